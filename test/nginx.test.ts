// deploy/nginx/pagero-gateway.conf as it is, run by a real nginx before the broker and an API over TLS: what passes,
// for whom, and what the gateway makes of a refusal.

import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { createServer, request as send } from 'node:https'
import type { IncomingHttpHeaders } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { freePorts } from './support/free-ports.ts'
import { buildListeners, type InternalListener } from './support/internal-listener.ts'
import { hasNginx, type Nginx, replaced, startNginx } from './support/nginx.ts'

const CONFIGURATION = join(import.meta.dirname, '../deploy/nginx/pagero-gateway.conf')
const API_HOST = 'api.pageroonline.com'
const TEN_MB = 10 * 1024 * 1024

interface Received {
  line: string
  headers: IncomingHttpHeaders
  /** SHA-256 of the body. */
  digest: string
}

interface Answer {
  status: number
  headers: IncomingHttpHeaders
  body: Buffer
}

interface Gateway extends InternalListener {
  nginx: Nginx
  /** What the API was sent. */
  received: Received[]
  accessLog: () => string
  /** Sends a call with the client certificate of that name; undefined shows none. */
  call: (
    user: string | undefined,
    path: string,
    options?: { method?: string; headers?: Record<string, string>; body?: Buffer },
  ) => Promise<Answer>
}

function openssl(directory: string, line: string): void {
  execFileSync('openssl', line.split(' '), { cwd: directory, stdio: 'ignore' })
}

/** A CA, a certificate for the host of the API, one for the gateway, and one for each client. */
function makeCertificates(directory: string, clients: Readonly<Record<string, string>>): void {
  const key = '-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
  for (const ca of ['ca', 'stranger-ca']) {
    openssl(directory, `req -x509 ${key} -days 1 -subj /CN=${ca} -keyout ${ca}.pem -out ${ca}.crt`)
  }
  const issue = (name: string, subject: string, ca: string, alternative?: string) => {
    openssl(directory, `req ${key} -subj ${subject} -keyout ${name}.pem -out ${name}.csr`)
    const extensions = alternative === undefined ? '' : ` -extfile ${name}.ext`
    if (alternative !== undefined) {
      writeFileSync(join(directory, `${name}.ext`), `subjectAltName=DNS:${alternative}\n`)
    }
    openssl(
      directory,
      `x509 -req -in ${name}.csr -CA ${ca}.crt -CAkey ${ca}.pem -CAcreateserial -days 1 -out ${name}.crt${extensions}`,
    )
  }
  issue('api', `/CN=${API_HOST}`, 'ca', API_HOST)
  issue('api-of-stranger', `/CN=${API_HOST}`, 'stranger-ca', API_HOST)
  issue('gateway', '/CN=pagero.internal', 'ca', 'pagero.internal')
  for (const [name, subject] of Object.entries(clients)) issue(name, subject, 'ca')
}

const CLIENTS = {
  alice: '/O=Nordvik/CN=alice',
  nobody: '/CN=nobody',
  // A name within another part of the subject, and one with a comma in it.
  trick: '/CN=eve,CN=alice',
  unit: '/CN=eve/OU=CN=alice',
}

const certificates = t.testdir()
if (hasNginx) makeCertificates(certificates, CLIENTS)

