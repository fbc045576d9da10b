// The store of grants as the simulation has it, held against the one on PostgreSQL: the same random sequences of calls
// must give the same results and leave the same rows. So what the simulation says holds for the real thing.
// Every span of time that a condition asks about is 500 s, and instants are moved by 1000 s: none is ever in between.

import { randomUUID } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import { sql } from 'kysely'
import pg from 'pg'
import t from 'tap'
import { type AttemptOutcome, parseUserKey, type UserKey } from '../src/grant.ts'
import type { ArmRequest, GrantStore, NewGrant, Successor } from '../src/grant-stores.ts'
import { openDatabase } from '../src/postgres/database.ts'
import { createGrantStore, type GrantStoreSettings } from '../src/postgres/grant-store.ts'
import { createReplicaStore } from '../src/postgres/replica-store.ts'
import { Secret } from '../src/secret.ts'
import { createTestDatabase } from './support/database.ts'
import { silentLog } from './support/silent-log.ts'
import { createSimulatedDatabase, type GrantRow } from './support/simulation/database.ts'
import { createRandom } from './support/simulation/random.ts'

const SPAN_SECONDS = 500
const SHIFT_SECONDS = 1_000
/** The two clocks are one machine's; this is for statements that take long. */
const TOLERANCE_SECONDS = 100
const SETTINGS: GrantStoreSettings & { heartbeatStaleSeconds: number } = {
  refreshTokenLifetime: 'P3Y',
  heartbeatStaleSeconds: SPAN_SECONDS,
  zombieWaitSeconds: SPAN_SECONDS,
  databaseSettleSeconds: SPAN_SECONDS,
}
const SEQUENCES = 75
const CALLS = 80
const FIRST_SEED = Number(process.env['GRANT_STORE_SEED'] ?? 1)

const OUTCOMES: ReadonlyArray<Exclude<AttemptOutcome, 'granted'>> = [
  'refused',
  'rejected_client',
  'not_processed',
  'in_doubt',
]

/** Both stores, with what the calls so far have made known. */
async function setScene(t: Parameters<typeof createTestDatabase>[0]) {
  const { database, url } = await createTestDatabase(t)
  // The start of the server is an instant like any other here: unqualified, the name finds this function first.
  const client = new pg.Client({ connectionString: url })
  await client.connect()
  t.teardown(() => client.end())
  const name = new URL(url).pathname.slice(1)
  await client.query(`
    create table server_start as select clock_timestamp() as at;
    create function public.pg_postmaster_start_time() returns timestamptz language sql as
      'select at from public.server_start';
    alter database ${name} set search_path = public, pg_catalog`)
  return { client, database, real: createGrantStore(database, SETTINGS) }
}

/** Arms the first token of a login as this boot of a replica. */
function armAs(
  real: GrantStore,
  login: { user: UserKey; loginId: string },
  replica: string,
  boot: string,
) {
  return real.arm({
    ...{ ...login, generation: 1, attemptId: randomUUID(), cause: 'expiry', replica, boot },
    ...{ tokenDigest: Buffer.alloc(0), leaseSeconds: 1 },
  })
}

/** Puts the first grant of a user in place. */
async function connectUser(real: GrantStore): Promise<{ user: UserKey; loginId: string }> {
  const user = parseUserKey('user') as UserKey
  const loginId = randomUUID()
  await real.connect({
    ...{ user, loginId, replaces: 0, refreshTokenSealed: Buffer.from('sealed'), keyId: 'k1' },
    ...{ accessToken: null, requestedSecondsAgo: 0, expiresInSeconds: 600, scope: '' },
    ...{ pageroIssuer: null, pageroSubject: null, revocation: undefined },
  })
  return { user, loginId }
}

function grantColumns(row: GrantRow | undefined, nowMs: number) {
  if (row === undefined) return undefined
  const secondsFromNow = (at: Date | null | undefined) =>
    at === null || at === undefined
      ? at
      : // Without the sign of a zero.
        Math.round((at.getTime() - nowMs) / 1000 / TOLERANCE_SECONDS) + 0
  const { accessToken } = row
  return {
    ...row,
    refreshTokenSealed: row.refreshTokenSealed?.toString(),
    accessToken: accessToken && {
      sealed: accessToken.sealed.toString(),
      fingerprint: accessToken.fingerprint,
      requestedAt: secondsFromNow(accessToken.requestedAt),
      expiresAt: secondsFromNow(accessToken.expiresAt),
    },
    leaseUntil: secondsFromNow(row.leaseUntil),
    nextRetryAt: secondsFromNow(row.nextRetryAt),
    authenticatedAt: secondsFromNow(row.authenticatedAt),
    rotatedAt: secondsFromNow(row.rotatedAt),
    lastUsedAt: secondsFromNow(row.lastUsedAt),
    rollingExpiresAt: secondsFromNow(row.rollingExpiresAt),
    absoluteExpiresAt: secondsFromNow(row.absoluteExpiresAt),
    decidedAt: secondsFromNow(row.decidedAt),
    readAt: undefined,
    // Of the model alone.
    armedAtMs: undefined,
  }
}

