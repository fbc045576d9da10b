// The stores of logins, sessions, revocations and replicas, on a real database: their boundaries, and
// what two callers at once get.

import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'

import { sql } from 'kysely'
import t, { type Test } from 'tap'

import { parseUserKey } from '../src/grant.ts'
import type { UserKey } from '../src/grant.ts'
import type { NewRevocation } from '../src/grant-stores.ts'
import type { Session, SessionStore, StartedLogin } from '../src/login-stores.ts'
import { createGrantStore } from '../src/postgres/grant-store.ts'
import { createLoginTransactionStore } from '../src/postgres/login-transaction-store.ts'
import { createReplicaStore } from '../src/postgres/replica-store.ts'
import { createRevocationStore } from '../src/postgres/revocation-store.ts'
import { createSessionStore } from '../src/postgres/session-store.ts'
import { createTestDatabase } from './support/database.ts'

const ALICE = parseUserKey('alice') as UserKey
const BOB = parseUserKey('bob') as UserKey
const CAROL = parseUserKey('carol') as UserKey

// ── Login transactions ───────────────────────────────────────────────────────────────────────────

const BROWSER = hashOf('browser')
const LIMITS = { lifetimeSeconds: 600, pendingMax: 5 }

function transaction(state: string, browser = BROWSER): StartedLogin & { returnTo: string } {
  return {
    stateHash: hashOf(state),
    browserBindingHash: browser,
    codeVerifierSealed: randomBytes(80),
    nonceHash: hashOf('nonce'),
    returnTo: '/orders?page=2',
    replacesSessionHash: hashOf('old session'),
  }
}

t.test('a login transaction comes back as it was stored, once', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createLoginTransactionStore(db)
  const full = transaction('full')
  const bare = {
    ...transaction('bare'),
    codeVerifierSealed: null,
    nonceHash: null,
    replacesSessionHash: null,
  }
  for (const stored of [full, bare]) {
    await store.create(stored, LIMITS)
    const { returnedAt, ...returned } = (await store.consume(stored.stateHash, BROWSER)) ?? {}
    t.strictSame(returned, { ...stored, connect: null })
    t.ok(Math.abs(Number(returnedAt) - Date.now()) < 60_000)
    t.equal(await store.consume(stored.stateHash, BROWSER), undefined)
  }
})

t.test('of twenty callbacks with one state at once exactly one gets the transaction', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createLoginTransactionStore(db)
  await store.create(transaction('state'), LIMITS)
  const taken = await Promise.all(
    Array.from({ length: 20 }, () => store.consume(hashOf('state'), BROWSER)),
  )
  t.equal(taken.filter((one) => one !== undefined).length, 1)
})

t.test('another browser neither gets the transaction nor uses it up', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createLoginTransactionStore(db)
  await store.create(transaction('state'), LIMITS)
  t.equal(await store.consume(hashOf('state'), hashOf('other browser')), undefined)
  t.ok(await store.consume(hashOf('state'), BROWSER))
})

t.test('a transaction lives until its expiry and not a moment longer', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createLoginTransactionStore(db)
  for (const state of ['expired', 'live']) await store.create(transaction(state), LIMITS)
  const { rows } = await sql<{ seconds: number }>`
    select extract(epoch from expires_at - clock_timestamp())::float8 as seconds
    from login_transactions`.execute(db)
  t.ok(rows.every(({ seconds }) => seconds > 590 && seconds <= 600))

  await db
    .updateTable('login_transactions')
    .set({ expires_at: sql<Date>`clock_timestamp()` })
    .where('state_hash', '=', hashOf('expired'))
    .execute()
  t.equal(await store.consume(hashOf('expired'), BROWSER), undefined)
  t.equal(await store.sweep(), 1)
  t.equal(await store.sweep(), 0)
  t.ok(await store.consume(hashOf('live'), BROWSER))
})

t.test('a browser keeps its newest pending logins up to the cap, others keep theirs', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createLoginTransactionStore(db)
  const limits = { lifetimeSeconds: 600, pendingMax: 3 }
  const otherBrowser = hashOf('other browser')
  await store.create(transaction('of another', otherBrowser), limits)
  for (let tab = 1; tab <= 8; tab++) await store.create(transaction(`tab ${tab}`), limits)

  const kept: number[] = []
  for (let tab = 1; tab <= 8; tab++) {
    if (await store.consume(hashOf(`tab ${tab}`), BROWSER)) kept.push(tab)
  }
  t.strictSame(kept, [6, 7, 8])
  t.ok(await store.consume(hashOf('of another'), otherBrowser))
})

