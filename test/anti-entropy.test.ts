// The pass over the spool, in virtual time: what it applies, what it keeps and for how long, and what it says is done.

import t from 'tap'
import { createAntiEntropy } from '../src/anti-entropy.ts'
import { BrokerError } from '../src/errors.ts'
import { SETTINGS, setVirtualCore } from './support/virtual-core.ts'

function setUp() {
  const core = setVirtualCore()
  const antiEntropy = createAntiEntropy(core.ports, SETTINGS, core.identity)
  const grant = core.connect('alice')
  const keep = (attemptId: string, generation = 2) =>
    core.disk.set(attemptId, core.successorOf(grant.user, attemptId, generation))
  /** Has the ledger know the attempt. */
  const arm = (attemptId: string) =>
    core.database.arm({
      ...{ user: grant.user, loginId: grant.loginId, generation: grant.generation, attemptId },
      ...{
        ...core.identity,
        tokenDigest: Buffer.from('digest'),
        cause: 'expiry',
        leaseSeconds: 60,
      },
    })
  const isDrained = () => core.database.replicas.get('broker-0')?.spoolDrainedAtMs !== null
  return { ...core, antiEntropy, user: grant.user, keep, arm, isDrained }
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

t.test(
  'while an entry cannot be read the others are applied, and nothing is said to be done',
  async (t) => {
    const { antiEntropy, keep, server, outcomeOf, storedTokenOf, user, isDrained, calls } = setUp()
    keep('a')
    server.spoolIsWhole = false
    t.equal(await outcomeOf(antiEntropy.runOnce()), false)
    t.equal(storedTokenOf(user), 'rt-of-a')
    t.notOk(isDrained())
    t.notOk(antiEntropy.drained())
    t.notOk(calls.includes('spoolDrained'))
    server.spoolIsWhole = true
    t.equal(await outcomeOf(antiEntropy.runOnce()), true)
    t.ok(isDrained())
  },
)

t.test('an applied entry is kept for its time, from when it was first found so', async (t) => {
  for (const [afterMs, left] of [
    [119_999, 1],
    [120_000, 0],
  ] as const) {
    const { antiEntropy, keep, outcomeOf, disk, scheduler, database, successorOf, user } = setUp()
    keep('a')
    // The ledger knows nothing of it.
    database.store(successorOf(user, 'a', 2))
    await outcomeOf(antiEntropy.runOnce())
    await scheduler.run({ untilMs: scheduler.nowMs() + afterMs })
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

t.test('its time counts from when it was applied, whichever process did that', async (t) => {
  const { antiEntropy, ports, identity, keep, arm, outcomeOf, disk, pass } = setUp()
  arm('a')
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  for (const [seconds, left] of [
    [119, 1],
    [1, 0],
  ] as const) {
    await pass(seconds)
    await outcomeOf(createAntiEntropy(ports, SETTINGS, identity).runOnce())
    t.equal(disk.size, left)
  }
})

t.test('of a login the newest applied entry is kept, and of another login too', async (t) => {
  const { antiEntropy, keep, outcomeOf, disk, connect, successorOf, database, faults, pass } =
    setUp()
  const bob = connect('bob', { loginId: '00000000-0000-4000-8000-00000000000b' })
  keep('a', 2)
  keep('b', 3)
  keep('c', 4)
  disk.set('d', { ...successorOf(bob.user, 'd', 2), loginId: bob.loginId })
  const putBack = database.snapshot()
  // What is not in the row yet takes the place of nothing.
  faults.set('store', [undefined, undefined, 'lost'])
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame([...disk.keys()].toSorted(), ['b', 'c', 'd'])
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame([...disk.keys()].toSorted(), ['c', 'd'])
  putBack()
  await pass(30)
  await outcomeOf(antiEntropy.runOnce())
  t.equal(database.grants.get(bob.user)?.generation, 2)
  t.equal(database.grants.get('alice' as typeof bob.user)?.generation, 4)
})

t.test(
  'in a crowded spool the oldest applied entries go early, and none in a minute',
  async (t) => {
    const { antiEntropy, outcomeOf, disk, server, connect, successorOf, pass, log, faults } =
      setUp()
    const keepAnother = (attemptId: string) => {
      const loginId = `00000000-0000-4000-8000-00000000000${attemptId}`
      const { user } = connect(attemptId, { loginId })
      disk.set(attemptId, { ...successorOf(user, attemptId, 2), loginId })
    }
    const holds = async () => {
      await outcomeOf(antiEntropy.runOnce())
      return [...disk.keys()].join('')
    }
    keepAnother('c')
    t.equal(await holds(), 'c')
    await pass(20)
    for (const attemptId of ['a', 'b', 'd']) keepAnother(attemptId)
    t.equal(await holds(), 'cabd')
    server.entriesMax = 2
    await pass(39)
    t.equal(await holds(), 'cabd', 'none for a minute')
    t.notOk(log.events.some(({ event }) => event === 'spool_crowded'))
    await pass(2)
    t.equal(await holds(), 'abd', 'nor one more than has had it')
    t.match(log.events.at(-1), { event: 'spool_crowded', count: 1 })
    faults.set('remove', ['lost'])
    await pass(20)
    t.equal(await holds(), 'abd')
    t.match(log.events.at(-1), { event: 'spool_entry_not_removed' })
    const told = log.events.length
    t.equal(await holds(), 'bd', 'nor more than there are too many')
    t.match(log.events.at(-1), { event: 'spool_crowded', count: 1 })
    t.equal(await holds(), 'bd')
    t.equal(log.events.length, told + 1, 'it is told when it costs something')
  },
)

t.test(
  'the oldest is the one that was applied first, in whatever order they are found',
  async (t) => {
    const { ports, identity, connect, successorOf, database, disk, outcomeOf, pass, server } =
      setUp()
    const applyAnother = async (attemptId: string) => {
      const loginId = `00000000-0000-4000-8000-00000000000${attemptId}`
      const { user, generation } = connect(attemptId, { loginId })
      // The ledger tells when it was applied.
      database.arm({
        ...{ user, loginId, generation, attemptId, tokenDigest: Buffer.from('digest') },
        ...{ ...identity, cause: 'expiry', leaseSeconds: 60 },
      })
      disk.set(attemptId, { ...successorOf(user, attemptId, 2), loginId })
      await outcomeOf(createAntiEntropy(ports, SETTINGS, identity).runOnce())
      await pass(10)
    }
    for (const attemptId of ['a', 'b', 'c']) await applyAnother(attemptId)
    const found = [...disk].toReversed()
    disk.clear()
    for (const [attemptId, successor] of found) disk.set(attemptId, successor)
    await pass(50)
    server.entriesMax = 1
    await outcomeOf(createAntiEntropy(ports, SETTINGS, identity).runOnce())
    t.strictSame([...disk.keys()], ['c'])
  },
)

t.test('what is not applied stays in a crowded spool for as long as it takes', async (t) => {
  const { antiEntropy, keep, outcomeOf, disk, server, faults, pass } = setUp()
  keep('a')
  server.entriesMax = 0
  for (let i = 0; i < 3; i += 1) {
    faults.set('store', ['lost'])
    t.equal(await outcomeOf(antiEntropy.runOnce()), false)
    await pass(100)
  }
  t.equal(disk.size, 1)
})

t.test(
  'the time of an entry does not pass while a process stands still within a pass',
  async (t) => {
    const { ports, antiEntropy, keep, outcomeOf, disk, database, successorOf, user } = setUp()
    keep('a')
    // The ledger knows nothing of it, so that its time counts from when it was found.
    database.store(successorOf(user, 'a', 2))
    await outcomeOf(antiEntropy.runOnce())
    const { list } = ports.spool
    ports.spool.list = async (known) => {
      const listed = await list(known)
      await ports.clock.sleep(200_000)
      return listed
    }
    await outcomeOf(antiEntropy.runOnce())
    t.equal(disk.size, 1)
    await outcomeOf(antiEntropy.runOnce())
    t.equal(disk.size, 0)
  },
)

t.test('what is applied is asked for many at a time', async (t) => {
  const { ports, identity, keep, outcomeOf, calls, disk } = setUp()
  const asked: number[] = []
  const grants: typeof ports.grants = {
    ...ports.grants,
    findStored: (successors) => {
      asked.push(successors.length)
      return ports.grants.findStored(successors)
    },
  }
  const antiEntropy = createAntiEntropy({ ...ports, grants }, SETTINGS, identity)
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(asked, [], 'of nothing nothing is asked')
  for (let generation = 2; generation <= 1_001; generation += 1) keep(`a${generation}`, generation)
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.strictSame(asked, [500, 500])
  t.equal(disk.size, 1)
  calls.length = 0
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'findStored', 'list', 'spoolDrained'])
})

t.test('what is applied is not read again, until a failover has taken it back', async (t) => {
  const { antiEntropy, keep, outcomeOf, calls, database, storedTokenOf, user } = setUp()
  const putBack = database.snapshot()
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'list', 'findStored', 'read', 'store', 'spoolDrained'])
  calls.length = 0
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'findStored', 'list', 'spoolDrained'])
  putBack()
  calls.length = 0
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  const again = ['now', 'findStored', 'list', 'findStored', 'read', 'store', 'spoolDrained']
  t.strictSame(calls, again)
  t.equal(storedTokenOf(user), 'rt-of-a')
})

