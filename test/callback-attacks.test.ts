// What somebody may try with the two navigations of a login. Whatever it is, no token request leaves without a
// transaction of this very browser, none leaves twice, and no answer repeats what the request said.

import { createHash } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import { renderPage } from '../src/http/page.ts'
import { DONE_PATH, safeReturnTo } from '../src/return-to.ts'
import { type PublicListener, startPublicListener } from './support/public-listener.ts'

function tokenRequests({ scene }: PublicListener) {
  return scene.lookAlike.record.filter(({ endpoint }) => endpoint === 'token')
}

/** The callback's target with its query changed. */
function changed(target: string, change: (query: URLSearchParams) => void): string {
  const url = new URL(target, 'http://localhost')
  change(url.searchParams)
  return url.pathname + url.search
}

async function pendingLogins({ scene }: PublicListener): Promise<number> {
  const { rows } = await scene.database.pool.query('select 1 from login_transactions')
  return rows.length
}

t.test('one callback twenty times at once over two replicas costs one token request', async (t) => {
  const listener = await startPublicListener(t)
  const other = await listener.startReplica()
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  const elsewhere = other.browser()
  elsewhere.cookies = browser.cookies

  const answers = await Promise.all(
    Array.from({ length: 20 }, (_, i) =>
      (i % 2 === 0 ? browser : elsewhere).open(target, 'cross-site'),
    ),
  )
  const statuses = answers.map(({ status }) => status).toSorted((a, b) => a - b)
  t.same(statuses, [303, ...Array.from({ length: 19 }, () => 400)])
  for (const { status, setCookies } of answers) {
    if (status === 400) t.same(setCookies, [], 'a refusal touches no cookie')
  }
  t.equal(tokenRequests(listener).length, 1)
  t.equal((await browser.fetch('/auth/session')).status, 200)
  t.equal((await browser.fetch('/api/document/v1/documents')).status, 200, 'the grant lives')
})

t.test('what is no navigation of a person spends no code', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  const navigation = { 'sec-fetch-mode': 'navigate', 'sec-fetch-site': 'cross-site' }
  for (const [status, ask] of [
    [405, { method: 'HEAD' }],
    [405, { method: 'POST' }],
    [403, { headers: { 'sec-purpose': 'prefetch', 'sec-fetch-dest': 'document' } }],
    [403, { headers: { 'sec-purpose': 'prefetch;prerender' } }],
    [403, { headers: { purpose: 'prefetch' } }],
    [403, { headers: { ...navigation, 'sec-fetch-dest': 'iframe' } }],
    [403, { headers: { 'sec-fetch-mode': 'no-cors', 'sec-fetch-dest': 'image' } }],
    [403, { headers: { 'sec-fetch-mode': 'cors', 'sec-fetch-dest': 'empty' } }],
  ] as const) {
    const answer = await browser.send(target, ask)
    t.equal(answer.status, status, JSON.stringify(ask))
    t.equal(answer.headers['cache-control'], 'no-store')
  }
  t.same(tokenRequests(listener), [])
  t.equal((await browser.open(target, 'cross-site')).status, 303, 'the person still gets in')
})

t.test('what is no navigation of a person begins no login', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  for (const ask of [
    { method: 'HEAD' },
    { method: 'POST' },
    { headers: { 'sec-purpose': 'prefetch' } },
    { headers: { 'sec-fetch-dest': 'iframe', 'sec-fetch-mode': 'navigate' } },
    { headers: { 'sec-fetch-dest': 'image', 'sec-fetch-mode': 'no-cors' } },
    { headers: { 'sec-fetch-dest': 'empty', 'sec-fetch-mode': 'cors' } },
  ]) {
    const answer = await browser.send('/auth/login', ask)
    t.ok([403, 405].includes(answer.status), `${answer.status} for ${JSON.stringify(ask)}`)
    t.equal(answer.headers.location, undefined)
    t.same(answer.setCookies, [])
  }
  t.equal(await pendingLogins(listener), 0)
})

t.test('a state that is missing, unknown, malformed or doubled is refused', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  const state = new URL(target, 'http://localhost').searchParams.get('state') ?? ''
  const cases: Record<string, (query: URLSearchParams) => void> = {
    missing: (query) => query.delete('state'),
    empty: (query) => query.set('state', ''),
    unknown: (query) => query.set('state', 'A'.repeat(43)),
    short: (query) => query.set('state', state.slice(1)),
    long: (query) => query.set('state', 'a'.repeat(5_000)),
    'of other case': (query) => query.set('state', state.toLowerCase()),
    'not ASCII': (query) => query.set('state', `${state.slice(1)}é`),
    doubled: (query) => query.append('state', state),
    'doubled with another': (query) => query.append('state', 'B'.repeat(43)),
  }
  for (const [name, change] of Object.entries(cases)) {
    const answer = await browser.open(changed(target, change), 'cross-site')
    t.equal(answer.status, 400, name)
    t.match(answer.headers['content-type'], 'text/html; charset=utf-8')
  }
  t.equal((await browser.open('/auth/callback', 'typed')).status, 400, 'no parameter at all')
  t.same(tokenRequests(listener), [])
  t.equal((await browser.open(target, 'cross-site')).status, 303, 'the login itself is unharmed')
})

