// The client of the broker's internal listener, for services: tokens, calls to Pagero with them or through the broker, and
// grants. It needs fetch and WebCrypto and nothing else, and knows nothing of the broker but its HTTP interface.

import { BrokerProblemError, readProblem } from './problems.ts'
import { authorizationOf, callBroker } from './requests.ts'
import type {
  AccessToken,
  ConfirmedGrant,
  ConnectLink,
  ConnectLinkOptions,
  Grant,
  Page,
  RefreshAttempt,
} from './shapes.ts'
import { createTokens, type TokenOptions, type TokenSettings, userPath } from './tokens.ts'

export * from './problems.ts'
export * from './shapes.ts'
export type { TokenOptions } from './tokens.ts'

export interface BrokerClientOptions {
  /** Origin, or origin and path, of the broker's internal listener. */
  url: string
  /** API key or JWT of this caller; a function is asked before each call, so that it can be changed. */
  apiKey: string | (() => string | Promise<string>)
  /** Where access tokens may be sent: Pagero's, unless set. */
  apiUrl?: string
  /** For one call of the broker with its repetitions; 15,000 unless set, since a refresh may take its 10 seconds. */
  timeoutMs?: number
  /** How long a token is kept; 5 unless set, 0 keeps none. A disconnected user's is given out for as long. */
  cacheSeconds?: number
  /** Life that a kept token must have left, beyond what is asked for; 10 unless set. */
  marginSeconds?: number
  /** Instead of the global one: for proxies, and for tests. */
  fetch?: typeof globalThis.fetch
}

export interface CallOptions {
  signal?: AbortSignal
}

export interface BrokerClient {
  /**
   * Returns an access token that is fresh. Calls for one user at the same time are one call of the broker.
   * @throws BrokerProblemError, BrokerUnreachableError
   */
  accessToken(user: string, options?: TokenOptions): Promise<AccessToken>
  /** Reports an access token that Pagero has refused, and returns the one to use now. It may be the same. */
  replaceAccessToken(user: string, rejected: string, options?: CallOptions): Promise<AccessToken>
  /**
   * `fetch` with the user's access token, straight to Pagero's API. After a 401 the token is reported, once, and the
   * call repeated with the newer one, if there is one and the body can be sent again; else the 401 is the answer.
   * Redirects are not followed.
   *
   * @throws TypeError when the URL is not of the API: no token goes elsewhere
   */
  fetch(user: string, url: string | URL, init?: RequestInit): Promise<Response>
  /**
   * Calls Pagero's API through the broker, with the right `proxy:call`; no token comes here. What Pagero answers is
   * returned whatever its status.
   * @throws BrokerProblemError when the broker has answered in Pagero's place
   */
  proxy(user: string, path: string, init?: RequestInit): Promise<Response>
  grant(user: string, options?: CallOptions): Promise<Grant>
  /** Takes a refresh token over from another system, which must not use it any more. */
  importGrant(
    user: string,
    grant: { refreshToken: string; obtainedAt: Date },
    options?: CallOptions,
  ): Promise<Grant>
  /** Makes the link that sends this user's browser to Pagero. */
  createConnectLink(
    user: string,
    link: ConnectLinkOptions,
    options?: CallOptions,
  ): Promise<ConnectLink>
  /** Confirms that the browser which came back with this confirmation is this user's. */
  confirmGrant(user: string, confirmation: string, options?: CallOptions): Promise<ConfirmedGrant>
  disconnect(user: string, options?: CallOptions): Promise<void>
  endSessions(user: string, options?: CallOptions): Promise<void>
  /** Goes through all grants that match, page by page. `expiresWithin` is an ISO 8601 duration. */
  grants(
    filter?: { state?: string; expiresWithin?: string; pageSize?: number },
    options?: CallOptions,
  ): AsyncGenerator<Grant, void>
  /** Goes through the ledger of a user, newest first. */
  refreshAttempts(user: string, options?: CallOptions): AsyncGenerator<RefreshAttempt, void>
}

