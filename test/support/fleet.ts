// Replicas as processes over one PostgreSQL and one strict look-alike, with a spoilable line to each of them.
// It knows what the replicas cannot: which refresh token the authorization server would accept now.

import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Test } from 'tap'
import {
  type AuthorizationServerOptions,
  type LookAlike,
  startAuthorizationServer,
} from '../../demo/look-alike/authorization-server.ts'
import { systemClock } from '../../src/clock.ts'
import type { Config } from '../../src/config.ts'
import { connectGrant } from '../../src/connect.ts'
import { grantSealContext, parseUserKey, type UserKey } from '../../src/grant.ts'
import { createAuthorizationServer } from '../../src/pagero.ts'
import type { Sealer } from '../../src/ports.ts'
import { type Database, openDatabase } from '../../src/postgres/database.ts'
import { createGrantStore } from '../../src/postgres/grant-store.ts'
import { createRevocationStore } from '../../src/postgres/revocation-store.ts'
import { createSealer } from '../../src/seal.ts'
import { Secret } from '../../src/secret.ts'
import { type FaultProxy, startFaultProxy } from './fault-proxy.ts'
import { freePorts } from './free-ports.ts'
import { createReplica, type Replica } from './replica.ts'
import { silentLog } from './silent-log.ts'

/** The protocol's times, a tenth or so of the real ones; the relations that the start checks hold. */
const FAST_ENV = {
  REFRESH_DEADLINE_SECONDS: '4',
  REFRESH_SEND_DEADLINE_SECONDS: '2.5',
  REFRESH_LEASE_SECONDS: '5.5',
  CALLER_WAIT_SECONDS: '3',
  REFUSAL_CONFIRM_SECONDS: '0.2',
  ZOMBIE_WAIT_SECONDS: '6',
  UNKNOWN_SETTLE_SECONDS: '0.3',
  DATABASE_SETTLE_SECONDS: '0',
  ANTI_ENTROPY_SECONDS: '0.3',
  HEARTBEAT_SECONDS: '0.5',
  HEARTBEAT_STALE_SECONDS: '1.5',
  BREAKER_PROBE_SECONDS: '0.5',
  RETRY_BACKOFF_SECONDS: '0.2',
  SHUTDOWN_LISTEN_SECONDS: '1',
  TOKEN_CACHE_TRUST_MS: '0',
  // A machine that runs many tests is late, and that is none of their subjects.
  OVERLOAD_DELAY_MS: '0',
} as const
export const LEASE_MS = Number(FAST_ENV.REFRESH_LEASE_SECONDS) * 1000

const CLIENT_ID = 'nordvik-erp'
const CLIENT_SECRET = 'a secret: with % and + in it'
const REDIRECT_URI = 'http://localhost:3000/auth/callback'
const KEY_ID = 'test'
/** Grants that are made at a time: the test's own pool has 8 connections. */
const CONNECT_CONCURRENCY = 8

export interface Fleet {
  lookAlike: LookAlike
  /** The test's own connections; no fault touches them. */
  database: Database
  /** Seals with the key of the replicas, and opens with further keys too. */
  sealer: Sealer
  /** The environment of a replica, but for what is its own. */
  env: Readonly<Record<string, string>>
  /** Between the replicas and PostgreSQL. */
  toDatabase: FaultProxy
  /** Between the replicas and the token endpoint. */
  toServer: FaultProxy
  replicas: Replica[]
  /** Adds a replica and starts it, unless told not to. */
  add(options?: {
    name?: string
    env?: Readonly<Record<string, string>>
    started?: boolean
  }): Promise<Replica>
  /** Makes a grant for each user, with a refresh token that the look-alike has really issued. */
  connect(users: readonly string[]): Promise<void>
  /** Takes life from the stored access tokens, an hour unless said otherwise: of the users, or of all. */
  expire(users?: readonly string[], seconds?: number): Promise<void>
  rows(): Promise<GrantState[]>
  row(user: string): Promise<GrantState>
  /** The refresh token that the row of a user holds. */
  refreshToken(user: string): Promise<string>
  /** Number of answers in the spool of a replica. */
  spooled(replica: Replica): Promise<number>
  /** Users, all or some, whose stored refresh token the authorization server would refuse. */
  lost(users?: readonly string[]): Promise<string[]>
  /** Refreshes that reached the look-alike. */
  refreshes(): LookAlike['record']
  /** Points the replicas and the test's own connections to the server's new port. */
  moveDatabase(port: number): void
  /** Takes everything down. A fleet of a test does so by itself. */
  stop(): Promise<void>
}

export interface GrantState {
  user: string
  state: string
  reason: string | null
  generation: number
  phase: string
  loginId: string
  sealed: Buffer | null
}

