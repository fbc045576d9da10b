// Which changes of a grant make an event, that the two are one, and what an event says.

import { randomUUID } from 'node:crypto'
import t, { type Test } from 'tap'
import { disconnectGrant } from '../src/connect.ts'
import { importUserKey, type UserKey } from '../src/grant.ts'
import { createImporter } from '../src/import.ts'
import { webhookBody } from '../src/webhook.ts'
import { type Engine, type Scene, setScene } from './support/engine.ts'

async function start(t: Test): Promise<{ scene: Scene; engine: Engine }> {
  const scene = await setScene(t)
  return { scene, engine: await scene.startEngine({ events: true }) }
}

interface EventRow {
  type: string
  user_id: string
  grant_state: string
  cause: string | null
  generation: number
  within_days: number | null
}

/** Events of all users in their order. */
async function eventsOf({ database }: Scene): Promise<EventRow[]> {
  const { rows } = await database.pool.query<EventRow>(
    'select type, user_id, grant_state, cause, generation, within_days from outbox order by position',
  )
  return rows
}

async function typesOf(scene: Scene): Promise<string[]> {
  return (await eventsOf(scene)).map(({ type }) => type)
}

/** Has Pagero refuse the user's refresh token, and the broker find out. */
async function killGrant(scene: Scene, engine: Engine, user: UserKey): Promise<void> {
  await scene.lookAlike.revokeLogin(await scene.storedRefreshToken(engine, user))
  await scene.expire(user)
  await engine.accessTokens.fresh(user).catch(() => undefined)
}

t.test('a login connects, a death asks for a login, which recovers, and then ends', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'acme-1')
  await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  await engine.accessTokens.fresh(user)
  await killGrant(scene, engine, user)
  await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  await engine.accessTokens.fresh(user)
  await scene.connect(engine, 'acme-1')
  await disconnectGrant(engine.ports, user)
  await scene.connect(engine, 'acme-1')
  const active = { user_id: 'acme-1', grant_state: 'active', cause: null, within_days: null }
  const over = { user_id: 'acme-1', within_days: null }
  t.strictSame(
    (await eventsOf(scene)).map((event) => ({ ...event })),
    [
      { type: 'grant.connected', ...active, generation: 1 },
      { type: 'grant.connected', ...active, generation: 2 },
      {
        type: 'grant.reauthentication_required',
        ...over,
        grant_state: 'reauthentication_required',
        cause: 'revoked_or_expired',
        generation: 3,
      },
      { type: 'grant.recovered', ...active, generation: 4 },
      { type: 'grant.connected', ...active, generation: 6 },
      {
        type: 'grant.disconnected',
        ...over,
        grant_state: 'revoked',
        cause: 'disconnected',
        generation: 6,
      },
      { type: 'grant.connected', ...active, generation: 7 },
    ],
    'refreshes are nobody else’s business',
  )
})

t.test('a success that comes after the verdict recovers the grant, once', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'acme-1')
  const { loginId, refreshTokenSealed } = await scene.grantOf(engine, user)
  const verdict = { state: 'reauthentication_required', reason: 'rotation_lost' } as const
  t.ok(await engine.ports.grants.condemn(user, 1, verdict))
  t.notOk(await engine.ports.grants.condemn(user, 1, verdict), 'given before')
  const successor = {
    user,
    loginId,
    attemptId: randomUUID(),
    refreshTokenSealed: refreshTokenSealed ?? Buffer.alloc(0),
    keyId: 'test',
    accessToken: null,
    scope: '',
    httpStatus: 200,
    durationMs: 1,
  }
  t.equal(await engine.ports.grants.store({ ...successor, generation: 2 }), 'stored')
  t.equal(await engine.ports.grants.store({ ...successor, generation: 2 }), 'already_stored')
  t.equal(await engine.ports.grants.store({ ...successor, generation: 3 }), 'stored')
  t.strictSame(
    (await eventsOf(scene)).map(({ type, cause, generation }) => [type, cause, generation]),
    [
      ['grant.connected', null, 1],
      ['grant.reauthentication_required', 'rotation_lost', 1],
      ['grant.recovered', null, 2],
    ],
  )
})

t.test('a suspicion that is cleared up is told to nobody', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'acme-1')
  const { grants } = engine.ports
  t.ok(await grants.condemn(user, 1, { state: 'suspect', reason: 'rotation_lost' }))
  t.ok(await grants.condemn(user, 1, { state: 'active', reason: null }))
  t.ok(await grants.condemn(user, 1, { state: 'suspect', reason: 'rotation_lost' }))
  t.strictSame(await typesOf(scene), ['grant.connected'])
  await grants.condemn(user, 1, { state: 'reauthentication_required', reason: 'rotation_lost' })
  t.strictSame(await typesOf(scene), ['grant.connected', 'grant.reauthentication_required'])
})

t.test('each warning before the end of the lifetime is an event', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'acme-1')
  for (const interval of ['91 days', '89 days', '88 days', '29 days', '6 days', '-1 days']) {
    await scene.database.pool.query(
      'update grants set absolute_expires_at = now() + $1::interval',
      [interval],
    )
    await Promise.all([1, 2].map(() => engine.ports.grants.takeExpiryWarnings(100)))
  }
  t.strictSame(
    (await eventsOf(scene)).map(({ type, user_id, within_days }) => [type, user_id, within_days]),
    [
      ['grant.connected', user, null],
      ['grant.expiring', user, 90],
      ['grant.expiring', user, 30],
      ['grant.expiring', user, 7],
    ],
  )
})

