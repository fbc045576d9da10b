// Most requests of a busy service, or of a gateway, ask for a token that is in memory. They are answered here, before the
// router, its hooks and schemas: those cost more than the answer does.
// A request gets its 200 here, or nothing at all: whatever is not plainly allowed and at hand goes on to the routes, which
// decide for themselves and say why. So nothing is refused here, and nothing is decided twice in two ways.

import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import type { Caller, Callers } from '../callers.ts'
import { hasBody } from '../forward-upload.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import type { Audit } from '../ports.ts'
import { gatewayUserOf, readAskedCall } from './forward-auth-call.ts'
import { FORWARD_AUTH_PATH } from './forward-auth-routes.ts'
import { requestIdOf } from './refusals.ts'
import type { RateLimits } from '../rate-limit.ts'

const PREFIX = '/v1/users/'
const SUFFIX = '/access-token'

export interface ReadyTokenParts {
  callers: Pick<Callers, 'recognize' | 'mayUse' | 'maySee' | 'mayCall'>
  limits: Pick<RateLimits, 'caller' | 'user'>
  accessTokens: Pick<AccessTokens, 'ready'>
  jsonOf: (token: FreshToken) => string
  /** Fields of an answer with the token as its body, names and values in turn, but for its length. */
  tokenFields: readonly string[]
  /** Fields of an answer to a gateway, but for its length and the token. */
  gatewayFields: readonly string[]
  audit: Audit
}

/**
 * Returns what answers a request for a token that is ready, and has done so when it returns true; it returns false, having
 * done nothing, for any other.
 */
export function createReadyTokenAnswers(
  parts: ReadyTokenParts,
): (request: IncomingMessage, response: ServerResponse) => boolean {
  const { callers, limits, accessTokens, jsonOf, tokenFields, gatewayFields, audit } = parts
  return (request, response) => {
    if (request.method !== 'GET' || hasBody(request)) return false
    const { url = '', headers } = request
    const isGateway = url === FORWARD_AUTH_PATH
    const user = isGateway ? gatewayUserOf(headers) : userOf(url)
    if (user === undefined) return false
    const caller = callers.recognize(headers.authorization)
    if (caller === undefined) return false
    if (!callers.mayUse(caller, isGateway ? 'proxy:call' : 'token:read')) return false
    if (isGateway && !mayPass(callers, caller, headers)) return false
    if (!callers.maySee(caller, user)) return false
    if (!limits.caller.allows(caller.name) || !limits.user.allows(user)) return false
    const token = accessTokens.ready(user)
    if (token === undefined) return false
    limits.caller.admit(caller.name)
    limits.user.admit(user)
    audit.record({
      action: 'token_handed_out',
      actor: 'caller',
      name: caller.name,
      user,
      requestId: requestIdOf(request),
      fingerprint: token.fingerprint,
    })
    if (isGateway) {
      const authorization = `Bearer ${token.accessToken}`
      response.writeHead(200, [
        ...gatewayFields,
        'authorization',
        authorization,
        'content-length',
        '0',
      ])
      response.end()
      return true
    }
    const text = jsonOf(token)
    // Of ASCII alone, so its characters are its bytes.
    response.writeHead(200, [...tokenFields, 'content-length', String(text.length)])
    response.end(text, 'latin1')
    return true
  }
}

/** Tells whether the caller may make the call that the gateway asks about. */
function mayPass(
  callers: Pick<Callers, 'mayCall'>,
  caller: Caller,
  headers: IncomingHttpHeaders,
): boolean {
  try {
    const call = readAskedCall(headers, caller)
    return call === undefined || callers.mayCall(caller, call.method, call.path)
  } catch {
    // The route says what is wrong.
    return false
  }
}

/** The user of a target that is nothing but the path of a token, with nothing escaped. */
function userOf(target: string): UserKey | undefined {
  if (!target.startsWith(PREFIX) || !target.endsWith(SUFFIX)) return undefined
  return parseUserKey(target.slice(PREFIX.length, -SUFFIX.length))
}
