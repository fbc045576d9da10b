// What a process knows of the answers it got: which row has lost one, for as long as the spool keeps it, and which of them
// are nowhere else.

import t from 'tap'
import type { UserKey } from '../src/grant.ts'
import { createNewest } from '../src/newest.ts'
import type { Successor } from '../src/grant-stores.ts'

const ANNA = 'anna' as UserKey
const BERT = 'bert' as UserKey
const RETENTION_SECONDS = 900

function successorOf(user: UserKey, generation: number, loginId = 'first login'): Successor {
  return {
    user,
    loginId,
    generation,
    attemptId: 'attempt',
    refreshTokenSealed: Buffer.of(generation),
    keyId: 'k1',
    accessToken: null,
    scope: '',
    httpStatus: 200,
    durationMs: 1,
  }
}

const place = ({ user, loginId, generation }: Successor) => ({ user, loginId, generation })

t.test('a row of an earlier generation of the same login is behind', async (t) => {
  const newest = createNewest({ monotonicMs: () => 0 }, RETENTION_SECONDS)
  newest.note(successorOf(ANNA, 5), true)
  t.equal(newest.isBehind(place(successorOf(ANNA, 4))), true)
  t.equal(newest.isBehind(place(successorOf(ANNA, 5))), false, 'as new')
  t.equal(newest.isBehind(place(successorOf(ANNA, 6))), false, 'newer')
  t.equal(newest.isBehind(place(successorOf(ANNA, 4, 'another login'))), false)
  t.equal(newest.isBehind(place(successorOf(BERT, 4))), false, 'nothing is known of him')
  newest.note(successorOf(ANNA, 6), true)
  t.equal(newest.isBehind(place(successorOf(ANNA, 5))), true, 'what was noted last counts')
})

t.test('what the spool does not keep any more says nothing', async (t) => {
  let nowMs = 7_000
  const newest = createNewest({ monotonicMs: () => nowMs }, RETENTION_SECONDS)
  const before = place(successorOf(ANNA, 1))
  newest.note(successorOf(ANNA, 2), false)
  nowMs += RETENTION_SECONDS * 1000
  t.equal(newest.isBehind(before), true)
  newest.note(successorOf(BERT, 2), false)
  t.equal(newest.unspooled().length, 2)
  nowMs += 1
  t.equal(newest.isBehind(before), false)
  newest.note(successorOf(BERT, 3), false)
  t.strictSame(newest.unspooled().map(place), [place(successorOf(BERT, 3))], 'it is forgotten')
})

t.test('one that is noted again is the newest, and outlives those before it', async (t) => {
  let nowMs = 0
  const newest = createNewest({ monotonicMs: () => nowMs }, RETENTION_SECONDS)
  newest.note(successorOf(ANNA, 2), true)
  newest.note(successorOf(BERT, 2), true)
  nowMs = 1_000
  newest.note(successorOf(ANNA, 3), true)
  nowMs = RETENTION_SECONDS * 1000 + 500
  newest.note(successorOf(BERT, 3), false)
  t.equal(newest.isBehind(place(successorOf(ANNA, 2))), true)
  t.equal(newest.isBehind(place(successorOf(BERT, 2))), true)
})

t.test('only what is in no spool is given back, and not once it is in one', async (t) => {
  const newest = createNewest({ monotonicMs: () => 0 }, RETENTION_SECONDS)
  const spooled = successorOf(ANNA, 2)
  const unspooled = successorOf(BERT, 2)
  newest.note(spooled, false)
  newest.note(unspooled, false)
  t.strictSame(newest.unspooled(), [spooled, unspooled])
  newest.note(spooled, true)
  t.strictSame(newest.unspooled(), [unspooled])
})
