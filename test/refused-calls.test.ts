// An API that refuses every token: what a thousand calls of one user cost the grant, and what they cost the API.

import t from 'tap'
import { Pool } from 'undici'
import { createTestDatabase } from './support/database.ts'
import { startRawBroker } from './support/raw-broker.ts'
import { answer } from './support/upstream.ts'

const CALLS = 1_000

t.test(
  'a thousand refused calls cost two refreshes at most, and each is repeated once at most',
  async (t) => {
    const { url } = await createTestDatabase(t)
    const broker = await startRawBroker(t, {
      databaseUrl: url,
      env: { LOG_LEVEL: 'error' },
      respond: (call) => answer(call, 401, 'no'),
    })
    const [, seat] = await broker.seat('alice')
    if (seat === undefined) throw new Error('no seat')
    const before = await broker.fleet.row('alice')
    const refreshesBefore = broker.fleet.refreshes().length
    const pool = new Pool(broker.replica.origin, { connections: 20, pipelining: 1 })
    t.teardown(() => pool.destroy())
    const statuses = await Promise.all(
      Array.from({ length: CALLS }, async () => {
        const { statusCode, body } = await pool.request({
          method: 'GET',
          path: `${seat.prefix}/a`,
          headers: { authorization: broker.replica.authorization },
        })
        await body.dump()
        return statusCode
      }),
    )
    t.strictSame([...new Set(statuses)], [401])
    const refreshes = broker.fleet.refreshes().length - refreshesBefore
    t.ok(refreshes >= 1 && refreshes <= 2, `${refreshes} refreshes`)
    t.ok(broker.upstream.calls.length <= 2 * CALLS, `${broker.upstream.calls.length} calls`)
    const after = await broker.fleet.row('alice')
    t.equal(after.state, 'active', 'the grant is as good as before')
    t.equal(after.generation, before.generation + refreshes)
    t.strictSame(await broker.fleet.lost(), [])
  },
)
