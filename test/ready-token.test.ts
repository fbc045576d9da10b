// The answer before the router. It must be the very answer that the route would give, and there must be none otherwise.

import { createServer, request, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import type { AuditEvent } from '../src/audit-event.ts'
import { BrokerError } from '../src/errors.ts'
import type { UserKey } from '../src/grant.ts'
import { createReadyTokenAnswers } from '../src/http/ready-token.ts'
import { createRateLimits, type RateLimitSettings } from '../src/rate-limit.ts'
import { until } from './support/fleet.ts'
import { keepingLog } from './support/keeping-log.ts'
import { buildListeners, type InternalListener } from './support/internal-listener.ts'

const CALLERS = {
  reader: { rights: ['token:read'], users: ['acme-*'] },
  proxy: { rights: ['proxy:call'], users: ['*'] },
  documents: { rights: ['proxy:call'], users: ['acme-*'], proxyAllow: ['GET /document/v1/**'] },
  elsewhere: { rights: ['token:read'], users: ['other-*'] },
  expired: { rights: ['token:read'], users: ['*'], expiresAt: '2020-01-01T00:00:00Z' },
} as const

const PATH = '/v1/users/acme-1/access-token'
const GATEWAY_PATH = '/v1/forward-auth'
const NO_LIMITS: RateLimitSettings = { perCaller: 0, perUser: 0, perAddress: 0 }

interface Answer {
  status: number
  headers: Record<string, unknown>
  body: string
}

/** Sends a request on a connection of its own. */
function send(
  port: number,
  path: string,
  options: { method?: string; headers?: Readonly<Record<string, string>> },
): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const sent = request({ port, path, agent: false, ...options }, (response) => {
      let body = ''
      response.setEncoding('utf8')
      response.on('data', (chunk: string) => (body += chunk))
      response.on('end', () =>
        resolve({ status: response.statusCode ?? 0, headers: response.headers, body }),
      )
    })
    sent.on('error', reject).end()
  })
}

/** What two answers must have in common: all but the clock, the connection and the request's own number. */
function comparable({ status, headers, body }: Answer) {
  const { date: _date, connection: _connection, 'keep-alive': _keepAlive, ...rest } = headers
  return {
    status,
    headers: rest,
    body: body
      .replaceAll(/urn:uuid:[0-9a-f-]{36}/g, 'urn:uuid:-')
      .replace(/"expires_in":\d+/, '"expires_in":-'),
  }
}

function fingerprintIn(body: string): unknown {
  return (JSON.parse(body) as Record<string, unknown>)['fingerprint']
}

async function setUp(t: Test): Promise<InternalListener> {
  const listeners = await buildListeners(t, {
    callers: CALLERS,
    // Where each request is traced, none is answered before the router.
    replace: { log: { ...keepingLog(), writes: () => false } },
    tokenCacheTrustMs: 60_000,
  })
  const { scene, engine } = listeners
  await engine.accessTokens.fresh(await scene.connect(engine, 'acme-1'))
  return listeners
}

/** A server with nothing but these answers, which says 599 to the others. */
async function serveAlone(
  t: Test,
  { callers, engine }: InternalListener,
  rateLimits: RateLimitSettings = NO_LIMITS,
) {
  const handedOut: AuditEvent[] = []
  const { answersAtOnce, takesAtOnce } = createReadyTokenAnswers({
    limits: createRateLimits(engine.ports, rateLimits),
    callers,
    accessTokens: engine.accessTokens,
    isOverloaded: () => false,
    tokenFields: [],
    gatewayFields: [],
    audit: { record: (event) => void handedOut.push(event) },
  })
  const route = (_request: unknown, response: ServerResponse) => void response.writeHead(599).end()
  const server = createServer((incoming, response) => {
    if (answersAtOnce(incoming, response)) return
    if (!takesAtOnce(incoming, response, route)) route(incoming, response)
  })
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  t.teardown(() => void server.close())
  return { port: (server.address() as AddressInfo).port, handedOut }
}

t.test('a token in memory is answered before the router, and is on record', async (t) => {
  const listeners = await setUp(t)
  const { port, handedOut } = await serveAlone(t, listeners)
  const headers = listeners.credentials['reader'] ?? {}
  const { status, body } = await send(port, PATH, { headers })
  t.equal(status, 200)
  const { access_token: token, fingerprint } = JSON.parse(body) as Record<string, string>
  t.match(await listeners.scene.lookAlike.isActive(String(token)), { subject: 'acme-1' })
  t.match(handedOut, [{ action: 'token_handed_out', user: 'acme-1', name: 'reader', fingerprint }])
})

