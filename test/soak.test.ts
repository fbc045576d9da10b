// The long run in small: every caller gets a token, every rotation costs one call, no grant is lost.
// `npm run soak` is the long form, with kills.

import t from 'tap'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { readHistory } from './support/history.ts'
import { rotateInPeace } from './support/soak.ts'

t.setTimeout(280_000)

t.test('a thousand rotations over two replicas cost a thousand calls and no grant', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({
    url,
    test: t,
    env: { LOG_LEVEL: 'warn', CALLER_WAIT_SECONDS: '30' },
  })
  await Promise.all([fleet.add(), fleet.add()])
  const users = Array.from({ length: 200 }, (_, i) => `user-${i}`)
  await fleet.connect(users)
  const figures = await rotateInPeace(fleet, { users, rotations: 1_000, callersPerGrant: 10 })
  t.match(figures, {
    rotations: 1_000,
    calls: 10_000,
    askedAgain: 0,
    unserved: 0,
    extraCalls: 0,
    lost: 0,
  })
  const { overlaps, unarmed, spent, granted, increments, presentedAgain } = await readHistory(fleet)
  t.strictSame([overlaps, unarmed, presentedAgain], [[], [], []])
  t.strictSame([spent, granted, increments], [1_000, 1_000, 1_000])
})