// ── Sessions ─────────────────────────────────────────────────────────────────────────────────────

const LIFETIMES = { idleSeconds: 3_600, absoluteSeconds: 43_200 }
const FRESH = { replaces: null, perUserMax: 10 }

/** The store of sessions on a database where these users have a grant each, and a session is always begun. */
async function openSessions(t: Test) {
  const { database } = await createTestDatabase(t)
  const { db, pool } = database
  const sessions = createSessionStore(db)
  const grants = createGrantStore(database, {
    ...{ refreshTokenLifetime: 'P3Y', heartbeatStaleSeconds: 20, zombieWaitSeconds: 600 },
    databaseSettleSeconds: 0,
  })
  for (const user of [ALICE, BOB, 'idle_expires_at', 'absolute_expires_at']) {
    await sql`
      insert into grants (user_id, login_id, generation, authenticated_at, rotated_at,
        rolling_expires_at, absolute_expires_at)
      values (${user}, gen_random_uuid(), 1, now(), now(), now(), now())`.execute(db)
  }
  const create = async (...given: Parameters<SessionStore['create']>) => {
    const session = await sessions.create(...given)
    if (session === undefined) throw new Error('no session was begun')
    return session
  }
  return { db, pool, sessions, grants, store: { ...sessions, create } }
}

/** What is left of its life is less with each look. */
function withoutLife(session: Session | undefined) {
  return { ...session, lifeLeftMs: undefined }
}

t.test('a session is made with both expiries and resolves to itself', async (t) => {
  const { store } = await openSessions(t)
  const session = await store.create(hashOf('token'), ALICE, LIFETIMES, FRESH)
  t.equal(session.user, ALICE)
  t.equal(lifeMs(session.createdAt, session.idleExpiresAt), 3_600_000)
  t.equal(lifeMs(session.createdAt, session.absoluteExpiresAt), 43_200_000)
  t.equal(session.lifeLeftMs, 3_600_000)
  const resolved = await store.resolve(hashOf('token'), LIFETIMES)
  t.strictSame(withoutLife(resolved), withoutLife(session))
  t.ok(resolved && resolved.lifeLeftMs <= 3_600_000 && resolved.lifeLeftMs > 3_500_000)
  t.equal(await store.resolve(hashOf('another token'), LIFETIMES), undefined)
})

t.test('the idle expiry never lies beyond the absolute one', async (t) => {
  const { db, store } = await openSessions(t)
  const short = { idleSeconds: 3_600, absoluteSeconds: 60 }
  const session = await store.create(hashOf('token'), ALICE, short, FRESH)
  t.strictSame(session.idleExpiresAt, session.absoluteExpiresAt)
  await db
    .updateTable('sessions')
    .set({ last_seen_at: sql<Date>`last_seen_at - '1 hour'::interval` })
    .execute()
  const resolved = await store.resolve(hashOf('token'), short)
  t.strictSame(withoutLife(resolved), withoutLife(session))
})

t.test('use moves the idle expiry on, and is written at most every thirty seconds', async (t) => {
  const { db, store } = await openSessions(t)
  const session = await store.create(hashOf('token'), ALICE, LIFETIMES, FRESH)
  const age = (seconds: number) =>
    db
      .updateTable('sessions')
      .set({
        last_seen_at: sql<Date>`clock_timestamp() - make_interval(secs => ${seconds})`,
        idle_expires_at: session.idleExpiresAt,
      })
      .execute()

  await age(29)
  t.strictSame(
    (await store.resolve(hashOf('token'), LIFETIMES))?.idleExpiresAt,
    session.idleExpiresAt,
  )
  await age(30)
  const slid = await store.resolve(hashOf('token'), LIFETIMES)
  t.ok(slid && slid.idleExpiresAt > session.idleExpiresAt)
  t.strictSame(slid?.absoluteExpiresAt, session.absoluteExpiresAt)
  const again = await store.resolve(hashOf('token'), LIFETIMES)
  t.strictSame(withoutLife(again), withoutLife(slid), 'and the row says the same')
})

t.test('an idle life of seconds slides as well', async (t) => {
  const { db, store } = await openSessions(t)
  const brief = { idleSeconds: 4, absoluteSeconds: 60 }
  const session = await store.create(hashOf('token'), ALICE, brief, FRESH)
  await db
    .updateTable('sessions')
    .set({ last_seen_at: sql<Date>`last_seen_at - '1 second'::interval` })
    .execute()
  const slid = await store.resolve(hashOf('token'), brief)
  t.ok(slid && slid.idleExpiresAt > session.idleExpiresAt)
})

