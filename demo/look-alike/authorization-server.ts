// A local authorization server that looks like Pagero's and is stricter than it need be: every refresh token works
// once, and a second use ends the whole login. Tests and the demo talk to it over HTTP, as they would to Pagero.

import type { EventEmitter } from 'node:events'
import { createServer } from 'node:http'
import type { Account } from './accounts.ts'
import { applyFaults, type Fault } from './faults.ts'
import { replayWithin } from './grace.ts'
import { type IssuedLogin, issueLogin } from './issue-login.ts'
import { createIssuedAccessTokens } from './issued-access-tokens.ts'
import { close, listen } from './listening.ts'
import { serveLoginPages } from './login-pages.ts'
import {
  answerAsPagero,
  assumeDefaultScope,
  createProvider,
  notePresented,
  presentOneAtATime,
} from './provider.ts'
import { type Context, PATHS, type RecordedRequest, recordRequests } from './record.ts'
import { openStore } from './store.ts'

export type { Account } from './accounts.ts'
export type { Fault } from './faults.ts'
export type { RecordedRequest } from './record.ts'

/** The three years that Pagero documents. */
const REFRESH_TOKEN_LIFE_SECONDS = 3 * 365 * 86_400
/** The ten minutes that Pagero documents. */
const ACCESS_TOKEN_LIFE_SECONDS = 600

export interface AuthorizationServerOptions {
  clientId: string
  clientSecret: string
  redirectUris: readonly string[]
  /** A loopback address, or `localhost`; it is the host of the issuer. */
  host?: string
  /** 0, the default, is any free one. */
  port?: number
  accessTokenFormat?: 'jwt' | 'opaque'
  accessTokenLifeSeconds?: number
  refreshTokenLifeSeconds?: number
  /** How long a spent refresh token is answered with its successor again; 0, the default, never. */
  graceSeconds?: number
  /** Where to keep what must outlast the process; without it nothing does. */
  stateFile?: string
}

export interface LookAlike {
  /** `http://host:port`. */
  origin: string
  issuer: string
  authorizeUrl: string
  tokenUrl: string
  revokeUrl: string
  jwksUrl: string
  /** Every request so far, oldest first. */
  record: RecordedRequest[]
  /** Append to it; what is used is taken out. */
  faults: Fault[]
  /** Returns whose live access token this is. */
  isActive(accessToken: string): Promise<Account | undefined>
  /** Makes the API refuse one access token before its time. */
  rejectAccessToken(accessToken: string): Promise<void>
  /** Whether a refresh with this token would be granted. */
  acceptsRefreshToken(refreshToken: string): Promise<boolean>
  /** Makes a login for the subject without a browser. */
  issueLogin(subject: string): Promise<IssuedLogin>
  /** Ends the login that a refresh token stands for, as Pagero or the user could at any time. */
  revokeLogin(refreshToken: string): Promise<void>
  stop(): Promise<void>
}

/** Starts the look-alike; resolves when it listens. */
export async function startAuthorizationServer(
  options: AuthorizationServerOptions,
): Promise<LookAlike> {
  const store = await openStore(options.stateFile)
  const server = createServer()
  const host = options.host ?? '127.0.0.1'
  const origin = `http://${host}:${await listen(server, host, options.port ?? 0)}`
  const issuer = origin + PATHS.issuer
  const settings = {
    issuer,
    clientId: options.clientId,
    clientSecret: options.clientSecret,
    redirectUris: options.redirectUris,
    accessTokenFormat: options.accessTokenFormat ?? 'jwt',
    accessTokenLifeSeconds: options.accessTokenLifeSeconds ?? ACCESS_TOKEN_LIFE_SECONDS,
    refreshTokenLifeSeconds: options.refreshTokenLifeSeconds ?? REFRESH_TOKEN_LIFE_SECONDS,
  } as const
  const provider = createProvider(settings, store)
  const issued = createIssuedAccessTokens(store.adapter('IssuedAccessToken'))
  const record: RecordedRequest[] = []
  const faults: Fault[] = []
  const stopping = new AbortController()

  provider.on('grant.revoked', (_context, grantId) => void issued.revokeGrant(grantId))
  ;(provider as EventEmitter).on('error', (error: Error, context: Context) => {
    // A client that goes away in the middle of its request is no error of the server.
    if (!context.req.socket.destroyed) provider.onerror(error)
  })
  provider.use(recordRequests(record))
  provider.use(notePresented(provider))
  provider.use(serveLoginPages(provider))
  provider.use(applyFaults(faults, stopping.signal))
  provider.use(assumeDefaultScope)
  provider.use(presentOneAtATime())
  if (options.graceSeconds) provider.use(replayWithin(options.graceSeconds, provider))
  provider.use(answerAsPagero(issued))
  const answer = provider.callback()
  server.on('request', (request, response) => void answer(request, response))

  return {
    origin,
    issuer,
    authorizeUrl: origin + PATHS.authorize,
    tokenUrl: origin + PATHS.token,
    revokeUrl: origin + PATHS.revoke,
    jwksUrl: origin + PATHS.jwks,
    record,
    faults,
    isActive: (accessToken) => issued.find(accessToken),
    rejectAccessToken: (accessToken) => issued.reject(accessToken),
    async acceptsRefreshToken(refreshToken) {
      const found = await provider.RefreshToken.find(refreshToken)
      if (found?.grantId === undefined || found.consumed !== undefined) return false
      return (await provider.Grant.find(found.grantId)) !== undefined
    },
    issueLogin: (subject) => issueLogin(provider, issued, subject, settings),
    async revokeLogin(refreshToken) {
      const grantId = (await provider.RefreshToken.find(refreshToken))?.grantId
      if (grantId === undefined) return
      await provider.RefreshToken.revokeByGrantId(grantId)
      await provider.Grant.adapter.destroy(grantId)
      await issued.revokeGrant(grantId)
    },
    stop: async () => {
      stopping.abort()
      await close(server)
    },
  }
}