t.test('a token that is to be read first is answered before the router too', async (t) => {
  const listeners = await setUp(t)
  const { engine, scene, credentials } = listeners
  const { port, handedOut } = await serveAlone(t, listeners)
  const user = await scene.connect(engine, 'acme-5')
  const path = `/v1/users/${user}/access-token`
  for (const [url, caller] of [
    [path, 'reader'],
    [GATEWAY_PATH, 'proxy'],
  ] as const) {
    engine.accessTokens.forget(user)
    const headers = { ...credentials[caller], 'x-broker-user': user }
    const answer = await send(port, url, { headers })
    t.equal(answer.status, 200)
    const token =
      url === path ? JSON.parse(answer.body).access_token : answer.headers['authorization']
    t.match(await scene.lookAlike.isActive(String(token).replace('Bearer ', '')), { subject: user })
    t.match(handedOut, [{ action: 'token_handed_out', user, name: caller }])
    handedOut.length = 0
  }
})

t.test('while tokens are read, no more of them are given than the limits allow', async (t) => {
  const listeners = await setUp(t)
  const { engine, credentials } = listeners
  const { port, handedOut } = await serveAlone(t, listeners, { ...NO_LIMITS, perUser: 0.01 })
  engine.accessTokens.forget('acme-1' as UserKey)
  const asking = Array.from({ length: 5 }, () =>
    send(port, PATH, { headers: credentials['reader'] ?? {} }),
  )
  const statuses = (await Promise.all(asking)).map(({ status }) => status)
  t.same(
    statuses.toSorted((a, b) => a - b),
    [200, 599, 599, 599, 599],
  )
  t.equal(handedOut.length, 1)
})

t.test(
  'an answer before the router counts for the limits, and beyond them there is none',
  async (t) => {
    const listeners = await setUp(t)
    // One request, and the next after a hundred seconds.
    for (const limit of [{ perCaller: 0.01 }, { perUser: 0.01 }]) {
      for (const [path, caller] of [
        [PATH, 'reader'],
        [GATEWAY_PATH, 'proxy'],
      ] as const) {
        const headers = { ...listeners.credentials[caller], 'x-broker-user': 'acme-1' }
        const { port, handedOut } = await serveAlone(t, listeners, { ...NO_LIMITS, ...limit })
        t.equal((await send(port, path, { headers })).status, 200)
        t.equal((await send(port, path, { headers })).status, 599)
        t.equal(handedOut.length, 1)
      }
    }
  },
)

t.test('whatever else is asked, and whoever asks, is left to the routes', async (t) => {
  const listeners = await setUp(t)
  const { port, handedOut } = await serveAlone(t, listeners)
  const { reader, proxy, elsewhere, expired } = listeners.credentials
  const wrong = { authorization: `${String(reader?.authorization).slice(0, -1)}~` }
  for (const [what, path, options] of [
    ['another method', PATH, { method: 'HEAD', headers: reader }],
    ['a report', PATH, { method: 'POST', headers: reader }],
    ['a life asked for', `${PATH}?min_ttl=60`, { headers: reader }],
    ['an empty query', `${PATH}?`, { headers: reader }],
    ['an escaped user', '/v1/users/acme%2d1/access-token', { headers: reader }],
    ['a path below', `${PATH}/`, { headers: reader }],
    ['two users', '/v1/users/acme-1/acme-1/access-token', { headers: reader }],
    ['no user', '/v1/users//access-token', { headers: reader }],
    ['no path of a user', '/v1/users/access-token', { headers: reader }],
    ['a user without a grant', '/v1/users/acme-2/access-token', { headers: reader }],
    ['a body', PATH, { headers: { ...reader, 'transfer-encoding': 'chunked' } }],
    ['no caller', PATH, {}],
    ['a wrong key', PATH, { headers: wrong }],
    ['an expired key', PATH, { headers: expired }],
    ['another right', PATH, { headers: proxy }],
    ['other users', PATH, { headers: elsewhere }],
  ] as ReadonlyArray<[string, string, Parameters<typeof send>[2]]>) {
    t.equal((await send(port, path, options)).status, 599, what)
  }
  t.same(handedOut, [], 'and is on no record')
})

