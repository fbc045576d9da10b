// What nobody will ask for again goes, and nothing else.

import t from 'tap'
import { setScene } from './support/engine.ts'

t.test(
  'the ciphertext of a dead grant is kept for a month, and a late success revives it until then',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    await engine.ports.grants.condemn(user, 1, {
      state: 'reauthentication_required',
      reason: 'revoked_or_expired',
    })
    const died = (interval: string) =>
      scene.database.pool.query('update grants set condemned_at = now() - $1::interval', [interval])
    await died('29 days')
    t.equal(await engine.ports.grants.sweep(), 0)
    t.ok((await scene.grantOf(engine, user)).refreshTokenSealed)
    await died('31 days')
    t.equal(await engine.ports.grants.sweep(), 1)
    t.match(await scene.grantOf(engine, user), {
      refreshTokenSealed: null,
      accessToken: null,
      state: 'reauthentication_required',
      stateReason: 'revoked_or_expired',
    })
    await scene.connect(engine, 'acme-1')
    const { rows } = await scene.database.pool.query('select condemned_at from grants')
    t.strictSame(rows, [{ condemned_at: null }])
    t.equal(await engine.ports.grants.sweep(), 0)
  },
)

t.test('a living grant and a disconnected one are not swept', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.connect(engine, 'acme-1')
  await scene.database.pool.query(
    "update grants set rotated_at = rotated_at - interval '2 years', condemned_at = now() - interval '1 year'",
  )
  t.equal(await engine.ports.grants.sweep(), 0)
})

t.test('the ledger is kept for a quarter, unfinished entries for good', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.database.pool.query(
    `insert into refresh_attempts (attempt_id, user_id, login_id, generation, token_digest, replica, boot, cause,
       armed_at, outcome)
     select gen_random_uuid(), 'acme-1', gen_random_uuid(), 1, 'x', 'broker-1', gen_random_uuid(), 'expiry',
       now() - age, outcome
     from (values (interval '89 days', 'granted'), (interval '91 days', 'granted'), (interval '91 days', null))
       as rows (age, outcome)`,
  )
  t.equal(await engine.ports.grants.sweep(), 1)
  const { rows } = await scene.database.pool.query(
    'select outcome from refresh_attempts order by armed_at',
  )
  t.strictSame(rows, [{ outcome: null }, { outcome: 'granted' }])
})

t.test('a replica is forgotten after a month of silence', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine({ replica: 'broker-1' })
  await scene.startEngine({ replica: 'broker-2' })
  await scene.database.pool.query(
    "update replicas set seen_at = now() - interval '31 days' where name = 'broker-1'",
  )
  t.equal(await engine.ports.replicas.sweep(), 1)
  const { rows } = await scene.database.pool.query('select name from replicas')
  t.strictSame(rows, [{ name: 'broker-2' }])
})
