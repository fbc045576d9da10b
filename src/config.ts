// Settings: the environment read once into a frozen Config, or every problem at once. Never a value in a message.
// Names and defaults stand in settings.ts, what a value may be in setting-values.ts, what they must be to each other
// in setting-relations.ts. Nothing else reads the environment.

import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import type { RateLimitSettings } from './rate-limit.ts'
import { Secret } from './secret.ts'
import { createSettingReader, type SettingReader } from './setting-reader.ts'
import { otherProblems, refreshProblems } from './setting-relations.ts'
import {
  addressOrBlock,
  bindHost,
  calendarDuration,
  clientId,
  collectorUrl,
  databaseUrl,
  encryptionKeys,
  endpointUrl,
  fieldPairs,
  filePath,
  listOf,
  matching,
  numberBetween,
  oneOf,
  origin,
  plainUrl,
  redirectUri,
  secretText,
  webhookSecrets,
} from './setting-values.ts'

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

export interface WebhookSettings {
  url: string
  /** Each signs; a second one is there while it replaces the first. */
  secrets: readonly Secret[]
  timeoutSeconds: number
  /** First pause after a failed delivery. */
  backoffSeconds: number
}

export interface TraceSettings {
  /** The collector; the path of the signal is put behind it. */
  endpoint: string
  /** Pairs as they stand in the variable. */
  fields: Secret | undefined
  serviceName: string
  /** From 0 to 1, of traces that begin here. */
  sampledShare: number
}

export interface ListenerSettings {
  host: string
  port: number
}

export interface Config {
  databaseUrl: Secret | undefined
  migrateAtStart: boolean
  /** Serve although the database may forget a commit. */
  allowUnsafeDatabase: boolean
  pagero: PageroSettings
  /** Connect to Pagero's hosts although their names have addresses of private networks. */
  allowPrivateUpstreams: boolean
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
  /** Requests a second; 0 is no limit. */
  rateLimits: RateLimitSettings
  spoolDir: string
  /** ISO 8601, calendar years: P3Y. */
  refreshTokenLifetime: string
  sessions: { idleSeconds: number; absoluteSeconds: number; perUserMax: number }
  subjectClaim: string
  tokenCacheTrustMs: number
  staleLimitSeconds: number
  replicaName: string
  logLevel: 'trace' | 'debug' | 'info' | 'warn' | 'error'
  /** Undefined: nothing is traced. */
  traces: TraceSettings | undefined
  /** 0: the audit record is kept for good. */
  auditRetentionDays: number
  shutdownListenSeconds: number
  /** 0: nothing is refused for overload. */
  overloadDelayMs: number
  /** Undefined: nobody is told of events. */
  webhooks: WebhookSettings | undefined
  proxy: {
    requestBytesMax: number
    responseBytesMax: number
    connectTimeoutMs: number
    headersTimeoutMs: number
    idleTimeoutMs: number
    totalTimeoutMs: number
    requestBytesPerSecondMin: number
    connections: number
    connectionsPerUser: number
    waitingMax: number
  }
}

/** Settings that cannot be used: every problem at once, none of them with a value in it. */
export class ConfigError extends Error {
  readonly problems: readonly string[]

  constructor(problems: readonly string[]) {
    super(`The settings cannot be used:\n${problems.map((problem) => `  ${problem}`).join('\n')}`)
    this.name = 'ConfigError'
    this.problems = problems
  }
}

/** The longest that any time setting may be: a day. Beyond it somebody has mistaken the unit. */
const SECONDS_MAX = 86_400
/** Sessions may be longer: 400 days, the most that browsers keep a cookie. */
const SESSION_SECONDS_MAX = 34_560_000

/**
 * Reads all settings from an environment, where `NAME_FILE` names a file that holds `NAME`.
 *
 * Pure but for `readFile`. What comes back is frozen.
 *
 * @throws ConfigError with every problem there is
 */
