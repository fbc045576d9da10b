// The internal listener as a backend service meets it: real callers file, real PostgreSQL, real tokens of the look-alike.

import { createHash } from 'node:crypto'
import type { AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { InjectOptions, LightMyRequestResponse as Response } from 'fastify'
import t, { type Test } from 'tap'
import type { App } from '../src/http/app.ts'
import type { UserKey } from '../src/grant.ts'
import { handOutsOf } from './support/audit.ts'
import {
  buildListeners,
  type CallerEntry,
  type InternalListener,
} from './support/internal-listener.ts'

const ALL_RIGHTS = ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'] as const

const CALLERS = {
  everything: { rights: ALL_RIGHTS, users: ['*'] },
  acme: { rights: ALL_RIGHTS, users: ['acme-*'] },
  nothing: { rights: [], users: ['*'] },
  expired: { rights: ALL_RIGHTS, users: ['*'], expiresAt: '2020-01-01T00:00:00Z' },
  reader: {
    rights: ['proxy:call'],
    users: ['*'],
    proxyAllow: ['GET /document/v1/**'],
  },
} satisfies Record<string, CallerEntry>

const SOME_FINGERPRINT = 'A'.repeat(43)

/** Every route under a user, with the right that it needs. */
const USER_ROUTES: ReadonlyArray<{
  right: (typeof ALL_RIGHTS)[number]
  method: 'GET' | 'POST' | 'DELETE'
  path: string
  payload?: object
}> = [
  { right: 'token:read', method: 'GET', path: '/access-token' },
  {
    right: 'token:read',
    method: 'POST',
    path: '/access-token',
    payload: { rejected: SOME_FINGERPRINT },
  },
  { right: 'grant:read', method: 'GET', path: '/grant' },
  { right: 'grant:manage', method: 'DELETE', path: '/grant' },
  { right: 'ops:read', method: 'GET', path: '/refresh-attempts' },
  { right: 'proxy:call', method: 'GET', path: '/pagero/document/v1/documents' },
]

interface Ask {
  method?: 'GET' | 'HEAD' | 'POST' | 'PUT' | 'PATCH' | 'DELETE' | 'OPTIONS'
  payload?: string | object
  headers?: Record<string, string | string[]>
}

interface Setting extends InternalListener {
  /** Sends a request as a caller; undefined sends no credential. */
  ask: (caller: keyof typeof CALLERS | undefined, url: string, ask?: Ask) => Promise<Response>
}

async function setUp(
  t: Test,
  options: Omit<Parameters<typeof buildListeners>[1], 'callers'> = {},
): Promise<Setting> {
  const listeners = await buildListeners(t, { callers: CALLERS, ...options })
  return {
    ...listeners,
    async ask(caller, url, { method = 'GET', payload, headers = {} } = {}) {
      const credential = caller === undefined ? {} : listeners.credentials[caller]
      const request: InjectOptions = {
        method,
        url,
        headers: { ...credential, ...headers },
        ...(payload === undefined ? {} : { payload }),
      }
      return listeners.internalApp.inject(request)
    },
  }
}

function problemOf(response: Response): { status: number; code: unknown } {
  return { status: response.statusCode, code: (response.json() as { code: unknown }).code }
}

/** All that two answers must have in common: everything but the request's own number and the clock. */
function comparable(response: Response): unknown {
  const { date: _date, ...headers } = response.headers
  const body = response.body.replaceAll(/urn:uuid:[0-9a-f-]{36}/g, 'urn:uuid:-')
  return { status: response.statusCode, headers, body }
}

function fingerprintOf(accessToken: string): string {
  return createHash('sha256').update(accessToken).digest('base64url')
}

t.test('a token answer has the members of the contract and is never cached', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  const alice = await scene.connect(engine, 'alice')
  const before = Date.now()
  const response = await ask('everything', '/v1/users/alice/access-token')
  t.equal(response.statusCode, 200)
  const answer = response.json() as Record<string, unknown> & { access_token: string }
  t.same(Object.keys(answer).toSorted(), [
    'access_token',
    'expires_at',
    'expires_in',
    'fingerprint',
    'scope',
    'token_type',
  ])
  t.match(await scene.lookAlike.isActive(answer.access_token), { subject: 'alice' })
  t.equal(answer['token_type'], 'Bearer')
  t.equal(answer['fingerprint'], fingerprintOf(answer.access_token))
  const expiresInSeconds = Number(answer['expires_in'])
  t.ok(Number.isInteger(expiresInSeconds) && expiresInSeconds > 590 && expiresInSeconds <= 600)
  const expiresAtMs = Date.parse(String(answer['expires_at']))
  t.ok(Math.abs(expiresAtMs - before - expiresInSeconds * 1000) < 2_000)
  t.equal(response.headers['cache-control'], 'no-store')
  t.equal(response.headers.pragma, 'no-cache')
  t.equal(response.headers['content-type'], 'application/json; charset=utf-8')
  t.notHas(response.headers, { etag: String, 'last-modified': String })
  t.equal(scene.refreshes().length, 0)
  t.match(
    await handOutsOf(engine),
    [{ user: alice, actorName: 'everything', fingerprint: answer['fingerprint'], count: 1 }],
    'the hand-out is on record, by its fingerprint',
  )
  t.notMatch(JSON.stringify(engine.log.events), answer.access_token)

  const conditional = await ask('everything', '/v1/users/alice/access-token', {
    headers: { 'if-none-match': '*', 'if-modified-since': 'Mon, 23 Nov 2099 12:00:00 GMT' },
  })
  t.equal(conditional.statusCode, 200, 'never 304')
})

