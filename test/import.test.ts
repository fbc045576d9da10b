// Taking over refresh tokens from another system: proven by one refresh, moved in one statement, safe to repeat.

import { randomUUID } from 'node:crypto'
import t from 'tap'
import { disconnectGrant } from '../src/connect.ts'
import { BrokerError } from '../src/errors.ts'
import { grantSealContext, importUserKey, parseUserKey, type UserKey } from '../src/grant.ts'
import { createImporter } from '../src/import.ts'
import { createRevoker } from '../src/revocation.ts'
import { type Engine, type Scene, setScene } from './support/engine.ts'

const OBTAINED_AT = new Date('2026-03-02T08:15:00Z')

/** A refresh token as another system would hold it: granted to a user whom the broker does not know. */
async function foreignToken(scene: Scene, engine: Engine, subject: string): Promise<string> {
  const other = await scene.connect(engine, `other-${randomUUID()}`, subject)
  const token = await scene.storedRefreshToken(engine, other)
  await scene.database.pool.query('delete from grants where user_id = $1', [other])
  return token
}

function importerOf(engine: Engine) {
  return createImporter(engine.ports, engine.refresher, {
    callerWaitSeconds: 3,
    subjectClaim: 'sub',
  })
}

function userKey(text: string): UserKey {
  const user = parseUserKey(text)
  if (user === undefined) throw new Error('no user key')
  return user
}

async function codeOf(work: Promise<unknown>): Promise<string> {
  try {
    await work
    return 'none'
  } catch (error) {
    if (error instanceof BrokerError) return error.code
    throw error
  }
}

t.test('an imported token is proven by one refresh and becomes the grant', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const user = userKey('acme-1')
  const grant = await importerOf(engine).takeOver({ user, refreshToken, obtainedAt: OBTAINED_AT })
  t.match(grant, { user, state: 'active', generation: 1, pageroSubject: 'alice' })
  t.strictSame(grant.authenticatedAt, OBTAINED_AT)
  t.strictSame(grant.absoluteExpiresAt, new Date('2029-03-02T08:15:00Z'))
  t.ok(grant.rollingExpiresAt > grant.absoluteExpiresAt)
  t.equal(scene.refreshes().length, 1)
  const stored = await scene.storedRefreshToken(engine, user)
  t.not(stored, refreshToken)
  t.ok(await scene.lookAlike.acceptsRefreshToken(stored))
  const token = await engine.accessTokens.fresh(user)
  t.equal((await scene.lookAlike.isActive(token.accessToken))?.subject, 'alice')
  const { rows } = await scene.database.pool.query('select user_id from grants')
  t.strictSame(rows, [{ user_id: user }], 'the grant that proved it is gone')
})

t.test('the same request again tells how the first one ended and spends nothing', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const user = userKey('acme-1')
  const importer = importerOf(engine)
  const request = { user, refreshToken, obtainedAt: OBTAINED_AT }
  const grants = await Promise.all([importer.takeOver(request), importer.takeOver(request)])
  grants.push(await importer.takeOver(request))
  t.strictSame(
    grants.map(({ generation }) => generation),
    [1, 1, 1],
  )
  t.equal(scene.refreshes().length, 1)
  t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user)))
})

t.test('an import replaces an older grant, whose token is revoked', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1', 'bob')
  const older = await scene.storedRefreshToken(engine, user)
  const refreshToken = await foreignToken(scene, engine, 'alice')
  await importerOf(engine).takeOver({ user, refreshToken, obtainedAt: OBTAINED_AT })
  t.match(await scene.grantOf(engine, user), { generation: 2, pageroSubject: 'alice' })
  t.equal(await createRevoker(engine.ports).runOnce(), 1)
  t.notOk(await scene.lookAlike.acceptsRefreshToken(older))
  t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user)))
})

t.test('a token that Pagero refuses leaves an older grant as it was', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1', 'bob')
  const before = await scene.grantOf(engine, user)
  const importer = importerOf(engine)
  const request = { user, refreshToken: 'made-up', obtainedAt: OBTAINED_AT }
  t.equal(await codeOf(importer.takeOver(request)), 'reauthentication_required')
  const calls = scene.refreshes().length
  t.equal(await codeOf(importer.takeOver(request)), 'reauthentication_required')
  t.equal(scene.refreshes().length, calls, 'it is not presented again')
  const { readAt: _before, ...was } = before
  const { readAt: _after, ...is } = await scene.grantOf(engine, user)
  t.strictSame(is, was)
})

