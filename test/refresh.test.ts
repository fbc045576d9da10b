// One rotation: served, joined, armed, sent, classified, stored, and then served. Each fault says what it leaves of the grant.

import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { BrokerError, type ProblemCode } from '../src/errors.ts'
import type { UserKey } from '../src/grant.ts'
import type { Spool } from '../src/ports.ts'
import type { Fault } from '../demo/look-alike/faults.ts'
import { type Engine, type Scene, setScene } from './support/engine.ts'

async function problemOf(work: Promise<unknown>): Promise<ProblemCode | 'none'> {
  try {
    await work
    return 'none'
  } catch (error) {
    if (error instanceof BrokerError) return error.code
    throw error
  }
}

async function ledger(scene: Scene, user: UserKey) {
  const { rows } = await scene.database.pool.query<{
    outcome: string | null
    cause: string
    generation: number
    http_status: number | null
  }>(
    'select outcome, cause, generation::int, http_status from refresh_attempts where user_id = $1 order by armed_at',
    [user],
  )
  return rows
}

/** The stored refresh token is the one that the authorization server would accept. */
async function isAlive(scene: Scene, engine: Engine, user: UserKey): Promise<boolean> {
  return scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user))
}

t.test('an access token with life left is served without a call', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const first = await engine.accessTokens.fresh(user)
  const second = await engine.accessTokens.fresh(user)
  t.equal(first.accessToken, second.accessToken)
  t.ok(first.expiresInSeconds > 590 && first.expiresInSeconds <= 600)
  t.equal(first.fingerprint.length, 43)
  t.equal((await scene.lookAlike.isActive(first.accessToken))?.subject, 'acme-1')
  t.equal(scene.refreshes().length, 0)
})

t.test('two hundred callers for a token that has run out cost one token request', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const old = await engine.accessTokens.fresh(user)
  await scene.expire(user)
  const tokens = await Promise.all(
    Array.from({ length: 200 }, () => engine.accessTokens.fresh(user)),
  )
  t.equal(new Set(tokens.map(({ accessToken }) => accessToken)).size, 1)
  t.not(tokens[0]?.accessToken, old.accessToken)
  t.equal(scene.refreshes().length, 1)
  t.strictSame(await ledger(scene, user), [
    { outcome: 'granted', cause: 'expiry', generation: 1, http_status: 200 },
  ])
  const grant = await scene.grantOf(engine, user)
  t.match(grant, { generation: 2, state: 'active', phase: 'idle', failureCount: 0 })
  t.ok(await isAlive(scene, engine, user))
})

t.test('two replicas and a hundred callers cost one token request', async (t) => {
  const scene = await setScene(t)
  const [one, two] = [await scene.startEngine(), await scene.startEngine()]
  const user = await scene.connect(one, 'acme-1')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'delay', when: 'before', ms: 300 })
  await scene.expire(user)
  const tokens = await Promise.all(
    Array.from({ length: 100 }, (_, i) => (i % 2 === 0 ? one : two).accessTokens.fresh(user)),
  )
  t.equal(new Set(tokens.map(({ accessToken }) => accessToken)).size, 1)
  t.equal(scene.refreshes().length, 1)
})

t.test('each refresh presents the successor of the last one', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  for (let i = 0; i < 5; i += 1) {
    await scene.expire(user)
    await engine.accessTokens.fresh(user)
  }
  const presented = scene.refreshes().map(({ form }) => form['refresh_token'])
  t.equal(new Set(presented).size, 5)
  t.equal((await scene.grantOf(engine, user)).generation, 6)
  t.ok(await isAlive(scene, engine, user))
})

t.test('callers that hang up do not cancel the refresh', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine({ refresh: { callerWaitSeconds: 0.1 } })
  const user = await scene.connect(engine, 'acme-1')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'delay', when: 'after', ms: 800 })
  await scene.expire(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'temporarily_unavailable')
  await delay(1_000)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
  t.equal(scene.refreshes().length, 1)
})

