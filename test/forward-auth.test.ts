// Forward-auth as a gateway meets it: which call gets a token, for whom, and what every refusal looks like.

import { connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import { once } from 'node:events'
import type { InjectOptions, LightMyRequestResponse as Response } from 'fastify'
import t, { type Test } from 'tap'
import { PROBLEM_CODES } from '../src/errors.ts'
import { statusOf } from '../src/http/problem.ts'
import { handOutsOf } from './support/audit.ts'
import {
  buildListeners,
  type CallerEntry,
  type InternalListener,
} from './support/internal-listener.ts'

const CALLERS = {
  gateway: { rights: ['proxy:call'], users: ['*'] },
  limited: {
    rights: ['proxy:call'],
    users: ['*'],
    proxyAllow: ['GET /document/v1/**', 'POST /file/v1/files'],
  },
  acme: { rights: ['proxy:call'], users: ['acme-*'] },
  reader: { rights: ['token:read', 'grant:read', 'grant:manage', 'ops:read'], users: ['*'] },
  expired: { rights: ['proxy:call'], users: ['*'], expiresAt: '2020-01-01T00:00:00Z' },
} satisfies Record<string, CallerEntry>

type CallerName = keyof typeof CALLERS

interface Setting extends InternalListener {
  ask: (
    caller: CallerName | undefined,
    headers: Record<string, string | string[]>,
    request?: Pick<InjectOptions, 'method' | 'url' | 'payload'>,
  ) => Promise<Response>
}

async function setUp(t: Test): Promise<Setting> {
  const listeners = await buildListeners(t, { callers: CALLERS })
  await listeners.scene.connect(listeners.engine, 'alice')
  return {
    ...listeners,
    ask: (caller, headers, request = {}) =>
      listeners.internalApp.inject({
        method: 'GET',
        url: '/v1/forward-auth',
        ...request,
        headers: { ...(caller === undefined ? {} : listeners.credentials[caller]), ...headers },
      }),
  }
}

const ALICE = { 'x-broker-user': 'alice' }

function original(method: string, uri: string): Record<string, string> {
  return { 'x-original-method': method, 'x-original-uri': uri }
}

/** That an answer refuses, in the one way that gateways understand. */
function refused(t: Test, response: Response, status: number, code: string, what = code): void {
  t.equal(response.statusCode, status, what)
  t.equal(response.headers['x-broker-problem'], code, what)
  t.equal(response.headers['authorization'], undefined, what)
  t.equal(response.headers['cache-control'], 'no-store', what)
  t.match(response.headers['content-type'], /^application\/problem\+json/, what)
  t.match(response.json(), { status, code, type: `/problems/${code}` }, what)
}

t.test('the answer is an empty 200 with the access token for the gateway to inject', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  const response = await ask('gateway', ALICE)
  t.equal(response.statusCode, 200)
  t.equal(response.body, '')
  t.equal(response.headers['cache-control'], 'no-store')
  const [scheme, token = ''] = String(response.headers['authorization']).split(' ')
  t.equal(scheme, 'Bearer')
  t.match(await scene.lookAlike.isActive(token), { subject: 'alice' })
  const handOuts = await handOutsOf(engine)
  t.match(handOuts, [{ user: 'alice', actorName: 'gateway', fingerprint: /^[\w-]{43}$/ }])
  t.equal(handOuts.length, 1)
})

t.test('every problem code is 401, 403 or 503 to a gateway', (t) => {
  for (const code of PROBLEM_CODES) t.ok([401, 403, 503].includes(statusOf(code, 'gateway')), code)
  t.end()
})

t.test('the credential is checked before anything else, and its lack is no 401', async (t) => {
  const { ask } = await setUp(t)
  refused(t, await ask(undefined, ALICE), 403, 'caller_unauthenticated')
  refused(t, await ask('expired', ALICE), 403, 'caller_unauthenticated', 'expired')
  refused(t, await ask(undefined, {}), 403, 'caller_unauthenticated', 'no user either')
  const basic = { authorization: 'Basic cGdiOnNlY3JldA==', ...ALICE }
  refused(t, await ask(undefined, basic), 403, 'caller_unauthenticated', 'another scheme')
  refused(t, await ask('reader', ALICE), 403, 'caller_forbidden', 'other rights')
})

