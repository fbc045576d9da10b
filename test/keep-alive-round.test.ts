// One round of keeping alive, in virtual time: which grants it comes to, and what ends it. When a grant is due is the
// database's to say; see keep-alive.test.ts.

import t from 'tap'
import type { Grant, UserKey } from '../src/grant.ts'
import { createKeepAlive } from '../src/keep-alive.ts'
import { createRefresher } from '../src/refresh.ts'
import { SETTINGS, setVirtualCore } from './support/virtual-core.ts'

function setUp(names: readonly string[]) {
  const core = setVirtualCore()
  const refresher = createRefresher(core.ports, SETTINGS, core.identity)
  const due = names.map((name) => core.connect(name))
  const asked: Array<{ after: UserKey | undefined; limit: number }> = []
  const grants = {
    ...core.ports.grants,
    async findKeepAliveDue(page: { after: UserKey | undefined; limit: number }): Promise<Grant[]> {
      asked.push(page)
      return due.filter(({ user }) => user > (page.after ?? '')).slice(0, page.limit)
    },
  }
  const keepAlive = createKeepAlive({ log: core.log, grants }, refresher)
  const round = (stopping?: AbortSignal) => core.outcomeOf(keepAlive(stopping))
  const tokens = () => core.presented.map(({ token }) => token)
  return { ...core, refresher, asked, round, tokens }
}

t.test('those that are due are refreshed one after the other, ten at most', async (t) => {
  const { round, tokens, asked, database, refresher } = setUp(['a', 'b', 'c'])
  t.equal(await round(), 3)
  t.strictSame(asked, [{ after: undefined, limit: 10 }])
  t.strictSame(tokens(), ['a-rt', 'b-rt', 'c-rt'])
  t.equal(refresher.inFlight(), 0)
  t.ok([...database.attempts.values()].every(({ cause }) => cause === 'keep_alive'))
})

t.test('a grant that is dead is no reason to leave out the next', async (t) => {
  const { round, tokens, answers, log } = setUp(['a', 'b'])
  answers.push({ kind: 'refused', httpStatus: 400 }, { kind: 'refused', httpStatus: 400 })
  t.equal(await round(), 1)
  t.strictSame(tokens(), ['a-rt', 'a-rt', 'b-rt'])
  t.match(log.events.at(-2), { event: 'keep_alive_failed', code: 'reauthentication_required' })
})

t.test('nor is one whose token does not open', async (t) => {
  const { log, ports, outcomeOf, connect, refresher, tokens } = setUp([])
  const due = [{ ...connect('a'), refreshTokenSealed: Buffer.from('not sealed') }, connect('b')]
  const grants = { ...ports.grants, findKeepAliveDue: async () => due }
  t.equal(await outcomeOf(createKeepAlive({ log, grants }, refresher)()), 1)
  t.strictSame(tokens(), ['b-rt'])
  t.match(log.events.at(0), { event: 'keep_alive_failed', user: 'a', code: 'integrity_failure' })
})

t.test('nor is one that is gone since', async (t) => {
  const { round, tokens, database, log } = setUp(['a', 'b'])
  database.grants.delete('a' as UserKey)
  t.equal(await round(), 1)
  t.strictSame(tokens(), ['b-rt'])
  t.match(log.events.at(0), { event: 'keep_alive_failed', user: 'a', code: 'grant_not_found' })
})

t.test('any other trouble would befall the next one too', async (t) => {
  const { round, tokens, faults, log } = setUp(['a', 'b'])
  faults.set('arm', ['lost'])
  t.equal(await round(), 0)
  t.strictSame(tokens(), [])
  t.match(log.events.at(-1), { user: 'a', code: 'temporarily_unavailable' })
})

t.test('an error of nobody ends the round as well', async (t) => {
  const { log, ports, outcomeOf, connect } = setUp([])
  const due = [connect('a'), connect('b')]
  const grants = { ...ports.grants, findKeepAliveDue: async () => due }
  const broken = { refresh: async () => Promise.reject(new TypeError('broken')) }
  const round = createKeepAlive({ log, grants }, broken as never)()
  t.equal(await outcomeOf(round), 0)
  t.match(log.events, [{ user: 'a', code: 'internal_error' }])
  t.equal(log.events.length, 1)
})

t.test('a stop ends it between two grants', async (t) => {
  const { round, tokens } = setUp(['a', 'b'])
  const stopping = new AbortController()
  stopping.abort()
  t.equal(await round(stopping.signal), 0)
  t.strictSame(tokens(), [])
  t.equal(await round(new AbortController().signal), 2)
})

t.test('ten that cannot be refreshed keep no other from it', async (t) => {
  const names = Array.from({ length: 12 }, (_, n) => String.fromCharCode(97 + n))
  const { round, tokens, answers, asked } = setUp(names)
  for (let refusals = 0; refusals < 20; refusals += 1) {
    answers.push({ kind: 'refused', httpStatus: 400 })
  }
  t.equal(await round(), 0)
  t.equal(await round(), 2)
  t.strictSame(tokens().slice(-2), ['k-rt', 'l-rt'])
  await round()
  await round()
  t.strictSame(
    asked.map(({ after }) => after),
    [undefined, 'j', 'l', undefined],
    'and it begins again from the first',
  )
})