t.test('a session is over at either expiry, and use does not wake it', async (t) => {
  const { db, store } = await openSessions(t)
  for (const column of ['idle_expires_at', 'absolute_expires_at'] as const) {
    const token = hashOf(column)
    await store.create(token, column as UserKey, LIFETIMES, FRESH)
    await db
      .updateTable('sessions')
      .set({ [column]: sql<Date>`clock_timestamp()`, last_seen_at: new Date(0) })
      .where('token_hash', '=', token)
      .execute()
    t.equal(await store.resolve(token, LIFETIMES), undefined, column)
    t.equal(await store.resolve(token, LIFETIMES), undefined, column)
  }
  await store.create(hashOf('of bob'), BOB, LIFETIMES, FRESH)
  t.equal(await store.sweep(), 2)
  t.ok(await store.resolve(hashOf('of bob'), LIFETIMES))
})

t.test('the session that a login replaces is over with it, whoever it was of', async (t) => {
  const { store } = await openSessions(t)
  for (const [old, user] of [
    ['old of alice', ALICE],
    ['old of bob', BOB],
  ] as const) {
    await store.create(hashOf(old), user, LIFETIMES, FRESH)
    const options = { replaces: hashOf(old), perUserMax: 10 }
    await store.create(hashOf(`new after ${old}`), ALICE, LIFETIMES, options)
    t.equal(await store.resolve(hashOf(old), LIFETIMES), undefined)
    t.ok(await store.resolve(hashOf(`new after ${old}`), LIFETIMES))
  }
})

t.test('a user keeps the newest live sessions up to the cap', async (t) => {
  const { db, store } = await openSessions(t)
  const options = { replaces: null, perUserMax: 3 }
  await store.create(hashOf('of bob'), BOB, LIFETIMES, options)
  for (let n = 1; n <= 5; n++) await store.create(hashOf(`s${n}`), ALICE, LIFETIMES, options)
  t.strictSame(await liveOf(['s1', 's2', 's3', 's4', 's5', 'of bob']), ['s3', 's4', 's5', 'of bob'])

  // An expired one takes no place.
  await db
    .updateTable('sessions')
    .set({ idle_expires_at: sql<Date>`clock_timestamp()` })
    .where('token_hash', '=', hashOf('s5'))
    .execute()
  await store.create(hashOf('s6'), ALICE, LIFETIMES, options)
  t.strictSame(await liveOf(['s3', 's4', 's5', 's6']), ['s3', 's4', 's6'])

  // Nor does the one that is replaced.
  await store.create(hashOf('s7'), ALICE, LIFETIMES, { replaces: hashOf('s6'), perUserMax: 3 })
  t.strictSame(await liveOf(['s3', 's4', 's6', 's7']), ['s3', 's4', 's7'])

  await store.create(hashOf('only'), ALICE, LIFETIMES, { replaces: null, perUserMax: 1 })
  t.strictSame(await liveOf(['s3', 's4', 's7', 'only', 'of bob']), ['only', 'of bob'])

  async function liveOf(names: string[]): Promise<string[]> {
    const found: string[] = []
    for (const name of names) {
      if (await store.resolve(hashOf(name), LIFETIMES)) found.push(name)
    }
    return found
  }
})

t.test(
  'ending one session leaves the others, ending all of a user leaves other users',
  async (t) => {
    const { store } = await openSessions(t)
    for (const name of ['a1', 'a2', 'a3']) await store.create(hashOf(name), ALICE, LIFETIMES, FRESH)
    await store.create(hashOf('b1'), BOB, LIFETIMES, FRESH)
    await store.end(hashOf('a1'))
    await store.end(hashOf('a1'))
    t.equal(await store.resolve(hashOf('a1'), LIFETIMES), undefined)
    t.equal(await store.endAll(ALICE), 2)
    t.equal(await store.endAll(ALICE), 0)
    t.ok(await store.resolve(hashOf('b1'), LIFETIMES))
  },
)

