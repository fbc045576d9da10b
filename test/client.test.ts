// The client as an integrator gets it: packed, unpacked into another folder, imported by name; against a real broker with
// the look-alike behind it, and against a server that answers as the test says.

import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import { parse } from 'yaml'
import serviceManifest from '../package.json' with { type: 'json' }
import type * as Client from '../src/client/index.ts'
import manifest from '../src/client/package.json' with { type: 'json' }
import { PROBLEM_CODES } from '../src/errors.ts'
import { buildListeners, type InternalListener } from './support/internal-listener.ts'
import { ROOT } from './support/program.ts'

const run = promisify(execFile)

const folder = t.testdir()
const installed = join(folder, 'node_modules', manifest.name)
await pack()
const {
  BrokerProblemError,
  BrokerUnreachableError,
  createBrokerClient,
  isProblem,
  PROBLEM_CODES: codes,
} = (await import(pathToFileURL(join(installed, 'index.js')).href)) as typeof Client

/** Packs the client, as a release would, and unpacks it where `npm install` would put it. */
async function pack(): Promise<void> {
  mkdirSync(installed, { recursive: true })
  writeFileSync(join(folder, 'package.json'), '{ "type": "module" }')
  // Without what the test runner puts into the environment of every Node, which the compiler does not stand.
  const npm = ['npm', 'run', 'client', '--', '--pack-destination', folder]
  const command = ['-u', 'NODE_OPTIONS', ...npm]
  await run('env', command, { cwd: ROOT })
  const tarball = join(folder, `${manifest.name}-${manifest.version}.tgz`)
  await run('tar', ['-xzf', tarball, '-C', installed, '--strip-components=1'])
}

interface RealBroker extends InternalListener {
  client: Client.BrokerClient
  url: string
}

async function startReal(
  t: Test,
  options: Partial<Client.BrokerClientOptions> = {},
): Promise<RealBroker> {
  const listeners = await buildListeners(t, {
    callers: {
      app: {
        rights: ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'],
        users: ['*'],
      },
    },
  })
  const url = await listeners.internalApp.listen({ host: '127.0.0.1', port: 0 })
  const apiKey = listeners.credentials['app']?.authorization.replace('Bearer ', '') ?? ''
  const client = createBrokerClient({ url, apiKey, apiUrl: listeners.api.origin, ...options })
  return { ...listeners, client, url }
}

interface Scripted {
  url: string
  requests: Array<{ method: string; url: string; authorization: string; body: string }>
}

