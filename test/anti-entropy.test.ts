// The pass over the spool, in virtual time: what it applies, what it keeps and for how long, and what it says is done.

import t from 'tap'
import { createAntiEntropy } from '../src/anti-entropy.ts'
import { SETTINGS, setVirtualCore } from './support/virtual-core.ts'

function setUp() {
  const core = setVirtualCore()
  const antiEntropy = createAntiEntropy(core.ports, SETTINGS, core.identity)
  const grant = core.connect('alice')
  const keep = (attemptId: string, generation = 2) =>
    core.disk.set(attemptId, core.successorOf(grant.user, attemptId, generation))
  const isDrained = () => core.database.replicas.get('broker-0')?.spoolDrainedAtMs !== null
  return { ...core, antiEntropy, user: grant.user, keep, isDrained }
}

t.test('an entry that the row has not got is applied, and the first pass says so', async (t) => {
  const { antiEntropy, keep, outcomeOf, storedTokenOf, user, isDrained, events } = setUp()
  keep('a')
  t.notOk(isDrained())
  t.notOk(antiEntropy.drained())
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(storedTokenOf(user), 'rt-of-a')
  t.ok(antiEntropy.drained())
  await antiEntropy.untilDrained
  t.ok(isDrained(), 'and the others know')
  t.strictSame(events(), ['spool_entry_applied', 'spool_drained'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.strictSame(events(), ['spool_entry_applied', 'spool_drained'], 'both are told once')
})

t.test('an applied entry is kept for its time, from when it was first found so', async (t) => {
  for (const [afterMs, left] of [
    [119_999, 1],
    [120_000, 0],
  ] as const) {
    const { antiEntropy, keep, outcomeOf, disk, scheduler } = setUp()
    keep('a')
    await outcomeOf(antiEntropy.runOnce())
    // Both passes come to the entry equally late.
    await scheduler.run({ untilMs: afterMs })
    await outcomeOf(antiEntropy.runOnce())
    t.equal(disk.size, left, `${afterMs} ms`)
  }
})

t.test('an entry that comes back after it went is kept for its time anew', async (t) => {
  const { antiEntropy, keep, outcomeOf, disk, pass } = setUp()
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  disk.clear()
  await outcomeOf(antiEntropy.runOnce())
  await pass(500)
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  t.equal(disk.size, 1)
})

t.test(
  'an entry that cannot be applied keeps no other back, and the pass from ending',
  async (t) => {
    const { antiEntropy, keep, outcomeOf, storedTokenOf, user, isDrained, faults, log } = setUp()
    keep('a', 2)
    keep('b', 3)
    faults.set('store', ['lost'])
    t.equal(await outcomeOf(antiEntropy.runOnce()), false)
    t.equal(storedTokenOf(user), 'rt-of-b')
    t.notOk(antiEntropy.drained())
    t.notOk(isDrained())
    t.match(log.events, [
      { event: 'spool_entry_not_applied', user, attemptId: 'a' },
      { event: 'spool_entry_applied' },
    ])
    t.equal(await outcomeOf(antiEntropy.runOnce()), true)
    t.ok(antiEntropy.drained())
  },
)

t.test('a successor that no grant takes is revoked at Pagero, and forgotten', async (t) => {
  const { antiEntropy, keep, outcomeOf, user, disk, database, storedTokenOf } = setUp()
  keep('a')
  database.close(user, 1, undefined)
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(disk.size, 0)
  const [queued] = [...database.revocations.values()]
  t.match(queued, { user })
  t.match(queued?.tokenSealed.toString(), 'rt-of-a')
  t.equal(storedTokenOf(user), 'none')
})

t.test('what a failover took back is put back, as long as the entry is kept', async (t) => {
  const { antiEntropy, keep, outcomeOf, database, storedTokenOf, user, pass } = setUp()
  const putBack = database.snapshot()
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  putBack()
  t.equal(storedTokenOf(user), 'alice-rt')
  await pass(60)
  await outcomeOf(antiEntropy.runOnce())
  t.equal(storedTokenOf(user), 'rt-of-a')
})

t.test('it runs each half minute, and each second while the database is away', async (t) => {
  const { antiEntropy, calls, faults, pass, outcomeOf, isDrained, events } = setUp()
  const passes = () => calls.filter((name) => name === 'list').length
  faults.set('list', ['lost', 'lost'])
  faults.set('spoolDrained', ['lost'])
  antiEntropy.start()
  antiEntropy.start()
  await pass(0.9)
  t.equal(passes(), 1)
  t.strictSame(events(), ['spool_pass_failed'])
  await pass(2.2)
  t.equal(passes(), 4, 'once more for a word that was not taken')
  t.ok(isDrained())
  await pass(29)
  t.equal(passes(), 4)
  await pass(2)
  t.equal(passes(), 5)
  await outcomeOf(antiEntropy.stop())
  await pass(100)
  t.equal(passes(), 5)
})

t.test('a stop waits for the pass that is under way', async (t) => {
  const { antiEntropy, keep, pass, outcomeOf, storedTokenOf, user } = setUp()
  keep('a')
  antiEntropy.start()
  await pass(0)
  await outcomeOf(antiEntropy.stop())
  t.equal(storedTokenOf(user), 'rt-of-a')
})
