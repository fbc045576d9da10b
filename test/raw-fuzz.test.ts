// The corpus mutated at random, in a small form; `npm run fuzz` is the long one. The seed of a failure repeats it.

import t from 'tap'
import { createTestDatabase } from './support/database.ts'
import { startRawBroker } from './support/raw-broker.ts'
import { fuzz } from './support/raw-fuzz.ts'

t.test('no mutation of the corpus reaches the upstream as what it is not', async (t) => {
  const seed = Math.trunc(Math.random() * 2 ** 31)
  const { url } = await createTestDatabase(t)
  const broker = await startRawBroker(t, { databaseUrl: url, env: { LOG_LEVEL: 'error' } })
  const processId = broker.replica.processId()
  const figures = await fuzz(broker, { requests: 3_000, seconds: 60, seed })
  t.strictSame(figures.faults.slice(0, 10), [], `seed ${seed}, ${figures.requests} requests`)
  t.ok(figures.calls > 0 && Object.keys(figures.statuses).length > 3, 'both ways are gone')
  t.equal(broker.replica.processId(), processId, 'the process lives')
  t.equal((await broker.replica.ready()).status, 200)
})