t.test('a gateway is answered before the router for a call that its caller may make', async (t) => {
  const listeners = await setUp(t)
  const { port, handedOut } = await serveAlone(t, listeners)
  const named = { 'x-broker-user': 'acme-1' }
  const asked = { ...named, 'x-original-method': 'GET', 'x-original-uri': '/document/v1/list?a=b' }
  for (const [caller, headers] of [
    ['proxy', named],
    ['proxy', asked],
    ['documents', asked],
  ] as const) {
    const credential = listeners.credentials[caller]
    const answer = await send(port, GATEWAY_PATH, { headers: { ...credential, ...headers } })
    t.equal(answer.status, 200, caller)
    t.equal(answer.body, '')
    const [scheme, token = ''] = String(answer.headers['authorization']).split(' ')
    t.equal(scheme, 'Bearer')
    t.match(await listeners.scene.lookAlike.isActive(token), { subject: 'acme-1' })
    t.match(handedOut.pop(), { action: 'token_handed_out', user: 'acme-1', name: caller })
  }
  t.same(handedOut, [])
})

t.test('whatever else a gateway asks is left to the routes', async (t) => {
  const listeners = await setUp(t)
  const { port, handedOut } = await serveAlone(t, listeners)
  const named = { 'x-broker-user': 'acme-1' }
  const asked = { ...named, 'x-original-method': 'GET', 'x-original-uri': '/document/v1/list' }
  for (const [what, caller, headers, options] of [
    ['another right', 'reader', asked],
    ['other users', 'documents', { ...asked, 'x-broker-user': 'other-1' }],
    ['a user without a grant', 'documents', { ...asked, 'x-broker-user': 'acme-2' }],
    ['no user', 'proxy', {}],
    ['what is no key of a user', 'proxy', { 'x-broker-user': 'acme-1, acme-1' }],
    ['no call where one is needed', 'documents', named],
    ['half a call', 'documents', { ...named, 'x-original-uri': '/document/v1/list' }],
    ['a path not allowed', 'documents', { ...asked, 'x-original-uri': '/file/v1/files' }],
    ['a method not allowed', 'documents', { ...asked, 'x-original-method': 'POST' }],
    ['a way out', 'documents', { ...asked, 'x-original-uri': '/document/v1/../../file' }],
    [
      'two that differ',
      'documents',
      { ...asked, 'x-forwarded-method': 'GET', 'x-forwarded-uri': '/document/v1/other' },
    ],
    ['a method that no call has', 'proxy', { ...asked, 'x-original-method': 'TRACE' }],
    ['another method of its own', 'proxy', asked, { method: 'HEAD' }],
    ['a query', 'proxy', asked, { path: `${GATEWAY_PATH}?` }],
    ['a path of its own', 'proxy', asked, { path: `${GATEWAY_PATH}/document/v1/list` }],
  ] as ReadonlyArray<
    [string, string, Record<string, string>, { method?: string; path?: string }?]
  >) {
    const { path = GATEWAY_PATH, ...rest } = options ?? {}
    const answer = await send(port, path, {
      ...rest,
      headers: { ...listeners.credentials[caller], ...headers },
    })
    t.equal(answer.status, 599, what)
  }
  t.same(handedOut, [], 'and is on no record')
})

t.test('a token near its end is given before the router, and renewed meanwhile', async (t) => {
  const listeners = await setUp(t)
  const { engine, scene } = listeners
  const { port } = await serveAlone(t, listeners)
  const user = await scene.connect(engine, 'acme-3')
  const rowOf = async (key: UserKey) => {
    const row = await engine.ports.grants.find(key)
    if (row === undefined) throw new Error('The grant is gone.')
    return row
  }
  await scene.database.pool.query(
    `update grants set access_token_requested_at = access_token_requested_at - interval '540 s',
       access_token_expires_at = access_token_expires_at - interval '540 s' where user_id = $1`,
    [user],
  )
  engine.accessTokens.forget(user)
  const path = `/v1/users/${user}/access-token`
  const { generation } = await rowOf(user)
  t.equal((await send(port, path, { headers: listeners.credentials['reader'] ?? {} })).status, 200)
  await until(async () => (await rowOf(user)).generation > generation, 10_000, 'the renewal')
})

t.test('the listener answers before the router as its route does', async (t) => {
  const { internalApp, credentials } = await setUp(t)
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.addresses()[0] as AddressInfo
  const { reader, proxy, documents, elsewhere } = credentials
  const named = { 'x-broker-user': 'acme-1' }
  for (const url of [PATH, GATEWAY_PATH]) {
    for (const credential of [reader, proxy, documents, elsewhere, {}]) {
      const headers = { ...credential, ...named }
      const routed = await internalApp.inject({ url, headers })
      t.same(
        comparable(await send(port, url, { headers })),
        comparable({ status: routed.statusCode, headers: routed.headers, body: routed.body }),
      )
    }
  }
})