t.test('min_ttl brings a token that lives so long, and is checked', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'alice')
  const url = '/v1/users/alice/access-token'
  t.equal((await ask('everything', `${url}?min_ttl=0`)).statusCode, 200)
  t.equal((await ask('everything', `${url}?min_ttl=300`)).statusCode, 200, 'half the life')
  for (const query of [
    'min_ttl=301',
    'min_ttl=86401',
    'min_ttl=-1',
    'min_ttl=1.5',
    'min_ttl=',
    'min_ttl=ten',
    'min_ttl=1e999',
    'min_ttl=1&min_ttl=2',
    'min_ttl[]=1',
    'minttl=1',
    'access_token=x',
  ]) {
    const response = await ask('everything', `${url}?${query}`)
    t.match(problemOf(response), { status: 400, code: 'request_invalid' }, query)
    t.equal(response.headers['cache-control'], 'no-store')
  }
  t.equal(scene.refreshes().length, 0, 'no refusal cost a refresh')
})

t.test(
  'a reported token is replaced once, and the newer one is given to who reports the older',
  async (t) => {
    const { ask, scene, engine } = await setUp(t)
    await scene.connect(engine, 'alice')
    const url = '/v1/users/alice/access-token'
    const report = async (rejected: string) => {
      const response = await ask('everything', url, { method: 'POST', payload: { rejected } })
      t.equal(response.statusCode, 200)
      t.equal(response.headers['cache-control'], 'no-store')
      t.equal(response.headers.pragma, 'no-cache')
      return response.json() as { access_token: string; fingerprint: string }
    }
    const first = (await ask('everything', url)).json() as { fingerprint: string }
    const second = await report(first.fingerprint)
    t.not(second.fingerprint, first.fingerprint)
    t.equal(second.fingerprint, fingerprintOf(second.access_token))
    t.equal((await report(first.fingerprint)).fingerprint, second.fingerprint, 'reported too late')
    t.equal((await report(SOME_FINGERPRINT)).fingerprint, second.fingerprint, 'never heard of')
    t.equal((await report(second.fingerprint)).fingerprint, second.fingerprint, 'within 30 s')
    t.equal(scene.refreshes().length, 1)
  },
)