t.test('a code, issuer or error that occurs twice is refused', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  for (const name of ['code', 'iss', 'error'] as const) {
    const doubled = changed(target, (query) => {
      query.append(name, query.get(name) ?? 'access_denied')
      if (query.getAll(name).length < 2) query.append(name, 'access_denied')
    })
    t.equal((await browser.open(doubled, 'cross-site')).status, 400, name)
  }
  t.same(tokenRequests(listener), [])
  t.equal((await browser.open(target, 'cross-site')).status, 303)
})

t.test('the login of one browser cannot be completed in another', async (t) => {
  const listener = await startPublicListener(t)
  const attacker = listener.browser()
  const victim = listener.browser()
  const target = await attacker.authorize('mallory')
  t.equal((await victim.open(target, 'cross-site')).status, 400, 'without a login cookie')
  await victim.open('/auth/login')
  t.equal((await victim.open(target, 'cross-site')).status, 400, 'with a login of its own')
  t.notOk(victim.cookies.has('__Host-broker-session'))
  t.same(tokenRequests(listener), [])
  t.equal((await attacker.open(target, 'cross-site')).status, 303, 'nor was it burnt by trying')
})

t.test('of two login cookies neither is believed', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  const own = `__Host-broker-login=${browser.cookies.get('__Host-broker-login')?.value}`
  const planted = `__Host-broker-login=${'x'.repeat(43)}`
  for (const cookie of [`${own}; ${planted}`, `${planted}; ${own}`, `${own};${own}`]) {
    t.equal((await browser.send(target, { headers: { cookie } })).status, 400)
    t.equal((await browser.send('/auth/login', { headers: { cookie } })).status, 400)
  }
  t.same(tokenRequests(listener), [])
})

t.test('a planted login cookie that is none of ours is replaced', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  for (const value of ['x', 'x'.repeat(44), `${'x'.repeat(42)}!`, '']) {
    browser.cookies.set('__Host-broker-login', { value, sameSite: 'lax' })
    await browser.open('/auth/login')
    t.match(browser.cookies.get('__Host-broker-login')?.value, /^[A-Za-z0-9_-]{43}$/, value)
  }
})

t.test('an answer that comes too late is refused', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const target = await browser.authorize('alice')
  const { pool } = listener.scene.database
  const { rows } = await pool.query<{ life: number }>(
    'select extract(epoch from expires_at - created_at)::int as life from login_transactions',
  )
  t.same(rows, [{ life: 600 }])
  await pool.query(`update login_transactions set expires_at = clock_timestamp() - interval '1 ms'`)
  t.equal((await browser.open(target, 'cross-site')).status, 400)
  t.same(tokenRequests(listener), [])
})

t.test('with PAGERO_ISSUER set, iss must be there and equal to the letter', async (t) => {
  const listener = await startPublicListener(t)
  const { issuer } = listener.scene.lookAlike
  const cases: Record<string, (query: URLSearchParams) => void> = {
    missing: (query) => query.delete('iss'),
    empty: (query) => query.set('iss', ''),
    wrong: (query) => query.set('iss', 'https://authorization-server.com'),
    'with a slash': (query) => query.set('iss', `${issuer}/`),
    'in upper case': (query) => query.set('iss', issuer.toUpperCase()),
    doubled: (query) => query.append('iss', issuer),
    'wrong on an error': (query) => {
      query.delete('code')
      query.set('error', 'access_denied')
      query.set('iss', 'https://authorization-server.com')
    },
    'missing on an error': (query) => {
      query.delete('code')
      query.set('error', 'access_denied')
      query.delete('iss')
    },
  }
  for (const [name, change] of Object.entries(cases)) {
    const browser = listener.browser()
    const target = changed(await browser.authorize('alice'), change)
    t.equal((await browser.open(target, 'cross-site')).status, 400, name)
  }
  t.same(tokenRequests(listener), [])
})

