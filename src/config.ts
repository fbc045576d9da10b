// Settings: the environment read once into a frozen Config, or every problem at once. Never a value in a message.

import type { Secret } from './secret.ts'

/** Times of the refresh protocol. Fractions of a second are allowed. */
export interface RefreshSettings {
  deadlineSeconds: number
  sendDeadlineSeconds: number
  leaseSeconds: number
  aheadSeconds: number
  aheadJitterSeconds: number
  defaultMinTtlSeconds: number
  callerWaitSeconds: number
  forcedIntervalSeconds: number
  refusalConfirmSeconds: number
  zombieWaitSeconds: number
  unknownSettleSeconds: number
  databaseSettleSeconds: number
  antiEntropySeconds: number
  spoolRetentionSeconds: number
  heartbeatSeconds: number
  heartbeatStaleSeconds: number
  breakerProbeSeconds: number
  retryBackoffSeconds: number
  graceSeconds: number | undefined
  concurrency: number
}

/** The authorization server and the API behind the proxy. URLs stay strings, byte for byte. */
export interface PageroSettings {
  clientId: string
  clientSecret: Secret
  clientSecretNext: Secret | undefined
  clientAuth: 'client_secret_basic' | 'client_secret_post'
  redirectUri: string
  authorizeUrl: string
  tokenUrl: string
  revokeUrl: string
  apiUrl: string
  pkce: 'off' | 'S256'
  /** Empty = not sent. */
  scope: string
  issuer: string | undefined
  jwksUrl: string | undefined
}

export interface ListenerSettings {
  host: string
  port: number
}

export interface Config {
  databaseUrl: Secret | undefined
  migrateAtStart: boolean
  pagero: PageroSettings
  refresh: RefreshSettings
  /** What browsers see: an origin, no trailing slash. */
  publicUrl: string
  public: ListenerSettings
  internal: ListenerSettings
  /** First seals, all open. */
  encryptionKeys: ReadonlyArray<{ keyId: string; key: Uint8Array }>
  callersFile: string | undefined
  /** Exact origins besides the broker's own. */
  allowedOrigins: readonly string[]
  /** Peers whose X-Forwarded-For is believed: addresses and CIDR blocks. */
  trustedProxies: readonly string[]
  spoolDir: string
  /** ISO 8601, calendar years: P3Y. */
  refreshTokenLifetime: string
  sessions: { idleSeconds: number; absoluteSeconds: number; perUserMax: number }
  subjectClaim: string
  tokenCacheTrustMs: number
  staleLimitSeconds: number
  replicaName: string
  logLevel: 'trace' | 'debug' | 'info' | 'warn' | 'error'
  shutdownListenSeconds: number
  proxy: {
    requestBytesMax: number
    responseBytesMax: number
    connectTimeoutMs: number
    headersTimeoutMs: number
    idleTimeoutMs: number
    totalTimeoutMs: number
    connections: number
  }
}
