// Refresh tokens that are out of use, in virtual time: each reaches Pagero or the queue, and none is forgotten on the way.

import t from 'tap'
import type { UserKey } from '../src/grant.ts'
import type { SealContext } from '../src/ports.ts'
import {
  createRevoker,
  discardRefreshToken,
  revokeSuperseded,
  sealRevocation,
} from '../src/revocation.ts'
import { setVirtualCore } from './support/virtual-core.ts'

const ALICE = 'alice' as UserKey

function setUp() {
  const core = setVirtualCore()
  const queued = () => [...core.database.revocations.values()]
  const enqueue = (token: string) => {
    core.database.addRevocation(sealRevocation(core.ports, ALICE, token))
    const last = queued().at(-1)
    if (last === undefined) throw new Error('It was just queued.')
    return last
  }
  return { ...core, queued, enqueue, revoker: createRevoker(core.ports) }
}

const placeOf = (revocationId: string): SealContext => ({
  table: 'revocations',
  column: 'token_sealed',
  row: revocationId,
  salt: revocationId,
  generation: 1,
})

t.test('a token waits sealed in its own place', async (t) => {
  const { ports } = setUp()
  const one = sealRevocation(ports, ALICE, 'rt')
  t.match(one, { user: ALICE, keyId: 'simulated' })
  t.equal(ports.sealer.open(placeOf(one.revocationId), one.tokenSealed), 'rt')
  t.not(one.revocationId, sealRevocation(ports, ALICE, 'rt').revocationId)
})

t.test('what Pagero confirms is forgotten', async (t) => {
  const { revoker, enqueue, revoked, queued, outcomeOf, events } = setUp()
  enqueue('rt-1')
  enqueue('rt-2')
  t.equal(await outcomeOf(revoker.runOnce()), 2)
  t.strictSame(revoked, ['rt-1', 'rt-2'])
  t.strictSame(queued(), [])
  t.strictSame(events(), ['refresh_token_revoked', 'refresh_token_revoked'])
})

t.test('four at a time are taken, under a lease of a minute', async (t) => {
  const { revoker, enqueue, revoked, faults, outcomeOf, pass } = setUp()
  for (let i = 1; i <= 5; i += 1) enqueue(`rt-${i}`)
  faults.set('done', ['lost'])
  await outcomeOf(revoker.runOnce())
  t.strictSame(revoked, ['rt-1', 'rt-2', 'rt-3', 'rt-4'])
  await outcomeOf(revoker.runOnce())
  t.equal(revoked.length, 5)
  await pass(58)
  t.equal(await outcomeOf(revoker.runOnce()), 0, 'the one that was not noted is hidden')
  await pass(2)
  t.equal(await outcomeOf(revoker.runOnce()), 1)
  t.equal(revoked.at(-1), 'rt-1')
})

t.test('what Pagero does not confirm is tried again, ever more slowly', async (t) => {
  const { revoker, enqueue, server, database, outcomeOf, scheduler, events } = setUp()
  const { revocationId } = enqueue('rt')
  server.confirmsRevocations = false
  const delays: number[] = []
  for (let i = 0; i < 3; i += 1) {
    await outcomeOf(revoker.runOnce())
    const row = database.revocations.get(revocationId)
    const nowMs = database.find(ALICE)?.readAt.getTime() ?? scheduler.nowMs()
    t.equal(row?.failureCount, i + 1)
    delays.push((row?.nextAttemptAtMs ?? 0) - nowMs)
    if (row !== undefined) row.nextAttemptAtMs = 0
  }
  const [first = 0, second = 0, third = 0] = delays.map((ms) => (ms % 86_400_000) / 1000)
  t.ok(first >= 2.4 && first <= 5.1, `${first} s`)
  t.ok(second >= 4.9 && second <= 10.1, `${second} s`)
  t.ok(third >= 9.9 && third <= 20.1, `${third} s`)
  t.ok(events().every((event) => event === 'revocation_failed'))
})

t.test('one that cannot be opened is kept for an hour, for its key may come back', async (t) => {
  const { revoker, enqueue, database, revoked, outcomeOf, pass, events } = setUp()
  const row = enqueue('rt')
  const { tokenSealed } = row
  row.tokenSealed = Buffer.from('unreadable')
  t.equal(await outcomeOf(revoker.runOnce()), 1)
  t.strictSame([revoked, database.revocations.size, row.failureCount], [[], 1, 1])
  row.tokenSealed = tokenSealed
  await pass(3_598)
  t.equal(await outcomeOf(revoker.runOnce()), 0)
  await pass(2)
  await outcomeOf(revoker.runOnce())
  t.strictSame(revoked, ['rt'])
  t.strictSame(events(), ['revocation_unreadable', 'refresh_token_revoked'])
})

t.test('its loop looks each five seconds, and ends nothing with an error', async (t) => {
  const { revoker, enqueue, revoked, faults, pass, outcomeOf, events } = setUp()
  faults.set('take', ['lost'])
  revoker.start()
  enqueue('rt')
  await pass(4.9)
  t.strictSame([revoked, events()], [[], ['revocations_postponed']])
  await pass(0.2)
  t.strictSame(revoked, ['rt'])
  await outcomeOf(revoker.stop())
})

t.test('a token that nobody keeps is queued, or else told to Pagero at once', async (t) => {
  const { ports, queued, revoked, faults, server, outcomeOf, events } = setUp()
  await outcomeOf(discardRefreshToken(ports, 'rt-1', ALICE))
  await outcomeOf(discardRefreshToken(ports, 'rt-2'))
  t.match(queued(), [{ user: ALICE }, { user: 'pagero:' }])
  t.strictSame(revoked, [])
  faults.set('add', ['lost', 'lost'])
  await outcomeOf(discardRefreshToken(ports, 'rt-3'))
  t.strictSame([revoked, events()], [['rt-3'], []])
  server.confirmsRevocations = false
  await outcomeOf(discardRefreshToken(ports, 'rt-4'))
  t.strictSame(events(), ['refresh_token_orphaned'])
})

t.test('a successor that no grant takes is forgotten only once it is queued', async (t) => {
  const { ports, database, disk, faults, queued, connect, successorOf, outcomeOf, calls, events } =
    setUp()
  const { user } = connect('alice')
  const successor = successorOf(user, 'attempt')
  disk.set('attempt', successor)
  database.attempts.set('attempt', {
    ...{ attemptId: 'attempt', user, loginId: successor.loginId, generation: 1, cause: 'expiry' },
    ...{ replica: 'broker-0', boot: 'boot-0', armedAtMs: 0, finishedAtMs: null, outcome: null },
  })
  faults.set('add', ['lost'])
  t.match(await outcomeOf(revokeSuperseded(ports, successor)), { code: 'temporarily_unavailable' })
  t.equal(disk.size, 1)
  calls.length = 0
  await outcomeOf(revokeSuperseded(ports, successor))
  t.strictSame(calls, ['add', 'finishSuperseded', 'remove'])
  t.equal(disk.size, 0)
  const [row] = queued()
  t.equal(
    ports.sealer.open(placeOf(row?.revocationId ?? ''), row?.tokenSealed ?? Buffer.alloc(0)),
    'rt-of-attempt',
  )
  t.equal(database.attempts.get('attempt')?.outcome, 'granted')
  t.strictSame(events(), ['late_answer_revoked'])
  await outcomeOf(revokeSuperseded(ports, successor))
  t.equal(queued().length, 1, 'done once more, after a crash, it is queued no second time')
})
