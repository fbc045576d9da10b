// Right x endpoint x user x credential: no cell answers more than it should, and Pagero hears nothing of what is refused.
// The endpoints are those of the OpenAPI document; one without a row here fails.

import { randomBytes } from 'node:crypto'
import { request as requestHttp } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { LightMyRequestResponse as Response } from 'fastify'
import t, { type Test } from 'tap'
import { hashOpaqueToken, newOpaqueToken } from '../src/opaque-token.ts'
import type { UserKey } from '../src/grant.ts'
import { buildListeners, type InternalListener } from './support/internal-listener.ts'
import {
  AUDIENCE,
  createIssuerKey,
  ISSUER,
  joinToken,
  publishKeys,
  signToken,
  SUBJECT,
} from './support/token-issuer.ts'

const RIGHTS = ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'] as const
type Right = (typeof RIGHTS)[number]
type Method = 'GET' | 'HEAD' | 'POST' | 'PUT' | 'PATCH' | 'DELETE'

interface Row {
  right: Right
  payload?: object
  /** The user stands in a header. */
  userHeader?: true
  /** No user is named. */
  list?: true
  /** The code of what is not there, where it is no grant. */
  absent?: 'not_found'
}

const PROXIED: Row = { right: 'proxy:call' }
const GATEWAY: Row = { right: 'proxy:call', userHeader: true }

/** What each operation needs. A refused request must be good in every way but one. */
const ROWS: Readonly<Record<string, Row>> = {
  'GET /v1/users/{user}/access-token': { right: 'token:read' },
  'POST /v1/users/{user}/access-token': {
    right: 'token:read',
    payload: { rejected: 'A'.repeat(43) },
  },
  'GET /v1/users/{user}/grant': { right: 'grant:read' },
  'PUT /v1/users/{user}/grant': {
    right: 'grant:manage',
    payload: { refresh_token: 'not-one-of-pagero', obtained_at: '2026-03-02T08:15:00Z' },
  },
  'DELETE /v1/users/{user}/grant': { right: 'grant:manage' },
  'DELETE /v1/users/{user}/sessions': { right: 'grant:manage' },
  'GET /v1/users/{user}/refresh-attempts': { right: 'ops:read' },
  'POST /v1/users/{user}/connect-links': {
    right: 'grant:manage',
    payload: { return_to: '/done' },
  },
  'POST /v1/users/{user}/grant/confirm': {
    right: 'grant:manage',
    payload: { confirmation: 'A'.repeat(43) },
  },
  'GET /v1/grants': { right: 'ops:read', list: true },
  'GET /v1/audit-events': { right: 'ops:read', list: true },
  'GET /v1/webhook-deliveries': { right: 'ops:read', list: true },
  // Whose event it is, test/webhook-api.test.ts asks.
  'POST /v1/webhook-deliveries/{id}/redeliver': { right: 'grant:manage', absent: 'not_found' },
  'GET /v1/forward-auth': GATEWAY,
  ...Object.fromEntries(
    ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'].flatMap((method) => [
      [`${method} /v1/users/{user}/pagero/{path}`, PROXIED],
      [`${method} /v1/forward-auth/{path}`, GATEWAY],
    ]),
  ),
}

const CALLERS = {
  everything: { rights: RIGHTS, users: ['acme-*'] },
  expired: { rights: RIGHTS, users: ['*'], expiresAt: '2020-01-01T00:00:00Z' },
  ...Object.fromEntries(
    RIGHTS.flatMap((right) => [
      [`only-${RIGHTS.indexOf(right)}`, { rights: [right], users: ['acme-*'] }],
      [
        `all-but-${RIGHTS.indexOf(right)}`,
        { rights: RIGHTS.filter((one) => one !== right), users: ['*'] },
      ],
    ]),
  ),
}

interface Operation {
  name: string
  method: Method
  path: string
}

interface Setting extends InternalListener {
  operations: Operation[]
  ask(operation: Operation, user: string, headers: Record<string, string>): Promise<Response>
  /** Requests that Pagero has had so far. */
  heard(): number
}