export function readConfig(
  env: Readonly<Record<string, string | undefined>>,
  readFile: (path: string) => string = (path) => readFileSync(path, 'utf8'),
): Config {
  const problems: string[] = []
  const reader = createSettingReader(env, readFile, problems)
  const { required, optional, withDefault, seconds, number, whole } = reader

  const pagero = readPagero(reader)
  const refresh = readRefresh(reader)
  const config: Config = {
    databaseUrl: optional('DATABASE_URL', databaseUrl),
    allowUnsafeDatabase: withDefault('ALLOW_UNSAFE_DATABASE', oneOf('true', 'false')) === 'true',
    migrateAtStart: withDefault('MIGRATE_AT_START', oneOf('true', 'false')) === 'true',
    pagero,
    allowPrivateUpstreams:
      withDefault('ALLOW_PRIVATE_UPSTREAMS', oneOf('true', 'false')) === 'true',
    refresh,
    publicUrl: optional('PUBLIC_URL', origin) ?? originOf(pagero.redirectUri),
    public: { host: withDefault('PUBLIC_HOST', bindHost), port: whole('PUBLIC_PORT', 0, 65_535) },
    internal: {
      host: withDefault('INTERNAL_HOST', bindHost),
      port: whole('INTERNAL_PORT', 0, 65_535),
    },
    encryptionKeys: required('ENCRYPTION_KEYS', encryptionKeys) ?? [],
    callersFile: optional('CALLERS_FILE', filePath),
    allowedOrigins: optional('ALLOWED_ORIGINS', listOf(origin)) ?? [],
    trustedProxies: optional('TRUSTED_PROXIES', listOf(addressOrBlock)) ?? [],
    rateLimits: {
      perCaller: number('RATE_LIMIT_PER_CALLER', 0, 1_000_000),
      perUser: number('RATE_LIMIT_PER_USER', 0, 1_000_000),
      perAddress: number('RATE_LIMIT_PER_ADDRESS', 0, 1_000_000),
    },
    spoolDir: withDefault('SPOOL_DIR', filePath),
    refreshTokenLifetime: withDefault('REFRESH_TOKEN_LIFETIME', calendarDuration),
    sessions: {
      idleSeconds: seconds('SESSION_IDLE_SECONDS', 0.05, SESSION_SECONDS_MAX),
      absoluteSeconds: seconds('SESSION_ABSOLUTE_SECONDS', 0.05, SESSION_SECONDS_MAX),
      perUserMax: whole('SESSIONS_PER_USER_MAX', 1, 1000),
    },
    subjectClaim: withDefault(
      'SUBJECT_CLAIM',
      matching(/^[A-Za-z0-9_.:/-]{1,128}$/, 'a claim name'),
    ),
    tokenCacheTrustMs: whole('TOKEN_CACHE_TRUST_MS', 0, 60_000),
    staleLimitSeconds: seconds('STALE_LIMIT_SECONDS', 0, SECONDS_MAX),
    replicaName: readReplicaName(reader),
    logLevel: withDefault('LOG_LEVEL', oneOf('trace', 'debug', 'info', 'warn', 'error')),
    traces: readTraces(reader),
    auditRetentionDays: whole('AUDIT_RETENTION_DAYS', 0, 36_500),
    shutdownListenSeconds: seconds('SHUTDOWN_LISTEN_SECONDS', 0, 300),
    overloadDelayMs: whole('OVERLOAD_DELAY_MS', 0, 60_000),
    webhooks: readWebhooks(reader),
    proxy: {
      requestBytesMax: whole('PROXY_REQUEST_BYTES_MAX', 0, 2 ** 40),
      responseBytesMax: whole('PROXY_RESPONSE_BYTES_MAX', 0, 2 ** 40),
      connectTimeoutMs: whole('PROXY_CONNECT_TIMEOUT_MS', 10, 60_000),
      headersTimeoutMs: whole('PROXY_HEADERS_TIMEOUT_MS', 10, 3_600_000),
      idleTimeoutMs: whole('PROXY_IDLE_TIMEOUT_MS', 10, 3_600_000),
      totalTimeoutMs: whole('PROXY_TOTAL_TIMEOUT_MS', 10, 86_400_000),
      requestBytesPerSecondMin: whole('PROXY_REQUEST_BYTES_PER_SECOND_MIN', 0, 1_000_000),
      connections: whole('PROXY_CONNECTIONS', 1, 10_000),
      connectionsPerUser: whole('PROXY_CONNECTIONS_PER_USER', 1, 10_000),
      waitingMax: whole('PROXY_WAITING_MAX', 0, 10_000),
    },
  }
  problems.push(...refreshProblems(refresh), ...otherProblems(config))
  if (problems.length > 0) throw new ConfigError(problems)
  return deepFreeze(config)
}

