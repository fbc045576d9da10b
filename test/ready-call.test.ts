// Calls that are made before the router, because all that decides on them is in memory: each must be the very call that
// the route makes of it, and there must be none otherwise.

import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { request as httpRequest } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import type { AuditEvent } from '../src/audit-event.ts'
import { SESSION_COOKIE } from '../src/http/session-cookie.ts'
import { APPLICATION, buildListeners } from './support/internal-listener.ts'
import { keepingLog } from './support/keeping-log.ts'
import { startPublicListener } from './support/public-listener.ts'

const CALLERS = {
  all: { rights: ['proxy:call'], users: ['*'] },
  documents: { rights: ['proxy:call'], users: ['acme-*'], proxyAllow: ['GET /document/v1/**'] },
  reader: { rights: ['token:read'], users: ['*'] },
} as const

const ROOT = '/v1/users/acme-1/pagero'
const DOCUMENTS = '/document/v1/documents'

interface Ask {
  method?: string
  headers?: Readonly<Record<string, string>>
  body?: string
}

/** Sends a request on a connection of its own. */
function send(port: number, path: string, { body, ...options }: Ask) {
  return new Promise<{ status: number; headers: Record<string, unknown>; body: string }>(
    (resolve, reject) => {
      const sent = httpRequest({ port, path, agent: false, ...options }, (response) => {
        let text = ''
        response.setEncoding('utf8')
        response.on('data', (chunk: string) => (text += chunk))
        response.on('end', () => {
          const { date: _date, ...headers } = response.headers
          resolve({ status: response.statusCode ?? 0, headers, body: text })
        })
      })
      sent.on('error', reject).end(body)
    },
  )
}

/** Counts the requests that reach the handler of a route. */
function countRouted(t: Test): () => number {
  let routed = 0
  const count = () => void (routed += 1)
  subscribe('tracing:fastify.request.handler:start', count)
  t.teardown(() => unsubscribe('tracing:fastify.request.handler:start', count))
  return () => routed
}

/** Where each request is traced, none is taken before the router. */
function quietLog() {
  return { ...keepingLog(), writes: () => false }
}

async function setInternal(t: Test, rateLimits = { perCaller: 0, perUser: 0, perAddress: 0 }) {
  const events: AuditEvent[] = []
  const log = quietLog()
  const listeners = await buildListeners(t, {
    callers: CALLERS,
    rateLimits,
    replace: { log, audit: { record: (event) => void events.push(event) } },
    tokenCacheTrustMs: 60_000,
  })
  const { scene, engine, internalApp } = listeners
  const user = await scene.connect(engine, 'acme-1')
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.addresses()[0] as AddressInfo
  return {
    ...listeners,
    log,
    events,
    /** Puts into memory what a call needs to be made at once. */
    warm: () => engine.accessTokens.fresh(user),
    /** And takes it away again. */
    cool: async () => engine.accessTokens.forget(user),
    call: (caller: keyof typeof CALLERS, path: string, { headers, ...ask }: Ask = {}) =>
      send(port, path, { ...ask, headers: { ...listeners.credentials[caller], ...headers } }),
  }
}

t.test('a call of a service is the same before the router as through it', async (t) => {
  const { warm, cool, call, api, events } = await setInternal(t)
  const routed = countRouted(t)
  for (const [path, ask] of [
    [`${ROOT}${DOCUMENTS}`, {}],
    [`${ROOT}${DOCUMENTS}?a=1,2&a=%2B//&limit=3`, { headers: { accept: 'application/json' } }],
    [`${ROOT}${DOCUMENTS}`, { method: 'HEAD' }],
    [`${ROOT}${DOCUMENTS}/fetch`, { method: 'POST', body: '{"ids":[]}' }],
    [`${ROOT}${DOCUMENTS}/fetch`, { method: 'POST', body: '{', headers: { 'x-a': 'b' } }],
    [`${ROOT}/`, { method: 'DELETE' }],
    [`${ROOT}/nothing/here`, {}],
  ] as ReadonlyArray<[string, Ask]>) {
    const what = `${ask.method ?? 'GET'} ${path}`
    const answers = []
    const calls = []
    const records = []
    for (const prepare of [cool, warm]) {
      await prepare()
      const before = { routed: routed(), calls: api.record.length, events: events.length }
      answers.push(await call('all', path, ask))
      t.equal(routed() - before.routed, prepare === cool ? 1 : 0, what)
      calls.push(
        ...api.record.slice(before.calls).map((one) => {
          const { method, rawTarget, headers, bodyDigest } = one
          return { method, rawTarget, headers, bodyDigest }
        }),
      )
      records.push(
        ...events.slice(before.events).map(({ requestId: _requestId, ...event }) => event),
      )
    }
    t.same(answers[1], answers[0], what)
    t.equal(calls.length, 2)
    t.same(calls[1], calls[0], what)
    t.same(records[1], records[0], what)
    t.match(records[1], { action: 'call_proxied', actor: 'caller', name: 'all', user: 'acme-1' })
  }
})