t.test('a token that is lost on its way is told as lost', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'reset_after' })
  const importer = importerOf(engine)
  const request = { user: userKey('acme-1'), refreshToken, obtainedAt: OBTAINED_AT }
  const lost = { code: 'reauthentication_required', extensions: { cause: 'rotation_lost' } }
  let error: unknown
  do {
    await engine.ports.clock.sleep(100)
    error = await importer.takeOver(request).catch((caught: unknown) => caught)
  } while (error instanceof BrokerError && error.code === 'temporarily_unavailable')
  t.match(error, lost)
  await t.rejects(importer.takeOver(request), lost, 'and so it is when asked again')
})

/** Has Pagero refuse an import of the user, and then brings a success of it that was on its way all the time. */
async function refuseThenProve(scene: Scene, engine: Engine, user: UserKey): Promise<string> {
  const request = { user, refreshToken: `made-up-${randomUUID()}`, obtainedAt: OBTAINED_AT }
  await codeOf(importerOf(engine).takeOver(request))
  const { rows } = await scene.database.pool.query(
    `select g.user_id, g.login_id from grants g
     join imports i on g.user_id = 'pagero:~import~' || i.import_id where i.outcome = 'refused'`,
  )
  const place = { user: rows[0].user_id, loginId: rows[0].login_id, generation: 2 }
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const { sealer, grants } = engine.ports
  const stored = await grants.store({
    ...place,
    attemptId: randomUUID(),
    refreshTokenSealed: sealer.seal(grantSealContext('refresh_token_sealed', place), refreshToken),
    keyId: sealer.primaryKeyId,
    accessToken: null,
    scope: '',
    httpStatus: 200,
    durationMs: 1,
  })
  if (stored !== 'stored') throw new Error(stored)
  return refreshToken
}

t.test('a success that comes after the refusal is not thrown away', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = userKey('acme-1')
  const refreshToken = await refuseThenProve(scene, engine, user)
  t.equal(await importerOf(engine).resume(), 1)
  t.equal(await scene.storedRefreshToken(engine, user), refreshToken)
  t.ok(await scene.lookAlike.acceptsRefreshToken(refreshToken))
  t.equal(await importerOf(engine).resume(), 0)
  const { rows } = await scene.database.pool.query('select user_id from grants')
  t.strictSame(rows, [{ user_id: user }])
})

t.test('but it does not take the place of a grant that lives, or was closed', async (t) => {
  for (const isClosed of [false, true]) {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1', 'bob')
    if (isClosed) await disconnectGrant(engine.ports, user)
    const revoker = createRevoker(engine.ports)
    await revoker.runOnce()
    const before = await scene.grantOf(engine, user)
    const refreshToken = await refuseThenProve(scene, engine, user)
    t.equal(await importerOf(engine).resume(), 1)
    t.match(await scene.grantOf(engine, user), {
      state: isClosed ? 'revoked' : 'active',
      loginId: before.loginId,
    })
    t.equal(await revoker.runOnce(), 1)
    t.notOk(await scene.lookAlike.acceptsRefreshToken(refreshToken), 'it is revoked')
    t.equal(await importerOf(engine).resume(), 0)
  }
})

t.test('nor where the refusal came after the round had read that there was none', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = userKey('acme-1')
  await scene.connect(engine, 'acme-1', 'bob')
  await refuseThenProve(scene, engine, user)
  const before = await scene.grantOf(engine, user)
  const { imports } = engine.ports
  const stale = {
    ...imports,
    async findUnfinished(page: Parameters<typeof imports.findUnfinished>[0]) {
      const entries = await imports.findUnfinished(page)
      return entries.map((entry) => ({ ...entry, outcome: null }))
    },
  }
  const settings = { callerWaitSeconds: 3, subjectClaim: 'sub' }
  const importer = createImporter({ ...engine.ports, imports: stale }, engine.refresher, settings)
  t.equal(await importer.resume(), 1)
  t.equal((await scene.grantOf(engine, user)).loginId, before.loginId)
  t.equal(await importerOf(engine).resume(), 1, 'the next round knows')
  t.equal((await scene.grantOf(engine, user)).loginId, before.loginId)
  t.equal(await importerOf(engine).resume(), 0)
})

/** Begins an import that has to wait, because the server fails once. */
async function beginImport(scene: Scene, engine: Engine, user: UserKey) {
  const refreshToken = await foreignToken(scene, engine, 'alice')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 503 })
  const request = { user, refreshToken, obtainedAt: OBTAINED_AT }
  const code = await codeOf(importerOf(engine).takeOver(request))
  if (code !== 'temporarily_unavailable') throw new Error(code)
  return { request, refreshToken }
}