t.test(
  'a user without a grant and one that the gateway may not see get the same 401',
  async (t) => {
    const { ask } = await setUp(t)
    const nobody = await ask('gateway', { 'x-broker-user': 'nobody' })
    const invisible = await ask('acme', ALICE)
    refused(t, nobody, 401, 'grant_not_found')
    refused(t, invisible, 401, 'grant_not_found')
    const comparable = ({ headers, body }: Response) => ({
      headers: { ...headers, date: '' },
      body: body.replace(/urn:uuid:[0-9a-f-]+/, ''),
    })
    t.same(comparable(nobody), comparable(invisible))
    t.equal(
      nobody.headers['www-authenticate'],
      'Session',
      'it is not a key of ours that is missing',
    )
  },
)

t.test('a dead grant is a 401, an outage a 503 with the seconds to wait', async (t) => {
  const { ask, scene, engine } = await setUp(t)
  const bob = await scene.connect(engine, 'bob')
  const carol = await scene.connect(engine, 'carol')
  await scene.expire(bob)
  scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 429, times: 9 })
  const away = await ask('gateway', { 'x-broker-user': 'bob' })
  refused(t, away, 503, 'temporarily_unavailable')
  t.match(away.headers['retry-after'], /^\d+$/)
  t.match(await scene.grantOf(engine, bob), { state: 'active', phase: 'idle' }, 'it is intact')

  await scene.lookAlike.revokeLogin(await scene.storedRefreshToken(engine, carol))
  await scene.expire(carol)
  scene.lookAlike.faults.length = 0
  const until = performance.now() + 10_000
  let dead = await ask('gateway', { 'x-broker-user': 'carol' })
  // The breaker that the outage has opened lets one attempt pass at a time.
  while (dead.statusCode === 503 && performance.now() < until) {
    dead = await ask('gateway', { 'x-broker-user': 'carol' })
  }
  refused(t, dead, 401, 'reauthentication_required')
  t.match(await scene.grantOf(engine, carol), { state: 'reauthentication_required' })
})

t.test('only the named header says who the user is', async (t) => {
  const { ask } = await setUp(t)
  const spoofed = {
    'x-user-id': 'alice',
    'x-forwarded-user': 'alice',
    'x-remote-user': 'alice',
    x_broker_user: 'alice',
    'x.broker.user': 'alice',
    'remote-user': 'alice',
    cookie: '__Host-broker-session=alice',
  }
  refused(t, await ask('gateway', spoofed), 403, 'request_invalid', 'no user')
  const inUrl = await ask('gateway', {}, { url: '/v1/forward-auth?user=alice&x-broker-user=alice' })
  refused(t, inUrl, 403, 'request_invalid', 'in the query')
  const nobody = { 'x-broker-user': 'nobody', ...spoofed }
  refused(t, await ask('gateway', nobody), 401, 'grant_not_found', 'the others add nothing')
  for (const user of [
    '',
    'al ice',
    'alice,alice',
    'alice%00',
    'älice',
    '*',
    '.',
    '..',
    'a'.repeat(256),
  ]) {
    refused(t, await ask('gateway', { 'x-broker-user': user }), 403, 'request_invalid', user)
  }
  const twice = { 'x-broker-user': ['alice', 'alice'] }
  refused(t, await ask('gateway', twice), 403, 'request_invalid', 'twice')
})

t.test('a caller with proxy_allow is answered only for calls that it covers', async (t) => {
  const { ask } = await setUp(t)
  const allowed = [
    original('GET', '/document/v1/documents?limit=10'),
    original('POST', '/file/v1/files'),
    { 'x-forwarded-method': 'GET', 'x-forwarded-uri': '/document/v1/documents' },
  ]
  for (const headers of allowed) {
    const response = await ask('limited', { ...ALICE, ...headers })
    t.equal(response.statusCode, 200, JSON.stringify(headers))
  }
  const forbidden = [
    original('DELETE', '/document/v1/documents'),
    original('HEAD', '/document/v1/documents'),
    original('GET', '/file/v1/files'),
    original('GET', '/?/document/v1/documents'),
  ]
  for (const headers of forbidden) {
    const response = await ask('limited', { ...ALICE, ...headers })
    refused(t, response, 403, 'caller_forbidden', JSON.stringify(headers))
  }
  refused(t, await ask('limited', ALICE), 403, 'request_invalid', 'no call is told')
})