t.test('nobody gets a session without a grant, or with one that is closed', async (t) => {
  const { sessions, pool } = await openSessions(t)
  t.equal(await sessions.create(hashOf('of carol'), CAROL, LIFETIMES, FRESH), undefined)
  await pool.query("update grants set state = 'revoked' where user_id = 'alice'")
  t.equal(await sessions.create(hashOf('of alice'), ALICE, LIFETIMES, FRESH), undefined)
  t.ok(await sessions.create(hashOf('of bob'), BOB, LIFETIMES, FRESH))
  await pool.query("update grants set state = 'reauthentication_required'")
  t.ok(await sessions.create(hashOf('again of alice'), ALICE, LIFETIMES, FRESH), 'to log in again')
})

t.test('a session that begins while the grant is being closed is over with it', async (t) => {
  const { db, pool, sessions, grants } = await openSessions(t)
  const token = hashOf('token')
  let closing: Promise<boolean> | undefined
  await db.transaction().execute(async (uncommitted) => {
    t.ok(await createSessionStore(uncommitted).create(token, ALICE, LIFETIMES, FRESH))
    closing = grants.close(ALICE, 1, undefined)
    const waiting = () =>
      pool.query(
        "select 1 from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'placed'",
      )
    while ((await waiting()).rows.length === 0) await delay(5)
  })
  t.equal(await closing, true)
  t.equal(await sessions.resolve(token, LIFETIMES), undefined)
  t.equal(await sessions.create(token, ALICE, LIFETIMES, FRESH), undefined)
})

// ── Revocations ──────────────────────────────────────────────────────────────────────────────────

function revocation(user = ALICE): NewRevocation {
  return { revocationId: randomUUID(), user, tokenSealed: randomBytes(90), keyId: 'k1' }
}

t.test(
  'a revocation is taken as it was added, and adding it twice is adding it once',
  async (t) => {
    const { db } = (await createTestDatabase(t)).database
    const store = createRevocationStore(db)
    const added = revocation()
    await store.add(added)
    await store.add(added)
    t.strictSame(await store.take(10, 60), [{ ...added, failureCount: 0 }])
  },
)

t.test(
  'one that is taken is hidden until the lease is over, and gone when it is done',
  async (t) => {
    const { db } = (await createTestDatabase(t)).database
    const store = createRevocationStore(db)
    const added = revocation()
    await store.add(added)
    t.equal((await store.take(10, 60)).length, 1)
    t.equal((await store.take(10, 60)).length, 0)
    await db
      .updateTable('revocations')
      .set({ next_attempt_at: sql<Date>`clock_timestamp()` })
      .execute()
    t.equal((await store.take(10, 60)).length, 1, 'its replica has died')
    await store.done(added.revocationId)
    await db
      .updateTable('revocations')
      .set({ next_attempt_at: new Date(0) })
      .execute()
    t.equal((await store.take(10, 60)).length, 0)
  },
)

t.test('one that failed waits for its delay and counts its failures', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createRevocationStore(db)
  const added = revocation()
  await store.add(added)
  await store.take(1, 60)
  await store.retryLater(added.revocationId, 120)
  t.equal((await store.take(10, 60)).length, 0)
  const { rows } = await sql<{ seconds: number }>`
    select extract(epoch from next_attempt_at - clock_timestamp())::float8 as seconds
    from revocations`.execute(db)
  t.ok(rows[0] && rows[0].seconds > 115 && rows[0].seconds <= 120)
  await store.retryLater(added.revocationId, 0)
  t.match(await store.take(10, 60), [{ revocationId: added.revocationId, failureCount: 2 }])
})

t.test('replicas that take at once share the queue, each one goes to one of them', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createRevocationStore(db)
  const added = Array.from({ length: 20 }, () => revocation())
  for (const one of added) await store.add(one)
  const batches = await Promise.all(Array.from({ length: 8 }, () => store.take(5, 60)))
  t.ok(batches.every((batch) => batch.length <= 5))
  const taken = batches.flat().map(({ revocationId }) => revocationId)
  t.equal(new Set(taken).size, taken.length, 'none twice')
  const rest = (await store.take(20, 60)).map(({ revocationId }) => revocationId)
  t.strictSame(
    [...taken, ...rest].toSorted(),
    added.map(({ revocationId }) => revocationId).toSorted(),
    'none lost',
  )
})

// ── Replicas ─────────────────────────────────────────────────────────────────────────────────────

