// An upgrade as an operator does it: SIGTERM to one replica after the other, behind a balancer that heeds /readyz and
// repeats nothing. Nobody who calls may notice. `npm run soak` restarts a hundred times.

import t from 'tap'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { expectIntact } from './support/history.ts'
import { restartInTurn } from './support/soak.ts'

t.setTimeout(280_000)

t.test('rolling restarts under load fail no call and lose no grant', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t, env: { CALLER_WAIT_SECONDS: '15' } })
  await Promise.all([fleet.add(), fleet.add()])
  const users = Array.from({ length: 40 }, (_, i) => `user-${i}`)
  await fleet.connect(users)
  const figures = await restartInTurn(fleet, { users, restarts: 3 })
  t.strictSame(figures.exitCodes, [0])
  t.strictSame(figures.failed, [])
  t.ok(figures.rotations > users.length, 'tokens were rotated all the while')
  t.ok(figures.calls > users.length * 10)
  await expectIntact(t, fleet)
})