function readPagero({ required, optional, withDefault }: SettingReader): PageroSettings {
  return {
    clientId: required('PAGERO_CLIENT_ID', clientId) ?? '',
    clientSecret: required('PAGERO_CLIENT_SECRET', secretText) ?? new Secret(''),
    clientSecretNext: optional('PAGERO_CLIENT_SECRET_NEXT', secretText),
    clientAuth: withDefault(
      'PAGERO_CLIENT_AUTH',
      oneOf('client_secret_basic', 'client_secret_post'),
    ),
    redirectUri: required('PAGERO_REDIRECT_URI', redirectUri) ?? '',
    authorizeUrl: withDefault('PAGERO_AUTHORIZE_URL', endpointUrl),
    tokenUrl: withDefault('PAGERO_TOKEN_URL', endpointUrl),
    revokeUrl: withDefault('PAGERO_REVOKE_URL', endpointUrl),
    apiUrl: withDefault('PAGERO_API_URL', origin),
    pkce: withDefault('PAGERO_PKCE', oneOf('off', 'S256')),
    scope: withDefault(
      'PAGERO_SCOPE',
      matching(
        /^(?:[!#-[\]-~]+(?: [!#-[\]-~]+)*)?$/,
        'scopes with one space between them, or empty',
      ),
    ),
    issuer: optional('PAGERO_ISSUER', plainUrl),
    jwksUrl: optional('PAGERO_JWKS_URL', endpointUrl),
  }
}

function readRefresh({ seconds, whole, optional }: SettingReader): RefreshSettings {
  return {
    deadlineSeconds: seconds('REFRESH_DEADLINE_SECONDS', 0.05, 300),
    sendDeadlineSeconds: seconds('REFRESH_SEND_DEADLINE_SECONDS', 0.01, 300),
    leaseSeconds: seconds('REFRESH_LEASE_SECONDS', 0.05, SECONDS_MAX),
    aheadSeconds: seconds('REFRESH_AHEAD_SECONDS', 0, SECONDS_MAX),
    aheadJitterSeconds: seconds('REFRESH_AHEAD_JITTER_SECONDS', 0, SECONDS_MAX),
    defaultMinTtlSeconds: seconds('DEFAULT_MIN_TTL_SECONDS', 0, SECONDS_MAX),
    callerWaitSeconds: seconds('CALLER_WAIT_SECONDS', 0, 30),
    forcedIntervalSeconds: seconds('FORCED_REFRESH_INTERVAL_SECONDS', 0, SECONDS_MAX),
    refusalConfirmSeconds: seconds('REFUSAL_CONFIRM_SECONDS', 0.05, 300),
    zombieWaitSeconds: seconds('ZOMBIE_WAIT_SECONDS', 0, SECONDS_MAX),
    unknownSettleSeconds: seconds('UNKNOWN_SETTLE_SECONDS', 0, SECONDS_MAX),
    databaseSettleSeconds: seconds('DATABASE_SETTLE_SECONDS', 0, SECONDS_MAX),
    antiEntropySeconds: seconds('ANTI_ENTROPY_SECONDS', 0.05, 3600),
    spoolRetentionSeconds: seconds('SPOOL_RETENTION_SECONDS', 0, SECONDS_MAX),
    heartbeatSeconds: seconds('HEARTBEAT_SECONDS', 0.05, 3600),
    heartbeatStaleSeconds: seconds('HEARTBEAT_STALE_SECONDS', 0.05, SECONDS_MAX),
    breakerProbeSeconds: seconds('BREAKER_PROBE_SECONDS', 0.05, 3600),
    retryBackoffSeconds: seconds('RETRY_BACKOFF_SECONDS', 0.01, 900),
    graceSeconds: optional('REFRESH_GRACE_SECONDS', numberBetween(0.05, SECONDS_MAX, 'fraction')),
    concurrency: whole('REFRESH_CONCURRENCY', 1, 1000),
  }
}

function readWebhooks({ optional, required, seconds }: SettingReader): WebhookSettings | undefined {
  const url = optional('WEBHOOK_URL', endpointUrl)
  const secrets = (url === undefined ? optional : required)('WEBHOOK_SECRET', webhookSecrets)
  const times = {
    timeoutSeconds: seconds('WEBHOOK_TIMEOUT_SECONDS', 0.05, 60),
    backoffSeconds: seconds('WEBHOOK_BACKOFF_SECONDS', 0.01, 3600),
  }
  return url === undefined || secrets === undefined ? undefined : { url, secrets, ...times }
}

function readTraces({ optional, withDefault, number }: SettingReader): TraceSettings | undefined {
  const endpoint = optional('OTEL_EXPORTER_OTLP_ENDPOINT', collectorUrl)
  const others = {
    fields: optional('OTEL_EXPORTER_OTLP_HEADERS', fieldPairs),
    serviceName: withDefault(
      'OTEL_SERVICE_NAME',
      matching(/^[A-Za-z0-9._-]{1,128}$/, 'up to 128 of A-Z a-z 0-9 . _ -'),
    ),
    sampledShare: number('OTEL_TRACES_SAMPLER_ARG', 0, 1),
  }
  return endpoint === undefined ? undefined : { endpoint, ...others }
}

function readReplicaName({ optional }: SettingReader): string {
  const name = matching(/^[A-Za-z0-9._-]{1,128}$/, 'up to 128 of A-Z a-z 0-9 . _ -')
  return optional('REPLICA_NAME', name, hostname()) ?? ''
}

/** Empty when the redirect URI was refused; then nothing is built from it. */
function originOf(url: string): string {
  return url === '' ? '' : new URL(url).origin
}

/** Freezes all the way down, but for bytes, which cannot be frozen, and secrets, which have nothing to change. */
function deepFreeze<T>(value: T): T {
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return value
  for (const member of Object.values(value)) deepFreeze(member)
  return Object.freeze(value)
}
