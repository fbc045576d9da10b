// Over HTTP: the list of grants for operators, and taking over a refresh token.

import { randomUUID } from 'node:crypto'
import t, { type Test } from 'tap'
import { issueSession, resolveSession } from '../src/session.ts'
import { buildListeners } from './support/internal-listener.ts'

async function setUp(test: Test) {
  const listeners = await buildListeners(test, {
    callers: {
      operator: { rights: ['ops:read', 'grant:read', 'grant:manage', 'token:read'], users: ['*'] },
      acme: { rights: ['ops:read', 'grant:manage'], users: ['acme-*'] },
      reader: { rights: ['token:read'], users: ['*'] },
    },
  })
  const { internalApp, credentials, scene, engine } = listeners
  const ask = (
    caller: string | undefined,
    method: 'GET' | 'PUT',
    url: string,
    payload?: Record<string, unknown>,
  ) =>
    internalApp.inject({
      method,
      url,
      headers: caller === undefined ? {} : { ...credentials[caller] },
      ...(payload === undefined ? {} : { payload }),
    })
  /** A live refresh token of a login that the broker does not know. */
  async function foreignToken(): Promise<string> {
    const other = await scene.connect(engine, `other-${randomUUID()}`, 'alice')
    const token = await scene.storedRefreshToken(engine, other)
    await scene.database.pool.query('delete from grants where user_id = $1', [other])
    return token
  }
  return { ...listeners, ask, foreignToken }
}

t.test('the list shows a caller the users that it may see, in pages', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  for (const name of ['acme-1', 'acme-2', 'beta-1']) await scene.connect(engine, name)
  const users = async (caller: string, query = '') => {
    const response = await ask(caller, 'GET', `/v1/grants${query}`)
    t.equal(response.statusCode, 200)
    const body = response.json<{ items: Array<{ user: string }>; next: string | null }>()
    return { users: body.items.map(({ user }) => user), next: body.next }
  }
  t.strictSame(await users('operator'), { users: ['acme-1', 'acme-2', 'beta-1'], next: null })
  t.strictSame(await users('acme'), { users: ['acme-1', 'acme-2'], next: null })
  t.strictSame(await users('operator', '?limit=2'), { users: ['acme-1', 'acme-2'], next: 'acme-2' })
  t.strictSame(await users('operator', '?limit=2&after=acme-2'), { users: ['beta-1'], next: null })
  t.strictSame(await users('operator', '?expires_within=P30D'), { users: [], next: null })
  t.strictSame((await users('operator', '?expires_within=P4Y&state=active')).users.length, 3)
  const page = await ask('operator', 'GET', '/v1/grants?limit=1')
  t.notMatch(page.body, /sealed|token/u, 'a list holds no token, sealed or not')
})

t.test('the list refuses what it does not understand, and whoever lacks the right', async (t) => {
  const { ask } = await setUp(t)
  for (const query of [
    '?state=alive',
    '?expires_within=90',
    '?expires_within=P',
    '?expires_within=P1Y2',
    '?expires_within=-P1D',
    '?limit=0',
    '?limit=501',
    '?limit=ten',
    '?after=a%20b',
    '?unknown=1',
    '?state=active&state=revoked',
  ]) {
    const response = await ask('operator', 'GET', `/v1/grants${query}`)
    t.match(response.json(), { status: 400, code: 'request_invalid' }, query)
  }
  t.match((await ask('reader', 'GET', '/v1/grants')).json(), { code: 'caller_forbidden' })
  t.match((await ask(undefined, 'GET', '/v1/grants')).json(), { code: 'caller_unauthenticated' })
})

