// Three years ahead: both readings of the lifetime, the warnings before the earlier one, the list, the cause at the end.

import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { setScene } from './support/engine.ts'

t.test(
  'the earlier expiry warns at 90, 30 and 7 days, each once, and anew after a login',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    const endsIn = async (interval: string) => {
      await scene.database.pool.query(
        'update grants set absolute_expires_at = now() + $1::interval',
        [interval],
      )
      return engine.ports.grants.takeExpiryWarnings(100)
    }
    t.strictSame(await endsIn('91 days'), [])
    t.strictSame(await endsIn('89 days'), [{ user, withinDays: 90 }])
    t.strictSame(await endsIn('31 days'), [], 'not twice')
    t.strictSame(await endsIn('29 days'), [{ user, withinDays: 30 }])
    t.strictSame(await endsIn('6 days'), [{ user, withinDays: 7 }])
    t.strictSame(await endsIn('-1 days'), [])
    await scene.connect(engine, 'acme-1')
    t.strictSame(await endsIn('5 days'), [{ user, withinDays: 7 }])
  },
)

t.test('two replicas that ask at once warn once', async (t) => {
  const scene = await setScene(t)
  const [one, two] = [await scene.startEngine(), await scene.startEngine()]
  await scene.connect(one, 'acme-1')
  await scene.database.pool.query(
    "update grants set absolute_expires_at = now() + interval '1 day'",
  )
  const warnings = await Promise.all(
    [one, two, one, two].map((engine) => engine.ports.grants.takeExpiryWarnings(100)),
  )
  t.equal(warnings.flat().length, 1)
})

t.test('warnings are taken some at a time, and each once', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  for (const name of ['acme-1', 'acme-2', 'acme-3']) await scene.connect(engine, name)
  await scene.database.pool.query(
    "update grants set absolute_expires_at = now() + interval '1 day'",
  )
  const take = async () => (await engine.ports.grants.takeExpiryWarnings(2)).map(({ user }) => user)
  const told = [...(await take()), ...(await take())]
  t.strictSame(told.toSorted(), ['acme-1', 'acme-2', 'acme-3'])
  t.strictSame(await take(), [])
})

t.test('a refusal at the end of the lifetime says so', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await scene.lookAlike.revokeLogin(await scene.storedRefreshToken(engine, user))
  await scene.expire(user)
  await scene.database.pool.query(
    "update grants set absolute_expires_at = now() - interval '1 hour'",
  )
  const error = await engine.accessTokens.fresh(user).catch((thrown: unknown) => thrown)
  t.ok(error instanceof BrokerError && error.extensions.cause === 'lifetime_over')
})

t.test('a lifetime that is over by our reckoning alone changes nothing', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await scene.database.pool.query(
    "update grants set absolute_expires_at = now() - interval '1 year', rolling_expires_at = now() - interval '1 day'",
  )
  await scene.expire(user)
  await engine.accessTokens.fresh(user)
  t.equal((await scene.grantOf(engine, user)).state, 'active')
})

t.test('the list finds grants by state, expiry and visible users, in pages', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.database.pool.query(
    `insert into grants (user_id, login_id, generation, authenticated_at, rotated_at, rolling_expires_at,
       absolute_expires_at, state)
     select name, gen_random_uuid(), 1, now(), now(), now() + interval '3 years', now() + ends, state
     from (values
       ('acme-1', interval '3 years', 'active'), ('acme-2', interval '20 days', 'active'),
       ('acme_3', interval '-1 day', 'reauthentication_required'), ('beta-1', interval '2 days', 'active'),
       ('pagero:~import~9', interval '1 day', 'active')) as rows (name, ends, state)`,
  )
  const list = async (filter: {
    state?: 'active' | 'revoked'
    expiresWithin?: string
    users?: string[]
    after?: string
    limit?: number
  }) => {
    const grants = await engine.ports.grants.list({
      state: filter.state,
      expiresWithin: filter.expiresWithin,
      users: filter.users ?? ['*'],
      after: filter.after as never,
      limit: filter.limit ?? 10,
    })
    return grants.map(({ user }) => String(user))
  }
  t.strictSame(await list({}), ['acme-1', 'acme-2', 'acme_3', 'beta-1'])
  t.strictSame(await list({ state: 'active' }), ['acme-1', 'acme-2', 'beta-1'])
  t.strictSame(await list({ state: 'revoked' }), [])
  t.strictSame(await list({ expiresWithin: 'P30D' }), ['acme-2', 'acme_3', 'beta-1'])
  t.strictSame(await list({ expiresWithin: 'P1D' }), ['acme_3'], 'dates that are past are within')
  t.strictSame(
    await list({ users: ['acme-*'] }),
    ['acme-1', 'acme-2'],
    'a pattern takes _ and % as they are',
  )
  t.strictSame(await list({ users: ['acme_*', '%'] }), ['acme_3'])
  t.strictSame(await list({ users: [] }), [])
  t.strictSame(await list({ after: 'acme-2', limit: 1 }), ['acme_3'])
})