t.test(
  'inside the last stretch the living token is served and refreshed behind the caller',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    const first = await engine.accessTokens.fresh(user)
    await scene.database.pool.query(
      `update grants set access_token_requested_at = access_token_requested_at - interval '520 s',
       access_token_expires_at = access_token_expires_at - interval '520 s'`,
    )
    const served = await engine.accessTokens.fresh(user)
    t.equal(served.accessToken, first.accessToken)
    while (scene.refreshes().length === 0) await delay(10)
    await engine.refresher.stop()
    t.equal(scene.refreshes().length, 1)
    t.match(await ledger(scene, user), [{ cause: 'ahead', outcome: 'granted' }])
  },
)

t.test('min_ttl is kept, or refused when it is more than half the life', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  t.equal(
    await problemOf(engine.accessTokens.fresh(user, { minTtlSeconds: 301 })),
    'request_invalid',
  )
  t.equal(await problemOf(engine.accessTokens.fresh(user, { minTtlSeconds: 300 })), 'none')
  t.equal(scene.refreshes().length, 0)
  await scene.database.pool.query(
    `update grants set access_token_requested_at = access_token_requested_at - interval '350 s',
       access_token_expires_at = access_token_expires_at - interval '350 s'`,
  )
  const token = await engine.accessTokens.fresh(user, { minTtlSeconds: 300 })
  t.ok(token.expiresInSeconds >= 300)
  t.match(await ledger(scene, user), [{ cause: 'min_ttl' }])
  t.equal(
    await problemOf(engine.accessTokens.fresh(user, { minTtlSeconds: 0 })),
    'none',
    'zero takes whatever lives',
  )
})

t.test('a rejected token is replaced once, and not again within the interval', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const first = await engine.accessTokens.fresh(user)
  const replaced = await Promise.all(
    Array.from({ length: 50 }, () => engine.accessTokens.replaceRejected(user, first.fingerprint)),
  )
  t.equal(new Set(replaced.map(({ accessToken }) => accessToken)).size, 1)
  t.not(replaced[0]?.accessToken, first.accessToken)
  t.equal(scene.refreshes().length, 1)
  const second = replaced[0]?.fingerprint ?? ''
  const again = await engine.accessTokens.replaceRejected(user, second)
  t.equal(again.fingerprint, second, 'within the interval the present token is returned')
  const stale = await engine.accessTokens.replaceRejected(user, first.fingerprint)
  t.equal(stale.fingerprint, second, 'a fingerprint that is not current changes nothing')
  t.equal(scene.refreshes().length, 1)
})

t.test('nobody is called when the intent cannot be written', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  await scene.database.pool.query('alter table refresh_attempts rename to elsewhere')
  await t.rejects(engine.accessTokens.fresh(user))
  await scene.database.pool.query('alter table elsewhere rename to refresh_attempts')
  t.equal(scene.refreshes().length, 0)
  t.match(await scene.grantOf(engine, user), { generation: 1, phase: 'idle', state: 'active' })
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
})

t.test('an answer that cannot be stored or spooled is not served until it is stored', async (t) => {
  const scene = await setScene(t)
  const fullSpool: Spool = {
    write: () => Promise.reject(new Error('no space')),
    isEmpty: () => true,
    hasRoom: () => true,
    surplus: () => 0,
    checkWritable: () => Promise.reject(new Error('no space')),
    list: () => Promise.resolve({ entries: [], isWhole: true }),
    has: () => false,
    read: () => Promise.resolve(undefined),
    remove: () => Promise.resolve(),
  }
  const engine = await scene.startEngine({
    replace: { spool: fullSpool },
    refresh: { callerWaitSeconds: 1 },
  })
  const user = await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  const { pool } = scene.database
  scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    until: pool.query(
      `create function refuse() returns trigger language plpgsql as $$ begin
         if new.generation > old.generation then raise exception sqlstate '57P03'; end if; return new; end $$;
       create trigger refuse before update on grants for each row execute function refuse()`,
    ),
  })
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'temporarily_unavailable')
  t.equal(engine.refresher.inFlight(), 1, 'the rotation goes on')
  await pool.query('drop trigger refuse on grants')
  const token = await engine.accessTokens.fresh(user)
  t.ok(await scene.lookAlike.isActive(token.accessToken))
  t.equal(scene.refreshes().length, 1)
  t.ok(await isAlive(scene, engine, user))
  await scene.expire(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'temporarily_unavailable')
  t.equal(scene.refreshes().length, 1, 'nothing is armed while the spool is broken')
})

