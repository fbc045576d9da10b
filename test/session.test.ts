// The browser's session: who may use it, how it ends, and what a page of another origin cannot do with it.

import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { corsHeaders, refuseCrossSite } from '../src/http/csrf.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from '../src/opaque-token.ts'
import type { Session } from '../src/login-stores.ts'
import { openDatabase } from '../src/postgres/database.ts'
import { createSessionStore } from '../src/postgres/session-store.ts'
import { Secret } from '../src/secret.ts'
import { createSessionReader, endSessionsOf, resolveSession } from '../src/session.ts'
import type { Answer, Browser } from './support/browser.ts'
import { silentLog } from './support/database.ts'
import { type PublicListener, startPublicListener } from './support/public-listener.ts'
import { type Relay, startRelay } from './support/relay.ts'

const COOKIE = '__Host-broker-session'
const LIFETIMES = { idleSeconds: 3_600, absoluteSeconds: 43_200 }

async function loggedIn(
  t: Test,
  setup: Parameters<typeof startPublicListener>[1] = {},
): Promise<{ listener: PublicListener; browser: Browser }> {
  const listener = await startPublicListener(t, setup)
  const browser = listener.browser()
  t.equal((await browser.logIn('alice')).status, 303)
  return { listener, browser }
}

function tokenOf(browser: Browser): string {
  return browser.cookies.get(COOKIE)?.value ?? ''
}

function isProblem(t: Test, answer: Answer, status: number, code: string): void {
  t.equal(answer.status, status)
  t.match(answer.headers['content-type'], 'application/problem+json; charset=utf-8')
  t.match(answer.json(), { type: `/problems/${code}`, code, status })
  t.equal(answer.headers['cache-control'], 'no-store')
  t.equal(answer.headers['www-authenticate'], status === 401 ? 'Session' : undefined)
}

t.test('ten thousand tokens differ from each other throughout', (t) => {
  const tokens = Array.from({ length: 10_000 }, newOpaqueToken)
  t.equal(new Set(tokens).size, 10_000)
  t.equal(new Set(tokens.map((token) => token.slice(0, 12))).size, 10_000, 'from the beginning')
  t.ok(tokens.every(isOpaqueToken))
  t.end()
})

t.test('what is no session token costs no statement', async (t) => {
  const sessions = {
    resolve: () => Promise.reject(new Error('asked the database')),
  } as unknown as Parameters<typeof resolveSession>[0]['sessions']
  for (const text of [undefined, '', 'x', 'x'.repeat(42), 'x'.repeat(44), `${'x'.repeat(42)}=`]) {
    t.equal(await resolveSession({ sessions }, text, LIFETIMES), undefined)
  }
  await t.rejects(resolveSession({ sessions }, 'x'.repeat(43), LIFETIMES), /asked/)
})

t.test('/auth/session tells who it is and how the grant stands, and no more', async (t) => {
  const { browser } = await loggedIn(t)
  const answer = await browser.fetch('/auth/session')
  t.equal(answer.status, 200)
  t.equal(answer.headers['cache-control'], 'no-store')
  const { user, expires_at: expiresAt, grant, ...rest } = answer.json()
  t.same(rest, {})
  t.equal(user, 'pagero:alice')
  const secondsLeft = (Date.parse(String(expiresAt)) - Date.now()) / 1000
  t.ok(secondsLeft > 3_500 && secondsLeft <= 3_601, `${secondsLeft} s`)
  t.same(Object.keys(grant as object), [
    'state',
    'cause',
    'scope',
    'rolling_expires_at',
    'absolute_expires_at',
    'expires_at',
    'authenticated_at',
    'rotated_at',
  ])
})

t.test('without a session fetches get a 401 as JSON, never a redirect', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  for (const path of ['/auth/session', '/api/document/v1/documents']) {
    isProblem(t, await browser.fetch(path), 401, 'session_required')
    browser.cookies.set(COOKIE, { value: newOpaqueToken(), sameSite: 'strict' })
    isProblem(t, await browser.fetch(path), 401, 'session_required')
  }
  t.same(listener.api.record, [])
})

