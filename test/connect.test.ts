// A grant put in place of another, taken away, and the refresh tokens that go out of use by it.

import { createHash } from 'node:crypto'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { connectGrant, disconnectGrant, type GrantConnection } from '../src/connect.ts'
import { BrokerError } from '../src/errors.ts'
import { parseUserKey, type UserKey } from '../src/grant.ts'
import { accessTokenClaims, accountOfClaims, userKeyOfSubject } from '../src/identity.ts'
import { createRevoker, discardRefreshToken } from '../src/revocation.ts'
import { issueSession, resolveSession } from '../src/session.ts'
import { type Engine, type Scene, setScene } from './support/engine.ts'

const LIFETIMES = { idleSeconds: 3_600, absoluteSeconds: 43_200 }

function revocations(scene: Scene) {
  return scene.lookAlike.record.filter(({ endpoint }) => endpoint === 'revoke')
}

/** Presentations of this refresh token other than for revoking it. */
function presentations(scene: Scene, refreshToken: string) {
  return scene.refreshes().filter(({ form }) => form['refresh_token'] === refreshToken)
}

async function waitUntil(condition: () => boolean): Promise<void> {
  const patientUntil = performance.now() + 10_000
  while (!condition() && performance.now() < patientUntil) {
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

async function queued(scene: Scene): Promise<number> {
  const { rows } = await scene.database.pool.query('select 1 from revocations')
  return rows.length
}

async function start(t: Test): Promise<{ scene: Scene; engine: Engine }> {
  const scene = await setScene(t)
  return { scene, engine: await scene.startEngine() }
}

/** A connection that no authorization server has to know. */
function connectionOf(user: UserKey, changes: Partial<GrantConnection> = {}): GrantConnection {
  return {
    user,
    tokens: {
      accessToken: 'an access token',
      refreshToken: 'a refresh token',
      expiresInSeconds: 600,
      scope: '',
      idToken: undefined,
    },
    requestedAtMonotonicMs: systemClock.monotonicMs(),
    pagero: { issuer: 'https://issuer.example', subject: 'alice' },
    allowAccountChange: false,
    ...changes,
  }
}

t.test(
  'a second login revokes the refresh token of the first, which is never presented',
  async (t) => {
    const { scene, engine } = await start(t)
    const user = await scene.connect(engine, 'alice')
    const first = await scene.storedRefreshToken(engine, user)
    await scene.connect(engine, 'alice')
    const second = await scene.storedRefreshToken(engine, user)
    t.not(second, first)
    t.equal((await scene.grantOf(engine, user)).generation, 2)

    t.equal(await createRevoker(engine.ports).runOnce(), 1)
    t.same(
      revocations(scene).map(({ form, status }) => [form['token'], status]),
      [[first, 200]],
    )
    t.equal(await queued(scene), 0, 'Pagero has confirmed')
    t.notOk(await scene.lookAlike.acceptsRefreshToken(first))
    await scene.expire(user)
    await engine.accessTokens.fresh(user)
    t.same(presentations(scene, first), [])
    t.equal(presentations(scene, second).length, 1)
  },
)

t.test('a refresh token that comes again with the second login is not revoked', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  const first = await scene.storedRefreshToken(engine, user)
  scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: (answer) => ({ ...answer, refresh_token: first }),
  })
  await scene.connect(engine, 'alice')
  t.equal(await queued(scene), 0)
  t.equal(await scene.storedRefreshToken(engine, user), first)
})

t.test(
  'ten logins of one user at once leave one live grant and revoke the nine others',
  async (t) => {
    const { scene, engine } = await start(t)
    await Promise.all(Array.from({ length: 10 }, () => scene.connect(engine, 'alice')))
    const user = parseUserKey('alice') as UserKey
    t.equal((await scene.grantOf(engine, user)).generation, 10)
    t.equal(await queued(scene), 9)
    const revoker = createRevoker(engine.ports)
    while ((await revoker.runOnce()) > 0);
    const kept = await scene.storedRefreshToken(engine, user)
    t.ok(await scene.lookAlike.acceptsRefreshToken(kept))
    const revoked = new Set(revocations(scene).map(({ form }) => form['token']))
    t.equal(revoked.size, 9)
    t.notOk(revoked.has(kept))
  },
)

