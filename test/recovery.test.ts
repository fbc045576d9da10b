// What follows a death or a change of the database server, in virtual time: who is come back to, in which order, and what
// a heartbeat sets going.

import t from 'tap'
import type { Grant, UserKey } from '../src/grant.ts'
import { createHeartbeat } from '../src/failover.ts'
import type { Successor } from '../src/grant-stores.ts'
import { createRecovery } from '../src/recovery.ts'
import { setVirtualCore } from './support/virtual-core.ts'

/** Grants whose attempts the replica has left behind, more than are read at a time. */
function leaveBehind(count: number) {
  const core = setVirtualCore()
  const recovered: UserKey[] = []
  const atMs: number[] = []
  const recovery = createRecovery(
    core.ports,
    {
      recover(grant: Grant) {
        recovered.push(grant.user)
        atMs.push(core.scheduler.nowMs())
      },
    },
    core.identity,
  )
  const users = Array.from({ length: count }, (_, i) => `user-${String(i).padStart(3, '0')}`)
  for (const [index, name] of users.entries()) {
    const { user, loginId, generation } = core.connect(name)
    core.database.arm({
      ...{ user, loginId, generation, leaseSeconds: 60, cause: 'expiry' },
      ...{ attemptId: `attempt-${index}`, tokenDigest: Buffer.alloc(0), ...core.identity },
    })
  }
  return { ...core, recovery, recovered, users, atMs }
}

t.test(
  'all grants left behind are come back to, page by page, a tenth of a second apart',
  async (t) => {
    const { recovery, recovered, users, atMs, calls, pass, events } = leaveBehind(205)
    recovery.run()
    await pass(60)
    t.strictSame(recovered, users)
    t.strictSame(calls, ['findUndecided', 'findUndecided', 'findUndecided'])
    const gaps = atMs.slice(1).map((ms, index) => ms - (atMs[index] ?? 0))
    t.equal(Math.round(Math.min(...gaps)), 100)
    t.ok(Math.max(...gaps) < 110)
    t.equal(events().length, 205)
  },
)

t.test('a last page that is full is followed by one that is empty', async (t) => {
  const { recovery, recovered, calls, pass } = leaveBehind(100)
  recovery.run()
  await pass(60)
  t.equal(recovered.length, 100)
  t.strictSame(calls, ['findUndecided', 'findUndecided'])
})

t.test('grants of another replica are left to it', async (t) => {
  const { recovery, recovered, database, users, pass } = leaveBehind(2)
  const [first = '', second] = users
  const row = database.grants.get(first as UserKey)
  if (row !== undefined) database.grants.set(row.user, { ...row, owner: 'broker-1' })
  recovery.run()
  await pass(10)
  t.strictSame(recovered, [second])
})

t.test('a page that cannot be read is read again a second later, from where it was', async (t) => {
  const { recovery, recovered, users, faults, pass, calls, events } = leaveBehind(105)
  faults.set('findUndecided', [undefined, 'lost', 'lost'])
  recovery.run()
  await pass(10.2)
  t.strictSame(calls.length, 2)
  await pass(60)
  t.strictSame(recovered, users)
  t.equal(calls.length, 4)
  t.equal(events().filter((event) => event === 'recovery_failed').length, 2)
})

t.test('runs follow one on the other, and a stop ends them', async (t) => {
  const { recovery, recovered, pass, outcomeOf, calls } = leaveBehind(3)
  recovery.run()
  recovery.run()
  await pass(0.15)
  t.equal(calls.length, 1, 'the second waits for the first')
  await pass(5)
  t.equal(recovered.length, 6)
  recovery.run()
  await pass(0.15)
  t.equal(recovered.length, 8)
  await outcomeOf(recovery.stop())
  recovery.run()
  await pass(10)
  t.equal(recovered.length, 8)
})

t.test('a stop ends the pause after a page that could not be read', async (t) => {
  const { recovery, faults, pass, outcomeOf, scheduler, calls } = leaveBehind(1)
  faults.set('findUndecided', ['lost'])
  recovery.run()
  await pass(0.5)
  const beforeMs = scheduler.nowMs()
  await outcomeOf(recovery.stop())
  t.ok(scheduler.nowMs() - beforeMs < 10)
  t.equal(calls.length, 1)
})

// ── The heartbeat ────────────────────────────────────────────────────────────────────────────────