/** Sets up a look-alike and the lines to it and to the database at `url`; replicas are added afterwards. */
export async function setFleet(
  options: {
    url: string
    test?: Test
    graceSeconds?: number
    env?: Readonly<Record<string, string>>
    furtherKeys?: Config['encryptionKeys']
  } & Pick<AuthorizationServerOptions, 'accessTokenLifeSeconds'>,
): Promise<Fleet> {
  const lookAlike = await startAuthorizationServer({
    clientId: CLIENT_ID,
    clientSecret: CLIENT_SECRET,
    redirectUris: [REDIRECT_URI],
    accessTokenFormat: 'opaque',
    graceSeconds: options.graceSeconds ?? 0,
    ...(options.accessTokenLifeSeconds === undefined
      ? {}
      : { accessTokenLifeSeconds: options.accessTokenLifeSeconds }),
  })
  const toDatabase = await startFaultProxy(Number(new URL(options.url).port))
  const ownLine = await startFaultProxy(Number(new URL(options.url).port))
  const database = openDatabase(
    {
      url: new Secret(ownLine.through(options.url)),
      poolMax: 8,
      applicationName: 'broker test',
    },
    silentLog,
  )
  const toServer = await startFaultProxy(Number(new URL(lookAlike.origin).port))
  const directory = await mkdtemp(join(tmpdir(), 'broker-fleet-'))
  const key = randomBytes(32)
  const { rows } = await database.pool.query<{ id: string }>(
    'select deployment_id as id from deployment',
  )
  const keys = [{ keyId: KEY_ID, key }, ...(options.furtherKeys ?? [])]
  const sealer = createSealer(keys, rows[0]?.id ?? '')
  const caller = await writeCallersFile(directory)
  const replicas: Replica[] = []
  let named = 0
  const env = {
    DATABASE_URL: toDatabase.through(options.url),
    ALLOW_UNSAFE_DATABASE: 'true',
    ENCRYPTION_KEYS: `${KEY_ID}:${key.toString('base64')}`,
    CALLERS_FILE: caller.file,
    PAGERO_CLIENT_ID: CLIENT_ID,
    PAGERO_CLIENT_SECRET: CLIENT_SECRET,
    PAGERO_REDIRECT_URI: REDIRECT_URI,
    PAGERO_AUTHORIZE_URL: lookAlike.authorizeUrl,
    PAGERO_TOKEN_URL: toServer.through(lookAlike.tokenUrl),
    PAGERO_REVOKE_URL: lookAlike.revokeUrl,
    PAGERO_ISSUER: lookAlike.issuer,
    ...FAST_ENV,
    ...options.env,
  }
  const ports = {
    clock: systemClock,
    log: silentLog,
    sealer,
    grants: createGrantStore(database, {
      refreshTokenLifetime: 'P3Y',
      heartbeatStaleSeconds: 1,
      databaseSettleSeconds: 0,
      zombieWaitSeconds: 1,
    }),
    revocations: createRevocationStore(database.db),
    authorizationServer: createAuthorizationServer(pageroSettings(lookAlike), {
      clock: systemClock,
      log: silentLog,
    }),
  }

  async function connectOne(name: string): Promise<void> {
    const requestedAtMonotonicMs = systemClock.monotonicMs()
    const { accessToken, refreshToken, expiresInSeconds } = await lookAlike.issueLogin(name)
    await connectGrant(ports, {
      user: userKeyOf(name),
      tokens: { accessToken, refreshToken, expiresInSeconds, scope: '', idToken: undefined },
      requestedAtMonotonicMs,
      pagero: { issuer: lookAlike.issuer, subject: name },
      allowAccountChange: false,
    })
  }

  async function readRows(users?: readonly string[]): Promise<GrantState[]> {
    const found = await database.pool.query<GrantState>(
      `select user_id as "user", state, state_reason as reason, generation, phase,
         login_id as "loginId", refresh_token_sealed as sealed
       from grants where $1::text[] is null or user_id = any($1) order by user_id`,
      [users ?? null],
    )
    return found.rows
  }

  function tokenOf({ user, loginId, generation, sealed }: GrantState): string {
    const place = { user: userKeyOf(user), loginId, generation }
    const context = grantSealContext('refresh_token_sealed', place)
    return sealed === null ? '' : sealer.open(context, sealed)
  }

  const fleet: Fleet = {
    lookAlike,
    database,
    sealer,
    env,
    toDatabase,
    toServer,
    replicas,
    async add({ name = `replica-${(named += 1)}`, env: own = {}, started = true } = {}) {
      const [publicPort = 0, internalPort = 0] = await freePorts(2)
      const replica = createReplica({
        name,
        ports: { public: publicPort, internal: internalPort },
        apiKey: caller.apiKey,
        env: { ...env, SPOOL_DIR: join(directory, name, 'spool'), ...own },
      })
      replicas.push(replica)
      if (started) await replica.start()
      return replica
    },
    connect: (users) => inParallel(users, CONNECT_CONCURRENCY, connectOne),
    async expire(users, seconds = 3_600) {
      await database.pool.query(
        `update grants set
           access_token_requested_at = access_token_requested_at - make_interval(secs => $2),
           access_token_expires_at = access_token_expires_at - make_interval(secs => $2)
         where $1::text[] is null or user_id = any($1)`,
        [users ?? null, seconds],
      )
    },
    rows: () => readRows(),
    async row(user) {
      const [row] = await readRows([user])
      if (row === undefined) throw new Error(`no grant for ${user}`)
      return row
    },
    async spooled({ name }) {
      const spool = join(directory, name, 'spool')
      const files = (await readdir(spool)).filter((file) => /\.jsonl?$/.test(file))
      // One that has gone meanwhile holds nothing.
      const read = (file: string) => readFile(join(spool, file), 'utf8').catch(() => undefined)
      const texts = await Promise.all(files.map(read))
      return texts.flatMap((text) => text?.split('\n') ?? []).length
    },
    async lost(users) {
      const lost: string[] = []
      for (const row of await readRows(users)) {
        if (!(await lookAlike.acceptsRefreshToken(tokenOf(row)))) lost.push(row.user)
      }
      return lost
    },
    refreshToken: async (user) => tokenOf(await fleet.row(user)),
    refreshes: () =>
      lookAlike.record.filter(
        ({ endpoint, form }) => endpoint === 'token' && form['grant_type'] === 'refresh_token',
      ),
    moveDatabase(port) {
      toDatabase.aim(port)
      ownLine.aim(port)
    },
    async stop() {
      await Promise.all(replicas.map((replica) => replica.close()))
      await Promise.all([toDatabase.stop(), toServer.stop(), lookAlike.stop(), database.close()])
      await ownLine.stop()
      await rm(directory, { recursive: true, force: true })
    },
  }
  options.test?.teardown(() => fleet.stop())
  return fleet
}

