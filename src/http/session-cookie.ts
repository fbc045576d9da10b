// The broker's two cookies. `__Host-` makes browsers insist on Secure, Path=/ and no Domain, so that no
// sibling host can plant one. Read here from the raw header, because of two with one name neither is trusted.

import type { IncomingHttpHeaders, IncomingMessage } from 'node:http'
import type { CookieSerializeOptions } from '@fastify/cookie'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { BrokerError } from '../errors.ts'
import type { Session } from '../login-stores.ts'
import type { Audit } from '../record-stores.ts'
import { networkOf, type RateLimits } from '../rate-limit.ts'
import type { SessionReader } from '../session.ts'
import { type OriginRules, refuseCrossSite } from './csrf.ts'

export const SESSION_COOKIE = '__Host-broker-session'
export const LOGIN_COOKIE = '__Host-broker-login'

/**
 * No Max-Age: the cookie ends with the browser, and the limits are kept by the server. Strict, because
 * no navigation from elsewhere needs a session; the page's own fetches carry it.
 */
const SESSION_OPTIONS = {
  httpOnly: true,
  secure: true,
  path: '/',
  sameSite: 'strict',
} as const satisfies CookieSerializeOptions

/** Lax, because the callback is a navigation that comes from Pagero's site. */
const LOGIN_OPTIONS = {
  httpOnly: true,
  secure: true,
  path: '/',
  sameSite: 'lax',
} as const satisfies CookieSerializeOptions

/** RFC 6265 section 4.2.1: around a pair is blank space of these two kinds and no other. */
const AROUND = /^[ \t]+|[ \t]+$/g

/**
 * Returns the value of a cookie, or undefined when there is none.
 *
 * Of what stands before a name only what browsers leave out themselves is left out here: to them `__Host-` behind a
 * no-break space is no prefix, and a sibling host could plant it.
 *
 * @throws BrokerError `request_invalid` when the name occurs twice: somebody may have planted one of them
 */
export function readCookie(headers: IncomingHttpHeaders, name: string): string | undefined {
  const values: string[] = []
  for (const pair of (headers.cookie ?? '').split(';')) {
    const equals = pair.indexOf('=')
    if (equals !== -1 && pair.slice(0, equals).replaceAll(AROUND, '') === name) {
      values.push(pair.slice(equals + 1).replaceAll(AROUND, ''))
    }
  }
  if (values.length > 1) {
    throw new BrokerError('request_invalid', `The cookie ${name} was sent more than once.`, {
      errors: [{ pointer: 'cookie', detail: `${name} occurs ${values.length} times` }],
    })
  }
  return values[0]
}

export function setSessionCookie(reply: FastifyReply, token: string): void {
  reply.setCookie(SESSION_COOKIE, token, SESSION_OPTIONS)
}

export function clearSessionCookie(reply: FastifyReply): void {
  reply.clearCookie(SESSION_COOKIE, SESSION_OPTIONS)
}

/**
 * Sets the login cookie, or renews it, for the time until which the browser must be known again. It is never cleared: other tabs of the browser may still be on their
 * way, and alone it is worth nothing, since each login has a state of its own that is used up.
 */
export function setLoginCookie(
  reply: FastifyReply,
  browserBinding: string,
  lifetimeSeconds: number,
): void {
  reply.setCookie(LOGIN_COOKIE, browserBinding, { ...LOGIN_OPTIONS, maxAge: lifetimeSeconds })
}

/** Tells whose request it is, or refuses it. */
export interface SessionAuth {
  /**
   * Returns the session token of a request that may use it; undefined when it brings none.
   *
   * @throws BrokerError `request_invalid`, `csrf_refused`
   */
  readToken(request: FastifyRequest): string | undefined
  /**
   * Returns the session of a request.
   *
   * @throws BrokerError `request_invalid`, `csrf_refused`, `session_required`, `rate_limited`, `temporarily_unavailable`
   */
  requireSession(request: FastifyRequest): Promise<Session>
  /**
   * Returns what `requireSession` would, if that is in memory; undefined says nothing. Nothing is counted or recorded.
   * @throws BrokerError `request_invalid`
   */
  readySession(request: IncomingMessage): Session | undefined
}

/** Joins the checks in their order: cookie sent once, no other site's page, session alive, within the limits. */
export function createSessionAuth(
  sessions: SessionReader,
  rules: OriginRules,
  limits: Pick<RateLimits, 'user' | 'address'>,
  audit: Audit,
): SessionAuth {
  function readToken(request: FastifyRequest): string | undefined {
    const token = readCookie(request.headers, SESSION_COOKIE)
    const refusal = refuseCrossSite(request.headers, { ...rules, method: request.method })
    if (refusal !== undefined) {
      audit.record({
        action: 'csrf_refused',
        actor: 'anyone',
        outcome: 'refused',
        requestId: request.id,
        details: { method: request.method, reason: refusal },
      })
      throw new BrokerError('csrf_refused', refusal)
    }
    return token
  }
  return {
    readToken,
    readySession({ headers, method = '' }) {
      // Some address has used up what it may send. Whether it is this one, and what follows, the route finds out.
      if (!limits.address.allowsAll()) return undefined
      if (refuseCrossSite(headers, { ...rules, method }) !== undefined) return undefined
      return sessions.ready(readCookie(headers, SESSION_COOKIE))
    },
    async requireSession(request) {
      const session = await sessions.resolve(readToken(request))
      if (session !== undefined) {
        limits.user.admit(session.user)
        return session
      }
      limits.address.admit(networkOf(request.ip))
      throw new BrokerError(
        'session_required',
        'There is no session, or it has ended. Send the browser to /auth/login.',
      )
    },
  }
}