/** Goes on with the imports until none is left. */
async function resumeAll(engine: Engine): Promise<void> {
  while ((await importerOf(engine).resume()) > 0) await engine.ports.clock.sleep(100)
}

t.test('who has logged in since an import was begun keeps that grant', async (t) => {
  for (const hadOne of [false, true]) {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = userKey('acme-1')
    if (hadOne) await scene.connect(engine, user, 'bob')
    const { request, refreshToken } = await beginImport(scene, engine, user)
    await scene.connect(engine, user, hadOne ? 'bob' : 'carol')
    const before = await scene.grantOf(engine, user)
    const calls = scene.refreshes().length
    await resumeAll(engine)
    t.equal(scene.refreshes().length, calls, 'what will not be moved is not proven')
    const after = await scene.grantOf(engine, user)
    t.strictSame([after.loginId, after.state], [before.loginId, 'active'])
    await createRevoker(engine.ports).runOnce()
    t.notOk(await scene.lookAlike.acceptsRefreshToken(refreshToken), 'the imported one is revoked')
    t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user)))
    await t.rejects(importerOf(engine).takeOver(request), {
      code: 'reauthentication_required',
      message: /since the import was begun/,
    })
    t.equal((await scene.grantOf(engine, user)).loginId, before.loginId)
  }
})

t.test(
  'an import replaces the grant that it found, however often that was refreshed',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1', 'bob')
    await beginImport(scene, engine, user)
    await engine.refresher.refresh(await scene.grantOf(engine, user), 'rejected')
    t.match(await scene.grantOf(engine, user), { generation: 2, pageroSubject: 'bob' })
    await resumeAll(engine)
    t.match(await scene.grantOf(engine, user), { generation: 3, pageroSubject: 'alice' })
  },
)

t.test('of two imports of one user the one that was asked for later stays', async (t) => {
  for (const isInOrder of [true, false]) {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = userKey('acme-1')
    const { request: first } = await beginImport(scene, engine, user)
    const { request: second } = await beginImport(scene, engine, user)
    await engine.ports.clock.sleep(500)
    const importer = importerOf(engine)
    const codes: string[] = []
    for (const request of isInOrder ? [first, second] : [second, first]) {
      codes.push(await codeOf(importer.takeOver(request)))
    }
    t.strictSame(codes, ['none', isInOrder ? 'none' : 'reauthentication_required'])
    await createRevoker(engine.ports).runOnce()
    const stored = await scene.storedRefreshToken(engine, user)
    t.ok(await scene.lookAlike.acceptsRefreshToken(stored))
    t.equal(await codeOf(importer.takeOver(second)), 'none')
    t.equal(await scene.storedRefreshToken(engine, user), stored)
  }
})

t.test('who is disconnected after a refusal stays so when its success comes late', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = userKey('acme-1')
  const refreshToken = await refuseThenProve(scene, engine, user)
  t.equal(await disconnectGrant(engine.ports, user), false, 'nothing is under way any more')
  await resumeAll(engine)
  t.equal(await engine.ports.grants.find(user), undefined)
  await createRevoker(engine.ports).runOnce()
  t.notOk(await scene.lookAlike.acceptsRefreshToken(refreshToken))
})

t.test(
  'a death between closing the proof and ending the import leaves nothing behind',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = userKey('acme-1')
    await beginImport(scene, engine, user)
    await scene.connect(engine, user, 'bob')
    const { imports } = engine.ports
    const dead = {
      ...imports,
      async refuse() {
        throw new Error('killed')
      },
    }
    const settings = { callerWaitSeconds: 3, subjectClaim: 'sub' }
    const dying = createImporter({ ...engine.ports, imports: dead }, engine.refresher, settings)
    t.equal(await dying.resume(), 1)
    t.equal(await importerOf(engine).resume(), 1)
    t.equal(await importerOf(engine).resume(), 0)
  },
)

t.test('who is disconnected while an import waits stays so', async (t) => {
  for (const hadOne of [false, true]) {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = userKey('acme-1')
    if (hadOne) await scene.connect(engine, user, 'bob')
    const { refreshToken, request } = await beginImport(scene, engine, user)
    t.equal(await disconnectGrant(engine.ports, user), true)
    t.equal(await disconnectGrant(engine.ports, user), false, 'a second time nothing is left')
    const calls = scene.refreshes().length
    await resumeAll(engine)
    t.equal(scene.refreshes().length, calls)
    t.equal((await engine.ports.grants.find(user))?.state, hadOne ? 'revoked' : undefined)
    await createRevoker(engine.ports).runOnce()
    t.notOk(await scene.lookAlike.acceptsRefreshToken(refreshToken))
    t.equal(await codeOf(importerOf(engine).takeOver(request)), 'reauthentication_required')
    const other = { ...request, refreshToken: await foreignToken(scene, engine, 'alice') }
    t.match(await importerOf(engine).takeOver(other), { state: 'active' }, 'until another comes')
  }
})