t.test(
  'a spooled answer is served while the database is away, and stored when it is back',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    await scene.expire(user)
    const { pool } = scene.database
    scene.lookAlike.faults.push({
      endpoint: 'token',
      kind: 'delay',
      when: 'after',
      until: pool.query(
        `create function refuse() returns trigger language plpgsql as $$ begin
         if new.generation > old.generation then raise exception sqlstate '57P03'; end if; return new; end $$;
       create trigger refuse before update on grants for each row execute function refuse()`,
      ),
    })
    const token = await engine.accessTokens.fresh(user)
    t.ok(await scene.lookAlike.isActive(token.accessToken))
    t.equal((await scene.grantOf(engine, user)).generation, 1)
    t.equal((await engine.ports.spool.list()).entries.length, 1)
    await pool.query('drop trigger refuse on grants')
    await engine.refresher.stop()
    t.equal((await scene.grantOf(engine, user)).generation, 2)
    t.ok(await isAlive(scene, engine, user))
  },
)

t.test(
  'a spool of a process that died is applied by the next one before anything else',
  async (t) => {
    const scene = await setScene(t)
    const dead = await scene.startEngine({ replica: 'broker-0' })
    const user = await scene.connect(dead, 'acme-1')
    await scene.expire(user)
    await dead.accessTokens.fresh(user)
    const [entry] = (await dead.ports.spool.list()).entries
    if (entry === undefined) throw new Error('nothing was spooled')
    // The row as it was while the call was out: what a kill between spool and store leaves behind.
    await scene.database.pool.query(
      `with l as (update refresh_attempts set outcome = null, finished_at = null)
     update grants set generation = 1, phase = 'armed', refresh_token_sealed = 'x', access_token_sealed = null,
       access_token_expires_at = null, owner = 'broker-0', owner_boot = $1, lease_until = now() + interval '1 h'`,
      [dead.boot],
    )
    const next = await scene.startEngine({ replica: 'broker-0', spoolDir: dead.spoolDir })
    t.equal(next.antiEntropy.drained(), false)
    t.equal(await next.antiEntropy.runOnce(), true)
    t.equal(next.antiEntropy.drained(), true)
    t.match(await scene.grantOf(next, user), { generation: 2, phase: 'idle', state: 'active' })
    t.ok(await isAlive(scene, next, user))
    t.equal(scene.refreshes().length, 1)
    await delay(1_100)
    await next.antiEntropy.runOnce()
    t.strictSame((await next.ports.spool.list()).entries, [], 'it goes after the retention')
  },
)

t.test(
  'a refusal is confirmed once, then the grant needs a login and is never presented again',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    await scene.lookAlike.revokeLogin(await scene.storedRefreshToken(engine, user))
    await scene.expire(user)
    t.equal(await problemOf(engine.accessTokens.fresh(user)), 'reauthentication_required')
    t.equal(scene.refreshes().length, 2)
    const grant = await scene.grantOf(engine, user)
    t.match(grant, { state: 'reauthentication_required', stateReason: 'revoked_or_expired' })
    t.ok(grant.refreshTokenSealed, 'the ciphertext is kept')
    for (let i = 0; i < 20; i += 1) {
      t.equal(await problemOf(engine.accessTokens.fresh(user)), 'reauthentication_required')
    }
    t.equal(scene.refreshes().length, 2)
    await scene.connect(engine, 'acme-1')
    t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none', 'a login revives it')
  },
)