t.test('a login during a refresh wins, and what the refresh brought is revoked', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  await scene.expire(user)
  const gate = Promise.withResolvers<void>()
  scene.lookAlike.faults.push({
    endpoint: 'token',
    grantType: 'refresh_token',
    kind: 'delay',
    when: 'after',
    until: gate.promise,
  })
  const refreshed = engine.accessTokens.fresh(user).catch((error: unknown) => error)
  await waitUntil(() => scene.refreshes().length > 0)
  await scene.connect(engine, 'alice')
  const login = await scene.storedRefreshToken(engine, user)
  gate.resolve()
  await refreshed
  const revoker = createRevoker(engine.ports)
  const patientUntil = performance.now() + 5_000
  while (revocations(scene).length < 2 && performance.now() < patientUntil) await revoker.runOnce()
  t.equal(revocations(scene).length, 2, 'the replaced token and its late successor')
  t.equal(await scene.storedRefreshToken(engine, user), login)
  t.ok(await scene.lookAlike.acceptsRefreshToken(login))
})

t.test('a row whose refresh token does not open does not stop the login', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  await scene.database.pool.query(
    `update grants set refresh_token_sealed = set_byte(refresh_token_sealed, 40,
       get_byte(refresh_token_sealed, 40) # 1)`,
  )
  await scene.connect(engine, 'alice')
  t.equal((await scene.grantOf(engine, user)).generation, 2)
  t.ok(await scene.storedRefreshToken(engine, user))
  t.match(
    engine.log.events.find(({ event }) => event === 'replaced_refresh_token_unreadable'),
    { level: 'error', user: 'alice', generation: 1 },
  )
  t.equal(await queued(scene), 0)
})

t.test(
  'another Pagero account is refused, the older grant is kept, the new token revoked',
  async (t) => {
    const { scene, engine } = await start(t)
    const user = await scene.connect(engine, 'erp-7', 'alice')
    const kept = await scene.storedRefreshToken(engine, user)
    await t.rejects(scene.connect(engine, 'erp-7', 'bob'), { code: 'account_mismatch' })
    t.equal(await scene.storedRefreshToken(engine, user), kept)
    t.equal((await scene.grantOf(engine, user)).generation, 1)
    t.equal(await createRevoker(engine.ports).runOnce(), 1)
    const [revoked = ''] = revocations(scene).map(({ form }) => form['token'] ?? '')
    t.not(revoked, kept)
    t.notOk(await scene.lookAlike.acceptsRefreshToken(revoked))
    t.ok(await scene.lookAlike.acceptsRefreshToken(kept))

    t.ok(await disconnectGrant(engine.ports, user))
    await scene.connect(engine, 'erp-7', 'bob')
    t.equal((await scene.grantOf(engine, user)).pageroSubject, 'bob', 'after disconnecting it may')
  },
)

t.test('only a different issuer or subject makes another account', async (t) => {
  const { engine } = await start(t)
  const one = 'https://one.example'
  const two = 'https://two.example'
  for (const [before, after, allowAccountChange, taken] of [
    [{ issuer: one, subject: 'a' }, { issuer: one, subject: 'a' }, false, true],
    [{ issuer: null, subject: 'a' }, { issuer: one, subject: 'a' }, false, true],
    [{ issuer: one, subject: 'a' }, { issuer: null, subject: 'a' }, false, true],
    [{ issuer: one, subject: 'a' }, { issuer: two, subject: 'a' }, false, false],
    [{ issuer: one, subject: 'a' }, { issuer: one, subject: 'b' }, false, false],
    [{ issuer: null, subject: 'a' }, { issuer: null, subject: 'b' }, false, false],
    [{ issuer: one, subject: 'a' }, { issuer: two, subject: 'b' }, true, true],
  ] as const) {
    const user = `user-${Math.random()}` as UserKey
    await connectGrant(engine.ports, connectionOf(user, { pagero: before }))
    const connected = connectGrant(
      engine.ports,
      connectionOf(user, { pagero: after, allowAccountChange }),
    )
    const name = JSON.stringify([before, after, allowAccountChange])
    if (taken) await t.resolves(connected, name)
    else await t.rejects(connected, { code: 'account_mismatch' }, name)
  }
})

