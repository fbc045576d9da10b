// Every error is a problem document: each code by a table, and what the parser, the router and the body reader refuse
// over a raw socket, byte by byte.

import { once } from 'node:events'
import { connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import Type from 'typebox'
import t, { type Test } from 'tap'
import { BrokerError, PROBLEM_CODES, type ProblemCode } from '../src/errors.ts'
import { type App, buildApp } from '../src/http/app.ts'
import { type Listener, PROBLEM_KINDS, problemDocument, statusOf } from '../src/http/problem.ts'
import type { Clock, Log } from '../src/ports.ts'

const REQUEST_ID = '5b0f6d3e-9d9c-4a62-8f0a-1c2d3e4f5a6b'

/** What each code is on the internal listener, and on the public one where it differs. */
const STATUSES: Readonly<Record<ProblemCode, number | { internal: number; public: number }>> = {
  session_required: 401,
  csrf_refused: 403,
  login_transaction_invalid: 400,
  authorization_denied: 403,
  authorization_failed: 502,
  account_mismatch: 409,
  caller_unauthenticated: 401,
  caller_forbidden: 403,
  grant_not_found: { internal: 404, public: 401 },
  confirmation_pending: 409,
  reauthentication_required: { internal: 409, public: 401 },
  temporarily_unavailable: 503,
  client_rejected_by_pagero: 503,
  rate_limited: 429,
  request_invalid: 400,
  method_not_allowed: 405,
  not_found: 404,
  payload_too_large: 413,
  unsupported_media_type: 415,
  uri_too_long: 414,
  headers_too_large: 431,
  upstream_refused: 401,
  upstream_unreachable: 502,
  upstream_timeout: 504,
  loop_detected: 508,
  integrity_failure: 500,
  internal_error: 500,
}

interface LoggedLine {
  event: string
  fields: unknown
}

function recordingLog(lines: LoggedLine[]): Log {
  const record = (event: string, fields: unknown) => void lines.push({ event, fields })
  return { trace: record, debug: record, info: record, warn: record, error: record }
}

const clock: Clock = {
  now: () => new Date(),
  monotonicMs: () => performance.now(),
  sleep: () => Promise.resolve(),
  random: () => 0.5,
}

async function startApp(
  t: Test,
  listener: Listener,
  lines: LoggedLine[] = [],
  tls = false,
): Promise<{ app: App; port: number }> {
  const app = await buildApp(
    { clock, log: recordingLog(lines) },
    { listener, trustedProxies: [], requestTimeoutMs: 30_000, answerIdleTimeoutMs: 30_000, tls },
    (app) => {
      app.get('/throw/:code', (request) => {
        const { code } = request.params as { code: string }
        if (code === 'unknown') throw new TypeError('connect ECONNREFUSED 10.1.2.3:5432')
        throw new BrokerError(code as ProblemCode, 'A sentence for a person.', {
          retryAfterSeconds: 1.2,
        })
      })
      app.post('/bodyless', () => ({}))
      app.post(
        '/things/:thing',
        { schema: { body: Type.Object({ a: Type.String() }, { additionalProperties: false }) } },
        () => ({}),
      )
    },
  )
  t.teardown(() => app.close())
  await app.listen({ port: 0, host: '127.0.0.1' })
  return { app, port: (app.server.address() as AddressInfo).port }
}

interface RawAnswer {
  status: number
  headers: Map<string, string>
  body: string
}

/** Sends bytes as they are and reads the first answer until the server closes or the body is whole. */
async function sendRaw(port: number, bytes: string): Promise<RawAnswer> {
  const socket = connect(port, '127.0.0.1')
  socket.setTimeout(5_000, () => socket.destroy(new Error('no answer')))
  await once(socket, 'connect')
  socket.write(bytes)
  let text = ''
  for await (const chunk of socket) {
    text += String(chunk)
    const answer = parseAnswer(text)
    if (answer !== undefined) {
      socket.destroy()
      return answer
    }
  }
  throw new Error(`the connection ended after ${JSON.stringify(text)}`)
}

function parseAnswer(text: string): RawAnswer | undefined {
  const headEnd = text.indexOf('\r\n\r\n')
  if (headEnd === -1) return undefined
  const [statusLine = '', ...lines] = text.slice(0, headEnd).split('\r\n')
  const headers = new Map(
    lines.map((line) => {
      const colon = line.indexOf(':')
      return [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()]
    }),
  )
  const rest = text.slice(headEnd + 4)
  const chunked = headers.get('transfer-encoding') === 'chunked'
  const length = Number(headers.get('content-length') ?? Number.NaN)
  if (chunked ? !rest.endsWith('0\r\n\r\n') : rest.length < length) return undefined
  const body = chunked ? rest.replaceAll(/(?:^|\r\n)[0-9a-f]+\r\n|\r\n$/g, '') : rest
  return { status: Number(statusLine.split(' ')[1]), headers, body }
}

t.test('every code has the status of the contract on either listener, and an explanation', (t) => {
  t.same(Object.keys(STATUSES).toSorted(), [...PROBLEM_CODES].toSorted(), 'no code is left out')
  for (const code of PROBLEM_CODES) {
    const expected = STATUSES[code]
    for (const listener of ['internal', 'public'] as const) {
      const status = typeof expected === 'number' ? expected : expected[listener]
      t.equal(statusOf(code, listener), status, `${code} on the ${listener} listener`)
    }
    const { title, meaning, remedy } = PROBLEM_KINDS[code]
    t.match(title, /^[A-Z].*[^.]$/, `${code} has a title without a full stop`)
    t.match(meaning, /^[A-Z].+\.$/, `${code} has a meaning`)
    t.match(remedy, /^[A-Z].+\.$/, `${code} has a remedy`)
  }
  t.end()
})

t.test(
  'a problem document has the members of RFC 9457 and the broker’s own, and no others',
  (t) => {
    const { document } = problemDocument(
      new BrokerError('reauthentication_required', 'Log in again.', {
        cause: 'rotation_lost',
        reconnectUrl: 'https://app.example/auth/login',
        attemptId: 'a1',
        retryAfterSeconds: 0.1,
        errors: [{ pointer: 'params/user', detail: 'is no key' }],
      }),
      { listener: 'internal', requestId: REQUEST_ID },
    )
    t.same(document, {
      type: '/problems/reauthentication_required',
      title: 'The user must log in again',
      status: 409,
      code: 'reauthentication_required',
      detail: 'Log in again.',
      instance: `urn:uuid:${REQUEST_ID}`,
      retry_after: 1,
      cause: 'rotation_lost',
      reconnect_url: 'https://app.example/auth/login',
      attempt_id: 'a1',
      errors: [{ pointer: 'params/user', detail: 'is no key' }],
    })
    t.end()
  },
)

t.test('what a route throws is answered as its problem, on either listener', async (t) => {
  for (const listener of ['internal', 'public'] as const) {
    const { app } = await startApp(t, listener)
    for (const code of PROBLEM_CODES) {
      const answer = await app.inject({
        url: `/throw/${code}`,
        headers: { 'x-request-id': REQUEST_ID },
      })
      t.equal(answer.statusCode, statusOf(code, listener), code)
      t.equal(answer.headers['content-type'], 'application/problem+json; charset=utf-8')
      t.equal(answer.headers['cache-control'], 'no-store')
      t.equal(answer.headers['retry-after'], '2', 'rounded up to whole seconds')
      t.equal(answer.json().instance, `urn:uuid:${REQUEST_ID}`)
      t.equal(answer.json().type, `/problems/${code}`)
      const challenge = listener === 'public' ? 'Session' : 'Bearer realm="pagero-token-broker"'
      const challenged = answer.statusCode === 401 && code !== 'upstream_refused'
      t.equal(
        answer.headers['www-authenticate'],
        challenged ? challenge : undefined,
        'a 401 of the broker’s own, and nothing else, carries a challenge',
      )
    }
  }
})

t.test(
  'an unforeseen error is a 500 that tells the caller nothing and the log something',
  async (t) => {
    const lines: LoggedLine[] = []
    const { app } = await startApp(t, 'internal', lines)
    const answer = await app.inject('/throw/unknown')
    t.equal(answer.statusCode, 500)
    t.equal(answer.json().code, 'internal_error')
    t.notMatch(answer.body, /ECONNREFUSED|10\.1\.2\.3|TypeError|at /)
    t.match(lines, [{ event: 'request_failed', fields: { error: TypeError } }])
  },
)

t.test('a request id is taken over only if it is a UUID', async (t) => {
  const { app } = await startApp(t, 'internal')
  for (const given of ['1', `${REQUEST_ID}\u00e9`, REQUEST_ID.toUpperCase(), `${REQUEST_ID},x`]) {
    const answer = await app.inject({ url: '/nowhere', headers: { 'x-request-id': given } })
    t.match(answer.json().instance, /^urn:uuid:[0-9a-f]{8}-[0-9a-f-]{27}$/)
    t.not(answer.json().instance, `urn:uuid:${given}`)
  }
})

const HOST = 'Host: broker.example\r\n'
const JSON_BODY = 'Content-Type: application/json\r\n'

/** Requests that something below the routes refuses. */
const REFUSED: ReadonlyArray<{ what: string; bytes: string; status: number; code: ProblemCode }> = [
  {
    what: 'an unknown path',
    bytes: `GET /nowhere HTTP/1.1\r\n${HOST}\r\n`,
    status: 404,
    code: 'not_found',
  },
  {
    what: 'a method that the path has not',
    bytes: `DELETE /throw/x HTTP/1.1\r\n${HOST}\r\n`,
    status: 405,
    code: 'method_not_allowed',
  },
  {
    what: 'TRACE',
    bytes: `TRACE /throw/x HTTP/1.1\r\n${HOST}\r\n`,
    status: 405,
    code: 'method_not_allowed',
  },
  {
    what: 'a method nobody knows',
    bytes: `BREW /throw/x HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'CONNECT',
    bytes: `CONNECT evil.example:443 HTTP/1.1\r\n${HOST}\r\n`,
    status: 405,
    code: 'method_not_allowed',
  },
  {
    what: 'an expectation that nobody knows',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Expect: miracles\r\nContent-Length: 2\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'chunks in HTTP/1.0',
    bytes: `POST /things/1 HTTP/1.0\r\n${HOST}${JSON_BODY}Transfer-Encoding: chunked\r\n\r\n9\r\n{"a":"b"}\r\n0\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a chunk without a length',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Transfer-Encoding: chunked\r\n\r\nx\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'an absolute-form target',
    bytes: `GET http://evil.example/throw/x HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'an asterisk-form target',
    bytes: `OPTIONS * HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a fragment in the target',
    bytes: `GET /throw/x#y HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'two Host headers',
    bytes: `GET /throw/x HTTP/1.1\r\n${HOST}${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'no Host header',
    bytes: 'GET /throw/x HTTP/1.1\r\n\r\n',
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'two Authorization headers',
    bytes: `GET /throw/x HTTP/1.1\r\n${HOST}Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a percent-escape that is cut off',
    bytes: `GET /throw/%e0%a4 HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a percent sign alone',
    bytes: `GET /throw/% HTTP/1.1\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'HTTP/0.9',
    bytes: `GET /throw/x HTTP/0.9\r\n${HOST}\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'the preface of HTTP/2',
    bytes: 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    status: 400,
    code: 'request_invalid',
  },
  { what: 'a line that is no HTTP', bytes: 'hello\r\n\r\n', status: 400, code: 'request_invalid' },
  {
    what: 'a space before the colon of a header',
    bytes: `GET /throw/x HTTP/1.1\r\n${HOST}X-A : b\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'length and chunks together',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a transfer coding other than chunked',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'headers over 16 KiB',
    bytes: `GET /throw/x HTTP/1.1\r\n${HOST}X-A: ${'a'.repeat(17_000)}\r\n\r\n`,
    status: 431,
    code: 'headers_too_large',
  },
  {
    what: 'a body over the limit, announced',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 65537\r\n\r\n`,
    status: 413,
    code: 'payload_too_large',
  },
  {
    what: 'a body over the limit, in chunks',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Transfer-Encoding: chunked\r\n\r\n10001\r\n${'a'.repeat(65_537)}\r\n0\r\n\r\n`,
    status: 413,
    code: 'payload_too_large',
  },
  {
    what: 'a body that is not JSON by type',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\na=b`,
    status: 415,
    code: 'unsupported_media_type',
  },
  {
    what: 'broken JSON',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 4\r\n\r\n{"a"`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'an empty body',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 0\r\n\r\n`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'an unknown member',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 17\r\n\r\n{"a":"b","c":"d"}`,
    status: 400,
    code: 'request_invalid',
  },
  {
    what: 'a member named __proto__',
    bytes: `POST /things/1 HTTP/1.1\r\n${HOST}${JSON_BODY}Content-Length: 24\r\n\r\n{"a":"b","__proto__":{}}`,
    status: 400,
    code: 'request_invalid',
  },
]

t.test('what no route ever sees is refused with a problem document', async (t) => {
  for (const listener of ['internal', 'public'] as const) {
    const { port } = await startApp(t, listener)
    for (const { what, bytes, status, code } of REFUSED) {
      const answer = await sendRaw(port, bytes)
      t.equal(answer.status, status, `${what}: ${status}`)
      t.not(answer.body, '', `${what} is answered with a body`)
      const document = JSON.parse(answer.body || '{}') as Record<string, unknown>
      t.equal(answer.headers.get('content-type'), 'application/problem+json; charset=utf-8', what)
      t.equal(answer.headers.get('cache-control'), 'no-store', what)
      t.match(
        document,
        { type: `/problems/${code}`, code, status, title: String, detail: String },
        what,
      )
      t.equal(answer.headers.has('allow'), status === 405, 'Allow goes with 405 and nothing else')
    }
  }
})

t.test('a refusal carries the security headers of every other answer', async (t) => {
  const { port } = await startApp(t, 'public', [], true)
  const { headers: usual } = await sendRaw(port, `GET /nowhere HTTP/1.1\r\n${HOST}\r\n`)
  t.match(usual.get('strict-transport-security'), /^max-age=\d+$/)
  for (const { what, bytes } of REFUSED) {
    const { headers } = await sendRaw(port, bytes)
    for (const name of [
      'strict-transport-security',
      'content-security-policy',
      'x-content-type-options',
      'referrer-policy',
      'cross-origin-resource-policy',
      'cross-origin-opener-policy',
    ]) {
      t.equal(headers.get(name), usual.get(name), `${what}: ${name}`)
    }
  }
})

t.test('a route that takes no body takes none of any type', async (t) => {
  const { port } = await startApp(t, 'internal')
  for (const type of ['application/json', 'text/plain', 'application/x-www-form-urlencoded', 'x']) {
    for (const length of ['', 'Content-Length: 0\r\n']) {
      const bytes = `POST /bodyless HTTP/1.1\r\n${HOST}Content-Type: ${type}\r\n${length}\r\n`
      t.equal((await sendRaw(port, bytes)).status, 200, `${type}, ${length}`)
    }
  }
})

t.test('405 names the methods that the path has', async (t) => {
  const { app } = await startApp(t, 'internal')
  const answer = await app.inject({ method: 'PUT', url: '/throw/x' })
  t.equal(answer.headers.allow, 'GET, HEAD')
  t.equal((await app.inject({ method: 'GET', url: '/things/1' })).headers.allow, 'POST')
})

t.test('a path parameter longer than any key is refused, not matched in part', async (t) => {
  const { app } = await startApp(t, 'internal')
  const answer = await app.inject(`/throw/${'a'.repeat(1_025)}`)
  t.equal(answer.statusCode, 400)
  t.equal(answer.json().code, 'request_invalid')
})

t.test('a refused request leaves the server able to answer the next', async (t) => {
  const { app, port } = await startApp(t, 'internal')
  for (const { bytes } of REFUSED) await sendRaw(port, bytes)
  const answer = await app.inject('/throw/not_found')
  t.equal(answer.statusCode, 404)
})