t.test('a report is one fingerprint and nothing else', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'alice')
  const url = '/v1/users/alice/access-token'
  const json = { 'content-type': 'application/json' }
  const send = async (payload: string | object, headers = {}) =>
    problemOf(await ask('everything', url, { method: 'POST', payload, headers }))
  const invalid = { status: 400, code: 'request_invalid' }
  t.match(await send({}), invalid, 'no member')
  t.match(await send({ rejected: 'A'.repeat(42) }), invalid, 'too short')
  t.match(await send({ rejected: 'A'.repeat(44) }), invalid, 'too long')
  t.match(await send({ rejected: `${'A'.repeat(42)}=` }), invalid, 'padded')
  t.match(await send({ rejected: null }), invalid, 'null')
  t.match(await send({ rejected: [SOME_FINGERPRINT] }), invalid, 'a list')
  t.match(await send({ rejected: SOME_FINGERPRINT, state: 'active' }), invalid, 'unknown member')
  t.match(await send('{"rejected":', json), invalid, 'broken JSON')
  t.match(await send('null', json), invalid, 'JSON null')
  t.match(
    await send(`{"rejected":"${SOME_FINGERPRINT}","__proto__":{"a":1}}`, json),
    invalid,
    '__proto__',
  )
  t.match(
    await send(`{"rejected":"${SOME_FINGERPRINT}","constructor":{"prototype":1}}`, json),
    invalid,
    'constructor',
  )
  const unsupported = { status: 415, code: 'unsupported_media_type' }
  t.match(
    await send('rejected=a', { 'content-type': 'application/x-www-form-urlencoded' }),
    unsupported,
  )
  t.match(await send('{}', { 'content-type': 'text/plain' }), unsupported)
  t.match(await send({ rejected: 'A'.repeat(70_000) }), { status: 413, code: 'payload_too_large' })
  t.equal(scene.refreshes().length, 0)
})

t.test('without a valid credential nothing is answered, whatever is asked', async (t) => {
  const { ask, scene, engine, credentials } = await setUp(t)
  await scene.connect(engine, 'alice')
  const key = credentials['everything']?.authorization.slice('Bearer '.length) ?? ''
  const headers: ReadonlyArray<{ what: string; headers: Record<string, string | string[]> }> = [
    { what: 'no credential', headers: {} },
    { what: 'an empty one', headers: { authorization: '' } },
    { what: 'a scheme alone', headers: { authorization: 'Bearer' } },
    { what: 'a key without a scheme', headers: { authorization: key } },
    { what: 'another scheme', headers: { authorization: `Basic ${key}` } },
    { what: 'a wrong secret', headers: { authorization: `Bearer ${key.slice(0, -1)}_` } },
    { what: 'an unknown id', headers: { authorization: `Bearer pgb_key999_${'a'.repeat(43)}` } },
    { what: 'a key cut short', headers: { authorization: `Bearer ${key.slice(0, 20)}` } },
    { what: 'a key with something behind', headers: { authorization: `Bearer ${key} x` } },
    { what: 'two keys in one header', headers: { authorization: `Bearer ${key}, Bearer ${key}` } },
    { what: 'a very long key', headers: { authorization: `Bearer pgb_key0_${'a'.repeat(8_000)}` } },
    { what: 'a key in a cookie', headers: { cookie: `__Host-broker-session=${key}; key=${key}` } },
    {
      what: 'identity headers of a proxy',
      headers: { 'x-user-id': 'alice', 'x-forwarded-user': 'everything' },
    },
    { what: 'an expired key', headers: credentials['expired'] ?? {} },
  ]
  for (const { method, path, payload } of USER_ROUTES) {
    for (const { what, headers: sent } of headers) {
      const response = await ask(undefined, `/v1/users/alice${path}`, {
        method,
        headers: sent,
        ...(payload === undefined ? {} : { payload }),
      })
      t.match(
        problemOf(response),
        { status: 401, code: 'caller_unauthenticated' },
        `${method} ${path} with ${what}`,
      )
      t.match(
        response.headers['www-authenticate'],
        /^Bearer realm="pagero-token-broker"(?:, error="invalid_token")?$/,
      )
      t.notMatch(response.body, /pgb_[a-z0-9]|alice/)
    }
  }
  const inQuery = await ask(undefined, `/v1/users/alice/access-token?access_token=${key}`)
  t.match(problemOf(inQuery), { status: 401, code: 'caller_unauthenticated' }, 'a key in the query')
  const inBody = await ask(undefined, '/v1/users/alice/access-token', {
    method: 'POST',
    payload: { rejected: SOME_FINGERPRINT, access_token: key },
  })
  t.match(problemOf(inBody), { status: 401, code: 'caller_unauthenticated' }, 'a key in the body')
  t.equal((await scene.grantOf(engine, 'alice' as UserKey)).state, 'active')
})

