// An upgrade as an operator does it: SIGTERM to one replica after the other, behind a balancer that heeds /readyz and
// repeats nothing. Nobody who calls may notice.

import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { startBalancer } from './support/balancer.ts'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { expectIntact } from './support/history.ts'
import type { Answer } from './support/replica.ts'

t.setTimeout(280_000)

const LONG = process.env['SOAK'] === '1'

t.test('rolling restarts under load fail no call and lose no grant', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t, env: { CALLER_WAIT_SECONDS: '15' } })
  const replicas = await Promise.all([fleet.add(), fleet.add()])
  const users = Array.from({ length: 40 }, (_, i) => `user-${i}`)
  await fleet.connect(users)
  const balancer = await startBalancer(replicas)
  fleet.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    ms: 300,
    times: Infinity,
  })
  const failed: Answer[] = []
  let calls = 0
  let isOver = false
  const callers = users.map(async (user) => {
    while (!isOver) {
      const answer = await balancer.token(user)
      calls += 1
      if (answer.status !== 200) failed.push(answer)
      await delay(20)
    }
  })
  const expiring = (async () => {
    for (let round = 0; !isOver; round += 1) {
      await fleet.expire(users.filter((_, i) => i % 8 === round % 8))
      await delay(150)
    }
  })()
  const codes: unknown[] = []
  for (let restart = 0; restart < (LONG ? 100 : 3); restart += 1) {
    const replica = replicas[restart % replicas.length]
    codes.push(await replica?.kill('SIGTERM'))
    await replica?.start()
    await delay(300)
  }
  isOver = true
  await Promise.all([...callers, expiring])
  await balancer.stop()
  t.strictSame([...new Set(codes)], [0])
  t.strictSame(failed, [])
  t.ok(fleet.refreshes().length > users.length, 'tokens were rotated all the while')
  t.ok(calls > users.length * 10)
  await expectIntact(t, fleet)
})