async function setUp(t: Test, options: { apiCertificate?: string } = {}): Promise<Gateway> {
  const directory = t.testdir()
  const read = (name: string) => readFileSync(join(certificates, name))
  const logged = (name: string) => readFileSync(join(directory, name), 'utf8')
  const listeners = await buildListeners(t, {
    callers: {
      gateway: {
        rights: ['proxy:call'],
        users: ['alice', 'nobody', 'eve', 'mallory'],
        proxyAllow: ['GET /document/v1/**', 'GET /bytes', 'POST /file/v1/files'],
      },
    },
  })
  await listeners.scene.connect(listeners.engine, 'alice')
  await listeners.internalApp.listen({ host: '127.0.0.1', port: 0 })
  const broker = (listeners.internalApp.server.address() as AddressInfo).port

  const received: Received[] = []
  const certificate = options.apiCertificate ?? 'api'
  const api = createServer(
    { cert: read(`${certificate}.crt`), key: read(`${certificate}.pem`) },
    (request, response) => {
      const hash = createHash('sha256')
      request.on('data', (chunk: Buffer) => hash.update(chunk))
      request.on('end', () => {
        const { method, url = '', httpVersion, headers } = request
        const line = `${method} ${url} HTTP/${httpVersion}`
        received.push({ line, headers, digest: hash.digest('hex') })
        const [scheme, token = ''] = (headers.authorization ?? '').split(' ')
        void listeners.scene.lookAlike
          .isActive(scheme === 'Bearer' ? token : '')
          .then((account) => {
            response.writeHead(account === undefined ? 401 : 200, {
              'content-type': 'application/octet-stream',
              'set-cookie': ['pagero=1', 'pagero=2'],
              'access-control-allow-origin': '*',
              'access-control-allow-credentials': 'true',
              'x-accel-redirect': '/_broker/forward-auth',
              'www-authenticate': 'Bearer realm="pagero"',
              location: `https://${API_HOST}/file/v1/files/1`,
              etag: '"1"',
            })
            response.end(url === '/bytes' ? Buffer.alloc(TEN_MB, 'pagero') : account?.subject)
          })
      })
    },
  )
  api.listen(0, '127.0.0.1')
  await once(api, 'listening')
  t.teardown(() => {
    api.closeAllConnections()
    api.close()
  })

  const [port = 0] = await freePorts(1)
  const files = ['pagero-gateway.crt', 'pagero-gateway.pem', 'pagero-gateway-clients.crt']
  const sources = ['gateway.crt', 'gateway.pem', 'ca.crt']
  for (const [index, name] of files.entries()) {
    writeFileSync(join(directory, name), read(sources[index] ?? ''))
  }
  const { authorization = '' } = listeners.credentials['gateway'] ?? {}
  writeFileSync(
    join(directory, 'pagero-gateway.key'),
    `proxy_set_header Authorization "${authorization}";\n`,
  )
  const apiPort = (api.address() as AddressInfo).port
  const http = replaced(readFileSync(CONFIGURATION, 'utf8'), [
    ['server broker-1.internal:3001', `server 127.0.0.1:${broker}`],
    ['server broker-2.internal:3001', `server 127.0.0.1:${broker} backup`],
    [`server ${API_HOST}:443`, `server 127.0.0.1:${apiPort}`],
    ['listen 8443 ssl', `listen 127.0.0.1:${port} ssl`],
    ['/etc/ssl/certs/ca-certificates.crt', join(certificates, 'ca.crt')],
    ['/etc/nginx/', `${directory}/`],
    ['/var/log/nginx/', `${directory}/`],
  ])
  // Workers may have another user than the test.
  writeFileSync(join(directory, 'pagero-gateway.log'), '', { mode: 0o666 })
  const nginx = await startNginx(t, { http, port })

  return {
    ...listeners,
    nginx,
    received,
    accessLog: () => logged('pagero-gateway.log') + logged('pagero-gateway-error.log'),
    async call(user, path, { method = 'GET', headers = {}, body } = {}) {
      const request = send({
        host: '127.0.0.1',
        port,
        path,
        method,
        headers: { host: 'pagero.internal', ...headers },
        servername: 'pagero.internal',
        ca: read('ca.crt'),
        agent: false,
        ...(user === undefined ? {} : { cert: read(`${user}.crt`), key: read(`${user}.pem`) }),
      })
      request.end(body)
      const [response] = (await once(request, 'response')) as [import('node:http').IncomingMessage]
      const chunks: Buffer[] = []
      for await (const chunk of response) chunks.push(chunk as Buffer)
      return {
        status: response.statusCode ?? 0,
        headers: response.headers,
        body: Buffer.concat(chunks),
      }
    },
  }
}

function refused(t: Test, answer: Answer, status: number, code: string): void {
  t.equal(answer.status, status, code)
  t.equal(answer.headers['content-type'], 'application/problem+json', code)
  t.equal(answer.headers['cache-control'], 'no-store', code)
  t.match(JSON.parse(answer.body.toString()), { status, code, type: `/problems/${code}` }, code)
}

