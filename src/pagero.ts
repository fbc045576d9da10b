// Pagero's authorization server. oauth4webapi composes the requests and checks the authorization response, jose reads
// ID tokens, `send-once.ts` carries the posts. Nothing here stores anything or decides about a grant.

import { createHash, timingSafeEqual } from 'node:crypto'
import type { LookupFunction } from 'node:net'
import * as jose from 'jose'
import * as oauth from 'oauth4webapi'
import type { PageroSettings } from './config.ts'
import { BrokerError } from './errors.ts'
import type { TokenOutcome } from './grant.ts'
import { createKeySet } from './key-set.ts'
import type { AuthorizationServer, Clock, Log } from './ports.ts'
import type { Secret } from './secret.ts'
import { type Post, sendOnce, type SendResult } from './send-once.ts'
import { readTokenAnswer } from './token-answer.ts'
import { createUpstreamLookup } from './upstream-address.ts'

/** A code is presented within a person's patience; a refresh brings its own limits. */
const CODE_SEND_DEADLINE_MS = 5_000
const CODE_DEADLINE_MS = 45_000
const REVOKE_DEADLINE_MS = 15_000
/** Leeway for the clocks of two hosts; RFC 7519 section 4.1.4 speaks of "a few minutes" at most. */
const CLOCK_LEEWAY_SECONDS = 60
const ID_TOKEN_ALGORITHMS = [
  'RS256',
  'RS384',
  'RS512',
  'PS256',
  'PS384',
  'PS512',
  'ES256',
  'ES384',
  'ES512',
  'EdDSA',
  'Ed25519',
]

/**
 * Makes the port to the authorization server. Safe for any number of calls at once.
 * With a second client secret configured, it is tried only after `invalid_client`, and then kept (one extra call).
 * `lookup` finds the addresses of its hosts; without one, private addresses are refused.
 */
export function createAuthorizationServer(
  settings: PageroSettings,
  ports: { clock: Clock; log: Log; lookup?: LookupFunction },
): AuthorizationServer {
  const { clock, log, lookup = createUpstreamLookup({ allowPrivate: false }) } = ports
  const server: oauth.AuthorizationServer = {
    // Only compared when it is configured; oauth4webapi wants the member.
    issuer: settings.issuer ?? new URL(settings.tokenUrl).origin,
    token_endpoint: settings.tokenUrl,
    revocation_endpoint: settings.revokeUrl,
    authorization_response_iss_parameter_supported: settings.issuer !== undefined,
  }
  const client: oauth.Client = { client_id: settings.clientId }
  const keySet = settings.jwksUrl === undefined ? undefined : createKeySet(settings.jwksUrl, lookup)
  let secret: Secret = settings.clientSecret

  function authenticateWith(value: Secret): oauth.ClientAuth {
    return settings.clientAuth === 'client_secret_post'
      ? oauth.ClientSecretPost(value.reveal())
      : oauth.ClientSecretBasic(value.reveal())
  }

  async function presentOnce(
    grantType: string,
    parameters: Record<string, string>,
    limits: { sendBeforeMs: number; deadlineMs: number },
    clientSecret: Secret,
  ): Promise<TokenOutcome> {
    const post = await compose(settings.tokenUrl, (options) =>
      oauth.genericTokenEndpointRequest(
        server,
        client,
        authenticateWith(clientSecret),
        grantType,
        parameters,
        options,
      ),
    )
    return readTokenAnswer(await sendOnce(clock, post, limits, lookup))
  }

  /** Presents a code or refresh token; `invalid_client` spends neither, so the second secret may follow at once. */
  async function present(
    grantType: string,
    parameters: Record<string, string>,
    limits: { sendBeforeMs: number; deadlineMs: number },
  ): Promise<TokenOutcome> {
    const outcome = await presentOnce(grantType, parameters, limits, secret)
    const next = settings.clientSecretNext
    if (outcome.kind !== 'rejected_client' || next === undefined || secret === next) return outcome
    const second = await presentOnce(grantType, parameters, limits, next)
    if (second.kind === 'not_processed' && second.httpStatus === undefined) return outcome
    // Only these two say that the secret is good; anything else may come from whatever stands before the server.
    if (second.kind === 'granted' || second.kind === 'refused') {
      secret = next
      log.warn('client_secret_switched', { setting: 'PAGERO_CLIENT_SECRET_NEXT' })
    }
    return second
  }

  return {
    authorizationUrl({ state, nonce, codeChallenge, prompt }) {
      const parameters = new URLSearchParams({
        response_type: 'code',
        client_id: settings.clientId,
        redirect_uri: settings.redirectUri,
      })
      if (settings.scope !== '') parameters.set('scope', settings.scope)
      parameters.set('state', state)
      if (nonce !== undefined) parameters.set('nonce', nonce)
      if (prompt !== undefined) parameters.set('prompt', prompt)
      if (codeChallenge !== undefined) {
        parameters.set('code_challenge', codeChallenge)
        parameters.set('code_challenge_method', 'S256')
      }
      const separator = settings.authorizeUrl.includes('?') ? '&' : '?'
      return `${settings.authorizeUrl}${separator}${parameters.toString()}`
    },

    readAuthorizationResponse(parameters, state) {
      const relevant = new URLSearchParams(parameters)
      if (settings.issuer === undefined) relevant.delete('iss')
      try {
        const code = oauth.validateAuthResponse(server, client, relevant, state).get('code')
        if (code !== null && code !== '') return { code }
      } catch (error) {
        if (error instanceof oauth.AuthorizationResponseError) return { error: error.error }
        throw invalidResponse()
      }
      throw invalidResponse()
    },

    async exchangeCode(code, codeVerifier) {
      const sentAtMs = clock.monotonicMs()
      return present(
        'authorization_code',
        {
          code,
          redirect_uri: settings.redirectUri,
          ...(codeVerifier === undefined ? {} : { code_verifier: codeVerifier }),
        },
        { sendBeforeMs: sentAtMs + CODE_SEND_DEADLINE_MS, deadlineMs: sentAtMs + CODE_DEADLINE_MS },
      )
    },

    async refresh(refreshToken, limits) {
      return present('refresh_token', { refresh_token: refreshToken }, limits)
    },

    async revoke(refreshToken) {
      const post = await compose(settings.revokeUrl, (options) =>
        // Pagero documents the Basic header alone here, whatever the token endpoint accepts.
        oauth.revocationRequest(
          server,
          client,
          oauth.ClientSecretBasic(secret.reveal()),
          refreshToken,
          options,
        ),
      )
      const deadlineMs = clock.monotonicMs() + REVOKE_DEADLINE_MS
      const sent: SendResult = await sendOnce(
        clock,
        post,
        { sendBeforeMs: deadlineMs, deadlineMs },
        lookup,
      )
      // RFC 7009 section 2.2: an unknown token is answered 200 too.
      return sent.kind === 'answered' && sent.status === 200
    },

    async readIdToken(idToken, { nonceHash, now }) {
      let claims: jose.JWTPayload
      try {
        claims =
          keySet === undefined
            ? jose.decodeJwt(idToken)
            : (
                await jose.jwtVerify(idToken, keySet, {
                  algorithms: ID_TOKEN_ALGORITHMS,
                  clockTolerance: CLOCK_LEEWAY_SECONDS,
                  currentDate: now,
                })
              ).payload
      } catch (error) {
        const unreachable =
          error instanceof jose.errors.JWKSTimeout || !(error instanceof jose.errors.JOSEError)
        return { invalid: unreachable ? 'its keys could not be fetched' : 'its signature is wrong' }
      }
      const invalid = wrongClaim(claims, nonceHash, settings, now)
      return invalid === undefined ? { claims } : { invalid }
    },
  }
}