t.test('every refusal of a caller is on record, with the caller where it is known', async (t) => {
  const { ask, engine } = await setUp(t)
  await ask(undefined, '/v1/users/bob/grant')
  await ask('nothing', '/v1/users/bob/grant')
  await ask('acme', '/v1/users/bob/grant')
  await ask('reader', '/v1/users/bob/pagero/file/v1/files')
  t.match(
    engine.log.events.filter(({ level }) => level === 'warn'),
    [
      { event: 'caller_unauthenticated', requestId: String, address: '127.0.0.1' },
      { event: 'caller_forbidden', caller: 'nothing', reason: 'lacks the right grant:read' },
      { event: 'user_not_visible', caller: 'acme', user: 'bob' },
      { event: 'caller_forbidden', caller: 'reader', method: 'GET', reason: /proxy_allow/ },
    ],
  )
})

t.test('each route needs its own right, and says so before anything about the user', async (t) => {
  const { ask } = await setUp(t)
  for (const { right, method, path, payload } of USER_ROUTES) {
    for (const user of ['nobody', 'bob%00', 'a'.repeat(300)]) {
      const response = await ask('nothing', `/v1/users/${user}${path}`, {
        method,
        ...(payload === undefined ? {} : { payload }),
      })
      t.match(
        problemOf(response),
        { status: 403, code: 'caller_forbidden' },
        `${right} for ${method}`,
      )
    }
  }
})

t.test('a right opens its own routes and no others', async (t) => {
  const { internalApp, credentials } = await buildListeners(t, {
    callers: Object.fromEntries(
      ALL_RIGHTS.map((right) => [right.replace(':', '-'), { rights: [right], users: ['*'] }]),
    ),
  })
  for (const granted of ALL_RIGHTS) {
    for (const { right, method, path, payload } of USER_ROUTES) {
      const response = await internalApp.inject({
        method,
        url: `/v1/users/nobody${path}`,
        headers: credentials[granted.replace(':', '-')] ?? {},
        ...(payload === undefined ? {} : { payload }),
      })
      const expected =
        right === granted
          ? { status: 404, code: 'grant_not_found' }
          : { status: 403, code: 'caller_forbidden' }
      t.match(problemOf(response), expected, `${method} ${path} with ${granted}`)
    }
  }
})

t.test(
  'a user that the caller may not see is answered word for word as one that does not exist',
  async (t) => {
    const { ask, scene, engine } = await setUp(t)
    await scene.connect(engine, 'bob')
    for (const { method, path, payload } of USER_ROUTES) {
      for (const broken of [false, true]) {
        const suffix = broken ? '?unknown=1' : ''
        if (broken && path.startsWith('/pagero')) continue
        const send = (user: string) =>
          ask('acme', `/v1/users/${user}${path}${suffix}`, {
            method,
            ...(payload === undefined ? {} : { payload: broken ? { x: 1 } : payload }),
          })
        const invisible = await send('bob')
        const missing = await send('acme-nobody')
        const invisibleAndMissing = await send('nobody')
        t.same(comparable(invisible), comparable(missing), `${method} ${path}${suffix}`)
        t.same(comparable(invisibleAndMissing), comparable(missing))
      }
      const { status } = problemOf(
        await ask('acme', `/v1/users/bob${path}`, {
          method,
          ...(payload === undefined ? {} : { payload }),
        }),
      )
      t.equal(status, 404)
    }
    t.equal((await scene.grantOf(engine, 'bob' as UserKey)).state, 'active')
    t.equal(scene.refreshes().length, 0)
  },
)

t.test('with the database away, neither kind of user is told from the other', async (t) => {
  const { ask, scene } = await setUp(t)
  await scene.database.close()
  const invisible = await ask('acme', '/v1/users/bob/grant')
  const missing = await ask('acme', '/v1/users/acme-nobody/grant')
  t.same(comparable(invisible), comparable(missing))
  t.not(invisible.statusCode, 404)
})

t.test('a malformed user key is refused with its rule, whoever the caller may see', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'bob')
  const malformed = {
    'bob%00': 'NUL',
    'b%252f': 'encoded twice',
    'bob%2f..%2falice': 'an escaped slash',
    'bob%20': 'a space',
    'bob%0a': 'a line feed',
    'b%C3%B6b': 'an umlaut',
    '%EF%BD%82%EF%BD%8F%EF%BD%82': 'full-width letters',
    'bob%25': 'a percent sign',
    'bob*': 'a wildcard',
    'bob%3Bx': 'a semicolon',
    ['a'.repeat(256)]: '256 characters',
    ['a'.repeat(2_000)]: '2000 characters',
  }
  for (const caller of ['everything', 'acme'] as const) {
    for (const [user, what] of Object.entries(malformed)) {
      const response = await ask(caller, `/v1/users/${user}/access-token`)
      t.match(problemOf(response), { status: 400, code: 'request_invalid' }, `${what}, ${caller}`)
    }
  }
  const response = await ask('everything', '/v1/users/bob%00/grant')
  t.match(response.json(), {
    errors: [{ pointer: 'params/user', detail: /1 to 255 characters/ }],
  })
})