/** A server that answers each request with the next of the answers, and then with the last one. */
async function startScripted(
  t: Test,
  answers: ReadonlyArray<(request: IncomingMessage, response: ServerResponse) => unknown>,
): Promise<Scripted> {
  const requests: Scripted['requests'] = []
  const server = createServer((request, response) => {
    let body = ''
    request.on('data', (chunk: Buffer) => (body += chunk.toString()))
    request.on('end', () => {
      const { method = '', url = '', headers } = request
      const answer = answers[Math.min(requests.length, answers.length - 1)]
      requests.push({ method, url, authorization: headers.authorization ?? '', body })
      answer?.(request, response)
    })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, requests }
}

function json(status: number, body: object, headers: Record<string, string> = {}) {
  return (_request: IncomingMessage, response: ServerResponse) => {
    const type = status < 400 ? 'application/json' : 'application/problem+json'
    response.writeHead(status, { 'content-type': type, ...headers }).end(JSON.stringify(body))
  }
}

function token(name: string, seconds = 600): Client.AccessToken {
  return {
    access_token: name,
    token_type: 'Bearer',
    expires_in: seconds,
    expires_at: new Date(Date.now() + seconds * 1000).toISOString(),
    scope: '',
    fingerprint: createHash('sha256').update(name).digest('base64url'),
  }
}

function problem(code: string, status: number): object {
  const instance = 'urn:uuid:0b7c1a52-6f0e-4f86-9a3e-7d5a3b1c2d4e'
  return { type: `/problems/${code}`, title: code, status, code, detail: code, instance }
}

/** What the message of such a problem begins with. */
function hasCode(code: Client.ProblemCode): { name: string; message: RegExp } {
  return { name: 'BrokerProblemError', message: new RegExp(`^${code}: `) }
}

t.test('it brings nothing else with it, and has the version of the service', (t) => {
  const packed = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8')) as object
  t.same(
    Object.keys(packed).filter((name) => /dependencies/i.test(name)),
    [],
  )
  t.match(packed, { version: serviceManifest.version, license: serviceManifest.license })
  t.same(
    readdirSync(installed).filter((name) => !/\.(?:js|d\.ts)$/.test(name)),
    ['LICENSE', 'package.json'],
  )
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8')
  t.ok(readme.includes(`\`${manifest.name}-${manifest.version}.tgz\``))
  t.end()
})

t.test('plain JavaScript imports it by name and is served', async (t) => {
  const { scene, engine, url, credentials } = await startReal(t)
  await scene.connect(engine, 'alice')
  const program = `
    import { createBrokerClient, isProblem } from 'pagero-token-broker-client'
    const client = createBrokerClient({ url: process.env.URL, apiKey: process.env.KEY })
    const { access_token } = await client.accessToken('alice', { minTtlSeconds: 60 })
    const code = await client.accessToken('nobody').catch((error) => isProblem(error, 'grant_not_found'))
    console.log(JSON.stringify({ access_token, code }))
  `
  writeFileSync(join(folder, 'plain.js'), program)
  const key = credentials['app']?.authorization.replace('Bearer ', '') ?? ''
  const env = { URL: url, KEY: key }
  const { stdout } = await run(process.execPath, ['plain.js'], { cwd: folder, env })
  const said = JSON.parse(stdout) as { access_token: string; code: boolean }
  t.match(await scene.lookAlike.isActive(said.access_token), { subject: 'alice' })
  t.equal(said.code, true)
})

t.test(
  'TypeScript sees its types without those of Node, and problems narrow by code',
  async (t) => {
    const program = `
    import { type AccessToken, BrokerProblemError, createBrokerClient, isProblem } from 'pagero-token-broker-client'
    const client = createBrokerClient({ url: 'http://localhost:3001', apiKey: async () => 'key' })
    export async function use(): Promise<string> {
      try {
        const token: AccessToken = await client.accessToken('alice', { signal: AbortSignal.timeout(1) })
        for await (const grant of client.grants({ state: 'active' })) grant.pagero.subject?.length
        return token.access_token
      } catch (error) {
        if (isProblem(error, 'reauthentication_required')) return error.problem.reconnect_url ?? ''
        if (error instanceof BrokerProblemError) {
          switch (error.problem.code) {
            case 'temporarily_unavailable': return String(error.problem.retry_after)
            // @ts-expect-error: there is no such code
            case 'no_such_code': return ''
            default: return error.problem.detail
          }
        }
        // @ts-expect-error: min_ttl is spelled otherwise
        await client.accessToken('alice', { min_ttl: 1 })
        throw error
      }
    }
  `
    mkdirSync(join(folder, 'typed'), { recursive: true })
    writeFileSync(join(folder, 'typed/use.ts'), program)
    const compilerOptions = {
      strict: true,
      exactOptionalPropertyTypes: true,
      module: 'nodenext',
      target: 'es2022',
      lib: ['es2022', 'dom', 'dom.iterable', 'dom.asynciterable'],
      types: [],
      noEmit: true,
    }
    writeFileSync(join(folder, 'typed/tsconfig.json'), JSON.stringify({ compilerOptions }))
    const tsc = join(ROOT, 'node_modules/typescript/bin/tsc')
    const complaints = await run(process.execPath, [tsc, '--project', join(folder, 'typed')]).then(
      () => '',
      (error: unknown) => (error as { stdout: string }).stdout,
    )
    t.equal(complaints, '')
  },
)

t.test(
  'its types have the members of the OpenAPI document, and its codes are those of the broker',
  (t) => {
    t.same(codes, PROBLEM_CODES)
    interface Schema {
      properties: Record<string, unknown>
    }
    const document = parse(readFileSync(join(ROOT, 'openapi.yaml'), 'utf8')) as {
      components: { schemas: Record<string, Schema> }
    }
    const declared = readFileSync(join(installed, 'shapes.d.ts'), 'utf8')
    for (const name of ['AccessToken', 'Grant', 'RefreshAttempt', 'ConnectLink']) {
      const schema = document.components.schemas[name]
      // An operation that the broker does not have yet has no schema to differ from.
      if (schema === undefined && name === 'ConnectLink') continue
      const [, body = ''] = new RegExp(`interface ${name} {\\n([^]*?)^}`, 'm').exec(declared) ?? []
      const members = [...body.matchAll(/^ {4}(\w+)\??:/gm)].map((match) => match[1] ?? '')
      t.same(members.toSorted(), Object.keys(schema?.properties ?? {}).toSorted(), name)
    }
    t.end()
  },
)

t.test(
  'fifty questions at once are one call, and the answer is kept for a short time only',
  async (t) => {
    const server = await startScripted(t, [json(200, token('one')), json(200, token('two'))])
    const client = createBrokerClient({ url: `${server.url}/`, apiKey: 'key', cacheSeconds: 0.2 })
    const tokens = await Promise.all(Array.from({ length: 50 }, () => client.accessToken('alice')))
    t.same([...new Set(tokens.map((one) => one.access_token))], ['one'])
    await client.accessToken('alice')
    t.equal(server.requests.length, 1)
    t.match(server.requests[0], {
      url: '/v1/users/alice/access-token',
      authorization: 'Bearer key',
    })
    const untilMs = performance.now() + 10_000
    while (server.requests.length < 2 && performance.now() < untilMs)
      await client.accessToken('alice')
    t.equal((await client.accessToken('alice', { minTtlSeconds: 1 })).access_token, 'two')
  },
)

t.test('a kept token is not given out for more life than it has left, with a margin', async (t) => {
  const answers = [json(200, token('one', 100)), json(200, token('two', 600))]
  const server = await startScripted(t, answers)
  const client = createBrokerClient({ url: server.url, apiKey: 'key', cacheSeconds: 1_000 })
  await client.accessToken('alice')
  t.equal((await client.accessToken('alice', { minTtlSeconds: 80 })).access_token, 'one')
  t.equal((await client.accessToken('alice', { minTtlSeconds: 95 })).access_token, 'two')
  t.equal(server.requests[1]?.url, '/v1/users/alice/access-token?min_ttl=95')
  const short = await startScripted(t, [json(200, token('short', 9))])
  const careful = createBrokerClient({ url: short.url, apiKey: 'key', cacheSeconds: 1_000 })
  await careful.accessToken('alice')
  await careful.accessToken('alice')
  t.equal(short.requests.length, 2, 'within the margin nothing is kept')
})

t.test('Retry-After is waited for, and not beyond the time that there is', async (t) => {
  const unavailable = problem('temporarily_unavailable', 503)
  const soon = await startScripted(t, [
    json(503, unavailable, { 'retry-after': '1' }),
    json(200, token('one')),
  ])
  const client = createBrokerClient({ url: soon.url, apiKey: 'key' })
  const startedMs = performance.now()
  t.equal((await client.accessToken('alice')).access_token, 'one')
  t.ok(performance.now() - startedMs >= 990)
  const late = await startScripted(t, [json(503, unavailable, { 'retry-after': '3600' })])
  const impatient = createBrokerClient({ url: late.url, apiKey: 'key', timeoutMs: 5_000 })
  await t.rejects(impatient.accessToken('alice'), hasCode('temporarily_unavailable'))
  t.equal(late.requests.length, 1)
  const never = await startScripted(t, [json(503, unavailable, { 'retry-after': '0' })])
  const patient = createBrokerClient({ url: never.url, apiKey: 'key' })
  await t.rejects(patient.accessToken('alice'), hasCode('temporarily_unavailable'))
  t.equal(never.requests.length, 3, 'three attempts at most')
  await t.rejects(patient.disconnect('alice'), hasCode('temporarily_unavailable'))
  t.equal(never.requests.length, 4, 'what must not be repeated is not')
  const dead = await startScripted(t, [json(409, problem('reauthentication_required', 409))])
  const asking = createBrokerClient({ url: dead.url, apiKey: 'key' })
  const error = await asking.accessToken('alice').catch((failure: unknown) => failure)
  t.ok(error instanceof BrokerProblemError && isProblem(error, 'reauthentication_required'))
  t.equal(dead.requests.length, 1)
})

t.test(
  'silence, a broken connection and the answer of a stranger are told apart from problems',
  async (t) => {
    const silent = await startScripted(t, [() => undefined])
    const client = createBrokerClient({ url: silent.url, apiKey: 'key', timeoutMs: 100 })
    const timedOut = await client.accessToken('alice').catch((error: unknown) => error)
    t.ok(timedOut instanceof BrokerUnreachableError)
    t.match(timedOut, { message: /100 ms/ })

    const broken = await startScripted(t, [
      (request) => request.socket.destroy(),
      json(200, token('one')),
    ])
    const again = createBrokerClient({ url: broken.url, apiKey: 'key' })
    t.equal((await again.accessToken('alice')).access_token, 'one', 'a reset is tried again')

    const stranger = await startScripted(t, [
      (_request, response) => response.writeHead(404, { 'content-type': 'text/html' }).end('<p>'),
    ])
    const lost = createBrokerClient({ url: stranger.url, apiKey: 'key' })
    const error = await lost.accessToken('alice').catch((failure: unknown) => failure)
    t.ok(error instanceof BrokerUnreachableError)
    t.match(error, { status: 404 })
    t.equal(stranger.requests.length, 1)
  },
)

t.test('a signal ends the wait of its caller, and of no other', async (t) => {
  let answer: (() => unknown) | undefined
  const server = await startScripted(t, [
    (request, response) => (answer = () => json(200, token('one'))(request, response)),
  ])
  const client = createBrokerClient({ url: server.url, apiKey: 'key' })
  const leaving = new AbortController()
  const staying = client.accessToken('alice')
  const left = client.accessToken('alice', { signal: leaving.signal })
  while (answer === undefined) await new Promise((resolve) => setTimeout(resolve, 5))
  leaving.abort(new Error('no longer wanted'))
  await t.rejects(left, { message: 'no longer wanted' })
  answer()
  t.equal((await staying).access_token, 'one')
  t.equal(server.requests.length, 1)
  await t.rejects(client.accessToken('bob', { signal: leaving.signal }), /no longer wanted/)
})

t.test(
  'after a 401 the token is reported once and the call repeated with the newer one',
  async (t) => {
    const { client, scene, engine, api } = await startReal(t)
    await scene.connect(engine, 'alice')
    const { access_token: first } = await client.accessToken('alice')
    await scene.lookAlike.rejectAccessToken(first)
    const answers = await Promise.all([
      client.fetch('alice', '/document/v1/documents?limit=1'),
      client.fetch('alice', new URL('/document/v1/documents?limit=2', api.origin)),
    ])
    t.same(
      answers.map(({ status }) => status),
      [200, 200],
    )
    t.not((await client.accessToken('alice')).access_token, first)
    t.equal(scene.refreshes().length, 1)
  },
)

t.test('a body that cannot be sent again is sent once', async (t) => {
  const api = await startScripted(t, [json(401, {}), json(200, {})])
  const broker = await startScripted(t, [json(200, token('one')), json(200, token('two'))])
  const options = { apiKey: 'key', cacheSeconds: 0, apiUrl: api.url }
  const client = createBrokerClient({ url: broker.url, ...options })
  const stream = new Blob(['body']).stream()
  const init = { method: 'POST', body: stream, duplex: 'half' } as RequestInit
  t.equal((await client.fetch('alice', '/file/v1/files', init)).status, 401)
  t.equal(api.requests.length, 1)
  t.same(
    broker.requests.map(({ method }) => method),
    ['GET', 'POST'],
    'it is reported all the same',
  )
  t.same(JSON.parse(broker.requests[1]?.body ?? ''), { rejected: token('one').fingerprint })

  const second = await startScripted(t, [json(401, {}), json(200, {})])
  const other = await startScripted(t, [json(200, token('one')), json(200, token('two'))])
  const replaying = createBrokerClient({ url: other.url, ...options, apiUrl: second.url })
  const text = { method: 'POST', body: 'body' }
  t.equal((await replaying.fetch('alice', '/file/v1/files', text)).status, 200)
  t.same(
    second.requests.map(({ authorization, body }) => [authorization, body]),
    [
      ['Bearer one', 'body'],
      ['Bearer two', 'body'],
    ],
  )

  const third = await startScripted(t, [json(401, {})])
  const same = await startScripted(t, [json(200, token('one'))])
  const stuck = createBrokerClient({ url: same.url, ...options, apiUrl: third.url })
  t.equal((await stuck.fetch('alice', '/x')).status, 401)
  t.equal(third.requests.length, 1, 'with the same token it would be refused again')
})

t.test('a token goes to the API alone', async (t) => {
  const server = await startScripted(t, [json(200, token('one'))])
  const client = createBrokerClient({ url: server.url, apiKey: 'key' })
  for (const url of [
    'https://api.pageroonline.com.example/x',
    'http://api.pageroonline.com/x',
    '//x/y',
  ]) {
    await t.rejects(client.fetch('alice', url), TypeError, url)
  }
  t.equal(server.requests.length, 0)
  for (const user of ['', '.', '..']) await t.rejects(client.accessToken(user), TypeError, user)
})

t.test(
  'a call through the broker is answered by Pagero, or is a problem of the broker',
  async (t) => {
    const { client, scene, engine, api } = await startReal(t)
    await scene.connect(engine, 'alice')
    const response = await client.proxy('alice', '/document/v1/documents?limit=1')
    t.equal(response.status, 200)
    t.equal(api.record.at(-1)?.rawTarget, '/document/v1/documents?limit=1')
    t.equal((await client.proxy('alice', '/document/v1/nothing')).status, 404, "Pagero's own 404")
    await t.rejects(client.proxy('nobody', '/document/v1/documents'), hasCode('grant_not_found'))
    const calls = api.record.length
    for (const path of ['document', '/../grant', '/a/%2e%2e/b', '/a b', '/a#b']) {
      await t.rejects(client.proxy('alice', path), TypeError, path)
    }
    t.equal(api.record.length, calls)
  },
)

t.test('grants are looked at, listed, taken over and ended', async (t) => {
  const { client, scene, engine } = await startReal(t)
  for (const user of ['alice', 'bob', 'carol']) await scene.connect(engine, user)
  t.match(await client.grant('alice'), { user: 'alice', state: 'active', generation: 1 })
  const users: string[] = []
  for await (const { user } of client.grants({ state: 'active', pageSize: 2 })) users.push(user)
  t.same(users, ['alice', 'bob', 'carol'])
  const { refreshToken } = await scene.lookAlike.issueLogin('dora')
  const imported = await client.importGrant('acme-1', { refreshToken, obtainedAt: new Date() })
  t.match(imported, { user: 'acme-1', state: 'active' })
  const ledger: string[] = []
  const { access_token: first } = await client.accessToken('alice')
  t.not((await client.replaceAccessToken('alice', first)).access_token, first)
  for await (const { cause } of client.refreshAttempts('alice')) ledger.push(cause)
  t.same(ledger, ['rejected'])
  await client.endSessions('alice')
  await client.disconnect('alice')
  await t.rejects(client.accessToken('alice'), hasCode('grant_not_found'))
})