t.test('every sequence of calls leaves both stores alike', async (t) => {
  const { client, database, real } = await setScene(t)
  const met = new Map<string, number>()

  for (let seed = FIRST_SEED; seed < FIRST_SEED + SEQUENCES; seed += 1) {
    const random = createRandom(seed)
    const model = createSimulatedDatabase(SETTINGS, Date.now)
    const realReplicas = createReplicaStore(database.db, SETTINGS)
    const user = parseUserKey(`user-${seed}`) as UserKey
    const names = [`a-${seed}`, `b-${seed}`]
    const boots = [randomUUID(), randomUUID()]
    const logins: string[] = [randomUUID()]
    const attempts: string[] = [randomUUID()]
    let lastStored: string | undefined
    const secret = (text: string) => Buffer.from(`${text} ${Math.floor(random.next() * 1e6)}`)
    const oldest = (row: GrantRow | undefined) => row?.generation ?? 0
    const trail: string[] = []

    await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
    await client.query('delete from replicas')
    await client.query('update deployment set server_started_at = null')
    model.startedAtMs = Date.now() - SHIFT_SECONDS * 1000
    for (const name of names) {
      model.heartbeat(name, boots[0] ?? '')
      await realReplicas.heartbeat(name, boots[0] ?? '')
    }

    for (let call = 0; call < CALLS; call += 1) {
      const row = model.grants.get(user)
      const [name, work] = await drawCall(row)
      trail.push(name)
      const [expected, found] = await work()
      const kind = name === 'arm' && row?.phase === 'armed' ? 'take over' : name
      const result = `${kind} ${outcomeOf(expected)}`
      met.set(result, (met.get(result) ?? 0) + 1)
      const told = `seed ${seed}, call ${call}: ${trail.slice(-6).join(', ')}`
      if (!agree(found, expected, told)) return
      if (!(await rowsAgree(told))) return
    }

    async function drawCall(
      row: GrantRow | undefined,
    ): Promise<[name: string, work: () => Promise<[expected: unknown, found: unknown]>]> {
      const generation = oldest(row) + random.pick([0, 0, 0, 0, 0, 0, 0, -1, 1])
      const loginId = random.chance(0.9)
        ? (row?.loginId ?? random.pick(logins))
        : random.pick(logins)
      const replica = random.pick(names)
      const boot = random.pick(boots)
      const attemptId = random.chance(0.7)
        ? (row?.attemptId ?? random.pick(attempts))
        : random.pick(attempts)
      switch (
        random.pick([
          ...[
            ...['arm', 'arm', 'arm', 'arm', 'arm', 'arm', 'arm', 'arm'],
            'disarm',
            'disarm',
            'store',
            'store',
            'find stored',
            'find stored',
            'finish',
            'connect',
          ],
          ...['close', 'condemn', 'evidence', 'evidence', 'heartbeat', 'drained', 'age replica'],
          ...[
            'left behind',
            'left behind',
            'left behind',
            'heartbeat',
            'restored',
            'restored',
            'rearm',
          ],
          ...[
            'age attempt',
            'age retry',
            'age lease',
            'forced',
            'restart',
            'steady',
            'age lifetime',
          ],
        ])
      ) {
        case 'arm': {
          const request: ArmRequest = {
            ...{ user, loginId, generation, attemptId: randomUUID(), replica, boot },
            tokenDigest: secret('digest'),
            cause: random.pick(['expiry', 'rejected', 'recovery']),
            leaseSeconds: random.pick([SHIFT_SECONDS, -SHIFT_SECONDS, -SHIFT_SECONDS]),
          }
          attempts.push(request.attemptId)
          return [
            'arm',
            async () => [model.arm(request) !== undefined, (await real.arm(request)) !== undefined],
          ]
        }
        case 'disarm': {
          const end = {
            ...{
              user,
              attemptId,
              outcome: random.pick(OUTCOMES),
              httpStatus: 400,
              durationMs: 7.5,
            },
            retryInSeconds: random.pick([SHIFT_SECONDS, -SHIFT_SECONDS, -SHIFT_SECONDS]),
            stayArmed: random.chance(0.7),
            counts: random.chance(0.7),
          }
          return ['disarm', async () => [model.disarm(end), await real.disarm(end)]]
        }
        case 'store': {
          const entry = successor(attemptId, loginId, generation + 1)
          lastStored = attemptId
          return ['store', async () => [model.store(entry), await real.store(entry)]]
        }
        case 'find stored': {
          const entries = [
            successor(lastStored ?? attemptId, loginId, generation),
            successor(randomUUID(), loginId, generation + 1),
          ]
          const inSpans = (found: ReadonlyMap<string, number>) =>
            entries.map((one) => {
              const secondsAgo = found.get(one.attemptId)
              if (secondsAgo === undefined) return 'no'
              return secondsAgo > TOLERANCE_SECONDS ? 'long ago' : 'yes'
            })
          return [
            'find stored',
            async () => {
              if (random.chance(0.5)) await attemptAged(entries[0]?.attemptId ?? '')
              return [
                inSpans(model.findStored(entries)).join(),
                inSpans(await real.findStored(entries)).join(),
              ]
            },
          ]
        }
        case 'finish': {
          const entry = successor(attemptId, loginId, generation + 1)
          return [
            'finish',
            async () => [model.finishSuperseded(entry), await real.finishSuperseded(entry)],
          ]
        }
        case 'connect': {
          // Now and then: it ends whatever story the row was telling.
          if (row !== undefined && random.chance(0.7)) return ['nothing', async () => [1, 1]]
          const grant = newGrant(random.chance(0.9) ? oldest(row) : oldest(row) + 1)
          return ['connect', async () => [model.connect(grant), await real.connect(grant)]]
        }
        case 'close':
          // Rarely: a closed grant has little to tell.
          if (random.chance(0.7)) return ['nothing', async () => [1, 1]]
          return [
            'close',
            async () => [
              model.close(user, generation, undefined),
              await real.close(user, generation, undefined),
            ],
          ]
        case 'condemn': {
          const state = random.pick(['active', 'suspect', 'reauthentication_required'] as const)
          const reason = state === 'active' ? null : 'rotation_lost'
          const verdict = { state, reason, whileUnknown: random.chance(0.3) }
          return [
            'condemn',
            async () => [
              model.condemn(user, generation, verdict),
              await real.condemn(user, generation, verdict),
            ],
          ]
        }
        case 'left behind': {
          const page = { replica, after: undefined, limit: 10 }
          const usersOf = (left: ReadonlyArray<{ user: UserKey }>) => left.map((one) => one.user)
          return [
            'left behind',
            async () => [
              usersOf(model.findUndecided(page)).length > 0,
              usersOf(await real.findUndecided(page)).includes(user),
            ],
          ]
        }
        case 'heartbeat':
          return [
            'heartbeat',
            async () => [
              model.heartbeat(replica, boot) === undefined,
              (await realReplicas.heartbeat(replica, boot)) === undefined,
            ],
          ]
        case 'restored': {
          const { rows } = await client.query<{ server: string }>(
            'select public.pg_postmaster_start_time()::text as server',
          )
          const server = rows[0]?.server ?? ''
          return [
            'restored',
            async () => [
              model.restored(replica, boot, String(model.startedAtMs)),
              await realReplicas.restored(replica, boot, server),
            ],
          ]
        }
        case 'rearm': {
          const attempt = model.attempts.get(attemptId)
          const request: ArmRequest = {
            ...{ user, loginId, generation, attemptId, replica, boot },
            ...{ tokenDigest: secret('digest'), cause: 'recovery', leaseSeconds: SHIFT_SECONDS },
          }
          const armedAt = new Date(attempt?.armedAtMs ?? Date.now())
          return [
            'rearm',
            async () => [model.rearm(request, armedAt), await real.rearm(request, armedAt)],
          ]
        }
        case 'drained':
          return [
            'drained',
            async () => {
              // Instants are told in whole milliseconds: what was armed before must be so by one.
              await delay(2)
              const lateMs = random.pick([0, 0, SHIFT_SECONDS * 500])
              const asOf = (now: Date) => new Date(now.getTime() - lateMs)
              return [
                model.spoolDrained(replica, boot, asOf(model.now())),
                await realReplicas.spoolDrained(replica, boot, asOf(await realReplicas.now())),
              ]
            },
          ]
        case 'age replica':
          return ['age replica', () => aged('seen_at', replica)]
        case 'steady':
          return ['steady', () => aged('steady_since', replica)]
        case 'age attempt':
          return ['age attempt', () => attemptAged(attemptId)]
        case 'age retry':
          return ['age retry', () => grantAged('next_retry_at', 'nextRetryAt')]
        case 'age lease':
          return ['age lease', () => grantAged('lease_until', 'leaseUntil')]
        case 'age lifetime':
          if (random.chance(0.9)) return ['nothing', async () => [1, 1]]
          return ['age lifetime', lifetimeEnded]
        case 'restart': {
          if (random.chance(0.7)) return ['nothing', async () => [1, 1]]
          const agoSeconds = random.pick([0, SHIFT_SECONDS, SHIFT_SECONDS])
          return ['restart', () => restarted(agoSeconds)]
        }
        case 'forced':
          return [
            'forced',
            async () => [
              model.lastForcedSecondsAgo(user) === undefined,
              (await real.lastForcedSecondsAgo(user)) === undefined,
            ],
          ]
        default:
          return [
            'evidence',
            async () => [
              model.evidence(user, loginId, generation),
              await real.evidence(user, loginId, generation),
            ],
          ]
      }
    }

    function successor(attemptId: string, loginId: string, generation: number): Successor {
      const fingerprint = secret('fingerprint').toString()
      return {
        ...{ user, loginId, attemptId, generation, keyId: 'k1', scope: 'all', httpStatus: 200 },
        refreshTokenSealed: secret('refresh'),
        accessToken: random.chance(0.2)
          ? null
          : {
              sealed: secret('access'),
              requestedAt: new Date(),
              expiresAt: new Date(Date.now() + 600_000),
              fingerprint,
            },
        durationMs: 12.3,
      }
    }

    function newGrant(replaces: number): NewGrant {
      const loginId = randomUUID()
      logins.push(loginId)
      return {
        ...{ user, loginId, replaces, keyId: 'k1', scope: '', pageroIssuer: null },
        refreshTokenSealed: secret('refresh'),
        accessToken: { sealed: secret('access'), fingerprint: secret('fingerprint').toString() },
        requestedSecondsAgo: 1,
        expiresInSeconds: 600,
        pageroSubject: 'subject',
        revocation: random.chance(0.5)
          ? { revocationId: randomUUID(), user, tokenSealed: secret('old'), keyId: 'k1' }
          : undefined,
      }
    }

    async function aged(
      column: 'seen_at' | 'steady_since',
      replica: string,
    ): Promise<[unknown, unknown]> {
      const row = model.replicas.get(replica)
      if (row !== undefined && column === 'seen_at') row.seenAtMs -= SHIFT_SECONDS * 1000
      if (row !== undefined && column === 'steady_since') row.steadySinceMs -= SHIFT_SECONDS * 1000
      await client.query(
        `update replicas set ${column} = ${column} - make_interval(secs => $2) where name = $1`,
        [replica, SHIFT_SECONDS],
      )
      return [1, 1]
    }

    async function attemptAged(attemptId: string): Promise<[unknown, unknown]> {
      const attempt = model.attempts.get(attemptId)
      if (attempt !== undefined) {
        attempt.armedAtMs -= SHIFT_SECONDS * 1000
        const armed = model.grants.get(user)
        if (armed?.attemptId === attemptId && armed.armedAtMs !== undefined) {
          armed.armedAtMs -= SHIFT_SECONDS * 1000
        }
        if (attempt.finishedAtMs !== null) attempt.finishedAtMs -= SHIFT_SECONDS * 1000
      }
      for (const table of ['grants', 'refresh_attempts']) {
        await client.query(
          `update ${table} set armed_at = armed_at - make_interval(secs => $2) where attempt_id = $1`,
          [attemptId, SHIFT_SECONDS],
        )
      }
      await client.query(
        `update refresh_attempts set finished_at = finished_at - make_interval(secs => $2)
        where attempt_id = $1`,
        [attemptId, SHIFT_SECONDS],
      )
      return [1, 1]
    }

    async function grantAged(
      column: string,
      member: 'nextRetryAt' | 'leaseUntil',
    ): Promise<[unknown, unknown]> {
      const row = model.grants.get(user)
      const at = row?.[member]
      if (row !== undefined && at !== null && at !== undefined) {
        model.grants.set(user, { ...row, [member]: new Date(at.getTime() - 2e6) })
      }
      await client.query(
        `update grants set ${column} = ${column} - interval '2000 s' where user_id = $1`,
        [user],
      )
      return [1, 1]
    }

    async function lifetimeEnded(): Promise<[unknown, unknown]> {
      const row = model.grants.get(user)
      const { rows } = await client.query<{ absolute_expires_at: Date }>(
        `update grants set absolute_expires_at = clock_timestamp() + interval '1 hour'
         where user_id = $1 returning absolute_expires_at`,
        [user],
      )
      const [changed] = rows
      if (row !== undefined && changed !== undefined) {
        model.grants.set(user, { ...row, absoluteExpiresAt: changed.absolute_expires_at })
      }
      return [1, 1]
    }

    async function restarted(agoSeconds: number): Promise<[unknown, unknown]> {
      model.startedAtMs = Date.now() - agoSeconds * 1000
      await client.query(
        'update server_start set at = clock_timestamp() - make_interval(secs => $1)',
        [agoSeconds],
      )
      return [1, 1]
    }

    async function rowsAgree(told: string): Promise<boolean> {
      const nowMs = Date.now()
      const found = grantColumns(await real.find(user), nowMs)
      if (!agree(found, grantColumns(model.find(user), nowMs), `row; ${told}`)) return false
      const ledger = await client.query<{ attempt_id: string; outcome: string | null }>(
        'select attempt_id, outcome from refresh_attempts where user_id = $1 order by attempt_id',
        [user],
      )
      const expected = [...model.attempts.values()]
        .map(({ attemptId, outcome }) => ({ attempt_id: attemptId, outcome }))
        .toSorted((a, b) => (a.attempt_id < b.attempt_id ? -1 : 1))
      if (!agree(ledger.rows, expected, `ledger; ${told}`)) return false
      const queue = await client.query<{ revocation_id: string }>(
        'select revocation_id from revocations where user_id = $1 order by revocation_id',
        [user],
      )
      return agree(
        queue.rows.map((one) => one.revocation_id),
        [...model.revocations.keys()].toSorted(),
        `revocations; ${told}`,
      )
    }
  }

  for (const name of [
    ...['arm true', 'arm false', 'take over true', 'take over false'],
    ...['store stored', 'store already_stored', 'store superseded', 'connect true', 'close true'],
    ...['left behind true', 'left behind false'],
    ...['find stored no,no', 'find stored yes,no', 'find stored long ago,no'],
  ]) {
    t.ok((met.get(name) ?? 0) >= 10, `${name}: ${met.get(name)} times`)
  }

  /** Thousands of agreements are not worth a line each. */
  function agree(found: unknown, expected: unknown, told: string): boolean {
    return isDeepStrictEqual(found, expected) || t.strictSame(found, expected, told)
  }
})

