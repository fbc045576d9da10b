// How long a grant rests after a failure, when a refusal is believed, and what a dead grant died of.

import t from 'tap'
import type { Evidence } from '../src/grant-stores.ts'
import { causeOfDeath, needsConfirming, retryDelaySeconds } from '../src/verdict.ts'

const SETTINGS = { retryBackoffSeconds: 2, breakerProbeSeconds: 5, unknownSettleSeconds: 4 }
const REFUSED_ONCE: Evidence = {
  unknownBefore: false,
  refusals: 1,
  successorMayComeBack: false,
  laterGeneration: false,
  lifetimeOver: false,
}

type Failure = Parameters<typeof retryDelaySeconds>[1]
const UNREACHABLE: Failure = { kind: 'not_processed', reason: 'reset', unreachable: true }
const IN_DOUBT: Failure = { kind: 'in_doubt', reason: 'deadline' }
const REJECTED: Failure = { kind: 'rejected_client', httpStatus: 401, error: 'invalid_client' }

const delay = (failureCount: number, outcome: Failure, isOwn: boolean, settings = SETTINGS) =>
  retryDelaySeconds({ failureCount }, outcome, settings, isOwn)

t.test('a grant’s own failures double its pause, up to a quarter of an hour', async (t) => {
  const delays = [0, 1, 2, 8, 9, 10, 40].map((count) => delay(count, UNREACHABLE, true))
  t.strictSame(delays, [2, 4, 8, 512, 900, 900, 900])
})

t.test('a failure that all share pauses a grant no longer than the breaker would', async (t) => {
  const delays = [0, 1, 2, 9, 40].map((count) => delay(count, UNREACHABLE, false))
  t.strictSame(delays, [2, 4, 5, 5, 5])
})

t.test('the server may ask for a longer pause, never for a shorter', async (t) => {
  const asked = (retryAfterSeconds: number) => delay(1, { ...UNREACHABLE, retryAfterSeconds }, true)
  t.strictSame([asked(0), asked(3), asked(4), asked(60)], [4, 4, 4, 60])
})

t.test('an attempt in doubt is left to settle first', async (t) => {
  t.strictSame(
    [0, 1, 2].map((count) => delay(count, IN_DOUBT, true)),
    [4, 4, 8],
  )
})

t.test('a rejected client makes no grant wait beyond the next probe', async (t) => {
  t.equal(delay(9, REJECTED, true), 2)
  t.equal(delay(9, REJECTED, false, { ...SETTINGS, retryBackoffSeconds: 30 }), 5)
})

t.test('a refusal is heard twice, unless the end of an earlier attempt is unknown', async (t) => {
  t.equal(needsConfirming(REFUSED_ONCE), true)
  t.equal(needsConfirming({ ...REFUSED_ONCE, refusals: 2 }), false)
  t.equal(needsConfirming({ ...REFUSED_ONCE, refusals: 3 }), false)
  t.equal(needsConfirming({ ...REFUSED_ONCE, unknownBefore: true }), false)
})

t.test('of several causes the one that the ledger is surest of is told', async (t) => {
  const all = { ...REFUSED_ONCE, laterGeneration: true, unknownBefore: true, lifetimeOver: true }
  t.equal(causeOfDeath(all), 'restored_database')
  t.equal(causeOfDeath({ ...all, laterGeneration: false }), 'rotation_lost')
  t.equal(causeOfDeath({ ...REFUSED_ONCE, lifetimeOver: true }), 'lifetime_over')
  t.equal(causeOfDeath(REFUSED_ONCE), 'revoked_or_expired')
})