/** Makes a client. One for each credential; it may be used by many at once. */
export function createBrokerClient(options: BrokerClientOptions): BrokerClient {
  const settings: TokenSettings = {
    base: options.url.replace(/\/+$/, ''),
    apiKey: options.apiKey,
    timeoutMs: options.timeoutMs ?? 15_000,
    cacheMs: (options.cacheSeconds ?? 5) * 1000,
    marginMs: (options.marginSeconds ?? 10) * 1000,
    fetch: options.fetch ?? ((input, init) => globalThis.fetch(input, init)),
  }
  const apiOrigin = new URL(options.apiUrl ?? 'https://api.pageroonline.com').origin
  const tokens = createTokens(settings)

  const ask = <T>(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    path: string,
    { signal, body, repeatable = true }: CallOptions & { body?: object; repeatable?: boolean } = {},
  ): Promise<T> =>
    callBroker<T>(settings, {
      method,
      path,
      repeatable,
      signal,
      ...(body === undefined ? {} : { body }),
    })

  async function* pages<T>(
    path: string,
    query: Readonly<Record<string, string>>,
    { signal }: CallOptions,
  ): AsyncGenerator<T, void> {
    let after: string | null = null
    do {
      const parameters = new URLSearchParams({ ...query, ...(after === null ? {} : { after }) })
      const page: Page<T> = await ask('GET', `${path}?${parameters.toString()}`, {
        ...(signal === undefined ? {} : { signal }),
      })
      yield* page.items
      after = page.next
    } while (after !== null)
  }

  return {
    accessToken: (user, tokenOptions) => tokens.get(user, tokenOptions),

    async replaceAccessToken(user, rejected, { signal } = {}) {
      return tokens.replace(user, await fingerprintOf(rejected), signal)
    },

    async fetch(user, url, init = {}) {
      const target = new URL(url, apiOrigin)
      if (target.origin !== apiOrigin) throw new TypeError(`A token is for ${apiOrigin} alone.`)
      const signal = init.signal ?? undefined
      const send = ({ access_token: token }: AccessToken) => {
        const headers = new Headers(init.headers)
        headers.set('authorization', `Bearer ${token}`)
        return settings.fetch(target, { ...init, headers, redirect: 'manual' })
      }
      const token = await tokens.get(user, signal === undefined ? {} : { signal })
      const response = await send(token)
      if (response.status !== 401) return response
      const newer = await tokens
        .replace(user, token.fingerprint, signal)
        // The 401 is there already, and says more than that nothing better can be had.
        .catch(() => token)
      signal?.throwIfAborted()
      if (newer.fingerprint === token.fingerprint || !isReplayable(init.body)) return response
      await response.body?.cancel()
      return send(newer)
    },

    async proxy(user, path, init = {}) {
      const url = `${settings.base}${userPath(user)}/pagero${path}`
      // Where a URL would be written otherwise, another call than this one would be sent.
      if (!path.startsWith('/') || path.includes('#') || new URL(url).href !== url) {
        throw new TypeError('The path must begin with a slash and be written as it is to be sent.')
      }
      const headers = new Headers(init.headers)
      headers.set('authorization', await authorizationOf(settings))
      const response = await settings.fetch(url, { ...init, headers, redirect: 'manual' })
      const source = response.headers.get('proxy-status') ?? ''
      if (response.ok || source.includes('received-status=')) return response
      const problem = await readProblem(response.clone())
      if (problem === undefined) return response
      await response.body?.cancel()
      throw new BrokerProblemError(problem)
    },

    grant: (user, call) => ask('GET', `${userPath(user)}/grant`, call),

    async importGrant(user, { refreshToken, obtainedAt }, call) {
      const body = { refresh_token: refreshToken, obtained_at: obtainedAt.toISOString() }
      const grant = await ask<Grant>('PUT', `${userPath(user)}/grant`, { ...call, body })
      tokens.forget(user)
      return grant
    },

    createConnectLink: (user, body, call) =>
      ask('POST', `${userPath(user)}/connect-links`, { ...call, body, repeatable: false }),

    async confirmGrant(user, confirmation, call) {
      const path = `${userPath(user)}/grant/confirm`
      const request = { ...call, body: { confirmation }, repeatable: false }
      const grant = await ask<ConfirmedGrant>('POST', path, request)
      tokens.forget(user)
      return grant
    },

    async disconnect(user, call) {
      tokens.forget(user)
      // A repetition would find nothing to disconnect, and say so.
      await ask('DELETE', `${userPath(user)}/grant`, { ...call, repeatable: false })
      tokens.forget(user)
    },

    endSessions: (user, call) => ask('DELETE', `${userPath(user)}/sessions`, call),

    grants({ state, expiresWithin, pageSize } = {}, call = {}) {
      const query = {
        ...(state === undefined ? {} : { state }),
        ...(expiresWithin === undefined ? {} : { expires_within: expiresWithin }),
        ...(pageSize === undefined ? {} : { limit: String(pageSize) }),
      }
      return pages('/v1/grants', query, call)
    },

    refreshAttempts: (user, call = {}) => pages(`${userPath(user)}/refresh-attempts`, {}, call),
  }
}

/** base64url of SHA-256, as the broker reckons it. */
async function fingerprintOf(accessToken: string): Promise<string> {
  const digest = await crypto.subtle.digest('SHA-256', new TextEncoder().encode(accessToken))
  return btoa(String.fromCharCode(...new Uint8Array(digest)))
    .replaceAll('+', '-')
    .replaceAll('/', '_')
    .replaceAll('=', '')
}

/** Whether a body is still there once it was sent. */
function isReplayable(body: RequestInit['body']): boolean {
  return (
    body === undefined ||
    body === null ||
    typeof body === 'string' ||
    body instanceof URLSearchParams ||
    body instanceof Blob ||
    body instanceof FormData ||
    body instanceof ArrayBuffer ||
    ArrayBuffer.isView(body)
  )
}
