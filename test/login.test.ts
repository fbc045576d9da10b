// A login step by step as Pagero's pages describe it, checked against what reached the authorization server.

import { createHash } from 'node:crypto'
import t, { type Test } from 'tap'
import { CONFIRMABLE_SECONDS } from '../src/pending-grant.ts'
import { CLIENT_ID, CLIENT_SECRET, REDIRECT_URI } from './support/engine.ts'
import { type PublicListener, startPublicListener } from './support/public-listener.ts'

/** The redirect URI of Pagero's own example: no path, no slash at the end, a port. */
const BARE_REDIRECT_URI = 'https://urltoclient:4443'
const TOKEN = /^[A-Za-z0-9_-]{43}$/

function tokenRequests({ scene }: PublicListener) {
  return scene.lookAlike.record.filter(({ endpoint }) => endpoint === 'token')
}

function headerOf(request: { headers: ReadonlyArray<readonly [string, string]> }, name: string) {
  return request.headers.filter(([key]) => key.toLowerCase() === name).map(([, value]) => value)
}

t.test('a login goes to Pagero and comes back with a session', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()

  const begun = await browser.open('/auth/login?return_to=/orders%3Fid=1')
  t.equal(begun.status, 302)
  t.equal(begun.headers['cache-control'], 'no-store')
  t.equal(begun.body, '')
  const [loginCookie = '', ...furtherCookies] = begun.setCookies
  t.match(
    loginCookie,
    new RegExp(
      `^__Host-broker-login=[A-Za-z0-9_-]{43}; Max-Age=${CONFIRMABLE_SECONDS}; Path=/; HttpOnly; Secure; SameSite=Lax$`,
    ),
  )
  t.same(furtherCookies, [])

  const target = await browser.authorize('alice', '?return_to=/orders%3Fid=1')
  const completed = await browser.open(target, 'cross-site')
  t.equal(completed.status, 303)
  t.equal(completed.headers.location, '/orders?id=1')
  t.equal(completed.headers['cache-control'], 'no-store')
  t.equal(completed.headers['referrer-policy'], 'no-referrer')
  t.equal(completed.body, '')
  t.match(completed.setCookies, [
    /^__Host-broker-session=[A-Za-z0-9_-]{43}; Path=\/; HttpOnly; Secure; SameSite=Strict$/,
  ])

  const session = await browser.fetch('/auth/session')
  t.equal(session.status, 200)
  t.match(session.json(), { user: 'pagero:alice', grant: { state: 'active', cause: null } })
  const called = await browser.fetch('/api/document/v1/documents')
  t.equal(called.status, 200, 'the session pays for calls to the API')
})

t.test('the authorization request has the documented parameters, and no others', async (t) => {
  const listener = await startPublicListener(t, {
    pagero: { redirectUri: BARE_REDIRECT_URI, scope: '' },
  })
  const { location } = (await listener.browser().open('/auth/login')).headers
  const url = String(location)
  t.ok(url.startsWith(`${listener.scene.lookAlike.authorizeUrl}?`))
  const query = new URL(url).searchParams
  t.same([...query.keys()], ['response_type', 'client_id', 'redirect_uri', 'state'])
  t.equal(query.get('response_type'), 'code')
  t.equal(query.get('client_id'), CLIENT_ID)
  t.equal(query.get('redirect_uri'), BARE_REDIRECT_URI)
  t.match(query.get('state'), TOKEN)
  t.match(url, /&redirect_uri=https%3A%2F%2Furltoclient%3A4443&/, 'byte for byte, no slash added')
})

t.test('scope is sent as configured, with a nonce for openid', async (t) => {
  const listener = await startPublicListener(t)
  const { location } = (await listener.browser().open('/auth/login')).headers
  const query = new URL(String(location)).searchParams
  t.same(
    [...query.keys()],
    ['response_type', 'client_id', 'redirect_uri', 'scope', 'state', 'nonce'],
  )
  t.equal(query.get('scope'), 'all openid')
  t.match(query.get('nonce'), TOKEN)
})

t.test('prompt=login is passed on, every other prompt is not', async (t) => {
  const listener = await startPublicListener(t)
  for (const [query, expected] of [
    ['prompt=login', 'login'],
    ['prompt=none', null],
    ['prompt=Login', null],
    ['prompt=login%20consent', null],
    ['prompt=login&prompt=none', null],
    ['prompt=', null],
  ] as const) {
    const { location } = (await listener.browser().open(`/auth/login?${query}`)).headers
    t.equal(new URL(String(location)).searchParams.get('prompt'), expected, query)
  }
})

