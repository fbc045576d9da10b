// Sealing anew under another key: on a real database, beside writers, and as the command beside running replicas. What a
// value holds and where it stands stay as they are, whatever comes in between.

import { randomBytes, randomUUID } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import type { Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { grantSealContext, type UserKey } from '../src/grant.ts'
import type { SealedValueStore } from '../src/grant-stores.ts'
import { rotateKeys, SEALED_TABLES } from '../src/key-rotation.ts'
import { codeVerifierSealContext } from '../src/login.ts'
import { pendingSealContext } from '../src/pending-grant.ts'
import type { Clock, Sealer } from '../src/ports.ts'
import type { Database } from '../src/postgres/database.ts'
import { readDeploymentId } from '../src/postgres/deployment.ts'
import { createGrantStore } from '../src/postgres/grant-store.ts'
import { createLoginTransactionStore } from '../src/postgres/login-transaction-store.ts'
import { createPendingGrantStore } from '../src/postgres/pending-grant-store.ts'
import { createRevocationStore } from '../src/postgres/revocation-store.ts'
import { createSealedValueStore } from '../src/postgres/sealed-value-store.ts'
import { revocationSealContext, sealRevocation } from '../src/revocation.ts'
import { createSealer, sealedKeyId } from '../src/seal.ts'
import { startBalancer } from './support/balancer.ts'
import { createTestDatabase } from './support/database.ts'
import { startFaultProxy } from './support/fault-proxy.ts'
import { type Fleet, setFleet, until, userKeyOf } from './support/fleet.ts'
import { startProgram } from './support/program.ts'

t.setTimeout(280_000)

const OLD = { keyId: 'k1', key: randomBytes(32) }
const NEW = { keyId: 'k2', key: randomBytes(32) }
const LOST = { keyId: 'k0', key: randomBytes(32) }

interface Place {
  user: UserKey
  loginId: string
  generation: number
}

async function setUp(test: Test) {
  const { database } = await createTestDatabase(test)
  const { db } = database
  const deployment = await readDeploymentId(database)
  const before = createSealer([OLD, NEW], deployment)
  const grants = createGrantStore(database, {
    refreshTokenLifetime: 'P3Y',
    heartbeatStaleSeconds: 20,
    zombieWaitSeconds: 600,
    databaseSettleSeconds: 0,
  })
  const sealedValues = createSealedValueStore(db)

  async function addGrant(name: string, sealer = before): Promise<Place> {
    const place = { user: userKeyOf(name), loginId: randomUUID(), generation: 1 }
    await grants.connect({
      ...{ user: place.user, loginId: place.loginId, replaces: 0, scope: 'all' },
      refreshTokenSealed: sealer.seal(
        grantSealContext('refresh_token_sealed', place),
        `rt of ${name}`,
      ),
      keyId: sealer.primaryKeyId,
      accessToken: {
        sealed: sealer.seal(grantSealContext('access_token_sealed', place), `at of ${name}`),
        fingerprint: 'f'.repeat(43),
      },
      ...{ requestedSecondsAgo: 0, expiresInSeconds: 600, pageroIssuer: null, pageroSubject: null },
      revocation: undefined,
    })
    return place
  }

  return {
    database,
    before,
    anew: createSealer([NEW, OLD], deployment),
    after: createSealer([NEW], deployment),
    lost: createSealer([LOST], deployment),
    grants,
    sealedValues,
    addGrant,
    rotate: (sealer: Sealer, values = sealedValues, clock: Pick<Clock, 'sleep'> = systemClock) =>
      rotateKeys({ clock, sealer, sealedValues: values }),
    pending: createPendingGrantStore(db),
    revocations: createRevocationStore(db),
    logins: createLoginTransactionStore(db),
    /** What a grant's columns hold, opened with these keys. */
    async tokensOf(place: Place, sealer: Sealer) {
      const { rows } = await database.pool.query<{
        generation: number
        refresh: Buffer
        access: Buffer
        keyId: string
      }>(
        `select generation, refresh_token_sealed as refresh, access_token_sealed as access, key_id as "keyId"
         from grants where user_id = $1`,
        [place.user],
      )
      const [row] = rows
      if (row === undefined) throw new Error(`no grant of ${place.user}`)
      const here = { ...place, generation: row.generation }
      return {
        refresh: sealer.open(grantSealContext('refresh_token_sealed', here), row.refresh),
        access: sealer.open(grantSealContext('access_token_sealed', here), row.access),
        keyId: row.keyId,
      }
    },
  }
}

/** All rows of all tables with sealed values, but for these and the key's id; and the keys of the sealed values, by column. */
async function readEverything(database: Database) {
  const { rows: columns } = await database.pool.query<{ table: string; column: string }>(
    `select table_name as table, column_name as column from information_schema.columns
     where table_schema = current_schema() and column_name like '%\\_sealed' order by 1, 2`,
  )
  const keyIds: Record<string, Array<string | undefined>> = {}
  for (const { table, column } of columns) {
    const { rows } = await database.pool.query<{ sealed: Buffer }>(
      `select ${column} as sealed from ${table} where ${column} is not null`,
    )
    keyIds[`${table}.${column}`] = rows.map(({ sealed }) => sealedKeyId(sealed))
  }
  const rest: unknown[] = []
  for (const table of new Set(columns.map((one) => one.table))) {
    const sealed = columns.filter((one) => one.table === table).map(({ column }) => column)
    const { rows } = await database.pool.query<{ row: unknown }>(
      `select to_jsonb(t) - $1::text[] as row from ${table} t order by 1`,
      [[...sealed, 'key_id']],
    )
    rest.push(table, ...rows.map(({ row }) => row))
  }
  return { keyIds, rest }
}

t.test(
  'every sealed value there is comes to the first key, and nothing else changes',
  async (t) => {
    const { database, before, anew, after, rotate, addGrant, ...rest } = await setUp(t)
    const { grants, pending, revocations, logins, tokensOf } = rest
    const alice = await addGrant('alice')
    const bob = await addGrant('bob')
    await database.pool.query(
      `update grants set access_token_sealed = null, access_token_expires_at = null where user_id = 'bob'`,
    )
    const carol = await addGrant('carol')
    await grants.close(carol.user, 1, undefined)
    const confirmationHash = randomBytes(32)
    const waiting = { user: userKeyOf('dave'), confirmationHash }
    const owed = sealRevocation({ sealer: before }, waiting.user, 'rt of dave')
    await pending.place(
      {
        ...waiting,
        refreshTokenSealed: before.seal(
          pendingSealContext('refresh_token_sealed', waiting),
          'rt of dave',
        ),
        accessTokenSealed: before.seal(
          pendingSealContext('access_token_sealed', waiting),
          'at of dave',
        ),
        ...{ requestedSecondsAgo: 0, expiresInSeconds: 600, scope: '', keyId: before.primaryKeyId },
        ...{ pageroIssuer: null, pageroSubject: null, returnTo: '/', startSession: false },
        ...{ allowAccountChange: false, browserBindingHash: randomBytes(32) },
        replacesSessionHash: null,
        revocation: owed,
      },
      600,
    )
    const revocation = sealRevocation({ sealer: before }, userKeyOf('erin'), 'rt of erin')
    await revocations.add(revocation)
    const stateHash = randomBytes(32)
    for (const [hash, verifier] of [
      [stateHash, before.seal(codeVerifierSealContext(stateHash), 'verifier')],
      [randomBytes(32), null],
    ] as const) {
      await logins.create(
        {
          stateHash: hash,
          browserBindingHash: randomBytes(32),
          codeVerifierSealed: verifier,
          ...{ nonceHash: null, returnTo: '/', replacesSessionHash: null },
        },
        { lifetimeSeconds: 600, pendingMax: 10 },
      )
    }

    const was = await readEverything(database)
    for (const [column, keyIds] of Object.entries(was.keyIds)) {
      t.ok(keyIds.length > 0, `${column} is part of this test`)
      t.ok(keyIds.every((keyId) => keyId === 'k1'))
    }
    const { counts, unreadable, leftCount } = await rotate(anew)
    t.strictSame(counts, { grants: 2, pending_grants: 1, revocations: 1, login_transactions: 1 })
    t.strictSame([unreadable, leftCount], [[], 0])

    const is = await readEverything(database)
    t.strictSame(Object.keys(is.keyIds), Object.keys(was.keyIds))
    for (const [column, keyIds] of Object.entries(is.keyIds)) {
      t.ok(
        keyIds.every((keyId) => keyId === 'k2'),
        column,
      )
    }
    t.strictSame(is.rest, was.rest)
    t.strictSame(await tokensOf(alice, after), {
      refresh: 'rt of alice',
      access: 'at of alice',
      keyId: 'k2',
    })
    const [bobNow] = (
      await database.pool.query<{ sealed: Buffer }>(
        `select refresh_token_sealed as sealed from grants where user_id = 'bob'`,
      )
    ).rows
    t.equal(
      bobNow && after.open(grantSealContext('refresh_token_sealed', bob), bobNow.sealed),
      'rt of bob',
    )
    const dave = await pending.find(confirmationHash)
    t.equal(dave?.keyId, 'k2')
    t.equal(
      dave?.refreshTokenSealed &&
        after.open(pendingSealContext('refresh_token_sealed', waiting), dave.refreshTokenSealed),
      'rt of dave',
    )
    t.equal(
      dave?.accessToken &&
        after.open(pendingSealContext('access_token_sealed', waiting), dave.accessToken.sealed),
      'at of dave',
    )
    // Dropped, it becomes a row of the queue without being opened.
    await pending.drop(waiting.user)
    const queue = new Map(
      (await revocations.take(10, 60)).map((row) => [row.revocationId, row] as const),
    )
    for (const [id, token] of [
      [owed.revocationId, 'rt of dave'],
      [revocation.revocationId, 'rt of erin'],
    ] as const) {
      const row = queue.get(id)
      t.equal(row?.keyId, 'k2')
      t.equal(row && after.open(revocationSealContext(id), row.tokenSealed), token)
    }
    const { rows } = await database.pool.query<{ sealed: Buffer }>(
      'select code_verifier_sealed as sealed from login_transactions where state_hash = $1',
      [stateHash],
    )
    t.equal(rows[0] && after.open(codeVerifierSealContext(stateHash), rows[0].sealed), 'verifier')

    const again = await rotate(anew)
    t.ok(
      SEALED_TABLES.every((table) => again.counts[table] === 0),
      'there is nothing left to do',
    )
  },
)

t.test('of many rows none is left out', async (t) => {
  const { anew, after, rotate, addGrant, sealedValues, tokensOf } = await setUp(t)
  const places: Place[] = []
  let done = 0
  for (let i = 0; i < 1_203; i += 1) {
    // Some are sealed with the first key already: whole pages of them, and a few on each.
    const isDone = (i > 300 && i < 800) || i % 5 === 0
    if (isDone) done += 1
    // Capitals come first for PostgreSQL here, and elsewhere may not.
    const name = `${i % 3 === 0 ? 'User' : 'user'}-${String(i).padStart(4, '0')}`
    places.push(await addGrant(name, isDone ? anew : undefined))
  }
  let looks = 0
  const counting: SealedValueStore = {
    ...sealedValues,
    findSealedOtherwise: (table, ...rest) => {
      if (table === 'grants') looks += 1
      return sealedValues.findSealedOtherwise(table, ...rest)
    },
  }
  const looksOfAPass = Math.ceil(places.length / 200) + 1
  const { counts, leftCount } = await rotate(anew, counting)
  t.equal(counts.grants, places.length - done)
  t.equal(leftCount, 0)
  t.equal(
    looks,
    2 * looksOfAPass,
    'so many at a time, and once more to see that nothing came behind',
  )
  for (const place of places) {
    if ((await tokensOf(place, after)).refresh !== `rt of ${place.user}`) t.fail(place.user)
  }
  looks = 0
  t.equal((await rotate(anew, counting)).counts.grants, 0)
  t.equal(looks, looksOfAPass)
})

t.test('a row that comes behind the one that is looked at is not missed', async (t) => {
  const { anew, after, rotate, addGrant, sealedValues, tokensOf } = await setUp(t)
  await addGrant('m')
  let behind: Place | undefined
  const adding: SealedValueStore = {
    ...sealedValues,
    async findSealedOtherwise(table, ...rest) {
      const found = await sealedValues.findSealedOtherwise(table, ...rest)
      if (table === 'grants' && found.last === 'm') behind ??= await addGrant('a')
      return found
    },
  }
  t.match(await rotate(anew, adding), { counts: { grants: 2 }, leftCount: 0 })
  t.match(behind && (await tokensOf(behind, after)), { refresh: 'rt of a' })
})

t.test('two at once do it once, and rows that go meanwhile are nothing that is left', async (t) => {
  const { database, anew, after, rotate, addGrant, sealedValues, tokensOf } = await setUp(t)
  const places: Place[] = []
  for (let i = 0; i < 50; i += 1) places.push(await addGrant(`user-${i}`))
  await addGrant('gone')
  const deleting: SealedValueStore = {
    ...sealedValues,
    async findSealedOtherwise(...parameters) {
      const found = await sealedValues.findSealedOtherwise(...parameters)
      await database.pool.query(`delete from grants where user_id = 'gone'`)
      return found
    },
  }
  const [one, other] = await Promise.all([rotate(anew, deleting), rotate(anew)])
  t.strictSame([one.leftCount, other.leftCount], [0, 0])
  const resealed = one.counts.grants + other.counts.grants
  t.ok(resealed === 50 || resealed === 51, 'the one that goes may be sealed before')
  for (const place of places) {
    t.equal((await tokensOf(place, after)).refresh, `rt of ${place.user}`)
  }
})

t.test('a row that is written in between keeps what was written', async (t) => {
  const { before, anew, after, rotate, addGrant, grants, sealedValues, tokensOf } = await setUp(t)
  const busy = await addGrant('busy')
  const calm = await addGrant('calm')
  /** Puts a successor of the old key into the row, as a replica would that has not been told of the new one. */
  const store = async (generation: number) => {
    const place = { ...busy, generation }
    const attemptId = randomUUID()
    const result = await grants.store({
      ...place,
      attemptId,
      refreshTokenSealed: before.seal(
        grantSealContext('refresh_token_sealed', place),
        `rt ${generation}`,
      ),
      keyId: before.primaryKeyId,
      accessToken: {
        sealed: before.seal(grantSealContext('access_token_sealed', place), `at ${generation}`),
        requestedAt: new Date(),
        expiresAt: new Date(Date.now() + 600_000),
        fingerprint: 'f'.repeat(43),
      },
      ...{ scope: '', httpStatus: 200, durationMs: 1 },
    })
    t.equal(result, 'stored')
  }
  let generation = 1
  /** Writes after each read, so many times. */
  const writing = (times: number): SealedValueStore => ({
    ...sealedValues,
    async findSealedOtherwise(table, ...rest) {
      const found = await sealedValues.findSealedOtherwise(table, ...rest)
      if (found.rows.some((row) => 'user' in row && row.user === busy.user) && times > 0) {
        times -= 1
        generation += 1
        await store(generation)
      }
      return found
    },
  })
  const once = await rotate(anew, writing(1))
  t.match(once, { counts: { grants: 2 }, leftCount: 0 })
  t.match(await tokensOf(busy, after), { refresh: 'rt 2', access: 'at 2', keyId: 'k2' })
  t.match(await tokensOf(calm, after), { refresh: 'rt of calm' })

  generation += 1
  await store(generation)
  const always = await rotate(anew, writing(1_000), { sleep: async () => undefined })
  t.match(always, { counts: { grants: 0 }, leftCount: 1 }, 'it ends, and says that it is not done')
  t.match(await tokensOf(busy, before), { refresh: `rt ${generation}`, keyId: 'k1' })
})

t.test('a row that is locked keeps nobody waiting, and is sealed anew later', async (t) => {
  const { database, anew, after, rotate, addGrant, tokensOf } = await setUp(t)
  const locked = await addGrant('locked')
  const free = await addGrant('unlocked')
  const holder = await database.pool.connect()
  await holder.query('begin')
  await holder.query(`select 1 from grants where user_id = 'locked' for update`)
  const rotating = rotate(anew)
  await until(async () => (await tokensOf(free, anew)).keyId === 'k2', 5_000, 'the other row')
  t.equal((await tokensOf(locked, anew)).keyId, 'k1')
  await holder.query('commit')
  holder.release()
  t.match(await rotating, { counts: { grants: 2 }, leftCount: 0 })
  t.equal((await tokensOf(locked, after)).refresh, 'rt of locked')
})

t.test('what does not open stays as it is, is told, and keeps nothing else', async (t) => {
  const { database, anew, after, lost, rotate, addGrant, tokensOf } = await setUp(t)
  const first = await addGrant('a')
  const other = await addGrant('b', lost)
  const last = await addGrant('c')
  await database.pool.query(
    `update grants set access_token_sealed = set_byte(access_token_sealed, 30, get_byte(access_token_sealed, 30) # 1)
     where user_id = 'c'`,
  )
  const was = await database.pool.query(`select * from grants where user_id <> 'a' order by 1`)
  const { unreadable, ...told } = await rotate(anew)
  const is = await database.pool.query(`select * from grants where user_id <> 'a' order by 1`)
  t.strictSame(is.rows, was.rows)
  t.match(told, { counts: { grants: 1 }, unreadableCounts: { k0: 1, k1: 1 }, leftCount: 0 })
  t.strictSame(
    unreadable.map(({ user, detail }) => [user, detail]),
    [
      [
        'b',
        'The value stored in grants.refresh_token_sealed was sealed with the key "k0", which is not among the encryption keys.',
      ],
      [
        'c',
        'The value stored in grants.access_token_sealed was changed, or belongs to another place.',
      ],
    ],
  )
  t.equal((await tokensOf(first, after)).refresh, 'rt of a')
  t.equal((await tokensOf(other, lost)).refresh, 'rt of b')
  t.equal(last.generation, 1)
})

// ── The command, beside replicas ─────────────────────────────────────────────────────────────────

const USERS = Array.from({ length: 20 }, (_, i) => `user-${i}`)
/** Grants that nobody uses, so that the command has work for long enough to be killed in it. */
const IDLE = 8_000
const KILLS = 5

/** Adds grants that only lie there. */
async function addIdleGrants({ database, sealer }: Fleet): Promise<void> {
  const rows = Array.from({ length: IDLE }, (_, i) => {
    const place = { user: userKeyOf(`idle-${i}`), loginId: randomUUID(), generation: 1 }
    return {
      ...place,
      sealed: sealer.seal(grantSealContext('refresh_token_sealed', place), `rt of ${place.user}`),
    }
  })
  await database.pool.query(
    `insert into grants (user_id, login_id, generation, refresh_token_sealed, key_id,
       authenticated_at, rotated_at, rolling_expires_at, absolute_expires_at)
     select u, l, 1, s, $4, now(), now(), now() + interval '3 years', now() + interval '3 years'
     from unnest($1::text[], $2::uuid[], $3::bytea[]) as given (u, l, s)`,
    [
      rows.map(({ user }) => user),
      rows.map(({ loginId }) => loginId),
      rows.map(({ sealed }) => sealed),
      sealer.primaryKeyId,
    ],
  )
}

t.test(
  'a key is replaced under load: no call fails, nothing is lost, the old key can go',
  async (t) => {
    const { url } = await createTestDatabase(t)
    const key = randomBytes(32)
    const entry = `k2:${key.toString('base64')}`
    const fleet = await setFleet({ url, test: t, furtherKeys: [{ keyId: 'k2', key }] })
    const { database, env } = fleet
    const slow = await startFaultProxy(Number(new URL(url).port), t)
    slow.delayMs = 10
    const [oldEntry = ''] = [env['ENCRYPTION_KEYS']]
    await fleet.connect(USERS)
    await addIdleGrants(fleet)
    // The first step is done: every replica knows both.
    const both = { ENCRYPTION_KEYS: `${oldEntry},${entry}` }
    await Promise.all([
      fleet.add({ env: both }),
      fleet.add({ env: both }),
      fleet.add({ env: both }),
    ])
    const balancer = await startBalancer(fleet.replicas)
    const failed: unknown[] = []
    let calls = 0
    let isOver = false
    const load = USERS.map(async (user) => {
      while (!isOver) {
        const { status, body } = await balancer.token(user)
        calls += 1
        if (status !== 200) failed.push([user, status, body])
        await delay(100)
      }
    })
    const refreshing = (async () => {
      while (!isOver) {
        await fleet.expire(USERS)
        await delay(300)
      }
    })()
    /** One replica after the other. */
    const rollOut = async (keys: string) => {
      for (const replica of fleet.replicas) {
        await replica.kill('SIGTERM')
        await replica.start({ ENCRYPTION_KEYS: keys })
        await delay(300)
      }
    }
    const resealed = async (): Promise<number> => {
      const { rows } = await database.pool.query<{ count: number }>(
        `select count(*)::int as count from grants where key_id = 'k2'`,
      )
      return rows[0]?.count ?? 0
    }
    /** The command's own way to the database is slow, so that it can be killed between two statements. */
    const rotate = (keyId: string, own: Readonly<Record<string, string>> = {}) =>
      startProgram(t, ['src/main.ts', 'keys', 'rotate', keyId], {
        ...env,
        DATABASE_URL: slow.through(url),
        ENCRYPTION_KEYS: `${entry},${oldEntry}`,
        SPOOL_DIR: t.testdir(),
        ...own,
      })

    await rollOut(`${entry},${oldEntry}`)
    for (let kill = 1; kill <= KILLS; kill += 1) {
      const before = await resealed()
      const command = rotate('k2')
      await until(async () => (await resealed()) > before + 100, 30_000, 'rows sealed anew')
      slow.mode = 'stall'
      command.signal('SIGKILL')
      t.equal(await command.exited, 'SIGKILL')
      slow.cut()
      slow.mode = 'pass'
      t.ok((await resealed()) < IDLE, `killed for the ${kill}. time in the middle`)
    }
    const command = rotate('k2', { DATABASE_URL: url })
    t.equal(await command.exited, 0, command.output())
    t.match(command.output(), /^grants: \d+ rows sealed anew$/m)
    t.match(command.output(), /^Everything in the database is sealed with k2\.$/m)
    t.equal(await resealed(), IDLE + USERS.length)

    const wrong = rotate('k3', {
      DATABASE_URL: url,
      ENCRYPTION_KEYS: `k3:${randomBytes(32).toString('base64')}`,
    })
    t.equal(await wrong.exited, 1)
    t.match(wrong.output(), /left as it is: of user idle-0: .*sealed with the key "k2"/)
    const needed = IDLE + USERS.length
    t.match(wrong.output(), new RegExp(`^left as they are: ${needed} rows that need k2$`, 'm'))
    t.notMatch(wrong.output(), /Everything/)
    const back = rotate('k2', { DATABASE_URL: url, ENCRYPTION_KEYS: `${oldEntry},${entry}` })
    t.equal(await back.exited, 1)
    t.match(back.output(), /must be the first of ENCRYPTION_KEYS/)
    t.equal(await resealed(), needed, 'nothing goes back to the old key')

    await rollOut(entry)
    await delay(1_000)
    isOver = true
    await Promise.all([...load, refreshing])
    await balancer.stop()
    t.strictSame(failed.slice(0, 3), [])
    t.ok(calls > 500, `${calls} calls`)
    t.strictSame(await fleet.lost(USERS), [])
    const used = fleet.refreshes().length
    t.ok(used > USERS.length * 5, `${used} refreshes meanwhile`)
    const { rows: events } = await database.pool.query(
      `select outcome, details from audit_events where action = 'keys_rotated' order by at`,
    )
    t.match(events, [{ outcome: 'succeeded', details: { keyId: 'k2' } }])
  },
)