t.test('an entry that is gone when it is to be read keeps no pass from ending', async (t) => {
  const { antiEntropy, keep, outcomeOf, calls, disk, ports, isDrained, events } = setUp()
  keep('a')
  const { list } = ports.spool
  ports.spool.list = async () => {
    const listed = await list()
    disk.clear()
    return listed
  }
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.ok(isDrained())
  t.notOk(calls.includes('store'))
  t.strictSame(events(), ['spool_drained'])
})

t.test('what is applied and listed beside others is not asked for twice', async (t) => {
  const { antiEntropy, keep, outcomeOf, calls, ports } = setUp()
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  const { list } = ports.spool
  ports.spool.list = () => list()
  calls.length = 0
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'findStored', 'list', 'spoolDrained'])
})

t.test('what has left the spool is asked for no more', async (t) => {
  const { antiEntropy, keep, outcomeOf, calls, database, user, disk } = setUp()
  keep('a')
  // The ledger knows nothing of it, as after a failover.
  await outcomeOf(antiEntropy.runOnce())
  database.close(user, 2, undefined)
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(disk.size, 0)
  calls.length = 0
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'list', 'spoolDrained'])
})

t.test('an entry that has gone takes no place of one before it', async (t) => {
  const { antiEntropy, keep, outcomeOf, disk } = setUp()
  keep('b', 3)
  await outcomeOf(antiEntropy.runOnce())
  disk.clear()
  keep('a', 2)
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame([...disk.keys()], ['a'])
})