t.test('deploy/nginx', { skip: hasNginx ? false : 'nginx is not installed' }, (t) => {
  t.test(
    'the call goes on with the token of the user, and with nothing of the client',
    async (t) => {
      const { call, received, scene } = await setUp(t)
      const target = '/document/v1/documents?a=%2F&b=1//2'
      const answer = await call('alice', target, {
        headers: {
          authorization: 'Bearer of-the-client',
          cookie: 'a=b',
          'x-broker-user': 'mallory',
          'x-forwarded-user': 'mallory',
          'x-forwarded-for': '1.2.3.4',
          'x-original-uri': '/bytes',
          accept: 'application/json',
          'x-anything': '1',
        },
      })
      t.equal(answer.status, 200)
      t.equal(answer.body.toString(), 'alice')
      t.equal(received.length, 1)
      const { line, headers } = received[0] ?? { line: '', headers: {} }
      t.equal(line, `GET ${target} HTTP/1.1`)
      t.same(Object.keys(headers).toSorted(), ['accept', 'authorization', 'host'])
      t.equal(headers.host, API_HOST)
      t.equal(headers.accept, 'application/json')
      const token = headers.authorization?.replace('Bearer ', '') ?? ''
      t.match(await scene.lookAlike.isActive(token), { subject: 'alice' })

      t.strictSame(answer.headers['set-cookie'], undefined)
      for (const name of Object.keys(answer.headers)) {
        t.notMatch(name, /^(access-control-|x-accel-|www-authenticate|authorization)/)
      }
      t.equal(answer.headers.location, '/file/v1/files/1')
      t.equal(answer.headers.etag, '"1"')
      t.equal(answer.headers['cache-control'], 'private, no-store')
      t.equal(answer.headers['x-content-type-options'], 'nosniff')
    },
  )

  t.test('10 MB pass in either direction, without a temporary file', async (t) => {
    const { call, received, nginx, accessLog } = await setUp(t)
    const down = await call('alice', '/bytes')
    t.equal(down.status, 200)
    t.equal(down.body.length, TEN_MB)
    const body = randomBytes(TEN_MB)
    const up = await call('alice', '/file/v1/files', {
      method: 'POST',
      headers: { 'content-type': 'multipart/form-data; boundary=x' },
      body,
    })
    t.equal(up.status, 200)
    const { digest, headers } = received.at(-1) ?? { digest: '', headers: {} }
    t.equal(digest, createHash('sha256').update(body).digest('hex'))
    t.equal(headers['content-type'], 'multipart/form-data; boundary=x')
    t.notMatch((await nginx.logs()) + accessLog(), /buffered to a temporary file/)
  })

  t.test('nginx writes down neither the token nor the key', async (t) => {
    const { call, received, nginx, accessLog, credentials } = await setUp(t)
    await call('alice', '/document/v1/documents?q=secret')
    await call('alice', '/forbidden?q=secret')
    const token = received[0]?.headers.authorization?.replace('Bearer ', '') ?? ''
    t.ok(token.length > 20)
    const text = (await nginx.logs()) + accessLog()
    t.match(text, /user="alice" GET \/document\/v1\/documents 200/)
    t.match(text, /user="alice" GET \/forbidden 403/)
    t.notOk(text.includes(token.slice(0, 20)))
    t.notOk(text.includes(credentials['gateway']?.authorization.slice(7, 30) ?? 'pgb_'))
  })

  t.test('a refusal of the broker is a problem, and nothing reaches the API', async (t) => {
    const { call, received, internalApp } = await setUp(t)
    refused(t, await call('nobody', '/document/v1/documents'), 401, 'grant_not_found')
    refused(t, await call('alice', '/invoice/v1/invoices'), 403, 'caller_forbidden')
    refused(
      t,
      await call('alice', '/document/v1/documents', { method: 'DELETE' }),
      403,
      'caller_forbidden',
    )
    refused(t, await call('alice', '/document/v1/..%2fx'), 403, 'request_invalid')
    refused(t, await call('alice', '/document/v1//x'), 403, 'request_invalid')
    internalApp.server.closeAllConnections()
    await internalApp.close()
    const away = await call('alice', '/document/v1/documents')
    refused(t, away, 503, 'temporarily_unavailable')
    t.equal(away.headers['retry-after'], '2')
    t.same(received, [])
  })

  t.test('a 503 of the broker keeps its code and its Retry-After', async (t) => {
    const { call, scene, engine } = await setUp(t)
    const [grant] = await engine.ports.grants.list({
      state: undefined,
      expiresWithin: undefined,
      users: ['*'],
      after: undefined,
      limit: 1,
    })
    await scene.expire(grant?.user ?? ('' as never))
    scene.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 429, times: 9 })
    const away = await call('alice', '/document/v1/documents')
    refused(t, away, 503, 'temporarily_unavailable')
    t.match(away.headers['retry-after'], /^\d+$/)
  })

  t.test(
    'who has no certificate, or a name that only looks like a user, gets nowhere',
    async (t) => {
      const { call, received } = await setUp(t)
      const alice = { 'x-broker-user': 'alice', 'x-my-user': 'alice' }
      const none = await call(undefined, '/document/v1/documents', { headers: alice })
      t.equal(none.status, 400)
      const trick = await call('trick', '/document/v1/documents', { headers: alice })
      refused(t, trick, 403, 'request_invalid')
      const unit = await call('unit', '/document/v1/documents', { headers: alice })
      t.not(unit.status, 200)
      const direct = await call('alice', '/_broker/forward-auth')
      t.equal(direct.status, 404)
      t.equal(direct.headers['authorization'], undefined)
      t.same(received, [])
    },
  )

  t.test('an API whose certificate does not verify is sent nothing', async (t) => {
    const { call, received } = await setUp(t, { apiCertificate: 'api-of-stranger' })
    refused(t, await call('alice', '/document/v1/documents'), 502, 'upstream_unreachable')
    t.same(received, [])
  })
  t.end()
})
