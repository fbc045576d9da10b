// Most calls through the proxy find all that decides on them in memory: session or caller, grant, token. They are made here,
// before the router, its hooks and schemas: those cost about as much as the call itself does.
// As in ready-token.ts nothing is refused here, and nothing is decided twice in two ways: whatever is not plainly allowed
// and at hand goes on to the routes, which say why.

import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens } from '../access-token.ts'
import type { RateLimits } from '../rate-limit.ts'
import { type ForwardTarget, readForwardTarget } from '../request-target.ts'
import type { AnsweredRequest } from './app.ts'
import { leaveBody } from './connections.ts'
import {
  type CallParts,
  makeProxiedCall,
  type OnBehalf,
  PROXIED_METHODS,
  PROXY_ROUTES,
} from './proxied-call.ts'
import { requestIdOf } from './refusals.ts'

export interface ReadyCallParts extends CallParts {
  /**
   * Returns who may make this call when what decides on it is in memory, and undefined otherwise; it changes nothing. It
   * may throw whatever the route will say better.
   */
  recognize: (request: IncomingMessage, target: ForwardTarget) => OnBehalf | undefined
  /** What the listener adds to the answer, flat. */
  fieldsOf: (request: IncomingMessage) => readonly string[]
  limits: Pick<RateLimits, 'caller' | 'user'>
  accessTokens: Pick<AccessTokens, 'ready' | 'replaceRejected'>
  /** Takes note of an answer as the app does for its routes. */
  noteAnswered: (answered: AnsweredRequest) => void
}

/**
 * Returns what makes a call that is ready to be made, and has begun it when it returns true; it returns false, having
 * done nothing, for any other request.
 */
export function createReadyCalls(
  parts: ReadyCallParts,
): (request: IncomingMessage, response: ServerResponse) => boolean {
  const { listener, limits, accessTokens, log } = parts
  const { url: route } = PROXY_ROUTES[listener]
  return (request, response) => {
    const found = recognized(parts, request)
    if (found === undefined) return false
    const { target, onBehalf } = found
    const { user, actor, name } = onBehalf
    if (actor === 'caller' && !limits.caller.allows(name)) return false
    if (!limits.user.allows(user)) return false
    const token = accessTokens.ready(user)
    if (token === undefined) return false
    if (actor === 'caller') limits.caller.admit(name)
    limits.user.admit(user)
    leaveBody(request)
    const startedMs = performance.now()
    const requestId = requestIdOf(request)
    const fields = parts.fieldsOf(request)
    // As Fastify does for its routes.
    response.on('error', () => response.destroy())
    response.once('finish', () =>
      parts.noteAnswered({
        requestId,
        method: request.method ?? '',
        route,
        status: response.statusCode,
        durationMs: performance.now() - startedMs,
      }),
    )
    const call = { request, response, requestId, route, target, onBehalf, token, fields }
    makeProxiedCall(parts, call).catch((error: unknown) => {
      log.error('request_failed', { requestId, route, code: 'internal_error', error })
      response.destroy()
    })
    return true
  }
}

function recognized(
  { listener, recognize }: ReadyCallParts,
  request: IncomingMessage,
): { target: ForwardTarget; onBehalf: OnBehalf } | undefined {
  const { url = '', method } = request
  const { prefix } = PROXY_ROUTES[listener]
  if (!prefix.test(url) || !PROXIED_METHODS.some((one) => one === method)) return undefined
  try {
    const target = readForwardTarget(url, prefix)
    const onBehalf = recognize(request, target)
    return onBehalf && { target, onBehalf }
  } catch {
    // The route says what is wrong.
    return undefined
  }
}
