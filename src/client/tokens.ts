// Access tokens as the client keeps them: for a few seconds each, so that a loop does not ask for every call, and never up
// to their end. Who asks for a user while somebody already does shares that call.

import { type BrokerCall, callBroker, type RequestSettings, waitFor } from './requests.ts'
import type { AccessToken } from './shapes.ts'

export interface TokenSettings extends RequestSettings {
  /** How long a token is kept: a disconnected user's is given out for as long. 0 keeps none. */
  cacheMs: number
  /** Life that a kept token must have left. */
  marginMs: number
}

export interface TokenOptions {
  /** Seconds that the token must still live; at most half its life. Unset: the broker's default. */
  minTtlSeconds?: number
  signal?: AbortSignal
}

export interface Tokens {
  get(user: string, options?: TokenOptions): Promise<AccessToken>
  /** Reports a refused token by its fingerprint. */
  replace(user: string, fingerprint: string, signal?: AbortSignal): Promise<AccessToken>
  forget(user: string): void
}

/** Users whose tokens are kept at a time, about 1.5 kB each; the one that was asked for first goes first. */
const KEPT_MAX = 10_000

interface Kept {
  token: AccessToken
  keptAtMs: number
  /** Of `performance.now()`, counted from before the broker was asked. */
  endsAtMs: number
}

/** Makes the store of a client. */
export function createTokens(settings: TokenSettings): Tokens {
  const kept = new Map<string, Kept>()
  /** By user, then by what is asked for. */
  const asking = new Map<string, Map<string, Promise<AccessToken>>>()

  function keptToken(user: string, minTtlSeconds: number): AccessToken | undefined {
    const entry = kept.get(user)
    if (entry === undefined) return undefined
    const nowMs = performance.now()
    const leftMs = entry.endsAtMs - nowMs
    const lives = leftMs >= minTtlSeconds * 1000 + settings.marginMs
    if (!lives || nowMs - entry.keptAtMs >= settings.cacheMs) return undefined
    return { ...entry.token, expires_in: Math.floor(leftMs / 1000) }
  }

  function keep(user: string, token: AccessToken, askedAtMs: number): void {
    kept.delete(user)
    if (settings.cacheMs === 0) return
    const [eldest] = kept.keys()
    if (kept.size >= KEPT_MAX && eldest !== undefined) kept.delete(eldest)
    const endsAtMs = askedAtMs + token.expires_in * 1000
    kept.set(user, { token, keptAtMs: performance.now(), endsAtMs })
  }

  /** Joins the same question of somebody else, or asks. What is forgotten meanwhile is not kept. */
  function ask(user: string, question: string, call: BrokerCall): Promise<AccessToken> {
    const questions = asking.get(user) ?? new Map<string, Promise<AccessToken>>()
    asking.set(user, questions)
    const asked = questions.get(question)
    if (asked !== undefined) return asked
    const askedAtMs = performance.now()
    const answer = callBroker<AccessToken>(settings, call)
      .then((token) => {
        if (asking.get(user) === questions) keep(user, token, askedAtMs)
        return token
      })
      .finally(() => {
        questions.delete(question)
        if (questions.size === 0 && asking.get(user) === questions) asking.delete(user)
      })
    questions.set(question, answer)
    return answer
  }

  return {
    async get(user, { minTtlSeconds, signal } = {}) {
      signal?.throwIfAborted()
      const found = keptToken(user, minTtlSeconds ?? 0)
      if (found !== undefined) return found
      const query = minTtlSeconds === undefined ? '' : `?min_ttl=${minTtlSeconds}`
      const path = `${userPath(user)}/access-token${query}`
      return waitFor(ask(user, `GET ${query}`, { method: 'GET', path, repeatable: true }), signal)
    },
    async replace(user, fingerprint, signal) {
      signal?.throwIfAborted()
      if (kept.get(user)?.token.fingerprint === fingerprint) kept.delete(user)
      const answer = ask(user, `POST ${fingerprint}`, {
        method: 'POST',
        path: `${userPath(user)}/access-token`,
        body: { rejected: fingerprint },
        // Compare-and-refresh: the second time there is nothing left to refresh.
        repeatable: true,
      })
      return waitFor(answer, signal)
    },
    forget(user) {
      kept.delete(user)
      asking.delete(user)
    },
  }
}

/**
 * The path of a user.
 * @throws TypeError for a key that a URL cannot carry
 */
export function userPath(user: string): string {
  // Whatever resolves URLs takes these two for steps, escaped or not.
  if (user === '' || user === '.' || user === '..') throw new TypeError('This is no key of a user.')
  // These three need no escape in a path (RFC 3986 section 3.3), and the broker is quickest with what has none.
  const segment = encodeURIComponent(user).replaceAll(/%(?:3A|40|2B)/g, decodeURIComponent)
  return `/v1/users/${segment}`
}
