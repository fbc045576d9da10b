// Who may call the internal listener, in the order: credential, right, user key, then (the request being valid) visibility.
// Only the Authorization header counts. A user that the caller may not see is answered as one that has no grant.

import type { FastifyReply, FastifyRequest, HookHandlerDoneFunction } from 'fastify'
import { refusalReason } from '../caller-jwt.ts'
import type { Caller, Callers, Right } from '../callers.ts'
import { BrokerError, grantNotFound } from '../errors.ts'
import type { UserKey } from '../grant.ts'
import type { Ports } from '../ports.ts'
import { networkOf, type RateLimits } from '../rate-limit.ts'
import { readUserKey } from './user-parameter.ts'

/** Name of the request decorator that holds the caller; `internal-app.ts` declares it. */
export const CALLER = 'caller'

export interface CallerAuth {
  callers: Callers
  limits: RateLimits
  ports: Pick<Ports, 'audit' | 'grants' | 'pendingGrants' | 'log'>
}

/**
 * Authenticates the caller and checks its right, before anything of the body is read. A refusal is on record.
 * At once for an API key: a promise for each request is dear on the way to a token.
 * @throws BrokerError `caller_unauthenticated`, `caller_forbidden`, `rate_limited`, `temporarily_unavailable`
 */
function authenticateCaller(
  auth: CallerAuth,
  request: FastifyRequest,
  right: Right,
): Caller | Promise<Caller> {
  let caller: Caller | Promise<Caller>
  try {
    caller = auth.callers.authenticate(request.headers.authorization)
  } catch (error) {
    throw noteRefusal(auth, request, error)
  }
  if (!(caller instanceof Promise)) return requireRightOf(auth, request, caller, right)
  return caller.then(
    (verified) => requireRightOf(auth, request, verified, right),
    (error: unknown) => {
      throw noteRefusal(auth, request, error)
    },
  )
}

/** What the request is answered in the end: who guesses has fewer guesses, while no good credential is held up by it. */
function noteRefusal(
  { ports, limits }: CallerAuth,
  request: FastifyRequest,
  error: unknown,
): unknown {
  if (error instanceof BrokerError && error.code === 'caller_unauthenticated') {
    limits.address.admit(networkOf(request.ip))
    const reason = refusalReason(error.cause)
    ports.log.warn('caller_unauthenticated', {
      requestId: request.id,
      address: request.ip,
      ...(reason === undefined ? {} : { reason }),
    })
    ports.audit.record({
      action: 'caller_unauthenticated',
      actor: 'anyone',
      outcome: 'refused',
      requestId: request.id,
      details: { address: request.ip, ...(reason === undefined ? {} : { reason }) },
    })
  }
  return error
}

function requireRightOf(
  { callers, ports, limits }: CallerAuth,
  request: FastifyRequest,
  caller: Caller,
  right: Right,
): Caller {
  limits.caller.admit(caller.name)
  if (callers.mayUse(caller, right)) return caller
  noteForbidden(ports, request, caller, { reason: `lacks the right ${right}` })
  throw new BrokerError('caller_forbidden', `This caller has not the right ${right}.`)
}

function noteForbidden(
  { audit, log }: CallerAuth['ports'],
  request: FastifyRequest,
  { name }: Caller,
  details: { method?: string; reason: string },
): void {
  const requestId = request.id
  log.warn('caller_forbidden', { requestId, caller: name, ...details })
  audit.record({
    action: 'caller_forbidden',
    actor: 'caller',
    name,
    outcome: 'refused',
    requestId,
    details,
  })
}

/**
 * Checks that the caller may see the user.
 *
 * One that it may not see is looked up all the same, so that neither the time taken nor the state of the database
 * tells it from one without a grant.
 * @throws BrokerError `grant_not_found`, `rate_limited`
 */
export async function requireVisibleUser(
  auth: CallerAuth,
  request: FastifyRequest,
  caller: Caller,
  user: UserKey,
): Promise<void> {
  if (!auth.callers.maySee(caller, user)) await refuseInvisibleUser(auth, request, caller, user)
  auth.limits.user.admit(user)
}