t.test('user keys are compared byte for byte after one decoding', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'bob')
  const longest = 'a'.repeat(255)
  await scene.connect(engine, longest)
  await scene.connect(engine, 'pagero:5d3c@x+y~z_-.')
  t.equal((await ask('everything', '/v1/users/b%6fb/grant')).statusCode, 200)
  t.equal((await ask('everything', `/v1/users/${longest}/grant`)).statusCode, 200)
  t.equal((await ask('everything', '/v1/users/pagero:5d3c@x+y~z_-./grant')).statusCode, 200)
  t.equal((await ask('everything', '/v1/users/pagero%3A5d3c%40x%2By~z_-./grant')).statusCode, 200)
  for (const other of ['Bob', 'BOB', 'bob.', 'bob-', 'bo']) {
    t.match(
      problemOf(await ask('everything', `/v1/users/${other}/grant`)),
      { status: 404, code: 'grant_not_found' },
      other,
    )
  }
})

t.test('a grant is shown with its dates, and nothing that is sealed', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'alice', 'alice@example.com')
  const response = await ask('everything', '/v1/users/alice/grant')
  t.equal(response.statusCode, 200)
  t.equal(response.headers['cache-control'], 'no-store')
  const grant = response.json() as Record<string, unknown>
  t.same(Object.keys(grant).toSorted(), [
    'absolute_expires_at',
    'authenticated_at',
    'cause',
    'expires_at',
    'generation',
    'key_id',
    'last_used_at',
    'next_retry_at',
    'pagero',
    'rolling_expires_at',
    'rotated_at',
    'scope',
    'state',
    'user',
  ])
  t.match(grant, {
    user: 'alice',
    state: 'active',
    cause: null,
    generation: 1,
    key_id: 'test',
    next_retry_at: null,
    pagero: { issuer: scene.lookAlike.issuer, subject: 'alice@example.com' },
  })
  const years =
    new Date(String(grant['rolling_expires_at'])).getUTCFullYear() - new Date().getUTCFullYear()
  t.equal(years, 3)
  t.notMatch(response.body, await scene.storedRefreshToken(engine, 'alice' as UserKey))
})

t.test('the earlier of the two readings of three years is the one to expect', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'alice')
  await scene.database.pool.query(
    "update grants set absolute_expires_at = '2027-01-01T00:00:00Z' where user_id = 'alice'",
  )
  t.match((await ask('everything', '/v1/users/alice/grant')).json(), {
    absolute_expires_at: '2027-01-01T00:00:00.000Z',
    expires_at: '2027-01-01T00:00:00.000Z',
  })
})

t.test('a grant that died says why; asking for its token says to log in again', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  await scene.connect(engine, 'alice')
  await scene.database.pool.query(
    "update grants set state = 'reauthentication_required', state_reason = 'rotation_lost' where user_id = 'alice'",
  )
  t.match((await ask('everything', '/v1/users/alice/grant')).json(), {
    state: 'reauthentication_required',
    cause: 'rotation_lost',
  })
  const response = await ask('everything', '/v1/users/alice/access-token')
  t.match(problemOf(response), { status: 409, code: 'reauthentication_required' })
  t.match(response.json(), { cause: 'rotation_lost' })
})