t.test('an entry that cannot be read when it is to be applied is not done with', async (t) => {
  const { antiEntropy, keep, faults, outcomeOf, isDrained, events, storedTokenOf, user } = setUp()
  keep('a')
  faults.set('read', ['lost'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), false)
  t.notOk(isDrained())
  t.strictSame(events(), ['spool_entry_not_applied'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(storedTokenOf(user), 'rt-of-a')
})

t.test('while the database is away a pass ends at its first question', async (t) => {
  const { antiEntropy, keep, outcomeOf, calls, faults, events, pass, storedTokenOf, user } = setUp()
  for (let generation = 2; generation <= 602; generation += 1) keep(`a${generation}`, generation)
  faults.set('now', ['lost'])
  faults.set('findStored', ['lost'])
  antiEntropy.start()
  await pass(0.9)
  t.strictSame(calls, ['now'])
  t.strictSame(events(), ['spool_pass_failed'])
  await pass(1)
  t.strictSame(calls.slice(1), ['now', 'list', 'findStored'], 'nor is more than one asked of many')
  await pass(10)
  t.equal(storedTokenOf(user), 'rt-of-a602')
  await outcomeOf(antiEntropy.stop())
})

t.test(
  'an entry that cannot be applied keeps no other back, and the pass from ending',
  async (t) => {
    const { antiEntropy, keep, outcomeOf, storedTokenOf, user, isDrained, faults, log, disk } =
      setUp()
    keep('a', 2)
    keep('b', 3)
    faults.set('store', ['lost'])
    t.equal(await outcomeOf(antiEntropy.runOnce()), false)
    t.equal(storedTokenOf(user), 'rt-of-b')
    t.notOk(antiEntropy.drained())
    t.notOk(isDrained())
    t.ok(disk.has('a'), 'it stays until the row is known to have it')
    t.match(log.events, [
      { event: 'spool_entry_not_applied', user, attemptId: 'a' },
      { event: 'spool_entry_applied' },
    ])
    t.equal(await outcomeOf(antiEntropy.runOnce()), true)
    t.ok(antiEntropy.drained())
  },
)

t.test('a successor that no grant takes is revoked at Pagero, and forgotten', async (t) => {
  const { antiEntropy, keep, outcomeOf, user, disk, database, storedTokenOf, calls } = setUp()
  keep('a')
  database.close(user, 1, undefined)
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(calls.filter((name) => name === 'remove').length, 1)
  t.equal(disk.size, 0)
  const [queued] = [...database.revocations.values()]
  t.match(queued, { user })
  t.match(queued?.tokenSealed.toString(), 'rt-of-a')
  t.equal(storedTokenOf(user), 'none')
})

t.test('one that no grant takes and that does not open holds up nobody', async (t) => {
  const { antiEntropy, ports, keep, outcomeOf, user, disk, database, isDrained, log } = setUp()
  const { sealer } = ports
  const { open } = sealer
  keep('a')
  database.close(user, 1, undefined)
  sealer.open = () => {
    throw new BrokerError('integrity_failure', 'The key is missing.')
  }
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.ok(isDrained())
  t.match(log.events, [
    { level: 'error', event: 'late_answer_unreadable', user, attemptId: 'a' },
    { event: 'spool_drained' },
  ])
  t.equal(disk.size, 1)
  sealer.open = open
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(database.revocations.size, 1, 'and is revoked when its key is there again')
  t.equal(disk.size, 0)
})

t.test('one whose revocation cannot be queued is not done with', async (t) => {
  const { antiEntropy, faults, keep, outcomeOf, user, database, isDrained } = setUp()
  keep('a')
  database.close(user, 1, undefined)
  faults.set('add', ['lost'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), false)
  t.notOk(isDrained())
})

t.test('one that was applied before its grant was closed is kept for its time', async (t) => {
  const { antiEntropy, ports, identity, keep, arm, outcomeOf, user, disk, database, ...rest } =
    setUp()
  const { pass, events, calls } = rest
  arm('a')
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  database.close(user, 2, undefined)
  calls.length = 0
  await outcomeOf(antiEntropy.runOnce())
  t.strictSame(calls, ['now', 'findStored', 'list', 'spoolDrained'])
  t.strictSame(events(), ['spool_entry_applied', 'spool_drained'])
  t.equal(database.revocations.size, 0)
  t.equal(disk.size, 1)
  await pass(120)
  await outcomeOf(createAntiEntropy(ports, SETTINGS, identity).runOnce())
  t.equal(disk.size, 0)
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

t.test('what is put back late has all its time before it', async (t) => {
  const { antiEntropy, keep, arm, outcomeOf, database, storedTokenOf, user, pass, disk } = setUp()
  arm('a')
  const putBack = database.snapshot()
  keep('a')
  await outcomeOf(antiEntropy.runOnce())
  putBack()
  await pass(121)
  await outcomeOf(antiEntropy.runOnce())
  putBack()
  await pass(119)
  await outcomeOf(antiEntropy.runOnce())
  t.equal(storedTokenOf(user), 'rt-of-a')
  t.equal(disk.size, 1)
})

t.test('what is put back with no word of it has all its time before it too', async (t) => {
  const { antiEntropy, keep, outcomeOf, database, storedTokenOf, user, pass, disk, faults } =
    setUp()
  const putBack = database.snapshot()
  keep('a')
  // The ledger knows nothing of it, so that its time counts from when it was found.
  await outcomeOf(antiEntropy.runOnce())
  await pass(119)
  putBack()
  faults.set('store', ['unconfirmed'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), false)
  t.equal(storedTokenOf(user), 'rt-of-a')
  await pass(30)
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.equal(disk.size, 1)
  await pass(119)
  await outcomeOf(antiEntropy.runOnce())
  t.equal(disk.size, 1)
})

t.test(
  'what another has stored since it was asked for is not told of, nor kept anew',
  async (t) => {
    const { ports, identity, keep, outcomeOf, disk, database, successorOf, user, pass, events } =
      setUp()
    keep('a')
    database.store(successorOf(user, 'a', 2))
    let isAsked = false
    const grants: typeof ports.grants = {
      ...ports.grants,
      async findStored(successors) {
        const found = await ports.grants.findStored(successors)
        if (isAsked) return found
        isAsked = true
        return new Map()
      },
    }
    const antiEntropy = createAntiEntropy({ ...ports, grants }, SETTINGS, identity)
    await outcomeOf(antiEntropy.runOnce())
    t.strictSame(events(), ['spool_drained'])
    t.equal(disk.size, 1)
    await pass(120)
    await outcomeOf(antiEntropy.runOnce())
    t.equal(disk.size, 0)
  },
)

t.test('a disk that takes no changes keeps no pass from ending', async (t) => {
  const { antiEntropy, keep, outcomeOf, isDrained, faults, events, disk } = setUp()
  for (const [attemptId, generation] of [
    ['a', 2],
    ['b', 3],
    ['c', 4],
  ] as const)
    keep(attemptId, generation)
  faults.set('remove', ['lost'])
  t.equal(await outcomeOf(antiEntropy.runOnce()), true)
  t.ok(isDrained())
  t.strictSame(events().slice(-2), ['spool_drained', 'spool_entry_not_removed'])
  t.equal(disk.size, 3)
  await outcomeOf(antiEntropy.runOnce())
  t.equal(disk.size, 1)
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

t.test('what could not be applied is tried again in a second', async (t) => {
  const { antiEntropy, keep, faults, storedTokenOf, user, pass } = setUp()
  keep('a')
  faults.set('store', ['lost'])
  antiEntropy.start()
  await pass(0.9)
  t.equal(storedTokenOf(user), 'alice-rt')
  await pass(0.3)
  t.equal(storedTokenOf(user), 'rt-of-a')
})

t.test('while an entry cannot be read it runs each half minute as well', async (t) => {
  const { antiEntropy, server, calls, pass } = setUp()
  server.spoolIsWhole = false
  antiEntropy.start()
  await pass(29)
  t.equal(calls.filter((name) => name === 'list').length, 1)
  await pass(2)
  t.equal(calls.filter((name) => name === 'list').length, 2)
})

t.test('a stop waits for the pass that is under way', async (t) => {
  const { antiEntropy, keep, pass, outcomeOf, storedTokenOf, user } = setUp()
  keep('a')
  antiEntropy.start()
  await pass(0)
  await outcomeOf(antiEntropy.stop())
  t.equal(storedTokenOf(user), 'rt-of-a')
})