t.test('a heartbeat is seen, and does not undo what the boot has drained', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createReplicaStore(db)
  const boot = randomUUID()
  const read = () => db.selectFrom('replicas').selectAll().executeTakeFirstOrThrow()

  await store.heartbeat('r1', boot)
  const first = await read()
  t.match(first, { name: 'r1', boot, spool_drained_at: null })

  const asOf = await store.now()
  t.ok(asOf >= first.seen_at)
  await store.spoolDrained('r1', boot, asOf)
  const drained = await read()
  t.strictSame(drained.spool_drained_at, asOf)
  t.ok(drained.seen_at > first.seen_at)

  await store.heartbeat('r1', boot)
  await store.spoolDrained('r1', boot, new Date(asOf.getTime() - 1_000))
  const later = await read()
  t.strictSame(later.spool_drained_at, asOf, 'an earlier look that is heard of late')
  t.strictSame(later.booted_at, first.booted_at)
  t.ok(later.seen_at > drained.seen_at)

  const again = new Date(asOf.getTime() + 30_000)
  await store.spoolDrained('r1', boot, again)
  t.strictSame((await read()).spool_drained_at, again, 'a later look')
})

t.test('a new boot begins with a spool that is not drained', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createReplicaStore(db)
  const [before, after] = [randomUUID(), randomUUID()]
  await store.heartbeat('r1', before)
  await store.spoolDrained('r1', before, await store.now())
  const old = await db.selectFrom('replicas').selectAll().executeTakeFirstOrThrow()
  await store.heartbeat('r1', after)
  const row = await db.selectFrom('replicas').selectAll().executeTakeFirstOrThrow()
  t.match(row, { name: 'r1', boot: after, spool_drained_at: null })
  t.ok(row.booted_at > old.booted_at)

  await store.spoolDrained('r2', before, await store.now())
  const second = await db
    .selectFrom('replicas')
    .selectAll()
    .where('name', '=', 'r2')
    .executeTakeFirstOrThrow()
  t.ok(second.spool_drained_at, 'even when it was not heard of before')
})

t.test('a late word of a boot that is over does not make it the present one', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createReplicaStore(db)
  const [over, present] = [randomUUID(), randomUUID()]
  await store.heartbeat('r1', over)
  await store.heartbeat('r1', present)
  await store.spoolDrained('r1', over, await store.now())
  const row = await db.selectFrom('replicas').selectAll().executeTakeFirstOrThrow()
  t.match(row, { boot: present, spool_drained_at: null })
})

t.test('heartbeats are steady since the last gap', async (t) => {
  const { db } = (await createTestDatabase(t)).database
  const store = createReplicaStore(db, { heartbeatStaleSeconds: 20 })
  const boot = randomUUID()
  const read = () => db.selectFrom('replicas').selectAll().executeTakeFirstOrThrow()
  const ago = (seconds: number) =>
    db
      .updateTable('replicas')
      .set({ seen_at: sql<Date>`clock_timestamp() - make_interval(secs => ${seconds})` })
      .execute()
  await store.heartbeat('r1', boot)
  const first = await read()
  await ago(9)
  await store.heartbeat('r1', boot)
  t.strictSame((await read()).steady_since, first.steady_since)
  await ago(11)
  await store.heartbeat('r1', boot)
  t.ok((await read()).steady_since > first.steady_since, 'longer than half of the limit')
})

// ── An absent database ───────────────────────────────────────────────────────────────────────────

t.test('without a database every method is temporarily unavailable', async (t) => {
  const { database } = await createTestDatabase(t)
  const { db } = database
  await database.close()
  const hash = hashOf('any')
  const logins = createLoginTransactionStore(db)
  const sessions = createSessionStore(db)
  const revocations = createRevocationStore(db)
  const replicas = createReplicaStore(db)
  const calls: Array<() => Promise<unknown>> = [
    () => logins.create(transaction('state'), LIMITS),
    () => logins.consume(hash, BROWSER),
    () => logins.sweep(),
    () => sessions.create(hash, ALICE, LIFETIMES, FRESH),
    () => sessions.resolve(hash, LIFETIMES),
    () => sessions.end(hash),
    () => sessions.endAll(ALICE),
    () => sessions.sweep(),
    () => revocations.add(revocation()),
    () => revocations.take(1, 1),
    () => revocations.done(randomUUID()),
    () => revocations.retryLater(randomUUID(), 1),
    () => replicas.heartbeat('r1', randomUUID()),
    () => replicas.now(),
    () => replicas.spoolDrained('r1', randomUUID(), new Date()),
  ]
  for (const call of calls)
    await t.rejects(call(), { code: 'temporarily_unavailable' }, String(call))
})

function hashOf(text: string): Buffer {
  return createHash('sha256').update(text).digest()
}

function lifeMs(from: Date, until: Date): number {
  return until.getTime() - from.getTime()
}