for (const clientAuth of ['client_secret_basic', 'client_secret_post'] as const) {
  for (const pkce of ['off', 'S256'] as const) {
    t.test(`the token request is exact with ${clientAuth} and PKCE ${pkce}`, async (t) => {
      const listener = await startPublicListener(t, {
        pagero: { redirectUri: BARE_REDIRECT_URI, clientAuth, pkce },
      })
      const browser = listener.browser()
      const target = await browser.authorize('alice')
      t.match(target, /^\/\?code=/, 'the callback arrives at the root')
      t.equal((await browser.open(target, 'cross-site')).status, 303)

      const [request, ...others] = tokenRequests(listener)
      t.same(others, [])
      t.equal(request?.method, 'POST')
      t.same(headerOf(request ?? { headers: [] }, 'content-type'), [
        'application/x-www-form-urlencoded;charset=UTF-8',
      ])
      const expected: Record<string, string> = {
        grant_type: 'authorization_code',
        code: new URLSearchParams(target.slice(2)).get('code') ?? '',
        redirect_uri: BARE_REDIRECT_URI,
      }
      if (clientAuth === 'client_secret_post') {
        expected['client_id'] = CLIENT_ID
        expected['client_secret'] = CLIENT_SECRET
        t.same(headerOf(request ?? { headers: [] }, 'authorization'), [])
      } else {
        // RFC 6749 section 2.3.1: id and secret are form-encoded before Base64.
        const [header = ''] = headerOf(request ?? { headers: [] }, 'authorization')
        const sent = Buffer.from(header.replace(/^Basic /, ''), 'base64').toString()
        const parts = sent.split(':').map((part) => new URLSearchParams(`x=${part}`).get('x'))
        t.same(parts, [CLIENT_ID, CLIENT_SECRET], 'the colon within the secret is escaped')
        t.notMatch(sent, / /, 'encoded, not raw')
      }
      const { code_verifier: verifier, ...form } = request?.form ?? {}
      t.same(form, expected)
      const authorize = listener.scene.lookAlike.record.find(
        ({ endpoint }) => endpoint === 'authorize',
      )
      const asked = new URL(authorize?.rawTarget ?? '', 'http://x').searchParams
      if (pkce === 'off') {
        t.equal(verifier, undefined)
        t.equal(asked.get('code_challenge'), null)
      } else {
        t.match(verifier, TOKEN)
        t.equal(asked.get('code_challenge_method'), 'S256')
        const challenge = createHash('sha256')
          .update(verifier ?? '')
          .digest('base64url')
        t.equal(asked.get('code_challenge'), challenge)
      }
      const { rows } = await listener.scene.database.pool.query('select * from grants')
      t.equal(rows.length, 1)
    })
  }
}

t.test('the answer as Pagero prints it is taken', async (t) => {
  const listener = await startPublicListener(t, { accessTokenFormat: 'jwt' })
  const { lookAlike } = listener.scene
  let printed: Record<string, unknown> = {}
  lookAlike.faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: ({ access_token, refresh_token }) =>
      (printed = {
        token_type: 'bearer',
        access_token,
        refresh_token,
        scope: '',
        claims: 'publicid',
        expires_in: 600,
      }),
  })
  const browser = listener.browser()
  t.equal((await browser.logIn('alice')).status, 303)
  const { rows } = await listener.scene.database.pool.query(
    `select user_id, scope, state, access_token_fingerprint,
       extract(epoch from access_token_expires_at - access_token_requested_at)::int as life
     from grants`,
  )
  t.same(rows, [
    {
      user_id: 'pagero:alice',
      scope: '',
      state: 'active',
      access_token_fingerprint: createHash('sha256')
        .update(String(printed['access_token']))
        .digest('base64url'),
      life: 600,
    },
  ])
  const events = listener.engine.log.events.map(({ event }) => event)
  t.ok(events.includes('id_token_missing'), 'openid was asked for, and the log tells of it')
})

t.test('the life of the access token is counted from before the token request', async (t) => {
  const listener = await startPublicListener(t)
  listener.scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    ms: 1_200,
  })
  t.equal((await listener.browser().logIn('alice')).status, 303)
  const { rows } = await listener.scene.database.pool.query<{ ago: number }>(
    `select extract(epoch from rotated_at - access_token_requested_at)::float8 as ago from grants`,
  )
  t.ok((rows[0]?.ago ?? 0) >= 1.2, `${rows[0]?.ago} s`)
})

