// The core of one replica on real parts: PostgreSQL, the look-alike over HTTP, a spool on disk. No HTTP of our own.

import { randomBytes, randomUUID } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { logIn } from '../../demo/look-alike/log-in.ts'
import {
  type LookAlike,
  startAuthorizationServer,
} from '../../demo/look-alike/authorization-server.ts'
import { type AccessTokens, createAccessTokens } from '../../src/access-token.ts'
import { type AntiEntropy, createAntiEntropy } from '../../src/anti-entropy.ts'
import { type AuditRecord, createAudit } from '../../src/audit.ts'
import { systemClock } from '../../src/clock.ts'
import type { PageroSettings, RefreshSettings } from '../../src/config.ts'
import { connectGrant } from '../../src/connect.ts'
import { type Grant, grantSealContext, parseUserKey, type UserKey } from '../../src/grant.ts'
import { createAuthorizationServer } from '../../src/pagero.ts'
import type { Ports } from '../../src/ports.ts'
import { createAttemptStore } from '../../src/postgres/attempt-store.ts'
import { createAuditStore } from '../../src/postgres/audit-store.ts'
import { createConnectLinkStore } from '../../src/postgres/connect-link-store.ts'
import { createCredentialUseStore } from '../../src/postgres/credential-use-store.ts'
import type { Database } from '../../src/postgres/database.ts'
import { createGrantStore } from '../../src/postgres/grant-store.ts'
import { createImportStore } from '../../src/postgres/import-store.ts'
import { createLoginTransactionStore } from '../../src/postgres/login-transaction-store.ts'
import { createOutboxStore } from '../../src/postgres/outbox-store.ts'
import { createPendingGrantStore } from '../../src/postgres/pending-grant-store.ts'
import { createReplicaStore } from '../../src/postgres/replica-store.ts'
import { createRevocationStore } from '../../src/postgres/revocation-store.ts'
import { createSessionStore } from '../../src/postgres/session-store.ts'
import { createSessionTicketStore } from '../../src/postgres/session-ticket-store.ts'
import { createRefresher, type Refresher } from '../../src/refresh.ts'
import { createChainKeys, createSealer } from '../../src/seal.ts'
import { Secret } from '../../src/secret.ts'
import { createSpool } from '../../src/spool.ts'
import { createTestDatabase } from './database.ts'
import { keepingLog } from './keeping-log.ts'

export const CLIENT_ID = 'nordvik-erp'
export const CLIENT_SECRET = 'a secret: with % and + in it'
export const REDIRECT_URI = 'http://localhost:3000/auth/callback'

/** The protocol's times, a tenth or less of the real ones; the relations hold. */
const FAST_REFRESH: RefreshSettings = {
  deadlineSeconds: 4,
  sendDeadlineSeconds: 2,
  leaseSeconds: 5.5,
  aheadSeconds: 120,
  aheadJitterSeconds: 30,
  defaultMinTtlSeconds: 30,
  callerWaitSeconds: 3,
  forcedIntervalSeconds: 30,
  refusalConfirmSeconds: 0.2,
  zombieWaitSeconds: 5,
  unknownSettleSeconds: 0.3,
  databaseSettleSeconds: 0,
  antiEntropySeconds: 0.2,
  spoolRetentionSeconds: 1,
  heartbeatSeconds: 0.5,
  heartbeatStaleSeconds: 1.5,
  breakerProbeSeconds: 0.3,
  retryBackoffSeconds: 0.2,
  graceSeconds: undefined,
  concurrency: 20,
}

export interface Engine {
  ports: Ports
  log: ReturnType<typeof keepingLog>
  audit: AuditRecord
  refresher: Refresher
  accessTokens: AccessTokens
  antiEntropy: AntiEntropy
  boot: string
  spoolDir: string
}

export interface Scene {
  lookAlike: LookAlike
  database: Database
  url: string
  key: Uint8Array
  pagero: PageroSettings
  /** Starts the core of one more replica on the same database. */
  startEngine(options?: {
    refresh?: Partial<RefreshSettings>
    replica?: string
    /** The database is a copy that nobody has accepted. */
    held?: boolean
    /** Events of grants are written to the outbox. */
    events?: boolean
    /** 0, the default, asks the database each time. */
    tokenCacheTrustMs?: number
    replace?: Partial<Ports>
    spoolDir?: string
  }): Promise<Engine>
  /** Logs a subject in at the look-alike and stores the grant under `user`. */
  connect(engine: Engine, user: string, subject?: string): Promise<UserKey>
  grantOf(engine: Engine, user: UserKey): Promise<Grant>
  /** The refresh token that the row holds, in clear. */
  storedRefreshToken(engine: Engine, user: UserKey): Promise<string>
  /** Makes the stored access token run out now. */
  expire(user: UserKey): Promise<void>
  /** Refreshes that reached the look-alike. */
  refreshes(): LookAlike['record']
}

