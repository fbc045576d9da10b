// One call through the proxy that may be made: put on record, left to the forwarder, and answered if that fails. It works on
// the raw request and response, whether a route has found it good or ready-call.ts has.

import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import type { AuditEvent } from '../audit-event.ts'
import { BrokerError } from '../errors.ts'
import type { Forwarded, Forwarder } from '../forward.ts'
import type { UserKey } from '../grant.ts'
import type { Log } from '../ports.ts'
import type { Audit } from '../record-stores.ts'
import type { ForwardTarget } from '../request-target.ts'
import { type Listener, problemDocument } from './problem.ts'
import { answerProblem } from './problem-answers.ts'

/** Methods of Pagero's API. */
export const PROXIED_METHODS = ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'] as const

/** Where each listener has the proxied API: as the router knows it, and the raw path up to the target. */
export const PROXY_ROUTES = {
  internal: {
    url: '/v1/users/:user/pagero/*',
    prefix: /^\/v1\/users\/[A-Za-z0-9._~@:+%-]+\/pagero(?=\/)/,
  },
  public: { url: '/api/*', prefix: /^\/api(?=\/)/ },
} as const satisfies Record<Listener, object>

/** Whose token a call goes with, and who is on record for it. */
export type OnBehalf = { user: UserKey } & Required<Pick<AuditEvent, 'actor' | 'name'>>

export interface CallParts {
  listener: Listener
  accessTokens: Pick<AccessTokens, 'replaceRejected'>
  forwarder: Forwarder
  audit: Audit
  log: Log
}

export interface ProxiedCall {
  request: IncomingMessage
  response: ServerResponse
  requestId: string
  /** URL of the route, as logs name it. */
  route: string
  target: ForwardTarget
  onBehalf: OnBehalf
  token: FreshToken
  /** What the listener adds to each answer, flat: security headers, and CORS where it applies. Names are lower-case. */
  fields: readonly string[]
}

/** Makes the call and answers it. Resolves when the answer is out, or cut. */
export async function makeProxiedCall(parts: CallParts, call: ProxiedCall): Promise<void> {
  const { accessTokens, audit, forwarder } = parts
  const { request, response, requestId, target, onBehalf, token } = call
  const { method = '' } = request
  let sending: Pick<AuditEvent, 'action' | 'fingerprint'> = {
    action: 'call_proxied',
    fingerprint: token.fingerprint,
  }
  try {
    const forwarded = await forwarder.forward(request, response, {
      user: onBehalf.user,
      method,
      target: target.target,
      accessToken: token.accessToken,
      locationPrefix: target.prefix,
      responseHeaders: call.fields,
      // Before the token leaves, not after: an upload may take a quarter of an hour.
      onSend: () => audit.record({ ...sending, ...onBehalf, requestId, details: { method } }),
      async renew() {
        const current = await accessTokens.replaceRejected(onBehalf.user, token.fingerprint)
        if (current.fingerprint === token.fingerprint) return undefined
        sending = { action: 'call_repeated', fingerprint: current.fingerprint }
        return current.accessToken
      },
    })
    if (!forwarded.complete) noteCut(parts, call, forwarded)
  } catch (error) {
    answerFailure(parts, call, error)
  }
}

/** Leaves on record that a client did not get all of an answer, or none because it had gone. */
function noteCut(
  { log }: CallParts,
  { request, requestId, route }: ProxiedCall,
  { status, source }: Forwarded,
): void {
  log.warn('forward_cut', {
    requestId,
    method: request.method ?? '',
    route,
    ...(source === 'upstream' ? { upstreamStatus: status } : { status }),
  })
}

/** Answers a call that could not be forwarded. It may come while the client still sends its body. */
function answerFailure(
  { listener, forwarder, log }: CallParts,
  { request, response, requestId, fields: flat }: ProxiedCall,
  error: unknown,
): void {
  const { status, document } = problemDocument(error, { listener, requestId })
  log.warn('forward_failed', {
    requestId,
    status,
    code: String(document['code']),
    error: error instanceof BrokerError ? error.cause : error,
  })
  const fields: Record<string, string> = {}
  for (let i = 0; i < flat.length; i += 2) fields[flat[i] ?? ''] = flat[i + 1] ?? ''
  fields['proxy-status'] = forwarder.proxyStatusOf(error)
  answerProblem(request, response, { listener, requestId, error, fields })
}