t.test(
  'an import is an event of its user, and the grant that proves it is none of anybody',
  async (t) => {
    const { scene, engine } = await start(t)
    const importer = createImporter(engine.ports, engine.refresher, {
      callerWaitSeconds: 3,
      subjectClaim: 'sub',
    })
    const { refreshToken } = await scene.lookAlike.issueLogin('bob')
    const obtainedAt = new Date()
    await importer.takeOver({ user: 'acme-2' as UserKey, refreshToken, obtainedAt })
    t.strictSame(
      (await eventsOf(scene)).map(({ type, user_id }) => [type, user_id]),
      [['grant.connected', 'acme-2']],
    )
    const dead = await scene.lookAlike.issueLogin('eve')
    await scene.lookAlike.revokeLogin(dead.refreshToken)
    await t.rejects(
      importer.takeOver({ user: 'acme-3' as UserKey, refreshToken: dead.refreshToken, obtainedAt }),
      { code: 'reauthentication_required' },
    )
    // One that waits, and whose time is nearly over.
    await scene.database.pool.query(
      `insert into grants (user_id, login_id, generation, authenticated_at, rotated_at, rolling_expires_at,
       absolute_expires_at)
     values ($1, gen_random_uuid(), 1, now(), now(), now(), now())`,
      [importUserKey(randomUUID())],
    )
    t.equal((await engine.ports.grants.takeExpiryWarnings(100)).length, 1)
    t.equal((await eventsOf(scene)).length, 1)
  },
)

t.test('where nothing changes there is no event', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'acme-1')
  const { grants } = engine.ports
  t.notOk(await grants.close(user, 7, undefined))
  t.notOk(await grants.condemn(user, 7, { state: 'reauthentication_required', reason: null }))
  await t.rejects(scene.connect(engine, 'acme-1', 'mallory'), { code: 'account_mismatch' })
  t.equal(await disconnectGrant(engine.ports, 'nobody' as UserKey), false)
  t.strictSame(await typesOf(scene), ['grant.connected'])
})

t.test('a change whose event cannot be written does not happen', async (t) => {
  const { scene, engine } = await start(t)
  const { grants } = engine.ports
  const user = await scene.connect(engine, 'acme-1')
  const dead = await scene.connect(engine, 'acme-2')
  await grants.condemn(dead, 1, { state: 'reauthentication_required', reason: 'rotation_lost' })
  await scene.database.pool.query(
    "update grants set absolute_expires_at = now() + interval '5 days' where user_id = 'acme-1'",
  )
  const before = await Promise.all([grants.find(user), grants.find(dead)])
  await scene.database.pool.query('alter table outbox add check (false) not valid')
  const successor = {
    user: dead,
    loginId: before[1]?.loginId ?? '',
    attemptId: randomUUID(),
    generation: 2,
    refreshTokenSealed: Buffer.from('sealed'),
    keyId: 'test',
    accessToken: null,
    scope: '',
    httpStatus: 200,
    durationMs: 1,
  }
  const changes: Record<string, () => Promise<unknown>> = {
    login: () => scene.connect(engine, 'acme-1'),
    firstLogin: () => scene.connect(engine, 'acme-3'),
    lateSuccess: () => grants.store(successor),
    verdict: () => grants.condemn(user, 1, { state: 'reauthentication_required', reason: null }),
    closing: () => grants.close(user, 1, undefined),
    warning: () => grants.takeExpiryWarnings(100),
  }
  for (const [name, change] of Object.entries(changes)) {
    await t.rejects(change(), { code: '23514' }, name)
  }
  const after = await Promise.all([grants.find(user), grants.find(dead)])
  for (const [index, grant] of after.entries()) {
    t.strictSame({ ...grant, readAt: 0 }, { ...before[index], readAt: 0 })
  }
  t.equal(await grants.find('acme-3' as UserKey), undefined)
  await scene.database.pool.query('alter table outbox drop constraint outbox_check')
  t.equal((await grants.takeExpiryWarnings(100)).length, 1, 'the warning was not used up')
})

t.test('without a receiver nothing is written', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await killGrant(scene, engine, user)
  await scene.connect(engine, 'acme-1')
  await disconnectGrant(engine.ports, user)
  t.strictSame(await eventsOf(scene), [])
})

t.test('an event says who, what, why and where to go, and holds no secret', async (t) => {
  const { scene, engine } = await start(t)
  const person = await scene.connect(engine, 'pagero:alice', 'alice')
  const secrets = [await scene.storedRefreshToken(engine, person)]
  await scene.expire(person)
  const token = await engine.accessTokens.fresh(person)
  secrets.push(token.accessToken, token.fingerprint)
  secrets.push(await scene.storedRefreshToken(engine, person))
  await killGrant(scene, engine, person)
  await scene.connect(engine, 'acme-1', 'bob')
  const events = await engine.ports.outbox.take(10, 30)
  const [first, other] = events
    .toSorted((a, b) => a.position - b.position)
    .map((event) => webhookBody(event, 'https://broker.example'))
  const { expires_at: expiresAt, ...data } = (
    JSON.parse(first ?? '') as { data: Record<string, unknown> }
  ).data
  t.strictSame(data, {
    user: 'pagero:alice',
    state: 'active',
    cause: null,
    generation: 1,
    within_days: null,
    reconnect_url: 'https://broker.example/auth/login',
    detail: 'The user has connected to Pagero: tokens are to be had.',
  })
  t.match(expiresAt, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/)
  t.match(JSON.parse(other ?? ''), {
    type: 'grant.connected',
    timestamp: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/,
    data: { user: 'acme-1', reconnect_url: null },
  })
  const { rows } = await scene.database.pool.query<{ row: string }>(
    'select o::text as row from outbox o',
  )
  t.equal(rows.length, 3)
  for (const text of [...rows.map(({ row }) => row), first ?? '', other ?? '']) {
    for (const secret of secrets) t.notOk(text.includes(secret))
  }
})
