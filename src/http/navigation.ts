// What the routes have in common that a person opens as a page: prefetches, images, frames and scripts spend nothing,
// parameters are read from the raw query, and an error is answered with a page that says what to do.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { BrokerError, type ProblemCode } from '../errors.ts'
import type { Ports } from '../ports.ts'
import type { Audit } from '../record-stores.ts'
import type { Revoker } from '../revocation.ts'
import { refuseNonNavigation } from './csrf.ts'
import { wasShed } from './overload.ts'
import { type Page, pageResponses, sendProblemPage } from './page.ts'
import { asBrokerError, problemResponses } from './problem.ts'
import { sendProblem } from './problem-answers.ts'

/** Codes of a login that was refused after its tokens came: it has left one to revoke. */
const LEAVES_A_TOKEN: ReadonlySet<ProblemCode> = new Set([
  'authorization_failed',
  'account_mismatch',
])

/** Route options of a navigation. `link` is what the page of an error offers when no application waits. */
export function navigationRoute(parts: {
  ports: Pick<Ports, 'log' | 'audit'>
  revoker: Pick<Revoker, 'kick'>
  link: Page['link'] | undefined
}) {
  const { ports, revoker, link } = parts
  return {
    // HEAD is answered 405: it must neither begin a login nor spend a code.
    exposeHeadRoute: false,
    // The schemas tell what is expected, and refuse nothing.
    validatorCompiler: () => () => true,
    onRequest: (request: FastifyRequest, reply: FastifyReply) =>
      refuseOthers(ports.audit, request, reply),
    errorHandler: (
      error: FastifyError | BrokerError,
      request: FastifyRequest,
      reply: FastifyReply,
    ) => {
      const known = asBrokerError(error)
      if (wasShed(request.raw)) return sendProblemPage(reply, request, known, link)
      const fields = { requestId: request.id, code: known.code, error: known.cause ?? known }
      if (known.code === 'internal_error' || known.code === 'integrity_failure') {
        ports.log.error('login_refused', fields)
      } else ports.log.warn('login_refused', fields)
      ports.audit.record({
        action: 'login_refused',
        actor: 'anyone',
        outcome: 'refused',
        requestId: request.id,
        details: { reason: known.code },
      })
      if (LEAVES_A_TOKEN.has(known.code)) revoker.kick()
      const { returnTo } = known.extensions
      const back = { text: 'Back to the application', path: returnTo ?? '' }
      return sendProblemPage(reply, request, known, returnTo === undefined ? link : back)
    },
  }
}

/** No person sees the answer, so it is a problem document. */
async function refuseOthers(
  audit: Audit,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<void> {
  const refusal = refuseNonNavigation(request.headers)
  if (refusal !== undefined) {
    audit.record({
      action: 'csrf_refused',
      actor: 'anyone',
      outcome: 'refused',
      requestId: request.id,
      details: { method: request.method, reason: refusal },
    })
    await sendProblem(reply, request, 'public', new BrokerError('csrf_refused', refusal))
  }
}

/** The query as it was sent. */
export function queryOf(request: FastifyRequest): URLSearchParams {
  const { url = '' } = request.raw
  const mark = url.indexOf('?')
  return new URLSearchParams(mark === -1 ? '' : url.slice(mark + 1))
}

/** The value of a parameter that occurs once; of a doubled one none is believed. */
export function single(query: URLSearchParams, name: string): string | undefined {
  const values = query.getAll(name)
  return values.length === 1 ? values[0] : undefined
}

/** Response schema of a redirect that sets a cookie. */
export function redirectAnswer(description: string, location: string, cookie: string): object {
  return {
    description,
    type: 'null',
    headers: {
      Location: { type: 'string', description: 'Where to.', example: location },
      'Set-Cookie': { type: 'string', description: cookie },
    },
  }
}

/** A person gets a page for everything but what no person opened, which gets a problem document. */
export function navigationResponses(codes: readonly ProblemCode[]): Record<number, object> {
  const pages = pageResponses(codes)
  const { 403: refused } = problemResponses('public', ['csrf_refused']) as typeof pages
  const descriptions = [pages[403]?.description, refused?.description]
  return {
    ...pages,
    403: {
      description: descriptions.filter((text) => text !== undefined).join('\n\n'),
      content: { ...pages[403]?.content, ...refused?.content },
    },
  }
}