t.test('without PAGERO_ISSUER any iss passes, and none does too', async (t) => {
  const listener = await startPublicListener(t, {
    pagero: { issuer: undefined, jwksUrl: undefined },
  })
  for (const change of [
    (query: URLSearchParams) => query.delete('iss'),
    (query: URLSearchParams) => query.set('iss', 'https://authorization-server.com'),
  ]) {
    const browser = listener.browser()
    const target = changed(await browser.authorize('alice'), change)
    t.equal((await browser.open(target, 'cross-site')).status, 303)
  }
})

t.test('what Pagero says about an error is not repeated', async (t) => {
  const listener = await startPublicListener(t)
  const { issuer } = listener.scene.lookAlike
  for (const [error, status] of [
    ['access_denied', 403],
    ['server_error', 502],
    ['<script>alert(1)</script>', 502],
  ] as const) {
    const browser = listener.browser()
    const state = new URL(await browser.authorize('alice'), 'http://x').searchParams.get('state')
    const query = new URLSearchParams({
      error,
      error_description: '<script>canary</script>',
      error_uri: 'https://evil.example/canary',
      state: state ?? '',
      iss: issuer,
    })
    const answer = await browser.open(`/auth/callback?${query.toString()}`, 'cross-site')
    t.equal(answer.status, status, error)
    t.equal(answer.headers.location, undefined)
    t.notMatch(answer.body, /<script|canary|evil\.example/)
    t.notMatch(JSON.stringify(answer.headers), /canary|evil\.example/)
    const again = await browser.open(`/auth/callback?${query.toString()}`, 'cross-site')
    t.equal(again.status, 400, 'the transaction is used up')
  }
  t.same(tokenRequests(listener), [])
  t.notMatch(JSON.stringify(listener.engine.log.events), /canary|evil\.example|script/)
})

t.test('a code that is injected into another login is refused', async (t) => {
  for (const pkce of ['off', 'S256'] as const) {
    const listener = await startPublicListener(t, { pagero: { pkce } })
    const stolen = new URL(await listener.browser().authorize('victim'), 'http://x').searchParams
    const attacker = listener.browser()
    const target = changed(await attacker.authorize('mallory'), (query) =>
      query.set('code', stolen.get('code') ?? ''),
    )
    const answer = await attacker.open(target, 'cross-site')
    t.equal(answer.status, 502, `PKCE ${pkce}`)
    t.notOk(attacker.cookies.has('__Host-broker-session'))
    const { rows } = await listener.scene.database.pool.query('select 1 from grants')
    t.same(rows, [])
  }
})

const HOSTILE_RETURN_TO = [
  '//evil.example',
  '///evil.example',
  '/\\evil.example',
  '\\\\evil.example',
  '\\/evil.example',
  '/\t/evil.example',
  '/\n/evil.example',
  '/\r\nLocation: https://evil.example',
  '/\u0000/evil.example',
  '/\u0085/evil.example',
  '/%2f/evil.example',
  '/%2F%2Fevil.example',
  '/%5cevil.example',
  '/..//evil.example',
  '/.//evil.example',
  '/a/..//evil.example',
  '/%2e%2e//evil.example',
  'https:evil.example',
  'https:/evil.example',
  'https://evil.example',
  'HTTPS://EVIL.EXAMPLE',
  'https://broker.example@evil.example',
  'https://broker.example.evil.example/',
  'https://broker.example:8443/',
  'http://broker.example/',
  'https://app.example.evil.example/x',
  'https://app.example@evil.example/',
  'https://app.example\\@evil.example/',
  'https://APP.example/x',
  'javascript:alert(1)',
  ' javascript:alert(1)',
  'data:text/html,x',
  'http://[::1]/',
  'evil.example',
  '?x',
  '#x',
  '',
  ' /orders',
  `/${'a'.repeat(5_000)}`,
  `/${'é'.repeat(1_000)}`,
]
const ORIGINS = {
  publicUrl: 'https://broker.example',
  allowedOrigins: ['https://app.example'],
  redirectUri: 'https://broker.example/auth/callback',
}

t.test("a return_to that leads elsewhere becomes the broker's own page", (t) => {
  for (const text of HOSTILE_RETURN_TO)
    t.equal(safeReturnTo(text, ORIGINS), DONE_PATH, JSON.stringify(text.slice(0, 60)))
  t.equal(safeReturnTo(undefined, ORIGINS), DONE_PATH)
  t.end()
})