t.test('also who is disconnected between reading and moving', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = userKey('acme-1')
  const { refreshToken } = await beginImport(scene, engine, user)
  const { grants } = engine.ports
  let wasDropped = false
  const late = {
    ...grants,
    async connect(grant: Parameters<typeof grants.connect>[0]) {
      if (!wasDropped) wasDropped = await disconnectGrant(engine.ports, user)
      return grants.connect(grant)
    },
  }
  const settings = { callerWaitSeconds: 3, subjectClaim: 'sub' }
  const importer = createImporter({ ...engine.ports, grants: late }, engine.refresher, settings)
  while (!wasDropped) {
    await engine.ports.clock.sleep(100)
    await importer.resume()
  }
  t.equal(await grants.find(user), undefined)
  await resumeAll(engine)
  t.equal(await grants.find(user), undefined)
  await createRevoker(engine.ports).runOnce()
  t.notOk(await scene.lookAlike.acceptsRefreshToken(refreshToken))
})

t.test('one round goes on with all imports that an outage has held up', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const importer = importerOf(engine)
  const requests = []
  for (let n = 1; n <= 25; n += 1) {
    const user = userKey(`acme-${n}`)
    const refreshToken = await foreignToken(scene, engine, `alice-${n}`)
    requests.push({ user, refreshToken, obtainedAt: OBTAINED_AT })
  }
  const held = { ...engine.refresher, refresh: () => Promise.reject(new Error('held up')) }
  const settings = { callerWaitSeconds: 3, subjectClaim: 'sub' }
  const waiting = createImporter(engine.ports, held, settings)
  for (const request of requests) await t.rejects(waiting.takeOver(request), /held up/)
  t.equal(await waiting.resume(), 20, 'where none ends it is not gone on')
  t.equal(await importer.resume(), 25)
  t.equal(await importer.resume(), 0)
})

t.test('imports that do not open keep no younger one from its end', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  await scene.database.pool.query(
    `with broken as (
       insert into imports (import_id, user_id, token_digest, obtained_at)
       select ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid, 'broken-' || n, ('x' || n)::bytea, now() from generate_series(1, 25) n
       returning import_id)
     insert into grants (user_id, login_id, generation, refresh_token_sealed, key_id, authenticated_at,
       rotated_at, rolling_expires_at, absolute_expires_at)
     select 'pagero:~import~' || import_id, gen_random_uuid(), 1, 'x', 'test', now(), now(),
       now() + interval '3 years', now() + interval '3 years' from broken`,
  )
  const user = userKey('acme-1')
  const refreshToken = await refuseThenProve(scene, engine, user)
  const importer = importerOf(engine)
  t.equal(await importer.resume(), 20)
  t.equal(await importer.resume(), 6)
  t.equal(await scene.storedRefreshToken(engine, user), refreshToken)
  t.equal(engine.log.events.filter(({ event }) => event === 'import_unreadable').length, 25)
  t.equal(await importer.resume(), 20, 'and it begins again')
})

t.test('what was to prove a refused import is cleared away after a month', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const request = { user: userKey('acme-1'), refreshToken: 'made-up', obtainedAt: OBTAINED_AT }
  t.equal(await codeOf(importerOf(engine).takeOver(request)), 'reauthentication_required')
  const age = (days: number) =>
    scene.database.pool.query(`update imports set finished_at = now() - interval '${days} days'`)
  await age(29)
  t.equal(await engine.ports.imports.sweep(), 0)
  await age(31)
  t.equal(await engine.ports.imports.sweep(), 1)
  t.strictSame((await scene.database.pool.query('select 1 from grants')).rows, [])
  t.equal(await codeOf(importerOf(engine).takeOver(request)), 'reauthentication_required')
  t.equal(scene.refreshes().length, 2, 'it is not presented again')
})

t.test('a date in the future is refused before the token is used', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const request = {
    user: userKey('acme-1'),
    refreshToken,
    obtainedAt: new Date(Date.now() + 60_000),
  }
  t.equal(await codeOf(importerOf(engine).takeOver(request)), 'request_invalid')
  t.equal(scene.refreshes().length, 0)
  t.ok(await scene.lookAlike.acceptsRefreshToken(refreshToken))
})