t.test('disconnecting answers 204 once, then 404, and ends the token at once', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  const alice = await scene.connect(engine, 'alice')
  await engine.ports.sessions.create(
    Buffer.alloc(32, 1),
    alice,
    { idleSeconds: 60, absoluteSeconds: 60 },
    { replaces: null, perUserMax: 10 },
  )
  t.equal((await ask('everything', '/v1/users/alice/access-token')).statusCode, 200)
  const disconnect = () =>
    ask('everything', '/v1/users/alice/grant', {
      method: 'DELETE',
      // Some clients say so of every request; there is no body.
      headers: { 'content-type': 'application/json' },
    })
  const first = await disconnect()
  t.equal(first.statusCode, 204)
  t.equal(first.body, '')
  t.match(problemOf(await disconnect()), { status: 404, code: 'grant_not_found' })
  t.match(problemOf(await ask('everything', '/v1/users/alice/access-token')), {
    status: 404,
    code: 'grant_not_found',
  })
  t.match((await ask('everything', '/v1/users/alice/grant')).json(), { state: 'revoked' })
  t.equal(
    await engine.ports.sessions.resolve(Buffer.alloc(32, 1), {
      idleSeconds: 60,
      absoluteSeconds: 60,
    }),
    undefined,
    'the sessions are over',
  )
  const isRevoked = () => scene.lookAlike.record.some(({ endpoint }) => endpoint === 'revoke')
  for (let waits = 0; !isRevoked() && waits < 100; waits += 1) await delay(20)
  t.ok(isRevoked(), 'Pagero is told in the background')
  t.match(
    engine.log.events.filter(({ event }) => event === 'grant_disconnected_by_caller'),
    [{ user: 'alice', caller: 'everything' }],
  )
})

t.test('the ledger is read page by page, newest first', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  const alice = await scene.connect(engine, 'alice')
  await scene.connect(engine, 'bob')
  for (let renewals = 0; renewals < 5; renewals += 1) {
    await scene.expire(alice)
    await engine.accessTokens.fresh(alice)
  }
  const url = '/v1/users/alice/refresh-attempts'
  interface Page {
    items: Array<{ attempt_id: string; generation: number }>
    next: string | null
  }
  const read = async (query: string) => (await ask('everything', `${url}?${query}`)).json() as Page
  const whole = (await ask('everything', url)).json() as Page
  t.same(
    whole.items.map(({ generation }) => generation),
    [5, 4, 3, 2, 1],
  )
  t.equal(whole.next, null)
  t.match(whole.items[0], {
    cause: 'expiry',
    outcome: 'granted',
    http_status: 200,
    duration_ms: Number,
    replica: String,
    armed_at: /^\d{4}-\d\d-\d\dT.+Z$/,
    finished_at: /^\d{4}-\d\d-\d\dT.+Z$/,
  })
  const first = await read('limit=2')
  const second = await read(`limit=2&after=${first.next}`)
  const third = await read(`limit=2&after=${second.next}`)
  t.same([...first.items, ...second.items, ...third.items], whole.items)
  t.equal(third.next, null)
  t.same(await read('limit=5'), whole, 'a full last page has no next')

  for (const query of ['limit=0', 'limit=501', 'limit=x', 'after=1', 'after=', 'page=2']) {
    t.match(problemOf(await ask('everything', `${url}?${query}`)), { status: 400 }, query)
  }
  const urn = problemOf(await ask('everything', `${url}?after=urn:uuid:${first.next}`))
  t.match(urn, { status: 400, code: 'request_invalid' })
  const foreign = `/v1/users/bob/refresh-attempts?after=${first.next}`
  t.match(problemOf(await ask('everything', foreign)), { status: 400, code: 'request_invalid' })
  t.same((await ask('everything', '/v1/users/bob/refresh-attempts')).json(), {
    items: [],
    next: null,
  })
  t.match(problemOf(await ask('everything', '/v1/users/nobody/refresh-attempts')), {
    status: 404,
    code: 'grant_not_found',
  })
})