async function setUp(t: Test, jwt?: readonly object[]): Promise<Setting> {
  const listener = await buildListeners(t, {
    callers: {
      ...CALLERS,
      ...(jwt === undefined ? {} : { pod: { rights: RIGHTS, users: ['acme-*'], jwt } }),
    },
  })
  const { internalApp, scene, api } = listener
  for (const user of ['acme-alice', 'bob']) await scene.connect(listener.engine, user)
  const document = (await internalApp.inject('/openapi.json')).json() as {
    paths: Record<string, Record<string, { security?: Array<Record<string, unknown>> }>>
  }
  const operations = Object.entries(document.paths).flatMap(([path, item]) =>
    Object.entries(item)
      .filter(([, { security }]) => security?.some((scheme) => 'apiKey' in scheme))
      .map(([verb]) => {
        const method = verb.toUpperCase() as Method
        return { name: `${method} ${path}`, method, path }
      }),
  )
  return {
    ...listener,
    operations,
    heard: () => scene.lookAlike.record.length + api.record.length,
    ask(operation, user, headers) {
      const { payload, userHeader } = rowOf(operation)
      return internalApp.inject({
        method: operation.method,
        url: urlOf(operation, user),
        headers: { ...(userHeader ? { 'x-broker-user': user } : {}), ...headers },
        ...(payload === undefined ? {} : { payload }),
      })
    },
  }
}

function rowOf({ name }: Operation): Row {
  const row = ROWS[name]
  if (row === undefined) throw new Error(`${name} has no row in this test`)
  return row
}

function urlOf({ path }: Operation, user: string): string {
  return path
    .replace('{user}', user)
    .replace('{path}', 'document/v1/documents')
    .replace('{id}', '00000000-0000-4000-8000-000000000000')
}

/** The code of a refusal; a gateway finds it in a header, and so does who asks with HEAD. */
function codeOf(operation: Operation, response: Response): unknown {
  const inHeader = response.headers['x-broker-problem']
  if (inHeader !== undefined) return inHeader
  if (operation.method === 'HEAD') return CODES_OF_HEAD[response.statusCode]
  return (response.json() as { code: unknown }).code
}

const CODES_OF_HEAD: Readonly<Record<number, string>> = {
  401: 'caller_unauthenticated',
  403: 'caller_forbidden',
  404: 'grant_not_found',
}

/** All that two answers have in common but for the request's own id and the clock. */
function comparable(response: Response): unknown {
  const { date: _date, ...headers } = response.headers
  const body = response.body.replaceAll(/urn:uuid:[0-9a-f-]{36}/g, 'urn:uuid:-')
  return { status: response.statusCode, headers, body }
}

t.test('every operation of a calling service has a row', async (t) => {
  const { operations } = await setUp(t)
  t.ok(operations.length > 15, `${operations.length} operations`)
  t.same(
    operations.filter(({ name }) => ROWS[name] === undefined).map(({ name }) => name),
    [],
  )
})

t.test('no credential but a good one in the one place counts anywhere', async (t) => {
  const key = await createIssuerKey('one')
  const stranger = await createIssuerKey('one')
  const endpoint = await publishKeys(t, [key])
  const entry = { issuer: ISSUER, audience: AUDIENCE, subject: SUBJECT, jwks_uri: endpoint.url }
  const { operations, ask, heard, credentials, engine } = await setUp(t, [entry])
  const good = String(credentials['everything']?.authorization)
  const seconds = Math.floor(Date.now() / 1000)
  const claims = { iss: ISSUER, aud: AUDIENCE, sub: SUBJECT, iat: seconds, exp: seconds + 600 }
  const session = newOpaqueToken()
  await engine.ports.sessions.create(
    hashOpaqueToken(session),
    'acme-alice' as UserKey,
    { idleSeconds: 600, absoluteSeconds: 600 },
    { replaces: null, perUserMax: 10 },
  )
  const bearer = (token: string) => ({ authorization: `Bearer ${token}` })
  const bad: Record<string, Record<string, string>> = {
    none: {},
    'a wrong secret': bearer(`pgb_key0_${randomBytes(32).toString('base64url')}`),
    'an unknown id': bearer(`pgb_zzzz_${good.slice(-43)}`),
    'an expired key': credentials['expired'] ?? {},
    'another scheme': { authorization: good.replace('Bearer', 'Basic') },
    'a key without a scheme': { authorization: good.slice(7) },
    'two keys in one header': { authorization: `${good}, ${good}` },
    'a key in a cookie': { cookie: `authorization=${good.slice(7)}` },
    'the session of a browser': { cookie: `__Host-broker-session=${session}`, 'x-csrf': '1' },
    'a key in a header of its own': { 'x-api-key': good.slice(7) },
    'the names of others': { 'x-user-id': 'acme-alice', 'x-forwarded-user': 'everything' },
    'a token of no algorithm': bearer(joinToken({ alg: 'none' }, claims)),
    'a token with an HMAC': bearer(joinToken({ alg: 'HS256', kid: 'one' }, claims, 'AAAA')),
    "a stranger's token": bearer(await signToken(stranger)),
    'a token for others': bearer(await signToken(key, { claims: { aud: 'other' } })),
    'a token of an unknown key': bearer(await signToken({ ...key, kid: 'two' })),
    'a token that was good': bearer(
      await signToken(key, { claims: { iat: seconds - 700, exp: seconds - 60 } }),
    ),
  }
  const token = await signToken(key)
  const probe = {
    name: 'GET /v1/users/{user}/grant',
    method: 'GET',
    path: '/v1/users/{user}/grant',
  } as const
  t.equal((await ask(probe, 'acme-alice', bearer(token))).statusCode, 200, 'a good token passes')
  const before = heard()
  for (const operation of operations) {
    for (const [what, headers] of Object.entries(bad)) {
      const response = await ask(operation, 'acme-alice', headers)
      t.equal(codeOf(operation, response), 'caller_unauthenticated', `${operation.name}: ${what}`)
      t.notMatch(response.body, /pgb_[a-z0-9]|acme|eyJ/, 'nothing of it comes back')
    }
  }
  t.equal(heard(), before, 'Pagero heard nothing')
  t.ok(endpoint.requests.length <= 2, 'and the issuer was not asked for each')
  t.match(await engine.ports.grants.find('acme-alice' as UserKey), {
    state: 'active',
    generation: 1,
  })
})

