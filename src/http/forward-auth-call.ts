// What a gateway says in the headers of forward-auth: the user, and the call that it asks about. The route and the answer
// before the router read it here alike.

import type { IncomingHttpHeaders } from 'node:http'
import type { Caller } from '../callers.ts'
import { BrokerError } from '../errors.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import { readForwardTarget } from '../request-target.ts'
import { PROXIED_METHODS } from './proxied-call.ts'

/** The target of a call that stands in a header is all of it. */
const NO_PREFIX = /^(?=\/)/

/** Pairs of headers in which gateways tell the call that they ask about. */
const ORIGINALS = [
  { method: 'x-original-method', target: 'x-original-uri' },
  { method: 'x-forwarded-method', target: 'x-forwarded-uri' },
] as const

export interface OriginalCall {
  method: string
  /** Raw path and query. */
  target: string
}

/** Returns the user that the gateway names, or undefined. Two such headers are none: Node joins them to what is no key. */
export function gatewayUserOf(headers: IncomingHttpHeaders): UserKey | undefined {
  const named = headers['x-broker-user']
  return typeof named === 'string' ? parseUserKey(named) : undefined
}

/**
 * Returns the user that the gateway names.
 * @throws BrokerError `request_invalid`
 */
export function readGatewayUser(headers: IncomingHttpHeaders): UserKey {
  const user = gatewayUserOf(headers)
  if (user !== undefined) return user
  throw refusal('X-Broker-User', 'must be one key of a user')
}

/**
 * Returns the call that the gateway asks about, and undefined if nothing tells it and the caller may make any. A client
 * can add headers where the gateway lets it, so no place is believed before another. `own` is what the request line tells.
 *
 * @throws BrokerError `request_invalid` for a target that the proxied API would refuse, for two that differ, and for none
 *   where `proxy_allow` asks for one; `uri_too_long`
 */
export function readAskedCall(
  headers: IncomingHttpHeaders,
  { proxyAllow }: Pick<Caller, 'proxyAllow'>,
  own: readonly OriginalCall[] = [],
): { method: string; path: string } | undefined {
  const [call, ...others] = [...own, ...readOriginals(headers)]
  if (call === undefined) {
    if (proxyAllow === undefined) return undefined
    throw refusal('X-Original-URI', 'is needed, with X-Original-Method: the caller has proxy_allow')
  }
  if (others.some(({ method, target }) => method !== call.method || target !== call.target)) {
    throw refusal('X-Original-URI', 'differs from what another part of the request tells')
  }
  if (!PROXIED_METHODS.some((method) => method === call.method)) {
    throw refusal('X-Original-Method', `must be one of ${PROXIED_METHODS.join(', ')}`)
  }
  const { path } = readForwardTarget(call.target, NO_PREFIX)
  return { method: call.method, path }
}

/** The calls that the headers tell, at most one for each pair. Half a pair is none that could be checked. */
function readOriginals(headers: IncomingHttpHeaders): OriginalCall[] {
  const calls: OriginalCall[] = []
  for (const names of ORIGINALS) {
    const method = headers[names.method]
    const target = headers[names.target]
    if (method === undefined && target === undefined) continue
    if (typeof method !== 'string' || typeof target !== 'string') {
      throw refusal(names.target, `must come once, together with ${names.method}`)
    }
    calls.push({ method, target })
  }
  return calls
}

function refusal(header: string, detail: string): BrokerError {
  return new BrokerError('request_invalid', `The gateway’s header ${header} ${detail}.`, {
    errors: [{ pointer: `headers/${header.toLowerCase()}`, detail }],
  })
}