t.test('a refusal that passes is recovered', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'status',
    status: 400,
    body: { error: 'invalid_grant' },
  })
  await scene.expire(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
  t.match(await ledger(scene, user), [{ outcome: 'refused' }, { outcome: 'granted' }])
  t.match(await scene.grantOf(engine, user), { state: 'active', generation: 2 })
})

t.test('a request lost before it was processed is presented again after a pause', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'reset_before' })
  await scene.expire(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'temporarily_unavailable')
  await delay(1_200)
  t.match(await ledger(scene, user), [
    { outcome: 'in_doubt' },
    { outcome: 'granted', cause: 'recovery' },
  ])
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
  t.ok(await isAlive(scene, engine, user))
})

t.test(
  'an answer lost after consumption is reported as our loss, not as the revocation of the user',
  async (t) => {
    const lost: ReadonlyArray<readonly [name: string, fault: Fault]> = [
      ['whole', { endpoint: 'token', kind: 'reset_after' }],
      [
        'from the middle of the refresh token on',
        {
          ...{ endpoint: 'token', kind: 'mutate' },
          change: ({ access_token: accessToken, refresh_token: refreshToken }) =>
            `{"access_token":"${String(accessToken)}","refresh_token":"${String(refreshToken).slice(0, 9)}`,
        },
      ],
    ]
    for (const [name, fault] of lost) {
      await t.test(name, async (t) => {
        const scene = await setScene(t)
        const engine = await scene.startEngine()
        const user = await scene.connect(engine, 'acme-1')
        const before = await scene.storedRefreshToken(engine, user)
        scene.lookAlike.faults.push(fault)
        await scene.expire(user)
        t.equal(await problemOf(engine.accessTokens.fresh(user)), 'temporarily_unavailable')
        t.match(await scene.grantOf(engine, user), { state: 'active', generation: 1 })
        t.equal(await scene.storedRefreshToken(engine, user), before)
        await delay(1_500)
        t.match(await scene.grantOf(engine, user), {
          state: 'reauthentication_required',
          stateReason: 'rotation_lost',
        })
        t.equal(scene.refreshes().length, 2)
      })
    }
  },
)

t.test('no trouble of the server or the network changes a grant', async (t) => {
  const troubles = [
    { status: 500, body: 'oops' },
    { status: 502, body: '<html>Bad gateway</html>' },
    { status: 504, body: '' },
    { status: 503, body: '', headers: { 'retry-after': '1' } },
    { status: 429, body: '', headers: { 'retry-after': '1' } },
    { status: 401, body: { error: 'invalid_client' } },
    { status: 400, body: { error: 'invalid_request' } },
    { status: 404, body: 'not here' },
    { status: 200, body: '<html>a gateway says all is well</html>' },
    { status: 307, body: '', headers: { location: '/oauth/v2/oauth-token' } },
  ]
  for (const trouble of troubles) {
    await t.test(`${trouble.status} ${JSON.stringify(trouble.body)}`, async (t) => {
      const scene = await setScene(t)
      const engine = await scene.startEngine()
      const user = await scene.connect(engine, 'acme-1')
      scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', ...trouble })
      await scene.expire(user)
      const code = await problemOf(engine.accessTokens.fresh(user))
      const expected =
        trouble.status === 401 ? 'client_rejected_by_pagero' : 'temporarily_unavailable'
      t.equal(code, expected)
      t.match(await scene.grantOf(engine, user), { state: 'active', generation: 1 })
      await delay(1_500)
      t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
      t.ok(await isAlive(scene, engine, user))
    })
  }
})

