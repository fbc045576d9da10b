// What becomes of a rotation when the process that does it is paused, killed or told to go. Every server here is strict:
// a refresh token works once, and a second use of it ends the login.

import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import type { Test } from 'tap'
import { createTestDatabase } from './support/database.ts'
import {
  askUntilServed,
  type Fleet,
  holdAnswers,
  LEASE_MS,
  setFleet,
  until,
} from './support/fleet.ts'
import { expectIntact, readHistory } from './support/history.ts'
import type { Answer, Replica } from './support/replica.ts'
import { killWhileSpooled } from './support/soak.ts'

t.setTimeout(280_000)

/** A lease that no test waits out: what is recovered before its end was not recovered by it. */
const LONG_LEASE = { REFRESH_LEASE_SECONDS: '60' }
/** Ten seconds are promised from the restart of an owner to the recovery, five from the end of its lease; doubled for a busy machine. */
const RESTART_LIMIT_MS = 2 * 10_000
const TAKE_OVER_LIMIT_MS = 2 * 5_000

async function setPair(t: Test): Promise<{ fleet: Fleet; owner: Replica; other: Replica }> {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t })
  const [owner, other] = await Promise.all([
    fleet.add(),
    fleet.add({ env: { CALLER_WAIT_SECONDS: '0.5' } }),
  ])
  return { fleet, owner, other }
}

/** Waits until so many refreshes have arrived at the server. */
async function arrived(fleet: Fleet, count: number): Promise<void> {
  await until(() => fleet.refreshes().length >= count, 10_000, `${count} calls at the server`)
}

/** Has the owner begin a refresh whose request the server never reads, and kills it. */
async function killInRequest(fleet: Fleet, owner: Replica, users: readonly string[]) {
  fleet.toServer.mode = 'stall'
  const opened = fleet.toServer.opened
  const waiting = users.map((user) => owner.token(user))
  await until(() => fleet.toServer.opened >= opened + users.length, 10_000, 'connections')
  await owner.kill('SIGKILL')
  await Promise.all(waiting)
  fleet.toServer.cut()
  fleet.toServer.mode = 'pass'
}

t.test('an owner that was killed comes back, or its lease ends', async (t) => {
  const { fleet, owner, other } = await setPair(t)
  await fleet.connect(['paused', 'again', 'over', 'ahead', 'slow', 'unread', 'unheard'])

  await t.test('an answer that came while the owner was paused is kept', async (t) => {
    const letGo = holdAnswers(fleet)
    await fleet.expire(['paused'])
    const waiting = owner.token('paused', { limitMs: 60_000 })
    await arrived(fleet, 1)
    owner.signal('SIGSTOP')
    letGo()
    // Beyond the deadline, the lease and the heartbeat's limit.
    await delay(LEASE_MS + 2_000)
    owner.signal('SIGCONT')
    await waiting
    await until(
      async () => (await fleet.row('paused')).generation === 2,
      10_000,
      'the late answer in the row',
    )
    t.equal((await other.token('paused')).status, 200)
    t.equal(fleet.refreshes().length, 1)
    await expectIntact(t, fleet)
  })

  await t.test('a slow answer is used, and callers are told to come again', async (t) => {
    const before = fleet.refreshes().length
    fleet.lookAlike.faults.push({ endpoint: 'token', kind: 'delay', when: 'after', ms: 2_500 })
    await fleet.expire(['slow'])
    const answer = await other.token('slow')
    t.equal(answer.status, 503)
    t.equal(answer.body['code'], 'temporarily_unavailable')
    t.ok(Number(answer.body['retry_after']) > 0)
    t.ok(answer.tookMs < 2_400, 'the caller is not kept for as long as the server')
    await until(
      async () => (await fleet.row('slow')).generation === 2,
      10_000,
      'the slow answer in the row',
    )
    t.equal((await owner.token('slow')).status, 200)
    t.equal(fleet.refreshes().length - before, 1)
    await expectIntact(t, fleet)
  })

  await t.test('an owner that stays away is succeeded when its lease is over', async (t) => {
    const before = fleet.refreshes().length
    await fleet.expire(['over'])
    await fleet.expire(['ahead'], 520)
    // The one in its last stretch is served and refreshed behind the caller.
    await killInRequest(fleet, owner, ['over', 'ahead'])
    const answers: Answer[] = []
    await until(
      async () => {
        answers.push(await other.token('ahead'))
        return (await other.token('over')).status === 200
      },
      LEASE_MS + TAKE_OVER_LIMIT_MS,
      'the take-over',
    )
    t.strictSame([...new Set(answers.map(({ status }) => status))], [200])
    const { rows } = await fleet.database.pool.query<{ waited: number }>(
      `select extract(epoch from max(armed_at) - min(armed_at))::float8 * 1000 as waited
       from refresh_attempts where user_id = 'over'`,
    )
    const waitedMs = rows[0]?.waited ?? 0
    t.ok(waitedMs >= LEASE_MS, `${waitedMs} ms is not before the lease is over`)
    t.ok(waitedMs <= LEASE_MS + TAKE_OVER_LIMIT_MS, `${waitedMs} ms is soon after it`)
    await until(
      async () => {
        await other.token('ahead')
        return (await fleet.row('ahead')).generation === 2
      },
      TAKE_OVER_LIMIT_MS,
      'the refresh ahead',
    )
    t.equal(fleet.refreshes().length - before, 2)
    await expectIntact(t, fleet)
  })

  await t.test('the restart of an owner frees its users long before the lease', async (t) => {
    await owner.start(LONG_LEASE)
    await fleet.expire(['again'])
    await killInRequest(fleet, owner, ['again'])
    t.equal((await other.token('again')).status, 503)
    await owner.start()
    const tookMs = await askUntilServed(other, 'again', RESTART_LIMIT_MS)
    t.ok(tookMs < RESTART_LIMIT_MS)
    await expectIntact(t, fleet)
  })

  await t.test('a restarted owner settles by itself what nobody asks about', async (t) => {
    const letGo = holdAnswers(fleet)
    await owner.kill('SIGTERM')
    await owner.start(LONG_LEASE)
    await fleet.expire(['unread', 'unheard'])
    const before = fleet.refreshes().length
    const waiting = owner.token('unheard')
    await arrived(fleet, before + 1)
    await killInRequest(fleet, owner, ['unread'])
    letGo()
    await waiting
    await owner.start()
    await until(
      async () => (await fleet.row('unread')).generation === 2,
      RESTART_LIMIT_MS,
      'the refresh that the server never read',
    )
    await until(
      async () => (await fleet.row('unheard')).state === 'reauthentication_required',
      RESTART_LIMIT_MS,
      'the report of the answer that nobody heard',
    )
    t.equal((await fleet.row('unheard')).reason, 'rotation_lost')
    t.strictSame(await fleet.lost(), ['unheard'])
  })
})