t.test(
  'a call to Pagero is made for the user with the path as it was sent, if the caller may',
  async (t) => {
    const { internalApp, scene, engine, api, credentials } = await setUp(t)
    await scene.connect(engine, 'alice')
    await internalApp.listen({ host: '127.0.0.1', port: 0 })
    const { port } = internalApp.server.address() as AddressInfo
    const origin = `http://127.0.0.1:${port}`
    const call = (caller: string, user: string, target: string, method = 'GET') =>
      fetch(`${origin}/v1/users/${user}/pagero${target}`, {
        method,
        headers: credentials[caller] ?? {},
      })

    const answer = await call('reader', 'alice', '/document/v1/documents?limit=2&x=%41')
    t.equal(answer.status, 200)
    t.equal(api.record.at(-1)?.rawTarget, '/document/v1/documents?limit=2&x=%41')
    const calls = api.record.length
    for (const [target, method] of [
      ['/file/v1/files', 'GET'],
      ['/document/v1/documents', 'DELETE'],
      ['/document/v1', 'GET'],
    ] as const) {
      const refused = await call('reader', 'alice', target, method)
      t.equal(refused.status, 403, `${method} ${target}`)
      t.match(await refused.json(), { code: 'caller_forbidden' })
    }
    t.equal(
      (await call('reader', 'nobody', '/file/v1/files')).status,
      403,
      'before the user is looked up',
    )
    t.equal((await call('reader', 'nobody', '/document/v1/documents')).status, 404)
    t.equal((await call('acme', 'alice', '/document/v1/documents')).status, 404)
    t.equal((await call('nothing', 'alice', '/document/v1/documents')).status, 403)
    t.equal((await call('reader', 'bob%00', '/document/v1/documents')).status, 400)
    t.equal(api.record.length, calls, 'no refused call reached Pagero')
  },
)

t.test(
  'a method that a resource has not is 405 with Allow, with or without a credential',
  async (t) => {
    const { ask } = await setUp(t)
    for (const [path, method, allow] of [
      ['/v1/users/alice/access-token', 'PUT', 'GET, POST'],
      ['/v1/users/alice/access-token', 'HEAD', 'GET, POST'],
      ['/v1/users/alice/grant', 'POST', 'DELETE, GET, HEAD, PUT'],
      ['/v1/users/alice/refresh-attempts', 'DELETE', 'GET, HEAD'],
      ['/livez', 'POST', 'GET, HEAD'],
    ] as const) {
      for (const caller of ['everything', undefined] as const) {
        const response = await ask(caller, path, { method })
        t.equal(response.statusCode, 405, `${method} ${path}`)
        t.equal(response.headers.allow, allow)
      }
    }
  },
)

t.test('neither listener serves a route of the other', async (t) => {
  const { internalApp, publicApp, credentials } = await setUp(t)
  const headers = credentials['everything'] ?? {}
  const isServed = async (app: App, method: 'GET' | 'POST', url: string) =>
    (await app.inject({ method, url, headers })).json().code !== 'not_found'
  for (const [method, url] of [
    ['GET', '/v1/users/alice/access-token'],
    ['POST', '/v1/users/alice/access-token'],
    ['GET', '/v1/users/alice/grant'],
    ['GET', '/v1/users/alice/refresh-attempts'],
    ['GET', '/v1/users/alice/pagero/x'],
    ['GET', '/v1/'],
  ] as const) {
    t.equal(
      await isServed(publicApp, method, url),
      false,
      `${method} ${url} on the public listener`,
    )
  }
  for (const url of ['/docs', '/docs/json', '/openapi.yaml', '/problems', '/readyz', '/metrics']) {
    t.equal((await publicApp.inject(url)).statusCode, 404, url)
  }
  for (const [method, url] of [
    ['GET', '/auth/login'],
    ['GET', '/auth/callback'],
    ['GET', '/auth/session'],
    ['POST', '/auth/logout'],
    ['GET', '/api/document/v1/documents'],
  ] as const) {
    t.equal(await isServed(internalApp, method, url), false, `${method} ${url} on the internal one`)
  }
})

t.test('live means that the process answers; ready, that every check passes', async (t) => {
  let spool: () => Promise<string | undefined> = () => Promise.resolve(undefined)
  const { ask } = await setUp(t, {
    checks: { database: async () => undefined, spool: () => spool() },
  })
  const read = async () => {
    const response = await ask(undefined, '/readyz')
    t.equal(response.headers['cache-control'], 'no-store')
    return { status: response.statusCode, body: response.json() as unknown }
  }
  t.same(await read(), {
    status: 200,
    body: { status: 'ok', checks: { database: 'ok', spool: 'ok' } },
  })
  spool = async () => 'not drained yet'
  t.same(await read(), {
    status: 503,
    body: { status: 'unready', checks: { database: 'ok', spool: 'not drained yet' } },
  })
  spool = async () => {
    throw new Error('EACCES: permission denied, /var/lib/broker/spool')
  }
  t.same(await read(), {
    status: 503,
    body: { status: 'unready', checks: { database: 'ok', spool: 'failed' } },
  })
  spool = () => new Promise(() => undefined)
  const startedMs = performance.now()
  t.same(await read(), {
    status: 503,
    body: { status: 'unready', checks: { database: 'ok', spool: 'no result within 2000 ms' } },
  })
  t.ok(performance.now() - startedMs < 4_000)
  const live = await ask(undefined, '/livez')
  t.same(live.json(), { status: 'ok' })
})

