// The pages that the broker shows to a person: what went wrong with a login, and what to do now; or that it is done.
// Plain HTML without a script or a reference. Every text is escaped, and none comes from the request: an address to go back
// to was given by an application.

import type { FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { BrokerError, ProblemCode } from '../errors.ts'
import { contentSecurityPolicy, escapeHtml, htmlDocument } from './html.ts'
import { PROBLEM_KINDS, problemDocument, statusOf } from './problem.ts'

const STYLE = `
:root { color-scheme: light dark; font: 1rem/1.6 system-ui, sans-serif }
body { max-width: 36rem; margin: 15vh auto 0; padding: 0 1.5rem }
h1 { font-size: 1.4rem; line-height: 1.3 }
a { display: inline-block; padding: .5rem 1rem; border: 1px solid; border-radius: .4rem;
  color: inherit; text-decoration: none }
small { display: block; margin-top: 3rem; opacity: .7; overflow-wrap: anywhere }
`

const CONTENT_SECURITY_POLICY = contentSecurityPolicy(STYLE)

/** Answers a navigation with the page of an error, under the status that its problem document would have. */
export function sendProblemPage(
  reply: FastifyReply,
  request: FastifyRequest,
  error: BrokerError,
  link: Page['link'],
): FastifyReply {
  const { status, retryAfterSeconds } = problemDocument(error, {
    listener: 'public',
    requestId: request.id,
  })
  if (retryAfterSeconds !== undefined) reply.header('retry-after', String(retryAfterSeconds))
  return sendPage(
    reply.code(status),
    renderPage({
      title: PROBLEM_KINDS[error.code].title,
      text: error.detail,
      link,
      requestId: request.id,
    }),
  )
}

/** Answers a navigation with the page after a login that was to go nowhere in particular. It knows nobody: no session comes along. */
export function sendDonePage(reply: FastifyReply): FastifyReply {
  return sendPage(
    reply,
    renderPage({
      title: 'You are logged in',
      text: 'Your login at Pagero is complete. You can close this window.',
    }),
  )
}

function sendPage(reply: FastifyReply, html: string): FastifyReply {
  return reply
    .header('cache-control', 'no-store')
    .header('content-security-policy', CONTENT_SECURITY_POLICY)
    .type('text/html; charset=utf-8')
    .serializer(String)
    .send(html)
}

export interface Page {
  title: string
  text: string
  /** What the person can do here; undefined when that is elsewhere. */
  link?: { text: string; path: string } | undefined
  /** What a person may tell the operator; only where something went wrong. */
  requestId?: string
}

/** Returns the page as HTML. */
export function renderPage({ title, text, link, requestId }: Page): string {
  const paragraphs = [`<p>${escapeHtml(text)}</p>`]
  if (link !== undefined) {
    paragraphs.push(`<p><a href="${escapeHtml(link.path)}">${escapeHtml(link.text)}</a></p>`)
  }
  if (requestId !== undefined) {
    paragraphs.push(
      `<small>If this happens again, give this number to the operator: ${escapeHtml(requestId)}</small>`,
    )
  }
  return htmlDocument({ title, style: STYLE, body: paragraphs.join('\n') })
}

/** Response schemas of a route that answers its problems with this page. */
export function pageResponses(
  codes: readonly ProblemCode[],
): Record<number, { description: string; content: object }> {
  const responses: ReturnType<typeof pageResponses> = {}
  for (const status of new Set(codes.map((code) => statusOf(code, 'public')))) {
    const here = codes.filter((code) => statusOf(code, 'public') === status)
    responses[status] = {
      description: here.map((code) => `\`${code}\`: ${PROBLEM_KINDS[code].meaning}`).join('\n\n'),
      content: {
        'text/html': {
          schema: Type.String({ description: 'A page that says what went wrong and what to do.' }),
        },
      },
    }
  }
  return responses
}