t.test('a 200 with one odd field keeps the successor', async (t) => {
  const odd: ReadonlyArray<readonly [string, (answer: Record<string, unknown>) => unknown]> = [
    ['expires_in is a word', (answer) => ({ ...answer, expires_in: 'soon' })],
    ['scope is null', (answer) => ({ ...answer, scope: null })],
    ['token_type is unheard of', (answer) => ({ ...answer, token_type: 'mac' })],
    ['a byte order mark', (answer) => `\uFEFF${JSON.stringify(answer)}`],
    [
      'cut after the refresh token',
      (answer) => {
        const text = JSON.stringify({ refresh_token: answer['refresh_token'], ...answer })
        return text.slice(0, -1)
      },
    ],
    ['no access token', ({ access_token: _dropped, ...answer }) => answer],
  ]
  for (const [name, change] of odd) {
    await t.test(name, async (t) => {
      const scene = await setScene(t)
      const engine = await scene.startEngine()
      const user = await scene.connect(engine, 'acme-1')
      scene.lookAlike.faults.push({ endpoint: 'token', kind: 'mutate', change })
      await scene.expire(user)
      await problemOf(engine.accessTokens.fresh(user))
      t.match(await scene.grantOf(engine, user), { state: 'active', generation: 2 })
      t.ok(await isAlive(scene, engine, user))
    })
  }
})

t.test('without a new refresh token in the answer the old one stays current', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const before = await scene.storedRefreshToken(engine, user)
  scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'status',
    status: 200,
    body: { access_token: 'at-1', token_type: 'bearer', expires_in: 600, scope: '' },
  })
  await scene.expire(user)
  t.equal((await engine.accessTokens.fresh(user)).accessToken, 'at-1')
  t.equal(await scene.storedRefreshToken(engine, user), before)
  await scene.expire(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
})

t.test(
  'a login that replaces the grant beats a refresh in flight, whose late answer is revoked',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    const gate = Promise.withResolvers<void>()
    scene.lookAlike.faults.push({
      endpoint: 'token',
      grantType: 'refresh_token',
      kind: 'delay',
      when: 'after',
      until: gate.promise,
    })
    await scene.expire(user)
    const waiting = problemOf(engine.accessTokens.fresh(user))
    while (scene.refreshes().length === 0) await delay(10)
    await scene.connect(engine, 'acme-1')
    gate.resolve()
    await waiting
    await engine.refresher.stop()
    t.ok(await isAlive(scene, engine, user))
    const { rows } = await scene.database.pool.query('select 1 from revocations')
    t.equal(rows.length, 2, 'the replaced token and the late one wait for their revocation')
    t.strictSame((await engine.ports.spool.list()).entries, [])
  },
)

t.test('a sealed value that was moved reaches nobody and changes nothing', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const alice = await scene.connect(engine, 'alice')
  const bob = await scene.connect(engine, 'bob')
  await scene.expire(alice)
  await scene.database.pool.query(
    `update grants a set refresh_token_sealed = b.refresh_token_sealed from grants b
     where a.user_id = 'alice' and b.user_id = 'bob'`,
  )
  t.equal(await problemOf(engine.accessTokens.fresh(alice)), 'integrity_failure')
  t.equal(scene.refreshes().length, 0)
  t.match(await scene.grantOf(engine, alice), { state: 'active', phase: 'idle', generation: 1 })
  t.equal(await problemOf(engine.accessTokens.fresh(bob)), 'none')
})

t.test(
  'a client secret that is wrong opens the breaker for everybody and touches no grant',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine({ refresh: { breakerProbeSeconds: 1 } })
    const users = await Promise.all(['a', 'b', 'c', 'd'].map((name) => scene.connect(engine, name)))
    await scene.database.pool.query(
      `update grants set access_token_requested_at = access_token_requested_at - interval '1 hour',
       access_token_expires_at = access_token_expires_at - interval '1 hour'`,
    )
    scene.lookAlike.faults.push({
      endpoint: 'token',
      kind: 'status',
      status: 401,
      body: { error: 'invalid_client' },
      times: 1,
    })
    for (const user of users) {
      t.equal(await problemOf(engine.accessTokens.fresh(user)), 'client_rejected_by_pagero')
    }
    t.equal(scene.refreshes().length, 1)
    await delay(1_100)
    for (const user of users) t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none')
  },
)