t.test('a return_to that is the callback is none, whatever its path and query', (t) => {
  for (const text of ['/auth/callback', '/auth/x/../callback?code=1', '/auth/callback#x']) {
    t.equal(safeReturnTo(text, ORIGINS), DONE_PATH, text)
    t.equal(safeReturnTo(ORIGINS.publicUrl + text, ORIGINS), DONE_PATH, text)
    t.not(safeReturnTo(`https://app.example${text}`, ORIGINS), DONE_PATH, 'of another origin')
  }
  const bare = { ...ORIGINS, redirectUri: 'https://broker.example' }
  for (const text of ['/', '/?code=1', '/#x', '/.', 'https://broker.example', '/x/..']) {
    t.equal(safeReturnTo(text, bare), DONE_PATH, text)
  }
  t.equal(safeReturnTo('/orders', bare), '/orders')
  t.end()
})

t.test('a return_to of our own, or on a listed origin, is kept', (t) => {
  for (const [text, kept] of [
    ['/', '/'],
    ['/orders', '/orders'],
    ['/orders?id=1&next=//x#row-2', '/orders?id=1&next=//x#row-2'],
    ['/a//b', '/a//b'],
    ['/a/../b', '/b'],
    ['/@evil.example', '/@evil.example'],
    ['/café ü', '/caf%C3%A9%20%C3%BC'],
    ['/%2e', '/'],
    ['https://broker.example/orders', 'https://broker.example/orders'],
    ['https://app.example', 'https://app.example/'],
    ['https://app.example/inbox?x=1#y', 'https://app.example/inbox?x=1#y'],
    [`/${'a'.repeat(2_047)}`, `/${'a'.repeat(2_047)}`],
    [`/${'a'.repeat(2_048)}`, DONE_PATH],
  ] as const) {
    t.equal(safeReturnTo(text, ORIGINS), kept, text.slice(0, 60))
  }
  t.end()
})

t.test('no text whatever leads a browser to an origin that is not listed', (t) => {
  const piece = fc.constantFrom('/', '\\', '.', '..', '%2f', '%5c', '%2e', '@', ':', '?', '#', 'a')
  const odd = fc.constantFrom('\t', '\n', '\u0000', 'https:', 'https://app.example', 'evil.example')
  const text = fc.oneof(
    fc.array(fc.oneof(piece, odd), { maxLength: 12 }).map((parts) => parts.join('')),
    fc.array(piece, { maxLength: 12 }).map((parts) => `/${parts.join('')}`),
    fc.string({ unit: 'binary', maxLength: 40 }).map((rest) => `/${rest}`),
  )
  fc.assert(
    fc.property(text, (returnTo) => {
      const location = safeReturnTo(returnTo, ORIGINS)
      const { origin } = new URL(location, 'https://broker.example/auth/callback')
      return (
        /^[\x21-\x7e]{1,2048}$/.test(location) &&
        ['https://broker.example', 'https://app.example'].includes(origin)
      )
    }),
    { numRuns: 5_000 },
  )
  t.end()
})

t.test('the callback goes to no other origin, whatever the login was begun with', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  for (const text of ['//evil.example', '/\\evil.example', 'https://evil.example', '/..//e']) {
    const answer = await browser.logIn('alice', `?return_to=${encodeURIComponent(text)}`)
    t.equal(answer.status, 303)
    t.equal(answer.headers.location, DONE_PATH, text)
  }
  const doubled = await browser.logIn('alice', '?return_to=/a&return_to=/b')
  t.equal(doubled.headers.location, DONE_PATH, 'of two neither is believed')
})

t.test('a page runs nothing, loads nothing and tells what to do', async (t) => {
  const listener = await startPublicListener(t)
  const { headers, body, status } = await listener.browser().open('/auth/callback?code=canary')
  t.equal(status, 400)
  t.notMatch(body, /canary|<script|src=|https?:/)
  t.match(body, /<a href="\/auth\/login">Log in again<\/a>/)
  t.match(body, /give this number to the operator: [0-9a-f-]{36}/)
  const style = /<style>([^]*)<\/style>/.exec(body)?.[1] ?? ''
  const hash = createHash('sha256').update(style).digest('base64')
  t.equal(
    headers['content-security-policy'],
    `default-src 'none'; style-src 'sha256-${hash}'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'`,
  )
  t.equal(headers['x-content-type-options'], 'nosniff')
  t.equal(headers['referrer-policy'], 'no-referrer')
  t.equal(headers['cache-control'], 'no-store')
})

t.test('every text on a page is escaped', (t) => {
  const hostile = `<img src=x onerror="alert('&')">`
  const html = renderPage({
    title: hostile,
    text: hostile,
    link: { text: hostile, path: hostile },
    requestId: hostile,
  })
  t.notOk(html.includes('<img'))
  t.equal(
    html.split('&lt;img src=x onerror=&quot;alert(&#39;&amp;&#39;)&quot;&gt;').length - 1,
    6,
    'title twice, text, path, link text, number',
  )
  t.end()
})