t.test('without an ID token and with an opaque access token the login is refused', async (t) => {
  const listener = await startPublicListener(t, {
    accessTokenFormat: 'opaque',
    pagero: { scope: 'all' },
  })
  const browser = listener.browser()
  const answer = await browser.logIn('alice')
  t.equal(answer.status, 502)
  t.match(answer.body, /did not say who has logged in/)
  t.notOk(browser.cookies.has('__Host-broker-session'))
  await revokedAtLookAlike(t, listener, 1)
})

t.test('an ID token that was changed is refused, and its tokens are revoked', async (t) => {
  const listener = await startPublicListener(t)
  const { faults } = listener.scene.lookAlike
  const changes: ReadonlyArray<readonly [string, (idToken: string) => unknown, RegExp]> = [
    [
      'signature',
      (token) => token.replace(/\.[^.]{4}/, (part) => `${part}x`),
      /signature is wrong/,
    ],
    ['no JWT', () => 'nonsense', /signature is wrong/],
  ]
  for (const [name, change, text] of changes) {
    faults.push({
      endpoint: 'token',
      kind: 'mutate',
      change: (answer) => ({ ...answer, id_token: change(String(answer['id_token'])) }),
    })
    const answer = await listener.browser().logIn('alice')
    t.equal(answer.status, 502, name)
    t.match(answer.body, text, name)
  }
  t.same((await listener.scene.database.pool.query('select 1 from grants')).rows, [])
  await revokedAtLookAlike(t, listener, changes.length)
})

t.test('an ID token of another login is refused by its nonce', async (t) => {
  const listener = await startPublicListener(t)
  const { faults } = listener.scene.lookAlike
  let earlier: unknown
  faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: (answer) => {
      earlier = answer['id_token']
      return answer
    },
  })
  t.equal((await listener.browser().logIn('alice')).status, 303)
  faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: (answer) => ({ ...answer, id_token: earlier }),
  })
  const answer = await listener.browser().logIn('alice')
  t.equal(answer.status, 502)
  t.match(answer.body, /belongs to another login/)
})

t.test('an answer without a refresh token is refused with an explanation', async (t) => {
  const listener = await startPublicListener(t)
  listener.scene.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: (answer) => ({ ...answer, refresh_token: undefined }),
  })
  const answer = await listener.browser().logIn('alice')
  t.equal(answer.status, 502)
  t.match(answer.body, /gave no refresh token/)
})

t.test('each end of the code exchange has its page', async (t) => {
  const listener = await startPublicListener(t)
  const { faults } = listener.scene.lookAlike
  const refused = { error: 'invalid_grant' }
  const unknown = { error: 'invalid_client' }
  for (const [fault, status, text] of [
    [{ kind: 'status', status: 400, body: refused }, 502, /did not accept the authorization code/],
    [{ kind: 'status', status: 401, body: unknown }, 503, /credentials of this service/],
    [{ kind: 'status', status: 429, body: '' }, 503, /cannot be reached/],
    [{ kind: 'reset_after' }, 502, /lost on its way/],
  ] as const) {
    faults.push({ endpoint: 'token', ...fault })
    const browser = listener.browser()
    const answer = await browser.logIn('alice')
    t.equal(answer.status, status)
    t.match(answer.body, text)
    t.match(answer.body, /href="\/auth\/login"/)
    t.match(answer.headers['content-type'], 'text/html; charset=utf-8')
    t.notOk(browser.cookies.has('__Host-broker-session'))
    if (status === 503) t.match(answer.headers['retry-after'] ?? '5', /^\d+$/)
  }
  t.equal(tokenRequests(listener).length, 4, 'none of them was tried again')
  t.same(faults, [])
})

t.test('a refusal at Pagero is told as such', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize(undefined)
  t.match(target, /[?&]error=access_denied(&|$)/)
  const answer = await browser.open(target, 'cross-site')
  t.equal(answer.status, 403)
  t.match(answer.body, /Access was refused at Pagero/)
  t.same(tokenRequests(listener), [])
})