t.test(
  'of many who come at once a wrong secret is told by ten calls, and all are served when it is mended',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine({ refresh: { breakerProbeSeconds: 0.5 } })
    const names = Array.from({ length: 30 }, (_, n) => `user-${n}`)
    const users = await Promise.all(names.map((name) => scene.connect(engine, name)))
    for (const user of users) await scene.expire(user)
    scene.lookAlike.faults.push({
      endpoint: 'token',
      ...{ kind: 'status', status: 401, body: { error: 'invalid_client' }, times: Infinity },
    })
    const codes = await Promise.all(users.map((user) => problemOf(engine.accessTokens.fresh(user))))
    t.strictSame([...new Set(codes)], ['client_rejected_by_pagero'])
    t.ok(scene.refreshes().length <= 10, `${scene.refreshes().length} calls`)
    t.equal(engine.log.events.filter(({ event }) => event === 'breaker_opened').length, 1)
    scene.lookAlike.faults.length = 0
    const mendedAtMs = performance.now()
    for (const user of users) {
      while ((await problemOf(engine.accessTokens.fresh(user))) !== 'none') await delay(50)
    }
    t.ok(performance.now() - mendedAtMs < 15_000)
    for (const user of users) {
      t.match(await scene.grantOf(engine, user), {
        state: 'active',
        generation: 2,
        failureCount: 0,
      })
    }
  },
)

t.test('both expiries are three calendar years from rotation and from login', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  await engine.accessTokens.fresh(user)
  const { rotatedAt, authenticatedAt, rollingExpiresAt, absoluteExpiresAt } = await scene.grantOf(
    engine,
    user,
  )
  const plusThreeYears = (from: Date) => {
    const date = new Date(from)
    date.setUTCFullYear(date.getUTCFullYear() + 3)
    return date
  }
  t.ok(rotatedAt > authenticatedAt)
  t.ok(Math.abs(rollingExpiresAt.getTime() - plusThreeYears(rotatedAt).getTime()) < 1_000)
  t.ok(Math.abs(absoluteExpiresAt.getTime() - plusThreeYears(authenticatedAt).getTime()) < 1_000)
})

t.test('a refresh that waits for its turn while the broker stops presents nothing', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine({ refresh: { concurrency: 1 } })
  const first = await scene.connect(engine, 'acme-1')
  const second = await scene.connect(engine, 'acme-2')
  for (const user of [first, second]) await scene.expire(user)
  const gate = Promise.withResolvers<void>()
  scene.lookAlike.faults.push({
    endpoint: 'token',
    grantType: 'refresh_token',
    kind: 'delay',
    when: 'after',
    until: gate.promise,
  })
  const one = engine.accessTokens.fresh(first)
  while (scene.refreshes().length === 0) await delay(10)
  const two = problemOf(engine.accessTokens.fresh(second))
  while (engine.refresher.inFlight() < 2) await delay(10)
  const stopped = engine.refresher.stop()
  gate.resolve()
  await one
  t.equal(await two, 'temporarily_unavailable')
  await stopped
  t.equal(scene.refreshes().length, 1)
  t.same(await ledger(scene, second), [], 'it was not armed either')
  for (const user of [first, second]) t.ok(await isAlive(scene, engine, user))
})

t.test('a token is not served under the fingerprint of another', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  const other = await scene.connect(engine, 'acme-2')
  const { fingerprint } = await engine.accessTokens.fresh(user)
  const swap = (to: string) =>
    scene.database.pool.query(
      'update grants set access_token_fingerprint = $2 where user_id = $1',
      [user, to],
    )
  await swap((await engine.accessTokens.fresh(other)).fingerprint)
  engine.accessTokens.forget(user)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'integrity_failure')
  t.equal((await scene.grantOf(engine, user)).state, 'active')
  await swap(fingerprint)
  t.equal(await problemOf(engine.accessTokens.fresh(user)), 'none', 'swapping back heals')
  t.equal(scene.refreshes().length, 0)
})
