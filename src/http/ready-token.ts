// Most requests of a busy service, or of a gateway, ask for a token that is in memory, or soon will be. They are answered
// here, before the router, its hooks and schemas: those cost more than the answer does.
// A request gets its 200 here, or nothing at all: whatever is not plainly allowed, or fails, goes on to the routes, which
// decide for themselves and say why. So nothing is refused here, and nothing is decided twice in two ways.

import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import { createEnding } from '../answer-together.ts'
import type { Caller, Callers } from '../callers.ts'
import { hasBody } from '../forward-upload.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import type { Audit } from '../record-stores.ts'
import { accessTokenJson, createAccessTokenJson } from './access-token-json.ts'
import type { RequestCounts } from '../request-counts.ts'
import type { AppSettings } from './app.ts'
import { gatewayUserOf, readAskedCall } from './forward-auth-call.ts'
import { FORWARD_AUTH_PATH } from './forward-auth-routes.ts'
import { keepFailure } from './kept-failure.ts'
import { requestIdOf } from './refusals.ts'
import type { RateLimits } from '../rate-limit.ts'
import { TOKEN_ROUTE } from './token-routes.ts'

const PREFIX = '/v1/users/'
const SUFFIX = '/access-token'

export interface ReadyTokenParts {
  callers: Pick<Callers, 'recognize' | 'mayUse' | 'maySee' | 'mayCall'>
  limits: Pick<RateLimits, 'caller' | 'user'>
  accessTokens: Pick<AccessTokens, 'ready' | 'isAtHand' | 'fresh'>
  /** Tells whether there is more to do than can be done: then what is not at hand is left to whoever refuses. */
  isOverloaded: () => boolean
  /** Fields of an answer with the token as its body, names and values in turn, but for its length. */
  tokenFields: readonly string[]
  /** Fields of an answer to a gateway, but for its length and the token. */
  gatewayFields: readonly string[]
  audit: Audit
  counts?: RequestCounts | undefined
}

/** A request for the token of a user that its caller may have, if the limits allow it. */
interface Asked {
  caller: Caller
  user: UserKey
  isGateway: boolean
}

type Route = (request: IncomingMessage, response: ServerResponse) => void

/** Makes the answers of a listener; see `AppSettings`. */
export function createReadyTokenAnswers(
  parts: ReadyTokenParts,
): Required<Pick<AppSettings, 'answersAtOnce' | 'takesAtOnce'>> {
  const { callers, limits, accessTokens, isOverloaded, tokenFields, gatewayFields, audit } = parts
  const keptJsonOf = createAccessTokenJson()
  const answeredAs = (isGateway: boolean) =>
    ({ method: 'GET', route: isGateway ? FORWARD_AUTH_PATH : TOKEN_ROUTE, status: 200 }) as const
  const noteAtOnce = {
    token: parts.counts?.ofQuick(answeredAs(false)),
    gateway: parts.counts?.ofQuick(answeredAs(true)),
  }

  const end = createEnding()

  function askedOf(request: IncomingMessage): Asked | undefined {
    if (request.method !== 'GET' || hasBody(request)) return undefined
    const { url = '', headers } = request
    const isGateway = url === FORWARD_AUTH_PATH
    const user = isGateway ? gatewayUserOf(headers) : userOf(url)
    if (user === undefined) return undefined
    const caller = callers.recognize(headers.authorization)
    if (caller === undefined) return undefined
    if (!callers.mayUse(caller, isGateway ? 'proxy:call' : 'token:read')) return undefined
    if (isGateway && !mayPass(callers, caller, headers)) return undefined
    return callers.maySee(caller, user) ? { caller, user, isGateway } : undefined
  }

  const isWithinLimits = ({ caller, user }: Asked): boolean =>
    limits.caller.allows(caller.name) && limits.user.allows(user)

  /** Throws, with nothing written or counted, where the token makes no header field. */
  function answer(
    { caller, user, isGateway }: Asked,
    token: FreshToken,
    jsonOf: (token: FreshToken) => string,
    request: IncomingMessage,
    response: ServerResponse,
  ): void {
    const text = isGateway ? '' : jsonOf(token)
    const fields = isGateway
      ? [...gatewayFields, 'authorization', `Bearer ${token.accessToken}`]
      : [...tokenFields]
    // Of ASCII alone, so its characters are its bytes.
    fields.push('content-length', String(text.length))
    response.writeHead(200, fields)
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
    end(response, text)
  }

  /** Leaves it to the route where there is no token to be had: with the error, if there is one. */
  async function answerFresh(
    asked: Asked,
    request: IncomingMessage,
    response: ServerResponse,
    route: Route,
  ): Promise<void> {
    const startedMs = performance.now()
    let isAnswered = false
    try {
      const token = await accessTokens.fresh(asked.user)
      // Others may have used up meanwhile what the limits allow.
      if (isWithinLimits(asked)) {
        answer(asked, token, accessTokenJson, request, response)
        isAnswered = true
      }
    } catch (error) {
      keepFailure(request, error)
    }
    if (!isAnswered) return route(request, response)
    const durationMs = performance.now() - startedMs
    parts.counts?.note({ ...answeredAs(asked.isGateway), durationMs })
    return undefined
  }

  return {
    answersAtOnce(request, response) {
      const asked = askedOf(request)
      if (asked === undefined || !isWithinLimits(asked)) return false
      const token = accessTokens.ready(asked.user)
      if (token === undefined) return false
      try {
        answer(asked, token, keptJsonOf, request, response)
        if (asked.isGateway) noteAtOnce.gateway?.()
        else noteAtOnce.token?.()
        return true
      } catch {
        return false
      }
    },

    takesAtOnce(request, response, route) {
      const asked = askedOf(request)
      if (asked === undefined || !isWithinLimits(asked)) return false
      // At most it is checked with many others by one statement.
      if (isOverloaded() && !accessTokens.isAtHand(asked.user)) return false
      // As Fastify does for its routes.
      response.on('error', () => response.destroy())
      void answerFresh(asked, request, response, route)
      return true
    },
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

/** What clients escape in a segment though they need not (RFC 3986 section 3.3), and user keys have: `:`, `@` and `+`. */
const NEEDLESS_ESCAPE = /%(?:3a|40|2b)/gi

/** The user of a target that is nothing but the path of a token. */
function userOf(target: string): UserKey | undefined {
  if (!target.startsWith(PREFIX) || !target.endsWith(SUFFIX)) return undefined
  const segment = target.slice(PREFIX.length, -SUFFIX.length)
  return parseUserKey(
    segment.includes('%') ? segment.replaceAll(NEEDLESS_ESCAPE, decodeURIComponent) : segment,
  )
}