/** Sets the scene for one test: a database of its own and a look-alike of its own. */
export async function setScene(
  test: Test,
  options: {
    accessTokenLifeSeconds?: number
    accessTokenFormat?: 'jwt' | 'opaque'
    pagero?: Partial<PageroSettings>
  } = {},
): Promise<Scene> {
  const lookAlike = await startAuthorizationServer({
    clientId: CLIENT_ID,
    clientSecret: CLIENT_SECRET,
    redirectUris: [options.pagero?.redirectUri ?? REDIRECT_URI],
    accessTokenFormat: options.accessTokenFormat ?? 'jwt',
    ...(options.accessTokenLifeSeconds === undefined
      ? {}
      : { accessTokenLifeSeconds: options.accessTokenLifeSeconds }),
  })
  test.teardown(() => lookAlike.stop())
  const { database, url } = await createTestDatabase(test)
  const key = randomBytes(32)
  const pagero: PageroSettings = {
    clientId: CLIENT_ID,
    clientSecret: new Secret(CLIENT_SECRET),
    clientSecretNext: undefined,
    clientAuth: 'client_secret_basic',
    redirectUri: REDIRECT_URI,
    authorizeUrl: lookAlike.authorizeUrl,
    tokenUrl: lookAlike.tokenUrl,
    revokeUrl: lookAlike.revokeUrl,
    apiUrl: 'http://localhost:9',
    pkce: 'off',
    scope: 'all openid',
    issuer: lookAlike.issuer,
    jwksUrl: lookAlike.jwksUrl,
    ...options.pagero,
  }
  const { rows } = await database.pool.query<{ deployment_id: string }>(
    'select deployment_id from deployment',
  )
  const deploymentId = rows[0]?.deployment_id ?? ''

  async function startEngine(start: Parameters<Scene['startEngine']>[0] = {}): Promise<Engine> {
    const refresh = { ...FAST_REFRESH, ...start.refresh }
    const log = keepingLog()
    const spoolDir = start.spoolDir ?? (await mkdtemp(join(tmpdir(), 'broker-spool-')))
    const boot = randomUUID()
    const identity = { replica: start.replica ?? `replica-${boot.slice(0, 8)}`, boot }
    const keys = [{ keyId: 'test', key }]
    const auditEvents = createAuditStore(database)
    const audit = createAudit(
      { clock: systemClock, log, auditEvents },
      createChainKeys(keys, deploymentId),
      identity,
    )
    const ports: Ports = {
      clock: systemClock,
      log,
      audit,
      auditEvents,
      sealer: createSealer(keys, deploymentId),
      grants: createGrantStore(database, {
        refreshTokenLifetime: 'P3Y',
        heartbeatStaleSeconds: refresh.heartbeatStaleSeconds,
        databaseSettleSeconds: refresh.databaseSettleSeconds,
        zombieWaitSeconds: refresh.zombieWaitSeconds,
        events: start.events ?? false,
      }),
      attempts: createAttemptStore(database),
      imports: createImportStore(database, { refreshTokenLifetime: 'P3Y' }),
      revocations: createRevocationStore(database.db),
      outbox: createOutboxStore(database),
      loginTransactions: createLoginTransactionStore(database.db),
      connectLinks: createConnectLinkStore(database.db),
      pendingGrants: createPendingGrantStore(database.db),
      sessionTickets: createSessionTicketStore(database.db),
      sessions: createSessionStore(database.db),
      replicas: createReplicaStore(database.db),
      credentialUses: createCredentialUseStore(database.db),
      authorizationServer: createAuthorizationServer(pagero, { clock: systemClock, log }),
      spool: await createSpool(spoolDir, log),
      ...start.replace,
    }
    await ports.replicas.heartbeat(identity.replica, boot)
    const refresher = createRefresher(ports, refresh, { ...identity, held: start.held ?? false })
    const accessTokens = createAccessTokens(ports, refresher, {
      ...refresh,
      publicUrl: 'https://broker.example',
      tokenCacheTrustMs: start.tokenCacheTrustMs ?? 0,
      staleLimitSeconds: 60,
    })
    const antiEntropy = createAntiEntropy(ports, refresh, identity)
    test.teardown(async () => {
      await antiEntropy.stop()
      await refresher.stop()
      await audit.close()
      await rm(spoolDir, { recursive: true, force: true })
    })
    return { ports, log, audit, refresher, accessTokens, antiEntropy, boot, spoolDir }
  }

  async function grantOf(engine: Engine, user: UserKey): Promise<Grant> {
    const grant = await engine.ports.grants.find(user)
    if (grant === undefined) throw new Error(`no grant for ${user}`)
    return grant
  }

  return {
    lookAlike,
    database,
    url,
    key,
    pagero,
    startEngine,
    grantOf,
    async connect(engine, name, subject = name) {
      const user = parseUserKey(name)
      if (user === undefined) throw new Error(`${name} is no user key`)
      const server = engine.ports.authorizationServer
      const state = randomBytes(16).toString('base64url')
      const callback = await logIn(
        server.authorizationUrl({
          state,
          nonce: undefined,
          codeChallenge: undefined,
          prompt: undefined,
        }),
        subject,
      )
      const answer = server.readAuthorizationResponse(new URL(callback).searchParams, state)
      if (!('code' in answer)) throw new Error(answer.error)
      const requestedAtMonotonicMs = systemClock.monotonicMs()
      const outcome = await server.exchangeCode(answer.code, undefined)
      if (outcome.kind !== 'granted') throw new Error(outcome.kind)
      await connectGrant(engine.ports, {
        user,
        tokens: { ...outcome.tokens, refreshToken: outcome.tokens.refreshToken ?? '' },
        requestedAtMonotonicMs,
        pagero: { issuer: lookAlike.issuer, subject },
        allowAccountChange: false,
      })
      return user
    },
    async storedRefreshToken(engine, user) {
      const grant = await grantOf(engine, user)
      return engine.ports.sealer.open(
        grantSealContext('refresh_token_sealed', grant),
        grant.refreshTokenSealed ?? Buffer.alloc(0),
      )
    },
    async expire(user) {
      await database.pool.query(
        `update grants set
           access_token_requested_at = access_token_requested_at - interval '1 hour',
           access_token_expires_at = access_token_expires_at - interval '1 hour'
         where user_id = $1`,
        [user],
      )
    },
    refreshes: () =>
      lookAlike.record.filter(
        ({ endpoint, form }) => endpoint === 'token' && form['grant_type'] === 'refresh_token',
      ),
  }
}