t.test(
  'a store whose answer is lost is found to have stored, and nothing is revoked',
  async (t) => {
    const { scene, engine } = await start(t)
    const user = 'alice' as UserKey
    let connects = 0
    const grants = {
      ...engine.ports.grants,
      connect: async (grant: Parameters<typeof engine.ports.grants.connect>[0]) => {
        connects += 1
        await engine.ports.grants.connect(grant)
        throw new BrokerError('temporarily_unavailable', 'The answer was lost.')
      },
    }
    await connectGrant({ ...engine.ports, grants }, connectionOf(user))
    t.equal(connects, 1)
    t.equal((await scene.grantOf(engine, user)).generation, 1)
    t.equal(await queued(scene), 0)
  },
)

t.test('a login waits for a database that is away for a moment', async (t) => {
  const { scene, engine } = await start(t)
  let outages = 3
  const grants = {
    ...engine.ports.grants,
    find: async (user: UserKey) => {
      outages -= 1
      if (outages >= 0) throw new BrokerError('temporarily_unavailable', 'Away.')
      return engine.ports.grants.find(user)
    },
  }
  await connectGrant({ ...engine.ports, grants }, connectionOf('alice' as UserKey))
  t.equal(outages, -1)
  t.equal((await scene.grantOf(engine, 'alice' as UserKey)).state, 'active')
})

t.test('a login that finds no database revokes its token at Pagero itself', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  const refreshToken = await scene.storedRefreshToken(engine, user)
  const ports = {
    ...engine.ports,
    // Time passes with the pauses, not with the clock on the wall.
    clock: hurriedClock(),
    grants: { ...engine.ports.grants, find: databaseAway },
    revocations: { ...engine.ports.revocations, add: databaseAway },
  }
  const connection = connectionOf(user)
  connection.tokens.refreshToken = refreshToken
  await t.rejects(connectGrant(ports, connection), { code: 'temporarily_unavailable' })
  t.same(
    revocations(scene).map(({ form }) => form['token']),
    [refreshToken],
  )
})

t.test('a login whose fate is unknown is left alone', async (t) => {
  const { scene, engine } = await start(t)
  let finds = 0
  const ports = {
    ...engine.ports,
    clock: hurriedClock(),
    grants: {
      ...engine.ports.grants,
      find: async () => ((finds += 1) === 1 ? undefined : databaseAway()),
      connect: databaseAway,
    },
  }
  await t.rejects(connectGrant(ports, connectionOf('alice' as UserKey)), {
    code: 'temporarily_unavailable',
  })
  t.same(revocations(scene), [])
  t.equal(await queued(scene), 0)
  t.ok(engine.log.events.some(({ event }) => event === 'login_in_doubt'))
})