/** A heartbeat whose parts note that they were called, and a database that can be replaced by another. */
function setUpHeartbeat() {
  const core = setVirtualCore()
  const done: string[] = []
  const pass = { complete: true, told: true, ms: 1_000 }
  const beat = createHeartbeat(
    core.ports,
    {
      antiEntropy: {
        async runOnce() {
          done.push('spool')
          await core.ports.clock.sleep(pass.ms)
          return pass.complete
        },
      },
      refresher: {
        async restore() {
          done.push('attempts')
          return pass.told
        },
      },
      recovery: { run: () => void done.push('recovery') },
    },
    core.identity,
  )
  const replaceServer = () => (core.database.startedAtMs += 1)
  const isRestored = () =>
    core.database.replicas.get('broker-0')?.restoredOn === core.database.startedAtMs
  return { ...core, spool: pass, done, beat, replaceServer, isRestored }
}

t.test('on the same server a heartbeat says that it lives, and no more', async (t) => {
  const { beat, done, database, outcomeOf, pass, scheduler } = setUpHeartbeat()
  await outcomeOf(beat())
  await pass(5)
  await outcomeOf(beat())
  const { seenAtMs = 0 } = database.replicas.get('broker-0') ?? {}
  t.ok(seenAtMs > scheduler.nowMs())
  await pass(5)
  t.strictSame(done, [])
})

t.test(
  'a server that took another’s place is given everything before anybody is told',
  async (t) => {
    const { beat, done, outcomeOf, pass, replaceServer, isRestored, events } = setUpHeartbeat()
    await outcomeOf(beat())
    replaceServer()
    await outcomeOf(beat())
    t.strictSame(done, ['attempts', 'spool'])
    t.notOk(isRestored())
    await pass(2)
    t.ok(isRestored())
    t.strictSame(done, ['attempts', 'spool', 'recovery'])
    await outcomeOf(beat())
    await pass(5)
    t.equal(done.length, 3, 'once')
    t.strictSame(events(), ['database_server_replaced'])
  },
)

t.test('a server that knows nothing of the replica is given what is in its spool', async (t) => {
  for (const holds of [false, true]) {
    const { beat, done, outcomeOf, pass, database, disk } = setUpHeartbeat()
    database.replicas.clear()
    if (holds) disk.set('attempt', {} as Successor)
    await outcomeOf(beat())
    await pass(5)
    t.strictSame(done, holds ? ['attempts', 'spool', 'recovery'] : [])
  }
})

t.test('it is not begun again while it is under way', async (t) => {
  const { beat, done, outcomeOf, pass, replaceServer } = setUpHeartbeat()
  await outcomeOf(beat())
  replaceServer()
  await outcomeOf(beat())
  await outcomeOf(beat())
  t.strictSame(done, ['attempts', 'spool'])
  await pass(5)
  replaceServer()
  await outcomeOf(beat())
  await pass(5)
  t.equal(done.length, 6, 'but with the next server')
})

t.test('what could not be brought back is brought back with a later beat', async (t) => {
  const { beat, done, outcomeOf, pass, replaceServer, isRestored, spool, faults, events } =
    setUpHeartbeat()
  await outcomeOf(beat())
  replaceServer()
  spool.complete = false
  await outcomeOf(beat())
  await pass(5)
  t.notOk(isRestored())
  t.strictSame(done, ['attempts', 'spool'])
  spool.complete = true
  spool.told = false
  await outcomeOf(beat())
  await pass(5)
  t.notOk(isRestored(), 'a row has not got its token back yet')
  spool.told = true
  faults.set('restored', ['lost'])
  await outcomeOf(beat())
  await pass(5)
  t.notOk(isRestored())
  t.equal(done.length, 7, 'nobody comes back to rows before')
  t.strictSame(events().slice(2), ['database_server_replaced', 'database_not_restored'])
  await outcomeOf(beat())
  await pass(5)
  t.ok(isRestored())
  t.strictSame(done.slice(6), ['recovery', 'attempts', 'spool', 'recovery'])
})

t.test('its rows are come back to where the last word was written and not confirmed', async (t) => {
  const { beat, done, outcomeOf, pass, replaceServer, isRestored, faults } = setUpHeartbeat()
  await outcomeOf(beat())
  replaceServer()
  faults.set('restored', ['unconfirmed'])
  await outcomeOf(beat())
  await pass(5)
  t.ok(isRestored())
  await outcomeOf(beat())
  await pass(5)
  t.strictSame(done, ['attempts', 'spool', 'recovery'], 'for no later beat knows of it')
})

t.test('a heartbeat that cannot be written tells its caller', async (t) => {
  const { beat, faults, outcomeOf } = setUpHeartbeat()
  faults.set('heartbeat', ['lost'])
  t.match(await outcomeOf(beat()), { code: 'temporarily_unavailable' })
})