t.test('two Authorization headers are refused, each of them good', async (t) => {
  const { operations, internalApp, credentials, heard } = await setUp(t)
  await internalApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = internalApp.server.address() as AddressInfo
  const good = String(credentials['everything']?.authorization)
  const before = heard()
  for (const operation of operations) {
    const status = await new Promise((resolve, reject) => {
      const sent = requestHttp({
        port,
        method: operation.method,
        path: urlOf(operation, 'acme-alice'),
        headers: ['host', 'broker', 'authorization', good, 'authorization', good],
      })
      sent.on('response', (response) => {
        response.resume()
        resolve(response.statusCode)
      })
      sent.on('error', reject)
      sent.end()
    })
    t.equal(status, 400, operation.name)
  }
  t.equal(heard(), before)
})

t.test('a caller needs the one right of the operation, and no other will do', async (t) => {
  const { operations, ask, heard, credentials, engine } = await setUp(t)
  const before = heard()
  for (const operation of operations) {
    const { right } = rowOf(operation)
    for (const one of RIGHTS) {
      const index = RIGHTS.indexOf(one)
      const name = one === right ? `all-but-${index}` : `only-${index}`
      const response = await ask(operation, 'acme-alice', credentials[name] ?? {})
      t.equal(codeOf(operation, response), 'caller_forbidden', `${operation.name}: ${name}`)
    }
  }
  t.equal(heard(), before, 'Pagero heard nothing')
  t.match(await engine.ports.grants.find('acme-alice' as UserKey), {
    state: 'active',
    generation: 1,
  })
})

t.test(
  'a user that the caller may not see is answered as one that is not there, byte for byte',
  async (t) => {
    const { operations, ask, heard, credentials, engine } = await setUp(t)
    const headers = credentials['everything'] ?? {}
    const before = heard()
    for (const operation of operations) {
      const { list, absent: code = 'grant_not_found' } = rowOf(operation)
      if (list) {
        const response = await ask(operation, '', headers)
        t.equal(response.statusCode, 200, operation.name)
        t.notMatch(response.body, /bob/, `${operation.name} shows no user that may not be seen`)
        continue
      }
      const [there, absent] = [
        await ask(operation, 'bob', headers),
        await ask(operation, 'eve', headers),
      ]
      t.equal(codeOf(operation, there), code, operation.name)
      t.same(comparable(there), comparable(absent), operation.name)
    }
    t.equal(heard(), before, 'Pagero heard nothing')
    t.match(await engine.ports.grants.find('bob' as UserKey), { state: 'active', generation: 1 })
  },
)

t.test('with the right and the user, each operation that reads is answered', async (t) => {
  const { operations, ask, credentials } = await setUp(t)
  for (const operation of operations.filter(
    ({ method }) => method === 'GET' || method === 'HEAD',
  )) {
    const name = `only-${RIGHTS.indexOf(rowOf(operation).right)}`
    const response = await ask(operation, 'acme-alice', credentials[name] ?? {})
    t.equal(response.statusCode, 200, operation.name)
  }
})

t.test('a key opens nothing on the public listener', async (t) => {
  const { publicApp, credentials, heard } = await setUp(t)
  const headers = { ...credentials['everything'], 'x-csrf': '1' }
  const before = heard()
  for (const url of ['/auth/session', '/api/document/v1/documents']) {
    const response = await publicApp.inject({ url, headers })
    t.match(response.json(), { status: 401, code: 'session_required' }, url)
  }
  t.equal(heard(), before)
})