t.test('the documentation needs no credential and loads nothing from elsewhere', async (t) => {
  const { ask } = await setUp(t)
  const page = await ask(undefined, '/docs')
  t.equal(page.statusCode, 200)
  t.match(page.headers['content-security-policy'], /^default-src 'none'; script-src 'self'/)
  t.notMatch(page.body, /<script(?![^>]* src=)|https?:\/\//, 'no inline script, no other host')
  const asset = await ask(undefined, '/docs/static/swagger-ui-bundle.js')
  t.equal(asset.statusCode, 200)
  t.equal((await ask(undefined, '/docs/static/nothing.js')).statusCode, 404)

  const json = await ask(undefined, '/openapi.json')
  t.match(json.headers['content-type'], 'application/json; charset=utf-8')
  const document = json.json() as { paths: Record<string, unknown> }
  t.ok(document.paths['/v1/users/{user}/access-token'])
  t.ok(document.paths['/auth/login'], 'both listeners are in it')
  t.same((await ask(undefined, '/docs/json')).json(), document, 'the page shows the same document')
  const yaml = await ask(undefined, '/openapi.yaml')
  t.equal(yaml.headers['content-type'], 'application/yaml; charset=utf-8')
  t.match(yaml.body, /^openapi: 3\.1\.0\n/)
})

t.test('the type of every problem leads to a page that explains it', async (t) => {
  const { ask } = await setUp(t)
  const { type } = (await ask(undefined, '/nowhere')).json() as { type: string }
  const page = await ask(undefined, type)
  t.equal(page.statusCode, 200)
  t.equal(page.headers['content-type'], 'text/html; charset=utf-8')
  t.match(page.body, '<code>not_found</code>')
  t.match(page.headers['content-security-policy'], /^default-src 'none'; style-src 'sha256-/)
  const index = await ask(undefined, '/problems')
  t.match(index.body, type)
  const unknown = await ask(undefined, '/problems/%3Cscript%3E')
  t.match(problemOf(unknown), { status: 404, code: 'not_found' })
  t.notMatch(unknown.body, /<script>/)
})

t.test('every kind of answer has the fields that all must have', async (t) => {
  const { internalApp, credentials } = await buildListeners(t, { callers: CALLERS })
  const authorization = credentials['everything']?.authorization ?? ''
  const asked: ReadonlyArray<readonly [status: number, ask: InjectOptions & { url: string }]> = [
    [200, { url: '/livez' }],
    [200, { url: '/readyz' }],
    [200, { url: '/docs' }],
    [200, { url: '/openapi.yaml' }],
    [200, { url: '/openapi.json' }],
    [200, { url: '/problems/not_found' }],
    [404, { url: '/problems/none' }],
    [404, { url: '/nowhere' }],
    [405, { url: '/v1/grants', method: 'PUT' }],
    [401, { url: '/v1/grants' }],
    [400, { url: '/v1/users/a%20b/grant', headers: { authorization } }],
    [404, { url: '/v1/users/nobody/grant', headers: { authorization } }],
    [200, { url: '/v1/grants', headers: { authorization } }],
  ]
  for (const [status, ask] of asked) {
    const { statusCode, headers } = await internalApp.inject(ask)
    const what = `${ask.method ?? 'GET'} ${ask.url}`
    t.equal(statusCode, status, what)
    t.match(
      headers,
      {
        'content-security-policy': /default-src 'none'.*frame-ancestors 'none'/,
        'x-content-type-options': 'nosniff',
        'referrer-policy': 'no-referrer',
        'cross-origin-resource-policy': 'same-origin',
        'cross-origin-opener-policy': 'same-origin',
      },
      what,
    )
    for (const name of ['server', 'x-powered-by', 'set-cookie', 'access-control-allow-origin']) {
      t.notOk(name in headers, `${what} has no ${name}`)
    }
    if (status === 405) t.match(headers.allow, /^[A-Z, ]+$/)
    if (status >= 400) t.equal(headers['cache-control'], 'no-store', what)
  }
})