t.test('a refresh token is taken over, and the user has a token at once', async (t) => {
  const { ask, scene, foreignToken } = await setUp(t)
  const refresh_token = await foreignToken()
  const body = { refresh_token, obtained_at: '2026-03-02T08:15:00Z' }
  const response = await ask('operator', 'PUT', '/v1/users/acme-1/grant', body)
  t.equal(response.statusCode, 200)
  t.match(response.json(), {
    user: 'acme-1',
    state: 'active',
    absolute_expires_at: '2029-03-02T08:15:00.000Z',
    pagero: { subject: 'alice' },
  })
  t.notMatch(response.body, refresh_token)
  t.equal(response.headers['cache-control'], 'no-store')
  t.equal(
    (await ask('operator', 'PUT', '/v1/users/acme-1/grant', body)).statusCode,
    200,
    'the same request again',
  )
  t.equal(scene.refreshes().length, 1)
  t.equal((await ask('operator', 'GET', '/v1/users/acme-1/access-token')).statusCode, 200)
})

t.test('an import that cannot be is refused before the token is used', async (t) => {
  const { ask, scene, foreignToken } = await setUp(t)
  const refresh_token = await foreignToken()
  const obtained_at = '2026-03-02T08:15:00Z'
  const good = { refresh_token, obtained_at }
  const refused: ReadonlyArray<
    readonly [string | undefined, string, Record<string, unknown>, string]
  > = [
    ['operator', 'acme-1', { refresh_token }, 'request_invalid'],
    ['operator', 'acme-1', { obtained_at }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, refresh_token: '' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, obtained_at: 'yesterday' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, obtained_at: '2999-01-01T00:00:00Z' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, obtained_at: '2026-03-02T08:15:00+01' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, obtained_at: '2016-12-31T23:59:60Z' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, refresh_token: 'half \ud800' }, 'request_invalid'],
    ['operator', 'acme-1', { ...good, state: 'active' }, 'request_invalid'],
    ['operator', 'pagero:alice', good, 'request_invalid'],
    ['operator', 'a%2fb', good, 'request_invalid'],
    ['acme', 'beta-1', good, 'grant_not_found'],
    ['reader', 'acme-1', good, 'caller_forbidden'],
    [undefined, 'acme-1', good, 'caller_unauthenticated'],
  ]
  for (const [caller, user, body, code] of refused) {
    const response = await ask(caller, 'PUT', `/v1/users/${user}/grant`, body)
    t.match(response.json(), { code }, `${caller} ${user} ${Object.keys(body).join()}`)
  }
  t.equal(scene.refreshes().length, 0)
  t.ok(await scene.lookAlike.acceptsRefreshToken(refresh_token))
})

t.test('a token that Pagero refuses is 409 and names no way in', async (t) => {
  const { ask } = await setUp(t)
  const response = await ask('operator', 'PUT', '/v1/users/acme-1/grant', {
    refresh_token: 'made-up',
    obtained_at: '2026-03-02T08:15:00Z',
  })
  t.match(response.json(), { status: 409, code: 'reauthentication_required' })
  t.match((await ask('operator', 'GET', '/v1/users/acme-1/grant')).json(), {
    code: 'grant_not_found',
  })
})

t.test("an operator ends a user's browser sessions, and the grant stays", async (t) => {
  const { engine, internalApp, credentials, scene } = await setUp(t)
  const user = await scene.connect(engine, 'acme-1')
  const settings = { idleSeconds: 60, absoluteSeconds: 60, perUserMax: 5 }
  const [one, two] = await Promise.all(
    [1, 2].map(() => issueSession(engine.ports, user, { settings, replacesHash: null })),
  )
  const end = (caller: string, name: string) =>
    internalApp.inject({
      method: 'DELETE',
      url: `/v1/users/${name}/sessions`,
      headers: { ...credentials[caller] },
    })
  t.match((await end('reader', 'acme-1')).json(), { code: 'caller_forbidden' })
  t.match((await end('operator', 'nobody')).json(), { code: 'grant_not_found' })
  t.equal((await end('acme', 'acme-1')).statusCode, 204)
  for (const session of [one, two]) {
    t.equal(await resolveSession(engine.ports, session?.token, settings), undefined)
  }
  t.match(await scene.grantOf(engine, user), { state: 'active' })
  t.equal((await end('acme', 'acme-1')).statusCode, 204, 'without a session it is the same')
})