/** Lets oauth4webapi compose a request, and keeps it instead of sending it. */
async function compose(
  url: string,
  request: (options: {
    [oauth.customFetch]: (
      url: string,
      init: { headers: Record<string, string>; body?: unknown },
    ) => Promise<Response>
    [oauth.allowInsecureRequests]: boolean
    headers: Record<string, string>
  }) => Promise<Response>,
): Promise<Post> {
  let post: Post | undefined
  await request({
    [oauth.customFetch]: async (_url, init) => {
      post = { url, headers: init.headers, body: String(init.body) }
      return new Response()
    },
    // The settings accept http:// for loopback hosts alone.
    [oauth.allowInsecureRequests]: url.startsWith('http://'),
    headers: { 'user-agent': 'pagero-token-broker' },
  })
  if (post === undefined) throw new Error('oauth4webapi composed no request')
  return post
}

/** Checks an ID token's claims (OpenID Connect Core section 3.1.3.7); returns what is wrong, for a person. */
function wrongClaim(
  claims: jose.JWTPayload,
  nonceHash: Buffer | null,
  settings: Pick<PageroSettings, 'clientId' | 'issuer'>,
  now: Date,
): string | undefined {
  const audience = [claims.aud ?? []].flat()
  if (!audience.includes(settings.clientId)) return 'it was made for another client'
  if (audience.length > 1 && claims['azp'] !== settings.clientId) {
    return 'it was made for several clients and not issued to this one'
  }
  const nowSeconds = now.getTime() / 1000
  if (typeof claims.exp !== 'number' || claims.exp + CLOCK_LEEWAY_SECONDS <= nowSeconds) {
    return 'it has expired'
  }
  if (settings.issuer !== undefined && claims.iss !== settings.issuer) {
    return 'it was made by another issuer'
  }
  if (nonceHash !== null) {
    const { nonce } = claims
    const given = createHash('sha256')
      .update(typeof nonce === 'string' ? nonce : '')
      .digest()
    if (!timingSafeEqual(given, nonceHash)) return 'it belongs to another login'
  }
  return undefined
}

function invalidResponse(): BrokerError {
  return new BrokerError(
    'login_transaction_invalid',
    'The answer from Pagero is not one to the login that this browser has begun. Begin the login again.',
  )
}