t.test('an import whose process died after the proof is moved by the next one', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const user = userKey('acme-1')
  const importId = randomUUID()
  const proof = { user: importUserKey(importId), loginId: randomUUID(), generation: 1 }
  const { sealer, imports } = engine.ports
  await imports.begin(
    { importId, user, obtainedAt: OBTAINED_AT, tokenDigest: Buffer.from('digest') },
    {
      ...proof,
      refreshTokenSealed: sealer.seal(
        grantSealContext('refresh_token_sealed', proof),
        refreshToken,
      ),
      keyId: sealer.primaryKeyId,
    },
  )
  await engine.refresher.refresh(await scene.grantOf(engine, proof.user), 'import')
  t.equal(await codeOf(engine.accessTokens.fresh(user)), 'grant_not_found')
  t.equal(await importerOf(engine).resume(), 1)
  t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user)))
  t.equal(scene.refreshes().length, 1)
  t.equal(await importerOf(engine).resume(), 0)
})

t.test('an import that meets an outage goes on by itself', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const user = userKey('acme-1')
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 503 })
  const importer = importerOf(engine)
  const request = { user, refreshToken, obtainedAt: OBTAINED_AT }
  t.equal(await codeOf(importer.takeOver(request)), 'temporarily_unavailable')
  while ((await engine.ports.grants.find(user)) === undefined) {
    await engine.ports.clock.sleep(100)
    await importer.resume()
  }
  t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, user)))
})

t.test(
  'a token that was taken over is never presented again, however long ago and under whatever key',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const refreshToken = await foreignToken(scene, engine, 'alice')
    const user = userKey('acme-1')
    const request = { user, refreshToken, obtainedAt: OBTAINED_AT }
    await importerOf(engine).takeOver(request)
    await scene.database.pool.query("update imports set finished_at = now() - interval '35 months'")
    t.equal(await engine.ports.imports.sweep(), 0)
    const { sealer } = engine.ports
    const later = await scene.startEngine({
      replace: { sealer: { ...sealer, digest: () => Buffer.from('of another key') } },
    })
    t.match(await importerOf(later).takeOver(request), { generation: 1 })
    t.equal(scene.refreshes().length, 1)
    await scene.database.pool.query("update imports set finished_at = now() - interval '37 months'")
    t.equal(await engine.ports.imports.sweep(), 1, 'a token that old cannot live')
  },
)

t.test('one token given twice at the same instant is one import', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const { imports } = engine.ports
  const begin = (digest: string) => {
    const importId = randomUUID()
    return imports.begin(
      {
        ...{ importId, user: userKey('acme-1'), obtainedAt: OBTAINED_AT },
        tokenDigest: Buffer.from(digest),
      },
      {
        ...{ user: importUserKey(importId), loginId: randomUUID(), keyId: 'test' },
        refreshTokenSealed: Buffer.from('sealed'),
      },
    )
  }
  for (let n = 0; n < 200; n += 1) {
    const [one, other] = await Promise.all([begin(`token ${n}`), begin(`token ${n}`)])
    if (one.importId !== other.importId) t.fail('they are two')
  }
  const { rows } = await scene.database.pool.query('select count(*)::int from imports')
  t.strictSame(rows, [{ count: 200 }])
})

t.test('one token given for two users at once is taken over for one of them', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const importer = importerOf(engine)
  const codes = await Promise.all(
    ['acme-1', 'acme-2'].map((name) =>
      codeOf(importer.takeOver({ user: userKey(name), refreshToken, obtainedAt: OBTAINED_AT })),
    ),
  )
  t.strictSame(codes.toSorted(), ['none', 'request_invalid'])
  t.equal(scene.refreshes().length, 1)
  const winner = userKey(codes[0] === 'none' ? 'acme-1' : 'acme-2')
  t.ok(await scene.lookAlike.acceptsRefreshToken(await scene.storedRefreshToken(engine, winner)))
})

t.test('an import whose grant was disconnected since does not look like a success', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const refreshToken = await foreignToken(scene, engine, 'alice')
  const user = userKey('acme-1')
  const request = { user, refreshToken, obtainedAt: OBTAINED_AT }
  await importerOf(engine).takeOver(request)
  await disconnectGrant(engine.ports, user)
  t.equal(await codeOf(importerOf(engine).takeOver(request)), 'grant_not_found')
})