t.test('what a service may not call is refused with its token in memory too', async (t) => {
  const { warm, call, api, events } = await setInternal(t)
  await warm()
  await call('all', `${ROOT}${DOCUMENTS}`)
  await call('documents', `${ROOT}${DOCUMENTS}`)
  const before = api.record.length
  events.length = 0
  for (const [status, caller, path, ask] of [
    [403, 'reader', `${ROOT}${DOCUMENTS}`],
    [403, 'documents', `${ROOT}/file/v1/files`],
    [403, 'documents', `${ROOT}${DOCUMENTS}`, { method: 'POST', body: '{}' }],
    [404, 'documents', `/v1/users/other-1/pagero${DOCUMENTS}`],
    [404, 'all', `/v1/users/acme-2/pagero${DOCUMENTS}`],
    [400, 'all', `${ROOT}/document/v1/../../file`],
    [400, 'all', `${ROOT}/document/v1/%2e%2e/file`],
    [400, 'all', `${ROOT}//document`],
    [400, 'all', `${ROOT}/document;a=b`],
    [400, 'all', `/v1/users/../pagero${DOCUMENTS}`],
    [405, 'all', `${ROOT}${DOCUMENTS}`, { method: 'OPTIONS' }],
    [401, 'all', `${ROOT}${DOCUMENTS}`, { headers: { authorization: 'Bearer pgb_a_b' } }],
    [400, 'all', `${ROOT}${DOCUMENTS}`, { headers: { expect: 'a-miracle' } }],
    [508, 'all', `${ROOT}${DOCUMENTS}`, { headers: { via: '1.1 broker-test' } }],
    [413, 'all', `${ROOT}/file/v1/files`, { method: 'POST', body: 'x'.repeat(1_000_001) }],
  ] as ReadonlyArray<[number, keyof typeof CALLERS, string, Ask?]>) {
    t.equal((await call(caller, path, ask)).status, status, `${ask?.method ?? 'GET'} ${path}`)
  }
  t.equal(api.record.length, before, 'and nothing reaches the API')
})

t.test(
  'a call before the router counts for the limits, and beyond them there is none',
  async (t) => {
    // Two requests, and the next after seconds.
    for (const limit of [{ perCaller: 0.4 }, { perUser: 0.4 }]) {
      const limits = { perCaller: 0, perUser: 0, perAddress: 0, ...limit }
      const { warm, call, api } = await setInternal(t, limits)
      await warm()
      const routed = countRouted(t)
      t.equal((await call('all', `${ROOT}${DOCUMENTS}`)).status, 200)
      t.equal((await call('all', `${ROOT}${DOCUMENTS}`)).status, 200)
      t.equal(routed(), 0)
      t.equal((await call('all', `${ROOT}${DOCUMENTS}`)).status, 429)
      t.equal(api.record.length, 2)
    }
  },
)

t.test('a call that fails is answered and told of as by the route', async (t) => {
  const { warm, cool, call, api, log } = await setInternal(t)
  await api.stop()
  const answers = []
  const told = []
  for (const prepare of [cool, warm]) {
    await prepare()
    log.events.length = 0
    answers.push(
      await call('all', `${ROOT}${DOCUMENTS}`, { headers: { 'x-request-id': REQUEST_ID } }),
    )
    told.push(log.events.map((event) => ({ ...event, durationMs: 0, error: '' })))
  }
  t.equal(answers[1]?.status, 502)
  t.same(answers[1], answers[0])
  t.match(told[1], [{ event: 'forward_failed' }, { event: 'request_answered', status: 502 }])
  t.same(told[1], told[0])
})

const REQUEST_ID = '6a1f0a52-6f0e-4f4e-8a53-0d2b0c1c7d11'