t.test('disconnecting ends the grant and the sessions at once, and Pagero is told', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  const other = await scene.connect(engine, 'bob')
  const refreshToken = await scene.storedRefreshToken(engine, user)
  const sessions = { settings: { ...LIFETIMES, perUserMax: 20 }, replacesHash: null }
  const mine = await issueSession(engine.ports, user, sessions)
  const his = await issueSession(engine.ports, other, sessions)

  t.equal(await disconnectGrant(engine.ports, user), true)
  const grant = await scene.grantOf(engine, user)
  t.equal(grant.state, 'revoked')
  t.equal(grant.refreshTokenSealed, null)
  t.equal(grant.accessToken, null)
  t.equal(await resolveSession(engine.ports, mine.token, LIFETIMES), undefined)
  t.match(await resolveSession(engine.ports, his.token, LIFETIMES), { user: 'bob' })
  await t.rejects(engine.accessTokens.fresh(user), { code: 'grant_not_found' })
  await t.rejects(issueSession(engine.ports, user, sessions), { code: 'authorization_failed' })
  t.strictSame((await scene.grantOf(engine, user)).state, 'revoked', 'and it stays closed')

  t.equal(await disconnectGrant(engine.ports, user), false, 'a second time there is nothing to do')
  t.equal(await disconnectGrant(engine.ports, 'nobody' as UserKey), false)
  t.equal(await createRevoker(engine.ports).runOnce(), 1)
  t.same(
    revocations(scene).map(({ form }) => form['token']),
    [refreshToken],
  )
})

t.test('a revocation that Pagero does not confirm is tried again later', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  await disconnectGrant(engine.ports, user)
  const revoker = createRevoker(engine.ports)
  const { pool } = scene.database
  const delays: number[] = []
  for (const fault of [{ kind: 'status', status: 503 }, { kind: 'reset_before' }] as const) {
    scene.lookAlike.faults.push({ endpoint: 'revoke', ...fault })
    t.equal(await revoker.runOnce(), 1)
    t.equal(await revoker.runOnce(), 0, 'not before its time')
    const { rows } = await pool.query<{ delay: number }>(
      `select extract(epoch from next_attempt_at - clock_timestamp())::float8 as delay
       from revocations`,
    )
    delays.push(rows[0]?.delay ?? NaN)
    await pool.query('update revocations set next_attempt_at = clock_timestamp()')
  }
  const [first = 0, second = 0] = delays
  t.ok(first > 2 && first <= 5, `${first} s, of at most 5`)
  t.ok(second > 4.5 && second <= 10, `${second} s, of at most 10`)
  t.equal(await revoker.runOnce(), 1)
  t.equal(await queued(scene), 0)
  t.same(
    revocations(scene).map(({ status }) => status),
    [503, undefined, 200],
  )
})

t.test('the back-off of a revocation ends at an hour', async (t) => {
  const { scene, engine } = await start(t)
  await disconnectGrant(engine.ports, await scene.connect(engine, 'alice'))
  await scene.database.pool.query('update revocations set failure_count = 400')
  scene.lookAlike.faults.push({ endpoint: 'revoke', kind: 'status', status: 503 })
  await createRevoker(engine.ports).runOnce()
  const { rows } = await scene.database.pool.query<{ delay: number }>(
    `select extract(epoch from next_attempt_at - clock_timestamp())::float8 as delay
     from revocations`,
  )
  const delay = rows[0]?.delay ?? NaN
  t.ok(delay > 1_790 && delay <= 3_600, `${delay} s`)
})

t.test('a revocation that does not open is kept and reported', async (t) => {
  const { scene, engine } = await start(t)
  await disconnectGrant(engine.ports, await scene.connect(engine, 'alice'))
  await scene.database.pool.query(
    'update revocations set token_sealed = set_byte(token_sealed, 40, get_byte(token_sealed, 40) # 1)',
  )
  t.equal(await createRevoker(engine.ports).runOnce(), 1)
  t.equal(await queued(scene), 1)
  t.same(revocations(scene), [])
  t.ok(engine.log.events.some(({ event }) => event === 'revocation_unreadable'))
})

