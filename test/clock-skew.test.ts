// Replicas whose wall clocks are hours off from each other and from the database, one of which jumps while it runs
// (RF-32). What replicas must agree on comes from the database's clock, what a process measures from its monotonic one;
// so nothing may be refreshed twice, served when it is over, or taken over too early. Needs Debian's faketime.

import { existsSync } from 'node:fs'
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { createBrowser } from './support/browser.ts'
import { createTestDatabase } from './support/database.ts'
import { askUntilServed, LEASE_MS, setFleet, until } from './support/fleet.ts'
import { expectIntact, readHistory } from './support/history.ts'
import type { Answer } from './support/replica.ts'

t.setTimeout(280_000)

const LIBRARY = ['x86_64', 'aarch64']
  .map((machine) => `/usr/lib/${machine}-linux-gnu/faketime/libfaketimeMT.so.1`)
  .find((path) => existsSync(path))
const skip = LIBRARY === undefined && 'faketime is not installed (Debian: apt-get install faketime)'

/** The wall clock is turned, the monotonic one is left alone, as on a machine whose time is set wrong. */
const FAKE = {
  LD_PRELOAD: LIBRARY ?? '',
  FAKETIME_DONT_FAKE_MONOTONIC: '1',
  DONT_FAKE_MONOTONIC: '1',
}
const ROUNDS = 6
/** From the read of the row to the answer in hand, on a busy machine. */
const TOLERANCE_SECONDS = 20
const TAKE_OVER_LIMIT_MS = 30_000