t.test('what fails before the router is told by its route, and not tried again', async (t) => {
  const log = { ...keepingLog(), writes: (level: string) => level !== 'debug' }
  let isOverloaded = false
  const { scene, engine, internalApp, credentials } = await buildListeners(t, {
    callers: CALLERS,
    replace: { log },
    isOverloaded: () => isOverloaded,
  })
  await scene.connect(engine, 'acme-1')
  const readGrant = async () =>
    (await scene.database.pool.query(`select * from grants where user_id = 'acme-1'`)).rows
  const before = await readGrant()
  t.equal(before.length, 1)
  let reads = 0
  engine.ports.grants.findMany = () => {
    reads += 1
    const error = new BrokerError('temporarily_unavailable', 'It is away.', {
      retryAfterSeconds: 2,
    })
    return Promise.reject(error)
  }
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.addresses()[0] as AddressInfo
  for (const [url, caller] of [
    [PATH, 'reader'],
    [GATEWAY_PATH, 'proxy'],
  ] as const) {
    const headers = { ...credentials[caller], 'x-broker-user': 'acme-1' }
    // What comes by no connection is routed.
    const routed = await internalApp.inject({ url, headers })
    reads = 0
    log.events.length = 0
    t.same(
      comparable(await send(port, url, { headers })),
      comparable({ status: routed.statusCode, headers: routed.headers, body: routed.body }),
    )
    t.equal(routed.statusCode, 503)
    t.equal(reads, 1, 'it is not asked twice')
    const route = url === PATH ? '/v1/users/:user/access-token' : url
    t.match(log.events, [{ event: 'request_answered', status: 503, route }])
  }

  const { findMany } = engine.ports.grants
  engine.ports.grants.findMany = (users) => {
    isOverloaded = true
    return findMany(users)
  }
  const asReader = { headers: { ...credentials.reader } }
  const late = await send(port, PATH, asReader)
  t.match(late.body, /It is away/, 'also where the process does not keep up by then')
  t.match((await send(port, PATH, asReader)).body, /more to do than it can/)
  t.strictSame(await readGrant(), before, 'the grant is as it was')
})

t.test('what clients escape needlessly is the same user', async (t) => {
  const listeners = await setUp(t)
  const { scene, engine, internalApp } = listeners
  const user = 'acme-1:2@b+c'
  await engine.accessTokens.fresh(await scene.connect(engine, user))
  const headers = { ...listeners.credentials.reader }
  const { port } = await serveAlone(t, listeners)
  for (const segment of [user, encodeURIComponent(user), 'acme-1%3a2@b%2Bc']) {
    const url = `/v1/users/${segment}/access-token`
    const early = await send(port, url, { headers })
    t.equal(early.status, 200, segment)
    const routed = await internalApp.inject({ url, headers })
    t.equal(fingerprintIn(early.body), fingerprintIn(routed.body))
  }
  const twice = encodeURIComponent(encodeURIComponent(user))
  for (const segment of [twice, 'acme-1%3a2%40b%2Bc%2F', 'acme%2d1', 'acme-1%3']) {
    const url = `/v1/users/${segment}/access-token`
    t.equal((await send(port, url, { headers })).status, 599, segment)
  }
})

t.test('what clients take out of a path names no user, escaped or not', async (t) => {
  const { internalApp, credentials } = await setUp(t)
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.addresses()[0] as AddressInfo
  for (const user of ['.', '..', '%2e', '%2E%2e']) {
    const path = `/v1/users/${user}/access-token`
    const { status, body } = await send(port, path, { headers: credentials['elsewhere'] ?? {} })
    t.equal(status, 400, user)
    t.match(JSON.parse(body), {
      errors: [{ pointer: 'params/user', detail: /neither \. nor \.\./ }],
    })
  }
  for (const user of ['...', '.a', '..a', 'a..']) {
    const path = `/v1/users/${user}/access-token`
    t.equal((await send(port, path, { headers: credentials['elsewhere'] ?? {} })).status, 404, user)
  }
})

t.test('a grant that is closed is not served from before the router either', async (t) => {
  const listeners = await setUp(t)
  const { engine, internalApp, credentials } = listeners
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.addresses()[0] as AddressInfo
  const headers = credentials['reader'] ?? {}
  t.equal((await send(port, PATH, { headers })).status, 200)
  engine.accessTokens.forget('acme-1' as Parameters<typeof engine.accessTokens.forget>[0])
  const { database } = listeners.scene
  await database.pool.query(`delete from grants where user_id = 'acme-1'`)
  t.equal((await send(port, PATH, { headers })).status, 404)
})