async function refuseInvisibleUser(
  { ports, limits }: CallerAuth,
  request: FastifyRequest,
  caller: Caller,
  user: UserKey,
): Promise<never> {
  // Limited like one that may be seen, and at nobody's expense: no user key has a space.
  limits.user.admit(`${caller.name} ${user}`)
  const { name } = caller
  const requestId = request.id
  ports.log.warn('user_not_visible', { requestId, caller: name, user })
  ports.audit.record({
    action: 'user_not_visible',
    actor: 'caller',
    name,
    user,
    outcome: 'refused',
    requestId,
  })
  await ports.grants.find(user)
  await ports.pendingGrants.findWaiting(user)
  throw grantNotFound()
}

/**
 * Hook of a route that names no user in its path: the caller needs the right. A callback, because a promise for each hook
 * of each request is dear on the way to a token; `begun` is called with the caller in place.
 */
export function requireRight(
  auth: CallerAuth,
  right: Right,
  begun: (request: FastifyRequest) => void = () => undefined,
) {
  return {
    onRequest(
      request: FastifyRequest,
      reply: FastifyReply,
      done: HookHandlerDoneFunction,
    ): Promise<void> | undefined {
      reply.header('cache-control', 'no-store')
      const begin = (caller: Caller): void => {
        request.setDecorator(CALLER, caller)
        begun(request)
      }
      const caller = authenticateCaller(auth, request, right)
      if (caller instanceof Promise) return caller.then(begin)
      begin(caller)
      done()
      return undefined
    },
  }
}

/**
 * Hooks of a route under `/v1/users/{user}`: the caller needs the right, and to see the user.
 * Visibility comes after the schemas, so that a malformed request is answered alike for every user.
 */
export function requireCaller(auth: CallerAuth, right: Right) {
  return {
    ...requireRight(auth, right, readUserKey),
    preHandler(
      request: FastifyRequest,
      _reply: FastifyReply,
      done: HookHandlerDoneFunction,
    ): Promise<never> | undefined {
      const caller = callerOf(request)
      const user = readUserKey(request)
      if (!auth.callers.maySee(caller, user))
        return refuseInvisibleUser(auth, request, caller, user)
      auth.limits.user.admit(user)
      done()
      return undefined
    },
  }
}

/**
 * Decides about a proxied call: right, user key, the caller's list of paths, and last visibility.
 * @throws BrokerError `caller_unauthenticated`, `caller_forbidden`, `rate_limited`, `request_invalid`, `grant_not_found`
 */
export async function authorizeProxiedCall(
  auth: CallerAuth,
  request: FastifyRequest,
  call: { method: string; path: string },
): Promise<{ caller: Caller; user: UserKey }> {
  const caller = await authenticateCaller(auth, request, 'proxy:call')
  const user = readUserKey(request)
  requireAllowedCall(auth, request, caller, call)
  await requireVisibleUser(auth, request, caller, user)
  return { caller, user }
}

/**
 * Returns the caller that `authorizeProxiedCall` would, if it is known by now and the call is plainly allowed; undefined
 * says nothing. Nothing is counted or recorded. Rate limits are not looked at.
 */
export function recognizeProxiedCall(
  { callers }: CallerAuth,
  authorization: string | undefined,
  { user, method, path }: { user: UserKey; method: string; path: string },
): Caller | undefined {
  const caller = callers.recognize(authorization)
  if (caller === undefined || !callers.mayUse(caller, 'proxy:call')) return undefined
  if (!callers.mayCall(caller, method, path) || !callers.maySee(caller, user)) return undefined
  return caller
}

/**
 * Checks that the caller's `proxy_allow` covers a call to Pagero; `path` is raw, without its query.
 * @throws BrokerError `caller_forbidden`
 */
export function requireAllowedCall(
  { callers, ports }: CallerAuth,
  request: FastifyRequest,
  caller: Caller,
  call: { method: string; path: string },
): void {
  if (callers.mayCall(caller, call.method, call.path)) return
  const { method } = call
  noteForbidden(ports, request, caller, { method, reason: 'proxy_allow does not cover the call' })
  throw new BrokerError('caller_forbidden', 'This caller may not make this call to Pagero.')
}

/** The caller that {@link requireCaller} or {@link requireRight} has authenticated. */
export function callerOf(request: FastifyRequest): Caller {
  return request.getDecorator<Caller>(CALLER)
}