t.test('a grant that is closed is not used by a call before the router either', async (t) => {
  const { warm, cool, call, api, scene } = await setInternal(t)
  await warm()
  t.equal((await call('all', `${ROOT}${DOCUMENTS}`)).status, 200)
  await scene.database.pool.query(`delete from grants where user_id = 'acme-1'`)
  await cool()
  t.equal((await call('all', `${ROOT}${DOCUMENTS}`)).status, 404)
  t.equal(api.record.length, 1)
})

async function setPublic(t: Test, rateLimits = { perCaller: 0, perUser: 0, perAddress: 0 }) {
  const listener = await startPublicListener(t, {
    config: { tokenCacheTrustMs: 60_000, allowedOrigins: [APPLICATION], rateLimits },
    replace: () => ({ log: quietLog() }),
  })
  const browser = listener.browser()
  await browser.logIn('alice')
  return { ...listener, browser }
}

t.test('a call of a page is the same before the router as through it', async (t) => {
  const { browser, api } = await setPublic(t)
  const routed = countRouted(t)
  for (const ask of [
    {},
    { headers: { origin: APPLICATION, 'sec-fetch-site': 'same-site' } },
    { method: 'POST', body: '{"ids":[]}', headers: { 'content-type': 'application/json' } },
  ]) {
    const path = `/api${DOCUMENTS}${ask.method === undefined ? '?limit=2' : '/fetch'}`
    // The first after a login is not in memory yet.
    await browser.logIn('alice')
    const before = routed()
    const { headers: first, ...answer } = await browser.fetch(path, ask)
    t.equal(routed() - before, 1)
    const { headers: second, ...repeated } = await browser.fetch(path, ask)
    t.equal(routed() - before, 1)
    t.ok(answer.status < 300)
    t.equal(repeated.status, answer.status)
    t.equal(repeated.body, answer.body)
    t.same({ ...second, date: '' }, { ...first, date: '' })
    const [one, other] = api.record.slice(-2)
    t.same(other?.headers, one?.headers)
    t.same(other?.bodyDigest, one?.bodyDigest)
  }
})

t.test('what a page may not call is refused with its session in memory too', async (t) => {
  const { browser, api, publicUrl } = await setPublic(t)
  const path = `/api${DOCUMENTS}`
  await browser.fetch(path)
  t.equal((await browser.fetch(path)).status, 200)
  const before = api.record.length
  const cookie = `${SESSION_COOKIE}=${browser.cookies.get(SESSION_COOKIE)?.value}`
  for (const [status, headers, method] of [
    [403, { 'x-csrf': '2' }],
    [403, { 'sec-fetch-site': 'cross-site' }],
    [403, { 'sec-fetch-site': 'same-site', origin: 'https://sibling.example' }],
    [403, { 'sec-fetch-site': 'none' }],
    [403, { 'sec-fetch-dest': 'iframe' }],
    [403, { origin: 'https://elsewhere.example' }, 'POST'],
    [400, { cookie: `${cookie}; ${cookie}` }],
    [401, { cookie: `${cookie}x` }],
    [401, { cookie: `x${cookie}` }],
    [405, { origin: publicUrl }, 'OPTIONS'],
  ] as ReadonlyArray<[number, Record<string, string>, string?]>) {
    const answer = await browser.fetch(path, { headers, ...(method && { method }) })
    t.equal(answer.status, status, JSON.stringify(headers))
  }
  t.equal((await browser.fetch(`/api/document/v1/..%2f..`)).status, 400)
  t.equal(api.record.length, before, 'and nothing reaches the API')
})

t.test('a session that has ended is not used by a call before the router either', async (t) => {
  const { browser, api } = await setPublic(t)
  const path = `/api${DOCUMENTS}`
  const cookie = `${SESSION_COOKIE}=${browser.cookies.get(SESSION_COOKIE)?.value}`
  await browser.fetch(path)
  t.equal((await browser.fetch(path)).status, 200)
  const before = api.record.length
  t.equal((await browser.fetch('/auth/logout', { method: 'POST' })).status, 204)
  t.equal((await browser.fetch(path, { headers: { cookie } })).status, 401)
  t.equal(api.record.length, before)
})

t.test('an address that has used up its requests makes no call before the router', async (t) => {
  const { browser, api } = await setPublic(t, { perCaller: 0, perUser: 0, perAddress: 1 })
  const path = `/api${DOCUMENTS}`
  await browser.fetch(path)
  t.equal((await browser.fetch(path)).status, 200)
  const before = api.record.length
  for (let i = 0; i < 6; i += 1) await browser.fetch(path, { headers: { cookie: '' } })
  t.equal((await browser.fetch(path)).status, 429)
  t.equal(api.record.length, before)
})