t.test('a second signal cuts nothing short', async (t) => {
  const { fleet, owner } = await setPair(t)
  await fleet.connect(['alice'])
  await fleet.expire(['alice'])
  const letGo = holdAnswers(fleet)
  const waiting = owner.token('alice')
  await arrived(fleet, 1)
  for (const name of ['SIGINT', 'SIGINT', 'SIGTERM', 'SIGTERM', 'SIGHUP', 'SIGQUIT'] as const) {
    owner.signal(name)
    await delay(100)
  }
  letGo()
  t.equal(await owner.gone(), 0)
  t.equal((await waiting).status, 200, 'who waits is answered')
  t.equal((await fleet.row('alice')).generation, 2)
  t.strictSame(await fleet.lost(), [])
  const told = owner.log.filter(({ event }) => event === 'shutdown_already_running')
  t.equal(told.length, 5)
})

t.test('answers in the spool outlive the process while the database is away', async (t) => {
  const { fleet, owner, other } = await setPair(t)
  const users = Array.from({ length: 10 }, (_, i) => `user-${i}`)
  await fleet.connect(users)
  await owner.kill('SIGTERM')
  // On a machine that others use too it takes a while until all the calls have arrived.
  await owner.start({
    ...{ ...LONG_LEASE, REFRESH_DEADLINE_SECONDS: '40', CALLER_WAIT_SECONDS: '15' },
    REFRESH_CONCURRENCY: String(users.length),
  })
  const { toDatabase } = fleet
  const figures = await killWhileSpooled(
    fleet,
    { owner, other },
    {
      users,
      deadMs: LEASE_MS / 2,
      database: {
        async stop() {
          toDatabase.mode = 'refuse'
          toDatabase.cut()
        },
        async start() {
          toDatabase.mode = 'pass'
        },
      },
    },
  )
  t.equal(figures.spooled, users.length)
  t.strictSame(figures.served, [200], 'spooled is served')
  t.strictSame(figures.refused, [503])
  t.equal(figures.presentedAgain, 0, 'nobody presents a token whose successor is spooled')
  t.equal(figures.recovered, users.length)
  t.equal(fleet.refreshes().length, users.length + 1, 'one each, and the first of all')
  t.strictSame((await readHistory(fleet)).presentedAgain, [])
  await expectIntact(t, fleet)
})
