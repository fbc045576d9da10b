// Most requests of a busy service, or of a gateway, ask for a token that is in memory, or in PostgreSQL and to be read. They
// are answered here, before the router, its hooks and schemas: those cost more than the answer does.
// A request gets its 200 here, or nothing at all: whatever is not plainly allowed and at hand goes on to the routes, which
// decide for themselves and say why. So nothing is decided twice in two ways; and nothing is refused here, but that a
// database that is away is not asked twice.

import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import type { Caller, Callers } from '../callers.ts'
import { BrokerError } from '../errors.ts'
import { hasBody } from '../forward-upload.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import type { Audit } from '../ports.ts'
import type { AnsweredRequest, AppSettings } from './app.ts'
import { gatewayUserOf, readAskedCall } from './forward-auth-call.ts'
import { FORWARD_AUTH_PATH } from './forward-auth-routes.ts'
import { answerProblem } from './problem-answers.ts'
import { requestIdOf } from './refusals.ts'
import type { RateLimits } from '../rate-limit.ts'

const PREFIX = '/v1/users/'
const SUFFIX = '/access-token'

export interface ReadyTokenParts {
  callers: Pick<Callers, 'recognize' | 'mayUse' | 'maySee' | 'mayCall'>
  limits: Pick<RateLimits, 'caller' | 'user'>
  accessTokens: Pick<AccessTokens, 'ready' | 'checked'>
  jsonOf: (token: FreshToken) => string
  /** Fields of an answer with the token as its body, names and values in turn, but for its length. */
  tokenFields: readonly string[]
  /** Fields of an answer to a gateway, but for its length and the token. */
  gatewayFields: readonly string[]
  audit: Audit
  /** Fields of every answer. */
  fields: Readonly<Record<string, string>>
  /** Takes note of a refusal as the app does for its routes. */
  noteAnswered: (answered: AnsweredRequest) => void
}

/** A request for the token of a user that its caller may have, if the limits allow it. */
interface Asked {
  caller: Caller
  user: UserKey
  isGateway: boolean
}

/** Makes the answers of a listener; see `AppSettings`. */
export function createReadyTokenAnswers(
  parts: ReadyTokenParts,
): Required<Pick<AppSettings, 'answersAtOnce' | 'takesAtOnce'>> {
  const { callers, limits, accessTokens, jsonOf, tokenFields, gatewayFields, audit } = parts

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

  function answer(
    { caller, user, isGateway }: Asked,
    token: FreshToken,
    request: IncomingMessage,
    response: ServerResponse,
  ): void {
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
      return
    }
    const text = jsonOf(token)
    // Of ASCII alone, so its characters are its bytes.
    response.writeHead(200, [...tokenFields, 'content-length', String(text.length)])
    response.end(text, 'latin1')
  }

  /** Answers as the routes would, which would only wait for the database once more. */
  function refuse(
    { isGateway, startedMs }: Asked & { startedMs: number },
    error: BrokerError,
    request: IncomingMessage,
    response: ServerResponse,
  ): void {
    const requestId = requestIdOf(request)
    const fields = isGateway ? { ...parts.fields, 'x-broker-problem': error.code } : parts.fields
    const listener = isGateway ? 'gateway' : 'internal'
    answerProblem(request, response, { listener, requestId, error, fields })
    parts.noteAnswered({
      requestId,
      method: 'GET',
      route: isGateway ? FORWARD_AUTH_PATH : `${PREFIX}:user${SUFFIX}`,
      status: response.statusCode,
      durationMs: performance.now() - startedMs,
    })
  }

  return {
    answersAtOnce(request, response) {
      const asked = askedOf(request)
      if (asked === undefined || !isWithinLimits(asked)) return false
      const token = accessTokens.ready(asked.user)
      if (token === undefined) return false
      answer(asked, token, request, response)
      return true
    },

    takesAtOnce(request, response, route) {
      const asked = askedOf(request)
      if (asked === undefined || !isWithinLimits(asked)) return false
      const startedMs = performance.now()
      // As Fastify does for its routes.
      response.on('error', () => response.destroy())
      accessTokens.checked(asked.user).then(
        (token) => {
          // Others may have used up meanwhile what the limits allow.
          if (token === undefined || !isWithinLimits(asked)) route(request, response)
          else answer(asked, token, request, response)
        },
        (error: unknown) => {
          if (isAway(error)) refuse({ ...asked, startedMs }, error, request, response)
          // The route says, and tells the log, what it is.
          else route(request, response)
        },
      )
      return true
    },
  }
}

function isAway(error: unknown): error is BrokerError {
  return error instanceof BrokerError && error.code === 'temporarily_unavailable'
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