function outcomeOf(result: unknown): string {
  return typeof result === 'string' || typeof result === 'boolean' ? String(result) : ''
}

t.test(
  'one successor stored twice at the same moment is stored once and never superseded',
  async (t) => {
    const { client, database, real } = await setScene(t)
    const user = parseUserKey('user') as UserKey
    const loginId = randomUUID()
    const sealed = Buffer.from('sealed')
    await real.connect({
      ...{ user, loginId, replaces: 0, refreshTokenSealed: sealed, keyId: 'k1', accessToken: null },
      ...{ requestedSecondsAgo: 0, expiresInSeconds: 600, scope: '', pageroIssuer: null },
      ...{ pageroSubject: null, revocation: undefined },
    })
    const entry: Successor = {
      ...{ user, loginId, attemptId: randomUUID(), generation: 2, refreshTokenSealed: sealed },
      ...{ keyId: 'k1', accessToken: null, scope: '', httpStatus: 200, durationMs: 1 },
    }
    await client.query('begin')
    await client.query('select 1 from grants where user_id = $1 for update', [user])
    // The rotation itself, and the pass over the spool, which finds the entry in between.
    const both = Promise.all([real.store(entry), real.store(entry)])
    const waiting = async () => {
      const { rows } = await database.pool.query(
        `select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
      )
      return rows.length
    }
    while ((await waiting()) < 2) await delay(10)
    await client.query('commit')
    t.strictSame((await both).toSorted(), ['already_stored', 'stored'])
    t.equal((await real.find(user))?.generation, 2)
  },
)

t.test('late words of a boot that is over do not make the one that lives look gone', async (t) => {
  const { client, database, real } = await setScene(t)
  await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
  const replicas = createReplicaStore(database.db, SETTINGS)
  const [over, present, next, others] = [randomUUID(), randomUUID(), randomUUID(), randomUUID()]
  const { user, loginId } = await connectUser(real)
  const armBy = (replica: string, boot: string) =>
    real.arm({
      ...{ user, loginId, generation: 1, attemptId: randomUUID(), cause: 'expiry', replica, boot },
      ...{ tokenDigest: Buffer.alloc(0), leaseSeconds: SHIFT_SECONDS },
    })
  await replicas.heartbeat('owner', over)
  const asOf = await replicas.now()
  await replicas.heartbeat('owner', present)
  await replicas.heartbeat('other', others)
  await delay(2)
  t.ok(await armBy('owner', present))
  // Both were on their way when it died.
  await replicas.heartbeat('owner', over)
  await replicas.spoolDrained('owner', over, asOf)
  t.equal(await armBy('other', others), undefined)
  t.equal((await real.evidence(user, loginId, 1)).successorMayComeBack, true)

  await replicas.heartbeat('owner', next)
  await delay(2)
  await replicas.spoolDrained('owner', next, await replicas.now())
  t.equal((await real.evidence(user, loginId, 1)).successorMayComeBack, false)
  t.ok(await armBy('other', others), 'it has started anew, and looked')
})

t.test(
  'an attempt that came in between and was not sent hides nobody who may bring the answer',
  async (t) => {
    const { client, database, real } = await setScene(t)
    await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
    const replicas = createReplicaStore(database.db, SETTINGS)
    const [before, after, others] = [randomUUID(), randomUUID(), randomUUID()]
    const { user, loginId } = await connectUser(real)
    const armBy = async (replica: string, boot: string) => {
      const attemptId = randomUUID()
      const armed = await real.arm({
        ...{ user, loginId, generation: 1, attemptId, cause: 'expiry', replica, boot },
        ...{ tokenDigest: Buffer.alloc(0), leaseSeconds: SHIFT_SECONDS },
      })
      return armed && attemptId
    }
    await replicas.heartbeat('owner', before)
    await replicas.heartbeat('other', others)
    t.ok(await armBy('owner', before), 'it dies with the answer in its spool')
    await client.query(`
    update grants set lease_until = lease_until - interval '2000 s';
    update replicas set seen_at = seen_at - interval '1000 s' where name = 'owner';
    update replicas set steady_since = steady_since - interval '1000 s' where name = 'other'`)
    const attemptId = await armBy('other', others)
    t.ok(attemptId, 'the lease is over, and the owner is gone')
    await real.disarm({
      ...{ user, attemptId: attemptId ?? '', outcome: 'not_processed', httpStatus: null },
      ...{ durationMs: 0, retryInSeconds: 0, stayArmed: false, counts: false },
    })
    t.equal((await real.find(user))?.phase, 'idle')

    await replicas.heartbeat('owner', after)
    t.equal(await armBy('other', others), undefined, 'it is back, with what it has in its spool')
    t.equal(await armBy('owner', after), undefined, 'which it has not looked at yet either')
    await delay(2)
    await replicas.spoolDrained('owner', after, await replicas.now())
    t.ok(await armBy('other', others), 'there was nothing in it')
  },
)

t.test('who is not back from there is not waited for, nor what is too long ago', async (t) => {
  const { client, database, real } = await setScene(t)
  await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
  const replicas = createReplicaStore(database.db, SETTINGS)
  const { user, loginId } = await connectUser(real)
  const others = randomUUID()
  const arm = () => armAs(real, { user, loginId }, 'other', others)
  await replicas.heartbeat('owner', randomUUID())
  await replicas.heartbeat('other', others)
  await client.query(
    `insert into refresh_attempts
       (attempt_id, user_id, login_id, generation, token_digest, replica, boot, cause, armed_at)
     values (gen_random_uuid(), 'user', $1, 1, 'x', 'owner', gen_random_uuid(), 'expiry', clock_timestamp())`,
    [loginId],
  )
  const free = `update grants set phase = 'idle', attempt_id = gen_random_uuid()`
  await client.query(free)
  t.equal(await arm(), undefined)
  await client.query(
    `update replicas set seen_at = seen_at - interval '1000 s' where name = 'owner'`,
  )
  t.ok(await arm())
  await client.query(`${free}; update replicas set seen_at = clock_timestamp();
    update refresh_attempts set armed_at = armed_at - interval '1000 s' where replica = 'owner'`)
  t.ok(await arm())
})

t.test('who comes late to a new server is waited for, and not for long', async (t) => {
  const { client, database, real } = await setScene(t)
  await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
  const replicas = createReplicaStore(database.db, SETTINGS)
  const { user, loginId } = await connectUser(real)
  const others = randomUUID()
  const arm = async () => {
    const armed = await armAs(real, { user, loginId }, 'other', others)
    await client.query(`update grants set phase = 'idle', attempt_id = null`)
    return armed
  }
  const age = (column: 'met_at' | 'seen_at') =>
    client.query(
      `update replicas set ${column} = ${column} - interval '2000 s' where name = 'late'`,
    )
  await replicas.heartbeat('other', others)
  await replicas.heartbeat('late', randomUUID())
  await client.query(`
    update server_start set at = clock_timestamp() - interval '900 s';
    update replicas set seen_at = seen_at - interval '1000 s' where name = 'late'`)
  t.ok(await replicas.heartbeat('other', others), 'another server')
  const { rows } = await client.query<{ at: string }>('select at::text from server_start')
  const server = rows[0]?.at ?? ''
  await replicas.restored('other', others, server)
  await client.query(
    `update deployment set server_noticed_at = server_noticed_at - interval '1000 s'`,
  )
  t.ok(await arm(), 'nobody else has been there for long')

  let late = randomUUID()
  t.equal(await replicas.heartbeat('late', late), server)
  t.equal(await arm(), undefined, 'it has just come')
  await age('seen_at')
  t.ok(await arm(), 'and has gone again')

  await replicas.heartbeat('late', late)
  t.equal(await arm(), undefined)
  await age('met_at')
  t.ok(await arm(), 'it has had its time')
  late = randomUUID()
  t.equal(await replicas.heartbeat('late', late), server)
  t.ok(await arm(), 'which does not begin anew with each start')

  await client.query(`update server_start set at = clock_timestamp() - interval '800 s'`)
  for (const [replica, boot] of [
    ['other', others],
    ['late', late],
  ] as const) {
    t.ok(await replicas.heartbeat(replica, boot), 'yet another server')
  }
  await client.query(`
    update deployment set server_noticed_at = server_noticed_at - interval '1000 s';
    update replicas set restored_on = met_on where name = 'other'`)
  t.equal(await arm(), undefined, 'but with each server')
  await client.query(`update replicas set restored_on = met_on where name = 'late'`)
  t.ok(await arm(), 'what it had is there')
})

t.test(
  'who is not known to a new server is waited for when it comes, and arms nothing before',
  async (t) => {
    const { client, database, real } = await setScene(t)
    await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
    const [others, news] = [randomUUID(), randomUUID()]
    // Of a process each.
    const other = createReplicaStore(database.db, SETTINGS)
    const young = createReplicaStore(database.db, SETTINGS)
    const { user, loginId } = await connectUser(real)
    const armBy = async (replica: string, boot: string) => {
      const armed = await real.arm({
        ...{
          user,
          loginId,
          generation: 1,
          attemptId: randomUUID(),
          cause: 'expiry',
          replica,
          boot,
        },
        ...{ tokenDigest: Buffer.alloc(0), leaseSeconds: 1 },
      })
      await client.query(`update grants set phase = 'idle', attempt_id = null`)
      return armed
    }
    await other.heartbeat('other', others)
    await young.heartbeat('young', news)
    t.ok(await armBy('young', news))
    // Its first heartbeat is among what the failover has lost.
    await client.query(`
    delete from replicas where name = 'young';
    update server_start set at = clock_timestamp() - interval '900 s'`)
    const server = (await other.heartbeat('other', others)) ?? ''
    await other.restored('other', others, server)
    t.equal(await armBy('other', others), undefined, 'it cannot have been seen yet')
    await settle(client)
    t.equal(await armBy('young', news), undefined, 'nobody can wait for it yet')
    t.equal(await young.heartbeat('young', news), server, 'it owes the server what it holds')
    t.equal(await armBy('other', others), undefined)
    await young.restored('young', news, server)
    t.ok(await armBy('other', others))
    t.ok(await armBy('young', news))

    await client.query(`delete from replicas where name = 'young'`)
    t.equal(await young.heartbeat('young', news), undefined, 'on the same server nothing is owed')
    t.ok(await armBy('young', news))

    for (const holds of [false, true]) {
      await client.query(`delete from replicas where name = 'young'`)
      // Its process has died too, and remembers no server.
      const restarted = createReplicaStore(database.db, SETTINGS)
      const owed = await restarted.heartbeat('young', randomUUID(), holds)
      t.equal(owed, holds ? server : undefined, 'what is in its spool is owed')
    }
    t.equal(await armBy('other', others), undefined)
    await client.query(
      `update replicas set met_at = met_at - interval '2000 s' where name = 'young'`,
    )
    t.ok(await armBy('other', others), 'it is not waited for until all tokens have ended')
  },
)

/** Lets the time go by in which everybody who lives is seen on a new server. */
async function settle(client: { query(text: string, values: unknown[]): Promise<unknown> }) {
  await client.query(
    `update deployment set server_noticed_at = server_noticed_at - make_interval(secs => $1)`,
    [SPAN_SECONDS / 2 + 1],
  )
}

t.test('on a new server nobody arms before all who live can have been seen', async (t) => {
  const { client, database, real } = await setScene(t)
  await client.query(`update server_start set at = clock_timestamp() - interval '1000 s'`)
  const replicas = createReplicaStore(database.db, SETTINGS)
  const { user, loginId } = await connectUser(real)
  const others = randomUUID()
  const arm = () => armAs(real, { user, loginId }, 'other', others)
  await replicas.heartbeat('silent', randomUUID())
  await replicas.heartbeat('other', others)
  // After an outage: its heartbeat is lost with the last commits, and the one before is old.
  await client.query(`
    update replicas set seen_at = seen_at - interval '1000 s' where name = 'silent';
    update server_start set at = clock_timestamp() - interval '900 s'`)
  const server = (await replicas.heartbeat('other', others)) ?? ''
  await replicas.restored('other', others, server)
  t.equal(await arm(), undefined)
  await settle(client)
  t.ok(await arm(), 'it would have been seen by now')
})

t.test('who lived and does not come is waited for until what it presented is over', async (t) => {
  const { client, database } = await setScene(t)
  const settings = { ...SETTINGS, heartbeatStaleSeconds: 100, zombieWaitSeconds: 5_000 }
  const real = createGrantStore(database, settings)
  await client.query(`update server_start set at = clock_timestamp() - interval '9000 s'`)
  const replicas = createReplicaStore(database.db, settings)
  const { user, loginId } = await connectUser(real)
  const others = randomUUID()
  const arm = () =>
    real.arm({
      ...{ user, loginId, generation: 1, attemptId: randomUUID(), cause: 'expiry' },
      ...{ replica: 'other', boot: others },
      ...{ tokenDigest: Buffer.alloc(0), leaseSeconds: SHIFT_SECONDS },
    })
  // Cut off, with a call under way whose arming is among what is lost.
  await replicas.heartbeat('absent', randomUUID())
  await replicas.heartbeat('other', others)
  await client.query(`update server_start set at = clock_timestamp() - interval '8000 s'`)
  const server = (await replicas.heartbeat('other', others)) ?? ''
  await replicas.restored('other', others, server)
  const pass = (seconds: number) =>
    client.query(`
      update deployment set server_noticed_at = server_noticed_at - interval '${seconds} s',
        server_left_at = server_left_at - interval '${seconds} s';
      update replicas set seen_at = seen_at - interval '${seconds} s' where name = 'absent'`)
  await pass(SHIFT_SECONDS / 2)
  t.equal(await arm(), undefined, 'it is not seen any more, and its call is not over')
  await pass(SHIFT_SECONDS)
  t.ok(await arm())
})

t.test('of many successors those that are stored are told apart', async (t) => {
  const { real } = await setScene(t)
  const sealed = Buffer.from('sealed')
  const entries: Successor[] = []
  for (const name of ['alice', 'bob', 'carol']) {
    const user = parseUserKey(name) as UserKey
    const loginId = randomUUID()
    await real.connect({
      ...{ user, loginId, replaces: 0, refreshTokenSealed: sealed, keyId: 'k1', accessToken: null },
      ...{ requestedSecondsAgo: 0, expiresInSeconds: 600, scope: '', pageroIssuer: null },
      ...{ pageroSubject: null, revocation: undefined },
    })
    entries.push({
      ...{ user, loginId, attemptId: randomUUID(), generation: 2, refreshTokenSealed: sealed },
      ...{ keyId: 'k1', accessToken: null, scope: '', httpStatus: 200, durationMs: 1 },
    })
  }
  const [alice, bob, carol] = entries as [Successor, Successor, Successor]
  t.equal((await real.findStored(entries)).size, 0)
  await real.store(alice)
  await real.store(carol)
  t.strictSame(
    [...(await real.findStored([bob, carol, alice])).keys()].toSorted(),
    [alice.attemptId, carol.attemptId].toSorted(),
  )
})

t.test('a server that cannot be written has no say in what is stored', async (t) => {
  const { url } = await createTestDatabase(t)
  const settings = { url: new Secret(url), poolMax: 1, applicationName: 'test' }
  const database = openDatabase(settings, silentLog)
  t.teardown(() => database.close())
  const store = createGrantStore(database, SETTINGS)
  const entry: Successor = {
    ...{ user: parseUserKey('user') as UserKey, loginId: randomUUID(), attemptId: randomUUID() },
    ...{ generation: 2, refreshTokenSealed: Buffer.from('sealed'), keyId: 'k1', scope: '' },
    ...{ accessToken: null, httpStatus: 200, durationMs: 1 },
  }
  await sql`set default_transaction_read_only = on`.execute(database.db)
  await t.rejects(store.findStored([entry]), { code: 'temporarily_unavailable' })
  t.equal((await store.findStored([entry])).size, 0, 'nor is its connection used again')
})
