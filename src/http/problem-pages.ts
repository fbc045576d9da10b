// The pages behind the member `type` of a problem document: what a code means and what to do, for whoever reads one.
// Every text is a constant of this program; nothing of a request is shown.

import type { FastifyReply } from 'fastify'
import { PROBLEM_CODES, type ProblemCode } from '../errors.ts'
import { contentSecurityPolicy, escapeHtml, htmlDocument } from './html.ts'
import { PROBLEM_KINDS } from './problem.ts'

const STYLE = `
:root { color-scheme: light dark; font: 1rem/1.6 system-ui, sans-serif }
body { max-width: 44rem; margin: 3rem auto; padding: 0 1.5rem }
h1 { font-size: 1.4rem; line-height: 1.3 }
code { font: 0.95em ui-monospace, monospace }
dt { margin-top: 1rem; font-weight: 600 }
dd { margin: 0 }
`

const CONTENT_SECURITY_POLICY = contentSecurityPolicy(STYLE)

/** Answers with the page of one code. */
export function sendProblemCodePage(reply: FastifyReply, code: ProblemCode): FastifyReply {
  const { title, meaning, remedy } = PROBLEM_KINDS[code]
  return sendPage(
    reply,
    title,
    `<p><code>${code}</code>, ${statusText(code)}</p>
<dl>
<dt>What happened</dt><dd>${escapeHtml(meaning)}</dd>
<dt>What to do</dt><dd>${escapeHtml(remedy)}</dd>
</dl>
<p><a href="/problems">All problem codes</a></p>`,
  )
}

/** Answers with the page that lists every code. */
export function sendProblemIndexPage(reply: FastifyReply): FastifyReply {
  const items = PROBLEM_CODES.map(
    (code) =>
      `<dt><a href="/problems/${code}"><code>${code}</code></a>, ${statusText(code)}</dt>` +
      `<dd>${escapeHtml(PROBLEM_KINDS[code].meaning)}</dd>`,
  )
  return sendPage(reply, 'Problem codes', `<dl>\n${items.join('\n')}\n</dl>`)
}

function sendPage(reply: FastifyReply, title: string, body: string): FastifyReply {
  return reply
    .header('content-security-policy', CONTENT_SECURITY_POLICY)
    .type('text/html; charset=utf-8')
    .send(htmlDocument({ title, style: STYLE, body }))
}

function statusText(code: ProblemCode): string {
  const { status, publicStatus } = PROBLEM_KINDS[code]
  return publicStatus === undefined
    ? `status ${status}`
    : `status ${status}, and ${publicStatus} on the public listener`
}