t.test('a kick wakes the revoker, and stopping waits for what it is doing', async (t) => {
  const { scene, engine } = await start(t)
  const user = await scene.connect(engine, 'alice')
  const revoker = createRevoker(engine.ports)
  revoker.start()
  // The first look finds nothing; the next would be five seconds later.
  await new Promise((resolve) => setTimeout(resolve, 200))
  const gate = Promise.withResolvers<void>()
  scene.lookAlike.faults.push({
    endpoint: 'revoke',
    kind: 'delay',
    when: 'before',
    until: gate.promise,
  })
  await disconnectGrant(engine.ports, user)
  const kickedAt = performance.now()
  revoker.kick()
  await waitUntil(() => revocations(scene).length === 1)
  t.ok(performance.now() - kickedAt < 2_000, 'long before the next poll')
  const stopped = revoker.stop()
  const early = await Promise.race([
    stopped.then(() => 'stopped'),
    new Promise((resolve) => setTimeout(() => resolve('waiting'), 100)),
  ])
  t.equal(early, 'waiting')
  gate.resolve()
  await stopped
  t.equal(await queued(scene), 0)
})

t.test('a token that nobody keeps is queued, under no user', async (t) => {
  const { scene, engine } = await start(t)
  await discardRefreshToken(engine.ports, 'a refresh token')
  const { rows } = await scene.database.pool.query<{ user_id: string }>(
    'select user_id from revocations',
  )
  t.same(rows, [{ user_id: 'pagero:' }])
  t.equal(userKeyOfSubject(''), undefined, 'which no login can have')
})

t.test('the user key of a subject is the subject where that fits, and encoded where not', (t) => {
  const long = 'x'.repeat(249)
  const longWords = 'x '.repeat(93)
  for (const [subject, key] of [
    ['alice', 'pagero:alice'],
    ['a.b_c~d@e:f+g-h', 'pagero:a.b_c~d@e:f+g-h'],
    ['~alice', 'pagero:~fmFsaWNl'],
    ['alice smith', 'pagero:~YWxpY2Ugc21pdGg'],
    ['åse', 'pagero:~w6VzZQ'],
    ['a/b', 'pagero:~YS9i'],
    ['x'.repeat(248), `pagero:${'x'.repeat(248)}`],
    [long, `pagero:~${digest(long)}`],
    [longWords.slice(1), `pagero:~${Buffer.from(longWords.slice(1)).toString('base64url')}`],
    [longWords, `pagero:~${digest(longWords)}`],
    ['', undefined],
    ['half a pair: \ud800', undefined],
  ] as const) {
    const made = userKeyOfSubject(subject)
    t.equal(made, key, JSON.stringify(subject.slice(0, 20)))
    t.equal(made === undefined ? undefined : parseUserKey(made), key, 'which is a user key')
  }
  t.end()
})

t.test('no two subjects share a user key', (t) => {
  const subject = fc.oneof(
    fc.string({ maxLength: 12 }),
    fc.string({ unit: 'binary', maxLength: 12 }),
    fc.string({ maxLength: 6 }).map((text) => `~${text}`),
    fc.string({ maxLength: 9 }).map((text) => `~${Buffer.from(text).toString('base64url')}`),
    fc.string({ minLength: 180, maxLength: 300 }),
  )
  fc.assert(
    fc.property(subject, subject, (one, other) => {
      const [first, second] = [userKeyOfSubject(one), userKeyOfSubject(other)]
      return one === other || first === undefined || first !== second
    }),
    { numRuns: 5_000 },
  )
  fc.assert(
    fc.property(subject, (one) => {
      const key = userKeyOfSubject(one)
      const encoded = Buffer.from(one, 'utf8').toString('base64url')
      // What the first key was made of, taken for a subject itself, has another key.
      return key === undefined || userKeyOfSubject(`~${encoded}`) !== key
    }),
    { numRuns: 5_000 },
  )
  t.end()
})

t.test('claims are read leniently and never trusted beyond their shape', (t) => {
  t.same(accessTokenClaims(jwt({ sub: 'alice' })), { sub: 'alice' })
  for (const text of [
    '',
    '_0XBPWQQ_5d3c6b6e',
    'a.b',
    'a.b.c',
    'a.b.c.d',
    jwt(null),
    jwt([1]),
    jwt('x'),
  ]) {
    t.equal(accessTokenClaims(text), undefined, text)
  }
  t.same(accountOfClaims({ sub: 'a', iss: 'i' }, 'sub'), { issuer: 'i', subject: 'a' })
  t.same(accountOfClaims({ sub: 'a' }, 'sub'), { issuer: null, subject: 'a' })
  t.same(accountOfClaims({ sub: 'a', email: 'e' }, 'email'), { issuer: null, subject: 'e' })
  for (const sub of [undefined, null, '', 7, {}, ['a']]) {
    t.equal(accountOfClaims({ sub }, 'sub'), undefined, JSON.stringify(sub))
  }
  t.end()
})