t.test('a dead grant is told to the page, and the session lives on', async (t) => {
  const { listener, browser } = await loggedIn(t)
  await listener.scene.database.pool.query(
    `update grants set state = 'reauthentication_required', state_reason = 'rotation_lost'`,
  )
  const session = await browser.fetch('/auth/session')
  t.match(session.json(), { grant: { state: 'reauthentication_required', cause: 'rotation_lost' } })
  const called = await browser.fetch('/api/document/v1/documents')
  isProblem(t, called, 401, 'reauthentication_required')
  t.match(called.json(), { cause: 'rotation_lost' })
  t.equal((await browser.logIn('alice')).status, 303)
  t.equal((await browser.fetch('/api/document/v1/documents')).status, 200)
})

t.test('of two session cookies neither is believed, in either order', async (t) => {
  const { listener, browser } = await loggedIn(t)
  const own = `${COOKIE}=${tokenOf(browser)}`
  const planted = `${COOKIE}=${newOpaqueToken()}`
  for (const cookie of [
    `${own}; ${planted}`,
    `${planted}; ${own}`,
    `${own};${own}`,
    `${own}; ${COOKIE}=`,
  ]) {
    for (const [target, method] of [
      ['/auth/session', 'GET'],
      ['/auth/logout', 'POST'],
      ['/api/document/v1/documents', 'GET'],
    ] as const) {
      isProblem(
        t,
        await browser.fetch(target, { method, headers: { cookie } }),
        400,
        'request_invalid',
      )
    }
  }
  t.same(listener.api.record, [])
  t.equal((await browser.fetch('/auth/session')).status, 200, 'nothing was ended by it')
  const other = `${COOKIE}-2=x; x${COOKIE}=y; ${own}`
  t.equal((await browser.fetch('/auth/session', { headers: { cookie: other } })).status, 200)
})

t.test('a cookie whose name only looks like ours is none of ours', async (t) => {
  const { browser } = await loggedIn(t)
  const pair = `${COOKIE}=${tokenOf(browser)}`
  // Bytes that a sibling host can put into a field and a browser may send back as they are.
  for (const blank of [
    '\u00a0',
    '\u0085',
    '\u00c2\u00a0',
    '\u00e2\u0080\u0080',
    '"',
    '$Version=1,',
  ]) {
    const headers = { cookie: `${blank}${pair}` }
    isProblem(t, await browser.fetch('/auth/session', { headers }), 401, 'session_required')
    const beside = { cookie: `${pair}; ${blank}${COOKIE}=x` }
    t.equal((await browser.fetch('/auth/session', { headers: beside })).status, 200)
  }
  for (const cookie of [` ${pair} `, `a=b;\t${pair}`]) {
    t.equal((await browser.fetch('/auth/session', { headers: { cookie } })).status, 200)
  }
})

t.test('a login gives a new session and ends the one that its browser had', async (t) => {
  const { listener, browser } = await loggedIn(t)
  const replica = (await listener.startReplica()).browser()
  const first = tokenOf(browser)
  t.equal((await browser.logIn('alice')).status, 303)
  t.not(tokenOf(browser), first)
  for (const each of [browser, replica]) {
    const headers = { cookie: `${COOKIE}=${first}` }
    isProblem(t, await each.fetch('/auth/session', { headers }), 401, 'session_required')
  }
  t.equal((await browser.fetch('/auth/session')).status, 200)
})

t.test('a planted session cookie is never taken up by a login', async (t) => {
  const listener = await startPublicListener(t)
  const browser = listener.browser()
  const planted = newOpaqueToken()
  browser.cookies.set(COOKIE, { value: planted, sameSite: 'strict' })
  await browser.logIn('alice')
  t.not(tokenOf(browser), planted)
  const headers = { cookie: `${COOKIE}=${planted}` }
  isProblem(t, await browser.fetch('/auth/session', { headers }), 401, 'session_required')
})

t.test('a session that idled too long is over', async (t) => {
  const { listener, browser } = await loggedIn(t)
  await listener.scene.database.pool.query(
    `update sessions set idle_expires_at = clock_timestamp() - interval '1 ms'`,
  )
  isProblem(t, await browser.fetch('/auth/session'), 401, 'session_required')
})

