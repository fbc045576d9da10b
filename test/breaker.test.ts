// The brake toward Pagero: when it closes the way, whom it lets through as a probe, and which failures are a grant's own.

import t from 'tap'
import { createBreaker } from '../src/breaker.ts'
import type { TokenOutcome, TokenSet, UserKey } from '../src/grant.ts'
import { keepingLog } from './support/keeping-log.ts'

const PROBE_SECONDS = 5
const UNREACHABLE: TokenOutcome = { kind: 'not_processed', reason: 'reset', unreachable: true }
const ANSWERED_NO: TokenOutcome = { kind: 'not_processed', reason: 'odd', unreachable: false }
const IN_DOUBT: TokenOutcome = { kind: 'in_doubt', reason: 'deadline' }
const REFUSED: TokenOutcome = { kind: 'refused', httpStatus: 400 }
const GRANTED: TokenOutcome = { kind: 'granted', tokens: {} as TokenSet, httpStatus: 200 }
const REJECTED: TokenOutcome = { kind: 'rejected_client', httpStatus: 401, error: 'invalid_client' }

const AWAY = { code: 'temporarily_unavailable' }
const OUR_FAULT = { code: 'client_rejected_by_pagero' }

const user = (number: number) => `user-${number}` as UserKey

/** A breaker whose clock stands still until it is set. */
function setUp() {
  const clock = { nowMs: 50_000, monotonicMs: () => clock.nowMs }
  const log = keepingLog()
  const breaker = createBreaker({ clock, log }, { breakerProbeSeconds: PROBE_SECONDS })
  const fail = (times: number, outcome = UNREACHABLE) => {
    for (let i = 0; i < times; i += 1) breaker.report(user(i), outcome)
  }
  return { clock, log, breaker, fail, events: () => log.events.map(({ event }) => event) }
}

t.test('four failures let every call pass, a fifth within ten seconds none', async (t) => {
  for (const outcome of [UNREACHABLE, IN_DOUBT]) {
    const { breaker, fail, clock, events } = setUp()
    fail(1, outcome)
    clock.nowMs += 9_999
    fail(3, outcome)
    breaker.check()
    breaker.admit()
    breaker.admit()
    fail(1, outcome)
    t.throws(() => breaker.check(), { ...AWAY, extensions: { retryAfterSeconds: PROBE_SECONDS } })
    t.throws(() => breaker.admit(), AWAY)
    t.strictSame(events(), ['breaker_opened'])
  }
})

t.test('failures that lie ten seconds apart do not add up', async (t) => {
  const { breaker, fail, clock } = setUp()
  fail(1)
  clock.nowMs += 10_000
  fail(4)
  t.doesNotThrow(() => breaker.check())
  fail(1)
  t.throws(() => breaker.check(), AWAY)
})

t.test('whatever the server answers, the count begins anew', async (t) => {
  for (const outcome of [GRANTED, REFUSED, ANSWERED_NO]) {
    const { breaker, fail, events } = setUp()
    fail(4)
    breaker.report(user(9), outcome)
    fail(4)
    t.doesNotThrow(() => breaker.check(), outcome.kind)
    t.strictSame(events(), [], 'nothing has opened and nothing closed')
  }
})

t.test('one probe passes at a time, each five seconds after the last', async (t) => {
  const { breaker, fail, clock } = setUp()
  fail(5)
  clock.nowMs += 2_000
  t.throws(() => breaker.check(), { ...AWAY, extensions: { retryAfterSeconds: 3 } })
  clock.nowMs += 2_999
  t.throws(
    () => breaker.admit(),
    { ...AWAY, extensions: { retryAfterSeconds: 1 } },
    'a second at least',
  )
  clock.nowMs += 1
  breaker.check()
  breaker.check()
  breaker.admit()
  t.throws(() => breaker.admit(), { ...AWAY, extensions: { retryAfterSeconds: PROBE_SECONDS } })
  t.throws(() => breaker.check(), AWAY, 'and others are told so')
  clock.nowMs += 5_000
  breaker.admit()
})

t.test('a probe that fails keeps it open for five seconds more', async (t) => {
  const { breaker, fail, clock, events } = setUp()
  fail(5)
  clock.nowMs += 20_000
  breaker.admit()
  clock.nowMs += 4_000
  fail(1)
  clock.nowMs += 4_999
  t.throws(() => breaker.admit(), AWAY)
  clock.nowMs += 1
  breaker.admit()
  t.strictSame(events(), ['breaker_opened'], 'it is told once')
})

t.test('a probe that is answered closes it, a refusal included', async (t) => {
  for (const outcome of [GRANTED, REFUSED, ANSWERED_NO]) {
    const { breaker, fail, clock, events } = setUp()
    fail(5)
    clock.nowMs += 5_000
    breaker.admit()
    breaker.report(user(0), outcome)
    breaker.admit()
    breaker.admit()
    t.strictSame(events(), ['breaker_opened', 'breaker_closed'], outcome.kind)
  }
})

t.test('a client that is rejected opens it at once, and everybody is told why', async (t) => {
  const { breaker, clock, fail, events } = setUp()
  breaker.report(user(0), REJECTED)
  t.throws(() => breaker.check(), { ...OUR_FAULT, extensions: { retryAfterSeconds: 5 } })
  clock.nowMs += 5_000
  breaker.admit()
  fail(1)
  t.throws(() => breaker.check(), AWAY, 'what the last probe met is what is told')
  clock.nowMs += 5_000
  breaker.admit()
  breaker.report(user(1), REJECTED)
  t.throws(() => breaker.check(), OUR_FAULT)
  clock.nowMs += 5_000
  breaker.admit()
  breaker.report(user(1), REJECTED)
  t.strictSame(
    events(),
    ['breaker_opened', 'breaker_opened', 'breaker_opened'],
    'the log tells of each change of that',
  )
})

t.test('a failure is put down to a grant once, until somebody is answered', async (t) => {
  const { breaker } = setUp()
  t.equal(breaker.report(user(1), UNREACHABLE), true)
  t.equal(breaker.report(user(1), UNREACHABLE), false)
  t.equal(breaker.report(user(2), IN_DOUBT), true, 'another grant')
  t.equal(breaker.report(user(3), GRANTED), true)
  t.equal(breaker.report(user(1), UNREACHABLE), true, 'somebody has been answered meanwhile')
  t.equal(breaker.report(user(4), REFUSED), true)
  t.equal(breaker.report(user(1), IN_DOUBT), true, 'a refusal is an answer')
  t.equal(breaker.report(user(3), ANSWERED_NO), true)
  t.equal(breaker.report(user(1), UNREACHABLE), false, 'an odd answer says nothing of the others')
})

t.test('while nobody is answered no failure is a grant’s own', async (t) => {
  const { breaker, fail, clock } = setUp()
  fail(5)
  clock.nowMs += 5_000
  breaker.admit()
  t.equal(breaker.report(user(7), UNREACHABLE), false)
  const { breaker: another } = setUp()
  t.equal(another.report(user(1), REJECTED), false, 'the operator’s fault is no grant’s')
})