t.test('clocks that are hours off change nothing', { skip }, async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t, env: { CALLER_WAIT_SECONDS: '15' } })
  const directory = await mkdtemp(join(tmpdir(), 'broker-clock-'))
  t.teardown(() => rm(directory, { recursive: true, force: true }))
  const clockFile = join(directory, 'clock')
  /** Sets the clock of the third replica, which looks into the file each time. */
  async function turn(offset: string): Promise<void> {
    await writeFile(`${clockFile}.new`, `${offset}\n`)
    await rename(`${clockFile}.new`, clockFile)
  }
  await turn('+0')
  const [early, late, jumping] = await Promise.all([
    fleet.add({ env: { ...FAKE, FAKETIME: '-5h' } }),
    fleet.add({ env: { ...FAKE, FAKETIME: '+3h' } }),
    fleet.add({ env: { ...FAKE, FAKETIME_TIMESTAMP_FILE: clockFile, FAKETIME_NO_CACHE: '1' } }),
  ])
  const replicas = [early, late, jumping]
  const users = ['user-0', 'user-1', 'user-2', 'user-3', 'user-4']
  await fleet.connect([...users, 'over'])

  await t.test('the clocks are off, and one jumps', async (t) => {
    const hoursOff = async (one: (typeof replicas)[number]) => {
      const answer = await fetch(`${one.origin}/livez`)
      const atMs = Date.parse(answer.headers.get('date') ?? '')
      return Math.round((atMs - Date.now()) / 3_600_000)
    }
    t.strictSame(await Promise.all(replicas.map(hoursOff)), [-5, 3, 0])
    await turn('+48h')
    await until(async () => (await hoursOff(jumping)) === 48, 10_000, 'the jump')
  })

  await t.test('each rotation costs one call, and all are told the same', async (t) => {
    for (let round = 0; round < ROUNDS; round += 1) {
      await turn(round % 2 === 0 ? '-30h' : '+48h')
      await fleet.expire(users)
      const before = fleet.refreshes().length
      const answers = await Promise.all(
        users.map(async (user) => Promise.all(replicas.map((replica) => replica.token(user)))),
      )
      for (const same of answers) {
        t.strictSame([...new Set(same.map(({ status }) => status))], [200])
        t.equal(new Set(same.map(({ body }) => body['access_token'])).size, 1)
        t.ok(same.every(isToldRightly), JSON.stringify(same.map(({ body }) => body['expires_in'])))
      }
      t.equal(fleet.refreshes().length - before, users.length)
    }
    t.strictSame((await readHistory(fleet)).presentedAgain, [])
    await expectIntact(t, fleet)
  })

  await t.test(
    'a token in its last seconds is served for what is left of it, and not after',
    async (t) => {
      const [user = ''] = users
      const before = fleet.refreshes().length
      // 50 of 600 s are left: served with 50, and refreshed for whoever asks for more.
      await fleet.expire([user], 550)
      fleet.lookAlike.faults.push({
        endpoint: 'token',
        kind: 'status',
        status: 503,
        times: Infinity,
      })
      for (const replica of replicas) {
        const { status, body } = await replica.token(user)
        t.equal(status, 200)
        t.ok(isWithin(Number(body['expires_in']), 50), String(body['expires_in']))
        t.equal((await replica.token(user, { minTtl: 100 })).status, 503)
      }
      await fleet.expire([user], 60)
      for (const replica of replicas) t.equal((await replica.token(user)).status, 503)
      fleet.lookAlike.faults.length = 0
      for (const replica of replicas) await askUntilServed(replica, user, TAKE_OVER_LIMIT_MS)
      t.equal(
        fleet
          .refreshes()
          .slice(before)
          .filter(({ spent }) => spent !== undefined).length,
        1,
        'one rotation for all of them',
      )
    },
  )

  await t.test(
    'a login begun on one replica is completed on the next, its session known to all',
    async (t) => {
      for (const [begins, completes] of [
        [early, late],
        [late, jumping],
        [jumping, early],
      ] as const) {
        const browser = createBrowser(begins.publicOrigin)
        const target = await browser.authorize(`alice-${completes.name}`)
        const next = createBrowser(completes.publicOrigin)
        next.cookies = browser.cookies
        const answer = await next.open(target, 'cross-site')
        t.equal(answer.status, 303, answer.body)
        for (const replica of replicas) {
          const other = createBrowser(replica.publicOrigin)
          other.cookies = next.cookies
          const session = await other.fetch('/auth/session')
          t.equal(session.status, 200)
          const leftMs = Date.parse(String(session.json()['expires_at'])) - Date.now()
          t.ok(leftMs > 3_000_000 && leftMs <= 3_660_000, `${leftMs} ms of an hour are left`)
        }
      }
    },
  )

  await t.test('nobody takes over before the lease is over', async (t) => {
    await fleet.expire(['over'])
    fleet.toServer.mode = 'stall'
    const { opened } = fleet.toServer
    const waiting = early.token('over')
    await until(() => fleet.toServer.opened > opened, 10_000, 'the call')
    await early.kill('SIGKILL')
    await waiting
    fleet.toServer.cut()
    fleet.toServer.mode = 'pass'
    await Promise.all(
      [late, jumping].map((replica) =>
        askUntilServed(replica, 'over', LEASE_MS + TAKE_OVER_LIMIT_MS),
      ),
    )
    const { rows } = await fleet.database.pool.query<{ waited: number }>(
      `select extract(epoch from max(armed_at) - min(armed_at))::float8 * 1000 as waited
       from refresh_attempts where user_id = 'over'`,
    )
    t.ok((rows[0]?.waited ?? 0) >= LEASE_MS, `${rows[0]?.waited} ms`)
    await delay(100)
    await expectIntact(t, fleet)
  })
})

/** What a caller is told of a token that has just been made and lives ten minutes. */
function isToldRightly({ body }: Answer): boolean {
  const leftSeconds = (Date.parse(String(body['expires_at'])) - Date.now()) / 1000
  return isWithin(Number(body['expires_in']), 600) && isWithin(leftSeconds, 600)
}

/** Never more, and less only by what a busy machine takes. */
function isWithin(seconds: number, expected: number): boolean {
  return seconds <= expected + 1 && seconds >= expected - TOLERANCE_SECONDS
}
