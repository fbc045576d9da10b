// The audit record of real processes: what a broker has answered is on record, whatever ends it in order and whatever
// becomes of PostgreSQL meanwhile.

import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { inParallel, setFleet, until } from './support/fleet.ts'
import { startOwnPostgres } from './support/own-postgres.ts'

t.setTimeout(180_000)

const postgres = await startOwnPostgres(t)
const fleet = await setFleet({ url: postgres.url(), test: t })
const users = Array.from({ length: 10 }, (_, i) => `user-${i}`)
await fleet.connect(users)

async function onRecord(): Promise<number> {
  const { rows } = await fleet.database.pool.query<{ times: number }>(
    "select coalesce(sum(count), 0)::integer as times from audit_events where action = 'token_handed_out'",
  )
  return rows[0]?.times ?? 0
}

/** Asks for tokens all at once, and returns how many were given. */
async function askFor(
  replica: Awaited<ReturnType<typeof fleet.add>>,
  calls: number,
): Promise<number> {
  let given = 0
  await inParallel(
    Array.from({ length: calls }, (_, i) => users[i % users.length] ?? ''),
    20,
    async (user) => {
      const { status } = await replica.token(user)
      given += Number(status === 200)
    },
  )
  return given
}

t.test('SIGTERM right after a thousand hand-outs loses none, and closes the chain', async (t) => {
  const replica = await fleet.add()
  const given = await askFor(replica, 1_000)
  t.ok(given > 900, `${given} given`)
  t.equal(await replica.kill('SIGTERM'), 0)
  t.equal(await onRecord(), given)
  const { rows } = await fleet.database.pool.query<{ action: string }>(
    'select action from audit_events order by sequence',
  )
  t.match(rows.at(0), { action: 'chain_opened' })
  t.same(rows.slice(-2), [{ action: 'broker_stopped' }, { action: 'chain_closed' }])
  t.ok(rows.some(({ action }) => action === 'broker_started'))
})

t.test('what is given out while PostgreSQL is stopped is on record once it is back', async (t) => {
  const replica = await fleet.add({ env: { STALE_LIMIT_SECONDS: '120' } })
  const before = await onRecord()
  let given = await askFor(replica, 100)
  await postgres.stopImmediately()
  const whileAway = await askFor(replica, 100)
  t.ok(whileAway > 0, `${whileAway} tokens from memory`)
  given += whileAway
  await delay(1_000)
  await postgres.start()
  fleet.moveDatabase(postgres.port())
  await until(async () => (await replica.ready()).status === 200, 30_000, 'readiness')
  const afterwards = await askFor(replica, 100)
  given += afterwards
  await until(async () => (await onRecord()) === before + given, 30_000, 'every hand-out on record')
  t.pass('none is missing, and none is there twice')
  t.equal(await replica.kill('SIGTERM'), 0)
  t.equal(await onRecord(), before + given)
})
