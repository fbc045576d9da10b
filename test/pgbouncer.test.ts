// The whole product through PgBouncer in transaction mode: a login, rotations, a take-over, and PgBouncer itself killed
// in the middle of it.

import t from 'tap'
import { request } from 'undici'
import { logIn } from '../demo/look-alike/log-in.ts'
import { createTestDatabase } from './support/database.ts'
import { askUntilServed, inParallel, LEASE_MS, setFleet, until } from './support/fleet.ts'
import { expectIntact } from './support/history.ts'
import { hasPgBouncer, startPgBouncer } from './support/pgbouncer.ts'

t.setTimeout(280_000)

const USERS = ['pagero:alice', 'user-1', 'user-2', 'user-3', 'user-4']
const ROUNDS = 10
/** What RF-26 allows from the return of the database to the first success, doubled: others use the machine too. */
const RECOVERY_LIMIT_MS = 2 * 10_000

const skip = hasPgBouncer ? false : 'PgBouncer is not installed (Debian: apt-get install pgbouncer)'

t.test('everything works through PgBouncer in transaction mode', { skip }, async (t) => {
  const { url } = await createTestDatabase(t)
  const pgBouncer = await startPgBouncer(t, url)
  const fleet = await setFleet({ url: pgBouncer.url, test: t })
  const [one, two] = await Promise.all([fleet.add(), fleet.add()])

  // Not `fetch`, which says of itself that it is no navigation.
  const started = await request(`${one.publicOrigin}/auth/login`)
  await started.body.dump()
  const callback = new URL(await logIn(String(started.headers['location']), 'alice'))
  const cookies = [started.headers['set-cookie'] ?? []].flat().map((text) => text.split(';')[0])
  const loggedIn = await request(`${two.publicOrigin}${callback.pathname}${callback.search}`, {
    headers: { cookie: cookies.join('; ') },
  })
  await loggedIn.body.dump()
  t.equal(loggedIn.statusCode, 303)
  await fleet.connect(USERS.slice(1))

  for (let round = 0; round < ROUNDS; round += 1) {
    await fleet.expire()
    if (round === ROUNDS / 2) {
      const asking = USERS.map((user) => one.token(encodeURIComponent(user)))
      await pgBouncer.restart()
      await Promise.all(asking)
    }
    await inParallel(USERS, USERS.length, async (user) => {
      const replica = round % 2 === 0 ? one : two
      await askUntilServed(replica, encodeURIComponent(user), RECOVERY_LIMIT_MS)
    })
  }

  await fleet.expire(['user-1'])
  fleet.toServer.mode = 'stall'
  const { opened } = fleet.toServer
  const waiting = one.token('user-1')
  await until(() => fleet.toServer.opened > opened, RECOVERY_LIMIT_MS, 'the call')
  await one.kill('SIGKILL')
  await waiting
  fleet.toServer.cut()
  fleet.toServer.mode = 'pass'
  await askUntilServed(two, 'user-1', LEASE_MS + RECOVERY_LIMIT_MS)

  t.match(
    two.log.filter(({ event }) => event === 'prepared_statements_off'),
    [{ level: 'info' }],
    'what it does not follow is done without',
  )
  await expectIntact(t, fleet)
  t.ok(fleet.refreshes().length >= USERS.length * (ROUNDS - 1) + 1)
})
