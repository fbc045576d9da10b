// The record of hand-outs: added up, never left out.

import t from 'tap'
import type { Caller } from '../src/callers.ts'
import type { UserKey } from '../src/grant.ts'
import { createHandOutLog } from '../src/http/hand-out-log.ts'
import { keepingLog } from './support/engine.ts'

const ALICE = 'alice' as UserKey
const BOB = 'bob' as UserKey

function callerOf(name: string): Caller {
  return { name, rights: new Set(['token:read'] as const), users: ['*'], proxyAllow: undefined }
}

const SYNC = callerOf('invoice-sync')
const REPORTS = callerOf('reports')

t.test('the first hand-out is a line at once, the following ones are counted', async (t) => {
  const log = keepingLog()
  const handOuts = createHandOutLog(log)
  t.teardown(() => handOuts.close())
  const handOut = { caller: SYNC, user: ALICE, fingerprint: 'f1' }
  for (const requestId of ['r1', 'r2', 'r3']) handOuts.note({ requestId, ...handOut })
  const first = { level: 'info', event: 'access_token_handed_out', user: ALICE, fingerprint: 'f1' }
  t.same(log.events, [{ ...first, requestId: 'r1', caller: 'invoice-sync' }])
  handOuts.flush()
  t.same(log.events.slice(1), [{ ...first, caller: 'invoice-sync', count: 2 }])
  handOuts.flush()
  t.equal(log.events.length, 2, 'nothing was handed out since')
  handOuts.note({ requestId: 'r4', ...handOut })
  t.match(log.events[2], { requestId: 'r4' }, 'after a pause it is a first one again')
})

t.test('callers, tokens and users are kept apart', async (t) => {
  const log = keepingLog()
  const handOuts = createHandOutLog(log)
  const all = [
    { caller: SYNC, user: ALICE, fingerprint: 'f1' },
    { caller: REPORTS, user: ALICE, fingerprint: 'f1' },
    { caller: SYNC, user: BOB, fingerprint: 'f2' },
    // The same account of Pagero, connected by two users, may have one token at both.
    { caller: SYNC, user: BOB, fingerprint: 'f1' },
  ]
  for (const handOut of all) handOuts.note({ requestId: 'r1', ...handOut })
  t.equal(log.events.length, 4)
  for (const handOut of all) handOuts.note({ requestId: 'r2', ...handOut })
  handOuts.close()
  const total = log.events.reduce((sum, { count = 1 }) => sum + count, 0)
  t.equal(total, 8, 'closing tells what was counted last')
  const sums = new Map<string, number>()
  for (const { caller, user, fingerprint, count = 1 } of log.events) {
    const key = `${caller} ${user} ${fingerprint}`
    sums.set(key, (sums.get(key) ?? 0) + count)
  }
  t.same([...sums.values()], [2, 2, 2, 2])
})

t.test('with more tokens than can be counted every hand-out is a line', async (t) => {
  const log = keepingLog()
  const handOuts = createHandOutLog(log)
  t.teardown(() => handOuts.close())
  for (let round = 0; round < 2; round += 1) {
    for (let i = 0; i < 10_010; i += 1) {
      handOuts.note({ requestId: 'r', caller: SYNC, user: ALICE, fingerprint: `f${i}` })
    }
  }
  t.equal(log.events.length, 10_010 + 10)
  handOuts.flush()
  const total = log.events.reduce((sum, { count = 1 }) => sum + count, 0)
  t.equal(total, 2 * 10_010)
})