t.test('use keeps a session from idling, and never beyond its absolute limit', async (t) => {
  const { listener, browser } = await loggedIn(t, {
    config: { sessions: { idleSeconds: 0.8, absoluteSeconds: 2.5, perUserMax: 20 } },
  })
  const { rows } = await listener.scene.database.pool.query<{ ends: Date }>(
    'select absolute_expires_at as ends from sessions',
  )
  const ends = rows[0]?.ends.getTime() ?? 0
  let lastSeenAt = 0
  for (;;) {
    const askedAt = Date.now()
    const answer = await browser.fetch('/auth/session')
    if (answer.status !== 200) break
    lastSeenAt = askedAt
    t.ok(Date.parse(String(answer.json()['expires_at'])) <= ends)
    t.ok(askedAt <= ends, 'never served after its end')
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
  t.ok(ends - lastSeenAt < 800, `used until ${ends - lastSeenAt} ms before its end`)
})

t.test('a user keeps no more sessions than are allowed; the oldest goes first', async (t) => {
  const { listener, browser } = await loggedIn(t, {
    config: { sessions: { ...LIFETIMES, perUserMax: 2 } },
  })
  const [second, third, stranger] = [listener.browser(), listener.browser(), listener.browser()]
  await stranger.logIn('bob')
  await second.logIn('alice')
  t.equal((await browser.fetch('/auth/session')).status, 200)
  await third.logIn('alice')
  const statuses = await Promise.all(
    [browser, second, third, stranger].map((each) => each.fetch('/auth/session')),
  )
  t.same(
    statuses.map(({ status }) => status),
    [401, 200, 200, 200],
  )
})

t.test('logging out ends the session on every replica', async (t) => {
  const { listener, browser } = await loggedIn(t)
  const replica = (await listener.startReplica()).browser()
  const headers = { cookie: `${COOKIE}=${tokenOf(browser)}` }
  const answer = await browser.fetch('/auth/logout', { method: 'POST' })
  t.equal(answer.status, 204)
  t.equal(answer.body, '')
  t.equal(answer.headers['clear-site-data'], '"storage"', 'not the cookies of sibling hosts')
  t.equal(answer.headers['cache-control'], 'no-store')
  t.match(answer.setCookies, [
    /^__Host-broker-session=; Max-Age=0; Path=\/; Expires=Thu, 01 Jan 1970 00:00:00 GMT; HttpOnly; Secure; SameSite=Strict$/,
  ])
  for (const each of [browser, replica]) {
    isProblem(t, await each.fetch('/auth/session', { headers }), 401, 'session_required')
  }
  const { rows } = await listener.scene.database.pool.query('select state from grants')
  t.same(rows, [{ state: 'active' }], 'the grant stays')
  t.equal(
    (await browser.fetch('/auth/logout', { method: 'POST' })).status,
    204,
    'without a session',
  )
})

t.test('nothing but a POST with the CSRF header from a page of ours logs out', async (t) => {
  const { browser } = await loggedIn(t)
  t.equal((await browser.open('/auth/logout')).status, 405)
  for (const [status, ask] of [
    [405, { method: 'GET' }],
    [403, { method: 'POST', headers: { 'x-csrf': '' } }],
    // Before its body is looked at.
    [403, { method: 'POST', headers: { 'x-csrf': '', 'content-type': 'text/plain' }, body: '{}' }],
    [403, { method: 'POST', headers: { 'sec-fetch-site': 'cross-site' } }],
    [
      403,
      { method: 'POST', headers: { 'sec-fetch-site': 'same-site', origin: 'https://x.example' } },
    ],
    [400, { method: 'POST', target: '?disconnect=maybe' }],
    [400, { method: 'POST', target: '?all=true' }],
    [415, { method: 'POST', headers: { 'content-type': 'text/plain' }, body: '{}' }],
    [
      415,
      {
        method: 'POST',
        headers: { 'content-type': 'application/x-www-form-urlencoded' },
        body: 'a=b',
      },
    ],
  ] as ReadonlyArray<readonly [number, { method: string; target?: string }]>) {
    const answer = await browser.fetch(`/auth/logout${ask.target ?? ''}`, ask)
    t.equal(answer.status, status, JSON.stringify(ask))
    t.same(answer.setCookies, [])
  }
  t.equal((await browser.fetch('/auth/session')).status, 200)
})

t.test(
  'logging out with disconnect ends the grant, all sessions of the user and nobody else',
  async (t) => {
    const { listener, browser } = await loggedIn(t)
    const elsewhere = listener.browser()
    const stranger = listener.browser()
    await elsewhere.logIn('alice')
    await stranger.logIn('bob')
    const answer = await browser.fetch('/auth/logout?disconnect=true', { method: 'POST' })
    t.equal(answer.status, 204)
    isProblem(t, await elsewhere.fetch('/auth/session'), 401, 'session_required')
    t.match((await stranger.fetch('/auth/session')).json(), { grant: { state: 'active' } })
    const { rows } = await listener.scene.database.pool.query(
      'select user_id, state from grants order by user_id',
    )
    t.same(rows, [
      { user_id: 'pagero:alice', state: 'revoked' },
      { user_id: 'pagero:bob', state: 'active' },
    ])
    const patientUntil = performance.now() + 2_000
    const revoked = () =>
      listener.scene.lookAlike.record.filter(({ endpoint }) => endpoint === 'revoke').length
    // Two of alice: the token that her second login replaced, and that one itself.
    while (revoked() < 2 && performance.now() < patientUntil) {
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    t.equal(revoked(), 2, 'at once, not at the next poll')
    isProblem(
      t,
      await browser.fetch('/auth/logout?disconnect=true', { method: 'POST' }),
      401,
      'session_required',
    )
  },
)

t.test('what is in memory ends with the login or disconnect that replaces it', async (t) => {
  const { listener, browser } = await loggedIn(t, { config: { tokenCacheTrustMs: 60_000 } })
  const documents = '/api/document/v1/documents'
  const presented = () =>
    listener.api.record.at(-1)?.headers.find(([name]) => name === 'authorization')
  t.equal((await browser.fetch(documents)).status, 200)
  const first = presented()
  await browser.fetch(documents)
  t.same(presented(), first, 'it is in memory')

  await browser.logIn('alice')
  t.equal((await browser.fetch(documents)).status, 200)
  t.notSame(presented(), first)
  t.equal(listener.api.record.length, 3, 'without presenting the old one first')

  await browser.fetch('/auth/logout?disconnect=true', { method: 'POST' })
  await t.rejects(listener.engine.accessTokens.fresh('pagero:alice' as Session['user']), {
    code: 'grant_not_found',
  })
})

t.test('without the CSRF header, or from another page, nothing reaches the API', async (t) => {
  const { listener, browser } = await loggedIn(t)
  for (const headers of [
    { 'x-csrf': '' },
    { 'x-csrf': '0' },
    { 'x-csrf': '1, 1' },
    { 'sec-fetch-site': 'cross-site' },
    { 'sec-fetch-site': 'same-site' },
    { 'sec-fetch-dest': 'iframe' },
  ]) {
    for (const method of ['GET', 'POST', 'DELETE']) {
      const answer = await browser.fetch('/api/document/v1/documents', { method, headers })
      isProblem(t, answer, 403, 'csrf_refused')
    }
  }
  t.same(listener.api.record, [])
})

t.test('the CSRF header counts in whatever case it is written', async (t) => {
  const { browser } = await loggedIn(t)
  const cookie = `${COOKIE}=${tokenOf(browser)}`
  for (const name of ['X-Csrf', 'x-CSRF', 'X-CSRF']) {
    t.equal((await browser.send('/auth/session', { headers: { cookie, [name]: '1' } })).status, 200)
  }
})

t.test('a database that is away logs nobody out', async (t) => {
  let relay: Relay | undefined
  const listener = await startPublicListener(t, {
    replace: (scene) => ({ sessions: relayedSessions(t, scene.url, (made) => (relay = made)) }),
  })
  const browser = listener.browser()
  await browser.logIn('alice')
  relay?.cut()
  for (const [target, method] of [
    ['/auth/session', 'GET'],
    ['/auth/logout', 'POST'],
    ['/api/document/v1/documents', 'GET'],
  ] as const) {
    const answer = await browser.fetch(target, { method })
    isProblem(t, answer, 503, 'temporarily_unavailable')
    t.match(answer.headers['retry-after'], /^\d+$/)
    t.same(answer.setCookies, [], 'the cookie is kept')
  }
  relay?.mend()
  t.equal((await browser.fetch('/auth/session')).status, 200)
})

t.test('no token of Pagero ever reaches the browser', async (t) => {
  const listener = await startPublicListener(t)
  const { lookAlike } = listener.scene
  const tokens: string[] = []
  lookAlike.faults.push({
    endpoint: 'token',
    kind: 'mutate',
    change: (answer) => {
      for (const name of ['access_token', 'refresh_token', 'id_token']) {
        tokens.push(String(answer[name]))
      }
      return answer
    },
  })
  const browser = listener.browser()
  const answers = [
    await browser.logIn('alice'),
    await browser.fetch('/auth/session'),
    await browser.fetch('/api/document/v1/documents'),
    await browser.fetch('/api/document/v1/none'),
    await browser.open('/auth/callback?code=x&state=y'),
    await browser.fetch('/auth/logout', { method: 'POST' }),
  ]
  t.equal(tokens.length, 3)
  const received = JSON.stringify(answers.map(({ headers, body }) => [headers, body]))
  for (const token of tokens) {
    t.ok(token.length > 20)
    t.notOk(received.includes(token.slice(0, 20)))
  }
  t.notOk(JSON.stringify(listener.engine.log.events).includes(tokens[1] ?? ''), 'nor the log')
})

t.test('calls of one session that come together cost one statement', async (t) => {
  const token = newOpaqueToken()
  const { reader, asked } = countingReader(1_000, token)
  const answers = await Promise.all(Array.from({ length: 50 }, () => reader.resolve(token)))
  t.equal(asked(), 1)
  t.ok(answers.every((session) => session?.user === 'alice'))
  await reader.resolve(token)
  t.equal(asked(), 1, 'and the next within the second none')
  t.equal(await reader.resolve(newOpaqueToken()), undefined)
  t.equal(await reader.resolve('x'), undefined)
})

t.test('trust in a session ends when it is forgotten, or after its time', async (t) => {
  const token = newOpaqueToken()
  const { reader, asked, advance } = countingReader(1_000, token)
  await reader.resolve(token)
  advance(999)
  await reader.resolve(token)
  t.equal(asked(), 1)
  advance(1)
  await reader.resolve(token)
  t.equal(asked(), 2, 'a second after it was asked for')
  reader.forget(token)
  await reader.resolve(token)
  t.equal(asked(), 3)
  reader.forgetUser('alice' as Session['user'])
  await reader.resolve(token)
  t.equal(asked(), 4)
  reader.forgetUser('bob' as Session['user'])
  await reader.resolve(token)
  t.equal(asked(), 4, 'others are still trusted')
})

t.test('a session in memory ends with its life, however long it is trusted', async (t) => {
  const token = newOpaqueToken()
  const { reader, asked, advance } = countingReader(60_000, token, 300)
  await reader.resolve(token)
  advance(299)
  await reader.resolve(token)
  t.equal(asked(), 1)
  advance(1)
  await reader.resolve(token)
  t.equal(asked(), 2, 'whether it lives is asked again')

  const { listener, browser } = await loggedIn(t, {
    config: {
      tokenCacheTrustMs: 60_000,
      sessions: { idleSeconds: 1.5, absoluteSeconds: 1.5, perUserMax: 20 },
    },
  })
  const { rows } = await listener.scene.database.pool.query<{ ends: Date }>(
    'select absolute_expires_at as ends from sessions',
  )
  const ends = rows[0]?.ends.getTime() ?? 0
  for (;;) {
    const askedAt = Date.now()
    if ((await browser.fetch('/auth/session')).status !== 200) break
    if (!t.ok(askedAt <= ends, 'never served after its end')) break
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
})

t.test('what a login replaces or crowds out is over at once where it happens', async (t) => {
  const { listener, browser } = await loggedIn(t, {
    config: { tokenCacheTrustMs: 60_000, sessions: { ...LIFETIMES, perUserMax: 2 } },
  })
  const [second, third] = [listener.browser(), listener.browser()]
  const statusOf = async (each: Browser, headers = {}) =>
    (await each.fetch('/auth/session', { headers })).status
  await second.logIn('alice')
  t.same([await statusOf(browser), await statusOf(second)], [200, 200], 'both are in memory')
  await third.logIn('alice')
  t.same([await statusOf(browser), await statusOf(second)], [401, 200], 'one too many')

  const replaced = { cookie: `${COOKIE}=${tokenOf(second)}` }
  await second.logIn('bob')
  t.equal(await statusOf(second, replaced), 401, 'also where the next user is another')
  t.same([await statusOf(second), await statusOf(third)], [200, 200])
})

t.test('a read that was under way when its session was forgotten is not kept', async (t) => {
  const token = newOpaqueToken()
  for (const forget of ['forget', 'forgetUser'] as const) {
    const { reader, asked } = countingReader(1_000, token)
    const early = reader.resolve(token)
    if (forget === 'forget') reader.forget(token)
    else reader.forgetUser('alice' as Session['user'])
    t.match(await early, { user: 'alice' })
    await reader.resolve(token)
    t.equal(asked(), 2, forget)
  }
})

t.test('however a session ends, it is over on another replica within the trust', async (t) => {
  const trustMs = 1_000
  const { listener, browser } = await loggedIn(t, { config: { tokenCacheTrustMs: trustMs } })
  const replica = (await listener.startReplica()).browser()
  const ways: Record<string, () => Promise<unknown>> = {
    logout: () => browser.fetch('/auth/logout', { method: 'POST' }),
    'all sessions of the user': () =>
      endSessionsOf(listener.engine.ports, 'pagero:alice' as Session['user']),
    disconnect: () => browser.fetch('/auth/logout?disconnect=true', { method: 'POST' }),
  }
  for (const [way, end] of Object.entries(ways)) {
    if (!browser.cookies.has(COOKIE) || way === 'disconnect') await browser.logIn('alice')
    const headers = { cookie: `${COOKIE}=${tokenOf(browser)}` }
    t.equal((await replica.fetch('/auth/session', { headers })).status, 200)
    await end()
    const endedAtMs = performance.now()
    if (way !== 'all sessions of the user') {
      t.equal((await browser.fetch('/auth/session', { headers })).status, 401, 'here at once')
    }
    for (;;) {
      const askedAtMs = performance.now()
      if ((await replica.fetch('/auth/session', { headers })).status === 401) break
      if (!t.ok(askedAtMs < endedAtMs + trustMs, way)) break
    }
  }
})

const OWN = 'https://broker.example'
const APP = 'https://app.example'

t.test('only a page of the own origin, or of a listed one, may use the cookie', (t) => {
  // Sec-Fetch-Site, Origin, method, further headers, verdict.
  type Case = readonly [string | undefined, string | undefined, string, object, 'pass' | 'refuse']
  const cases: readonly Case[] = [
    ['same-origin', undefined, 'GET', {}, 'pass'],
    ['same-origin', OWN, 'POST', {}, 'pass'],
    ['same-origin', undefined, 'POST', {}, 'pass'],
    ['same-origin', 'https://evil.example', 'POST', {}, 'refuse'],
    ['same-origin', 'null', 'POST', {}, 'refuse'],
    ['same-site', APP, 'GET', {}, 'pass'],
    ['same-site', APP, 'POST', {}, 'pass'],
    ['same-site', undefined, 'GET', {}, 'refuse'],
    ['same-site', OWN, 'GET', {}, 'refuse'],
    ['same-site', 'https://other.example', 'GET', {}, 'refuse'],
    ['cross-site', undefined, 'GET', {}, 'refuse'],
    ['cross-site', APP, 'GET', {}, 'refuse'],
    ['cross-site', OWN, 'POST', {}, 'refuse'],
    ['none', undefined, 'GET', { 'sec-fetch-mode': 'navigate' }, 'pass'],
    ['none', undefined, 'GET', { 'sec-fetch-mode': 'cors' }, 'refuse'],
    ['none', undefined, 'POST', {}, 'refuse'],
    ['', undefined, 'GET', {}, 'refuse'],
    ['Same-Origin', undefined, 'GET', {}, 'refuse'],
    ['same-origin, cross-site', undefined, 'GET', {}, 'refuse'],
    [undefined, undefined, 'GET', {}, 'pass'],
    [undefined, undefined, 'HEAD', {}, 'pass'],
    [undefined, undefined, 'POST', {}, 'refuse'],
    [undefined, undefined, 'PUT', {}, 'refuse'],
    [undefined, undefined, 'DELETE', {}, 'refuse'],
    [undefined, OWN, 'POST', {}, 'pass'],
    [undefined, APP, 'POST', {}, 'pass'],
    [undefined, 'null', 'GET', {}, 'refuse'],
    [undefined, 'https://broker.example.evil.example', 'POST', {}, 'refuse'],
    [undefined, 'https://evilbroker.example', 'POST', {}, 'refuse'],
    [undefined, 'https://BROKER.example', 'POST', {}, 'refuse'],
    [undefined, 'https://broker.example:8443', 'POST', {}, 'refuse'],
    [undefined, 'http://broker.example', 'POST', {}, 'refuse'],
    [undefined, 'https://broker.example/', 'POST', {}, 'refuse'],
    [undefined, `${OWN}, ${OWN}`, 'POST', {}, 'refuse'],
    ...['object', 'embed', 'iframe', 'frame', 'fencedframe'].map((dest): Case => [
      'same-origin',
      OWN,
      'GET',
      { 'sec-fetch-dest': dest },
      'refuse',
    ]),
    ['same-origin', OWN, 'GET', { 'sec-fetch-dest': 'empty' }, 'pass'],
  ]
  const rules = { ownOrigin: OWN, allowedOrigins: [APP] }
  for (const [site, origin, method, further, verdict] of cases) {
    const headers = {
      ...(site === undefined ? {} : { 'sec-fetch-site': site }),
      ...(origin === undefined ? {} : { origin }),
      ...further,
    }
    const name = JSON.stringify([method, headers])
    const refusal = refuseCrossSite({ ...headers, 'x-csrf': '1' }, { ...rules, method })
    t.equal(refusal === undefined ? 'pass' : 'refuse', verdict, name)
    for (const csrf of [undefined, '', '0', 'true', '1, 1', ' 1']) {
      const without = { ...headers, ...(csrf === undefined ? {} : { 'x-csrf': csrf }) }
      t.match(refuseCrossSite(without, { ...rules, method }), /X-CSRF/, `${name} with ${csrf}`)
    }
  }
  t.end()
})

t.test('CORS is silent unless the origin is listed, to the letter', (t) => {
  const listed = { ownOrigin: OWN, allowedOrigins: [APP], preflight: false }
  t.same(corsHeaders({ origin: APP }, { ...listed, allowedOrigins: [] }), {}, 'off by default')
  for (const origin of [
    undefined,
    'null',
    '*',
    OWN,
    'https://okapp.example',
    'https://app.example.evil',
    'http://app.example',
    'https://app.example:8443',
    'https://APP.example',
  ]) {
    const headers = corsHeaders(origin === undefined ? {} : { origin }, listed)
    t.same(headers, { vary: 'Origin, Sec-Fetch-Site' }, String(origin))
  }
  t.match(corsHeaders({ origin: APP }, listed), {
    vary: 'Origin, Sec-Fetch-Site',
    'access-control-allow-origin': APP,
    'access-control-allow-credentials': 'true',
    'access-control-expose-headers': /Proxy-Status/,
  })
  t.end()
})

t.test('a page of a listed origin can ask, call and read, errors too', async (t) => {
  const { browser } = await loggedIn(t, { config: { allowedOrigins: [APP] } })
  const from = { origin: APP, 'sec-fetch-site': 'same-site' }
  const preflight = {
    ...from,
    'access-control-request-method': 'POST',
    'access-control-request-headers': 'x-csrf,content-type',
  }
  for (const target of ['/api/document/v1/documents', '/auth/session', '/auth/logout']) {
    const asked = await browser.send(target, { method: 'OPTIONS', headers: preflight })
    t.equal(asked.status, 204, target)
    t.equal(asked.headers['access-control-allow-origin'], APP)
    t.equal(asked.headers['access-control-allow-credentials'], 'true')
    t.match(asked.headers['access-control-allow-headers'], /Content-Type.*X-CSRF/)
    t.match(asked.headers['access-control-allow-methods'], /POST/)
    t.match(asked.headers.vary, /Origin/)
  }
  for (const [target, status, method] of [
    ['/auth/session', 200, 'GET'],
    ['/api/document/v1/documents', 200, 'GET'],
    ['/api/a//b', 400, 'GET'],
    ['/auth/logout', 204, 'POST'],
    ['/auth/session', 401, 'GET'],
  ] as const) {
    const answer = await browser.fetch(target, { method, headers: from })
    t.equal(answer.status, status, target)
    t.equal(answer.headers['access-control-allow-origin'], APP, `${target} ${status}`)
    t.equal(answer.headers['access-control-allow-credentials'], 'true')
  }
  const crossSite = { ...from, 'sec-fetch-site': 'cross-site' }
  isProblem(t, await browser.fetch('/auth/session', { headers: crossSite }), 403, 'csrf_refused')
})

t.test('a preflight of an unknown origin is answered without CORS', async (t) => {
  for (const allowedOrigins of [[], [APP]]) {
    const listener = await startPublicListener(t, { config: { allowedOrigins } })
    for (const target of ['/api/x', '/auth/session']) {
      const answer = await listener.browser().send(target, {
        method: 'OPTIONS',
        headers: { origin: 'https://evil.example', 'access-control-request-method': 'POST' },
      })
      t.equal(answer.status, 405)
      t.equal(answer.headers['access-control-allow-origin'], undefined)
    }
    const login = await listener.browser().send('/auth/login', {
      method: 'OPTIONS',
      headers: { origin: APP, 'access-control-request-method': 'GET' },
    })
    t.equal(login.status, 405, 'a navigation has no use for it')
    t.equal(login.headers['access-control-allow-origin'], undefined)
  }
})

t.test('the public listener has none of the internal paths', async (t) => {
  const { browser } = await loggedIn(t)
  for (const path of [
    '/v1/users/pagero:alice/access-token',
    '/v1/users/pagero:alice/grant',
    '/metrics',
    '/docs',
    '/openapi.yaml',
    '/readyz',
    '/problems/not_found',
  ]) {
    isProblem(t, await browser.fetch(path), 404, 'not_found')
  }
  t.equal((await browser.fetch('/livez')).status, 200)
})

/** The session store over a cable that can be pulled. */
function relayedSessions(t: Test, url: string, made: (relay: Relay) => void) {
  const opened = startRelay(t, url).then((relay) => {
    made(relay)
    const database = openDatabase(
      { url: new Secret(relay.url), poolMax: 2, applicationName: 'broker test' },
      silentLog,
    )
    t.teardown(() => database.close())
    return createSessionStore(database.db)
  })
  type Store = Awaited<typeof opened>
  return {
    create: async (...args) => (await opened).create(...args),
    resolve: async (...args) => (await opened).resolve(...args),
    end: async (...args) => (await opened).end(...args),
    endAll: async (...args) => (await opened).endAll(...args),
    sweep: async () => (await opened).sweep(),
  } satisfies Store
}

/** A reader over one live session of alice, on a clock that is moved by hand. */
function countingReader(trustMs: number, token: string, lifeLeftMs = 3_600_000) {
  const live = hashOpaqueToken(token)
  const expiresAt = new Date(Date.now() + 3_600_000)
  let nowMs = 0
  let count = 0
  const reader = createSessionReader(
    {
      clock: { ...systemClock, monotonicMs: () => nowMs },
      sessions: {
        resolve: async (hash: Buffer): Promise<Session | undefined> => {
          if (!hash.equals(live)) return undefined
          count += 1
          return {
            user: 'alice' as Session['user'],
            createdAt: new Date(),
            idleExpiresAt: expiresAt,
            absoluteExpiresAt: expiresAt,
            lifeLeftMs,
          }
        },
      } as unknown as Parameters<typeof createSessionReader>[0]['sessions'],
    },
    { lifetimes: LIFETIMES, trustMs },
  )
  return {
    reader,
    asked: () => count,
    advance: (ms: number) => {
      nowMs += ms
    },
  }
}