/** A clock on which every pause passes at once. */
function hurriedClock(): typeof systemClock {
  let passedMs = 0
  return {
    ...systemClock,
    monotonicMs: () => passedMs,
    sleep: async (delayMs) => {
      passedMs += delayMs
    },
  }
}

function databaseAway(): Promise<never> {
  return Promise.reject(new BrokerError('temporarily_unavailable', 'The database is away.'))
}

function digest(text: string): string {
  return createHash('sha256').update(text).digest('base64url')
}

/** A JWT by its look, with this payload. */
function jwt(payload: unknown): string {
  return `e30.${Buffer.from(JSON.stringify(payload)).toString('base64url')}.c2ln`
}

t.test('a login whose stored answer was lost does not come back over a newer one', async (t) => {
  const { scene, engine } = await start(t)
  const { grants } = engine.ports
  let lost = false
  const unlucky = await scene.startEngine({
    replica: 'unlucky',
    replace: {
      grants: {
        ...grants,
        async connect(grant) {
          const placed = await grants.connect(grant)
          if (lost) return placed
          lost = true
          await scene.connect(engine, 'alice')
          throw new BrokerError('temporarily_unavailable', 'The connection was lost.')
        },
      },
    },
  })
  await t.rejects(scene.connect(unlucky, 'alice'), { code: 'authorization_failed' })
  const user = parseUserKey('alice') as UserKey
  t.equal((await scene.grantOf(engine, user)).generation, 2, 'the newer login stays')
  const revoker = createRevoker(engine.ports)
  while ((await revoker.runOnce()) > 0);
  const kept = await scene.storedRefreshToken(engine, user)
  t.ok(await scene.lookAlike.acceptsRefreshToken(kept), 'and is not revoked')
})

t.test(
  'a login whose round was lost goes on where the older one has only been refreshed',
  async (t) => {
    const { scene, engine } = await start(t)
    const user = await scene.connect(engine, 'alice')
    const { grants } = engine.ports
    let rounds = 0
    const connection = connectionOf(user, { allowAccountChange: true })
    await connectGrant(
      {
        ...engine.ports,
        grants: {
          ...grants,
          async connect(grant) {
            rounds += 1
            if (rounds > 1) return grants.connect(grant)
            await scene.expire(user)
            await engine.accessTokens.fresh(user)
            throw new BrokerError('temporarily_unavailable', 'The connection was lost.')
          },
        },
      },
      connection,
    )
    t.equal(rounds, 2)
    t.equal((await scene.grantOf(engine, user)).generation, 3)
    t.equal(await scene.storedRefreshToken(engine, user), connection.tokens.refreshToken)
    t.equal(await queued(scene), 1, 'and only what it replaces is revoked')
  },
)

t.test('a login whose store the database refuses is in no doubt', async (t) => {
  const { scene, engine } = await start(t)
  const connection = connectionOf('alice' as UserKey)
  const ports = {
    ...engine.ports,
    clock: hurriedClock(),
    grants: {
      ...engine.ports.grants,
      connect: () =>
        Promise.reject(
          new BrokerError('temporarily_unavailable', 'Read-only.', {}, { isUnwritten: true }),
        ),
    },
  }
  await t.rejects(connectGrant(ports, connection), { code: 'temporarily_unavailable' })
  t.equal(await queued(scene), 1, 'so its token is revoked')
  t.notOk(engine.log.events.some(({ event }) => event === 'login_in_doubt'))
})
