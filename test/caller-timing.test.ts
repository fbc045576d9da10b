// What a stranger could learn from how long an answer takes: over HTTP, in turns, so that whatever slows the machine slows
// all alike, and by medians, which a pause does not move.

import { Agent, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { createApiKey } from '../src/add-caller.ts'
import { buildListeners } from './support/internal-listener.ts'
import { keepingLog } from './support/keeping-log.ts'

const WRONG_KEYS = 20_000
const USERS = 1_000
/** Not counted: connections open, code is compiled. */
const WARM_UP = 200

interface Question {
  path: string
  authorization: string
}

async function setUp(t: Test) {
  const listeners = await buildListeners(t, {
    callers: { acme: { rights: ['token:read'], users: ['acme-*'] } },
    // As in production: where each request is traced, none is looked at before the router.
    replace: { log: { ...keepingLog(), writes: () => false } },
  })
  await listeners.internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = listeners.internalApp.addresses()[0] as AddressInfo
  const agent = new Agent({ keepAlive: true, maxSockets: 1 })
  t.teardown(() => agent.destroy())
  /** Microseconds until the answer has come, which must have this status. */
  const ask = ({ path, authorization }: Question, status: number): Promise<number> =>
    new Promise((resolve, reject) => {
      const began = performance.now()
      request({ agent, port, host: '127.0.0.1', path, headers: { authorization } }, (response) => {
        if (response.statusCode !== status) reject(new Error(`status ${response.statusCode}`))
        response.resume().on('end', () => resolve((performance.now() - began) * 1_000))
      })
        .on('error', reject)
        .end()
    })
  return { ...listeners, ask }
}

/** The median time of each question, asked in turn `calls` times altogether. */
async function mediansUs(
  ask: (question: Question, status: number) => Promise<number>,
  options: { questions: ReadonlyArray<() => Question>; calls: number; status: number },
): Promise<number[]> {
  const { questions, calls, status } = options
  const took = questions.map((): number[] => [])
  for (let call = -WARM_UP * questions.length; call < calls; call += 1) {
    const turn = (call + WARM_UP * questions.length) % questions.length
    const us = await ask(questions[turn]?.() ?? { path: '', authorization: '' }, status)
    if (call >= 0) took[turn]?.push(us)
  }
  return took.map((all) => all.toSorted((a, b) => a - b)[Math.floor(all.length / 2)] ?? 0)
}

t.test('over HTTP too, a wrong key takes no longer for sharing more with a good one', async (t) => {
  const { ask, credentials } = await setUp(t)
  const good = credentials['acme']?.authorization.slice('Bearer '.length) ?? ''
  const other = createApiKey().key
  const question = (key: string) => () => ({
    path: '/v1/users/acme-1/access-token',
    authorization: `Bearer ${key}`,
  })
  const medians = await mediansUs(ask, {
    // The third has the id of the good one, and half of its secret.
    questions: [0, 8, 30].map((count) => question(`${good.slice(0, count)}${other.slice(count)}`)),
    calls: WRONG_KEYS,
    status: 401,
  })
  // A comparison that stops at the first difference varies by nanoseconds, which the test of the comparison itself sees.
  // Here it is seen that no shared beginning leads another way, such as a look into the database: that takes 0.1 ms at least.
  const spread = Math.max(...medians) - Math.min(...medians)
  t.ok(spread < Math.max(100, Math.min(...medians) / 5), `medians in us: ${medians.join(', ')}`)
})

t.test('a user that may not be seen takes as long as one that is not there', async (t) => {
  const { ask, scene, engine, credentials } = await setUp(t)
  await scene.connect(engine, 'other-1')
  const { authorization = '' } = credentials['acme'] ?? {}
  const question = (user: string) => () => ({
    path: `/v1/users/${user}/access-token`,
    authorization,
  })
  const [hidden = 0, absent = 0] = await mediansUs(ask, {
    questions: [question('other-1'), question('acme-1')],
    calls: 2 * USERS,
    status: 404,
  })
  // Both are one look into the database. Without it for the hidden one, its answer would come in a fraction of the time.
  t.ok(
    Math.abs(hidden - absent) < Math.max(hidden, absent) / 4,
    `medians in us: ${hidden}, ${absent}`,
  )
})