/** Calls `work` for each of the things, so many at a time. */
export async function inParallel<T>(
  things: readonly T[],
  concurrency: number,
  work: (thing: T) => Promise<unknown>,
): Promise<void> {
  const rest = things.values()
  const lane = async () => {
    for (const thing of rest) await work(thing)
  }
  await Promise.all(Array.from({ length: concurrency }, lane))
}

/** Holds back the answers to the next refreshes, whose tokens are spent by then; the function that it returns lets them go. */
export function holdAnswers({ lookAlike }: Pick<Fleet, 'lookAlike'>, count = 1): () => void {
  const gate = Promise.withResolvers<void>()
  lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    until: gate.promise,
    times: count,
  })
  return gate.resolve
}

/** Waits until the condition holds; throws when it does not within the limit. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  limitMs: number,
  what: string,
): Promise<void> {
  const startedAtMs = performance.now()
  while (!(await condition())) {
    if (performance.now() - startedAtMs > limitMs) throw new Error(`Not in time: ${what}`)
    await delay(30)
  }
}

/** Asks for a user's token again and again until it is there, and returns how long that took. */
export async function askUntilServed(
  replica: Replica,
  user: string,
  limitMs: number,
): Promise<number> {
  const startedAtMs = performance.now()
  await until(
    async () => (await replica.token(user)).status === 200,
    limitMs,
    `a token of ${user} from ${replica.name}`,
  )
  return performance.now() - startedAtMs
}

export function userKeyOf(name: string): UserKey {
  const user = parseUserKey(name)
  if (user === undefined) throw new Error(`${name} is no user key`)
  return user
}

async function writeCallersFile(directory: string): Promise<{ file: string; apiKey: string }> {
  const apiKey = `pgb_fleet_${randomBytes(32).toString('base64url')}`
  const sha256 = createHash('sha256').update(apiKey).digest('hex')
  const file = join(directory, `callers-${randomUUID()}.json`)
  const entry = {
    name: 'fleet',
    api_keys: [{ id: 'fleet', sha256 }],
    rights: ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'],
    users: ['*'],
  }
  await writeFile(file, JSON.stringify({ callers: [entry] }), { mode: 0o600 })
  return { file, apiKey }
}

function pageroSettings({ authorizeUrl, tokenUrl, revokeUrl, issuer, jwksUrl }: LookAlike) {
  return {
    clientId: CLIENT_ID,
    clientSecret: new Secret(CLIENT_SECRET),
    clientSecretNext: undefined,
    clientAuth: 'client_secret_basic' as const,
    redirectUri: REDIRECT_URI,
    authorizeUrl,
    tokenUrl,
    revokeUrl,
    apiUrl: 'http://localhost:9',
    pkce: 'off' as const,
    scope: 'all',
    issuer,
    jwksUrl,
  }
}
