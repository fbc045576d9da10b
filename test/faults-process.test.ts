// What becomes of a rotation when the process that does it is paused, killed or told to go.

import t from 'tap'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { readHistory } from './support/history.ts'

t.test('smoke', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t })
  let at = performance.now()
  const [a, b] = await Promise.all([fleet.add(), fleet.add()])
  console.error('start', performance.now() - at); at = performance.now()
  await fleet.connect(Array.from({ length: 100 }, (_, i) => `u${i}`))
  console.error('connect', performance.now() - at); at = performance.now()
  await fleet.expire()
  const answers = await Promise.all(Array.from({ length: 1000 }, (_, i) => (i % 2 ? a : b)!.token(`u${i % 100}`)))
  console.error('calls', performance.now() - at)
  t.strictSame([...new Set(answers.map((x) => x.status))], [200])
  console.error(await readHistory(fleet), await fleet.lost())
  console.error(await a!.kill('SIGTERM'), a!.log.slice(-5))
})