t.test('two tabs of one browser both finish, in either order', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const first = await browser.authorize('alice', '?return_to=/first')
  const second = await browser.authorize('alice', '?return_to=/second')
  const answers = [
    await browser.open(second, 'cross-site'),
    await browser.open(first, 'cross-site'),
  ]
  t.same(
    answers.map(({ status, headers }) => [status, headers.location]),
    [
      [303, '/second'],
      [303, '/first'],
    ],
  )
  t.equal((await browser.fetch('/auth/session')).status, 200)
})

t.test('200 logins begun in one jar leave two small cookies, and the next one works', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  for (let i = 0; i < 200; i += 1) await browser.open('/auth/login', 'same-origin')
  const { rows } = await listener.scene.database.pool.query(
    'select count(*)::int as pending from login_transactions',
  )
  t.same(rows, [{ pending: 5 }])
  t.equal((await browser.logIn('alice')).status, 303)
  const jar = [...browser.cookies].map(([name, { value }]) => `${name}=${value}`).join('; ')
  t.ok(jar.length < 4_096, `${jar.length} characters`)
})

t.test('a thousand logins have a thousand states and challenges', async (t) => {
  const listener = await startPublicListener(t, { pagero: { pkce: 'S256' } })
  const browser = listener.browser()
  const seen = { state: new Set(), nonce: new Set(), code_challenge: new Set() }
  for (let i = 0; i < 1_000; i += 1) {
    const { location } = (await browser.open('/auth/login')).headers
    const query = new URL(String(location)).searchParams
    for (const [name, values] of Object.entries(seen)) values.add(query.get(name))
  }
  for (const [name, values] of Object.entries(seen)) t.equal(values.size, 1_000, name)
})

t.test('the redirect URI never follows the Host header', async (t) => {
  const listener = await startPublicListener(t)
  const answer = await listener.browser().send('/auth/login', {
    headers: {
      host: 'evil.example',
      'x-forwarded-host': 'evil.example',
      'x-forwarded-proto': 'gopher',
      forwarded: 'host=evil.example',
    },
  })
  const location = String(answer.headers.location)
  t.equal(new URL(location).searchParams.get('redirect_uri'), REDIRECT_URI)
  t.notMatch(location, /evil/)
})

t.test(
  'the database holds neither state, nonce, verifier, login cookie nor session token',
  async (t) => {
    const listener = await startPublicListener(t, { pagero: { pkce: 'S256' } })
    const browser = listener.browser()
    const { location } = (await browser.open('/auth/login')).headers
    await browser.logIn('alice')
    const query = new URL(String(location)).searchParams
    const secrets = [
      query.get('state'),
      query.get('nonce'),
      tokenRequests(listener)[0]?.form['code_verifier'],
      ...[...browser.cookies.values()].map(({ value }) => value),
    ]
    t.equal(secrets.length, 5)
    const { pool } = listener.scene.database
    const tables = ['login_transactions', 'sessions', 'grants', 'revocations']
    const dumps = await Promise.all(
      tables.map((table) =>
        pool.query<{ line: string }>(`select ${table}::text as line from ${table}`),
      ),
    )
    const lines = dumps.flatMap(({ rows }) => rows.map(({ line }) => line))
    t.equal(lines.length, 3, 'a pending login, a session and a grant')
    for (const secret of secrets) {
      t.match(secret, TOKEN)
      for (const form of [secret ?? '', Buffer.from(secret ?? '').toString('hex')]) {
        t.notOk(lines.some((line) => line.includes(form)))
      }
    }
  },
)

t.test('a database that is away answers 503 and spends nothing', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  await listener.scene.database.close()
  const begun = await browser.open('/auth/login')
  t.equal(begun.status, 503)
  t.match(begun.headers['retry-after'], /^\d+$/)
  t.match(begun.headers['content-type'], 'text/html; charset=utf-8')
  const completed = await browser.open(target, 'cross-site')
  t.equal(completed.status, 503)
  t.same(tokenRequests(listener), [])
})

/** Waits until the look-alike was told to forget this many refresh tokens, and accepts none of them. */
async function revokedAtLookAlike(
  t: Test,
  { scene }: PublicListener,
  count: number,
): Promise<void> {
  const revocations = () =>
    scene.lookAlike.record.filter(({ endpoint, status }) => endpoint === 'revoke' && status === 200)
  const patientUntil = performance.now() + 10_000
  while (revocations().length < count && performance.now() < patientUntil) {
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  t.equal(revocations().length, count)
  for (const { form } of revocations()) {
    t.notOk(await scene.lookAlike.acceptsRefreshToken(form['token'] ?? ''))
  }
}
