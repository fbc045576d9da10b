// Grants that nobody uses are refreshed once at half their life, and not before.

import t from 'tap'
import { createKeepAlive } from '../src/keep-alive.ts'
import { setScene } from './support/engine.ts'

t.test('a grant is kept alive from half its lifetime on, once', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const keepAlive = createKeepAlive(engine.ports, engine.refresher)
  const shift = (interval: string) =>
    scene.database.pool.query(
      `update grants set rotated_at = rotated_at - $1::interval,
         rolling_expires_at = rolling_expires_at - $1::interval`,
      [interval],
    )
  t.equal(await keepAlive(), 0)
  await shift('17 months 25 days')
  t.equal(await keepAlive(), 0, 'not before half its life')
  await shift('2 months')
  t.equal(await keepAlive(), 1)
  t.equal(await keepAlive(), 0, 'not again')
  t.equal(scene.refreshes().length, 1)
  t.match(await scene.grantOf(engine, user), { generation: 2, state: 'active' })
  const { rows } = await scene.database.pool.query('select cause from refresh_attempts')
  t.strictSame(rows, [{ cause: 'keep_alive' }])
})

t.test('grants come due spread over a month, each at a time of its own', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.database.pool.query(
    `insert into grants (user_id, login_id, generation, refresh_token_sealed, key_id, authenticated_at,
       rotated_at, rolling_expires_at, absolute_expires_at)
     select 'u-' || n, gen_random_uuid(), 1, 'x', 'test', now(), now() - interval '18 months 15 days',
       now() + interval '17 months 15 days', now() from generate_series(1, 1000) n`,
  )
  const due = await engine.ports.grants.findKeepAliveDue({ after: undefined, limit: 1_000 })
  t.ok(due.length > 300 && due.length < 700, `${due.length} of 1,000 are due in the middle of it`)
  const users = due.map(({ user }) => user)
  t.strictSame(users, users.toSorted())
  const after = users[99]
  const next = await engine.ports.grants.findKeepAliveDue({ after, limit: 10 })
  t.strictSame(
    next.map(({ user }) => user),
    users.slice(100, 110),
  )
})

t.test('trouble with the server ends a round and changes no grant', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.connect(engine, 'acme-1')
  await scene.connect(engine, 'acme-2')
  const keepAlive = createKeepAlive(engine.ports, engine.refresher)
  await scene.database.pool.query(
    `update grants set rotated_at = rotated_at - interval '20 months',
       rolling_expires_at = rolling_expires_at - interval '20 months'`,
  )
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 503 })
  t.equal(await keepAlive(), 0)
  t.equal(scene.refreshes().length, 1)
  const { rows } = await scene.database.pool.query('select distinct state from grants')
  t.strictSame(rows, [{ state: 'active' }])
})