t.test('a target that can be read in two ways is refused to every caller', async (t) => {
  const { ask } = await setUp(t)
  const targets = [
    '/document/v1/../../file/v1/files',
    '/document/v1/%2e%2e/x',
    '/document/v1//x',
    '/document/v1/x;y',
    '/document/v1/%2fx',
    '/document/v1/x\\y',
    'document/v1/documents',
    'https://api.pageroonline.com/document/v1/documents',
    '',
    '/document/v1/documents#fragment',
    '/document/v1/%zz',
  ]
  for (const caller of ['limited', 'gateway'] as const) {
    for (const target of targets) {
      const response = await ask(caller, { ...ALICE, ...original('GET', target) })
      refused(t, response, 403, 'request_invalid', `${caller} ${target}`)
    }
  }
  const long = original('GET', `/document/v1/${'x'.repeat(8_200)}`)
  refused(t, await ask('gateway', { ...ALICE, ...long }), 403, 'uri_too_long')
  for (const method of ['get', 'OPTIONS', 'TRACE', '', 'GET, GET']) {
    const headers = original(method, '/document/v1/documents')
    refused(t, await ask('gateway', { ...ALICE, ...headers }), 403, 'request_invalid', method)
  }
  for (const half of ['x-original-uri', 'x-forwarded-uri']) {
    const headers = { ...ALICE, [half]: '/document/v1/documents' }
    refused(t, await ask('limited', headers), 403, 'request_invalid', `${half} alone`)
  }
})

t.test('a client that adds the headers of another gateway cannot widen proxy_allow', async (t) => {
  const { ask } = await setUp(t)
  const forwarded = (method: string, uri: string) => ({
    'x-forwarded-method': method,
    'x-forwarded-uri': uri,
  })
  const allowed = ['GET', '/document/v1/documents'] as const
  const wanted = ['DELETE', '/document/v1/documents'] as const
  for (const headers of [
    { ...original(...allowed), ...forwarded(...wanted) },
    { ...original(...wanted), ...forwarded(...allowed) },
    { ...original(...allowed), ...forwarded('GET', '/document/v1/documents?x') },
  ]) {
    const response = await ask('limited', { ...ALICE, ...headers })
    refused(t, response, 403, 'request_invalid', JSON.stringify(headers))
  }
  const same = { ...original(...allowed), ...forwarded(...allowed) }
  t.equal((await ask('limited', { ...ALICE, ...same })).statusCode, 200, 'they may agree')
})

t.test('Envoy asks with the method and the path of the call', async (t) => {
  const { ask } = await setUp(t)
  const at = (method: 'GET' | 'POST' | 'DELETE', target: string, headers = {}) =>
    ask('limited', { ...ALICE, ...headers }, { method, url: `/v1/forward-auth${target}` })
  t.equal((await at('GET', '/document/v1/documents?limit=1')).statusCode, 200)
  t.equal((await at('POST', '/file/v1/files')).statusCode, 200)
  refused(t, await at('DELETE', '/document/v1/documents'), 403, 'caller_forbidden')
  refused(t, await at('GET', '/file/v1/files'), 403, 'caller_forbidden')
  const spoofed = original('GET', '/document/v1/documents')
  refused(t, await at('DELETE', '/document/v1/x', spoofed), 403, 'request_invalid', 'they differ')
  refused(t, await at('GET', '/document/v1/%2fx'), 403, 'request_invalid', 'escaped slash')
})

t.test('every method but GET is 405 and gives nothing out', async (t) => {
  const { ask, engine } = await setUp(t)
  for (const method of ['HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS'] as const) {
    const response = await ask('gateway', ALICE, { method })
    t.equal(response.statusCode, 405, method)
    t.equal(response.headers['authorization'], undefined, method)
    t.equal(response.headers['allow'], 'GET', method)
  }
  t.same(await handOutsOf(engine), [])
})

t.test('a path with dot segments does not leave the resource', async (t) => {
  const { internalApp, credentials } = await setUp(t)
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.server.address() as AddressInfo
  const socket = connect(port, '127.0.0.1')
  // A client library would resolve them before it sends.
  socket.end(
    `GET /v1/forward-auth/../users/alice/access-token HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Broker-User: alice\r\nAuthorization: ${credentials['gateway']?.authorization}\r\n\r\n`,
  )
  let text = ''
  socket.setEncoding('latin1').on('data', (chunk: string) => (text += chunk))
  await once(socket, 'close')
  t.match(text, /^HTTP\/1.1 403 /)
  t.notMatch(text, /access_token/)
})
