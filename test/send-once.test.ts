// One post on one connection, against a server of raw bytes: what it sends, how it ends, and what it keeps of an answer
// that breaks off.

import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { type AddressInfo, createServer, type Socket } from 'node:net'
import { join } from 'node:path'
import { createServer as createTlsServer } from 'node:tls'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { resetSocket } from '../src/reset-socket.ts'
import { sendOnce } from '../src/send-once.ts'
import { readTokenAnswer } from '../src/token-answer.ts'
import { createUpstreamLookup } from '../src/upstream-address.ts'

const lookup = createUpstreamLookup({ allowPrivate: true })
const HEADERS = { 'content-type': 'application/x-www-form-urlencoded', authorization: 'Basic eA==' }
const BODY = 'grant_type=refresh_token&refresh_token=rt'

/** A server that hands each connection, once its request is whole, to the test. */
async function startServer(t: Test, answer: (socket: Socket) => void) {
  const requests: string[] = []
  const sockets: Socket[] = []
  const server = createServer((socket) => {
    sockets.push(socket)
    socket.on('error', () => undefined)
    let text = ''
    socket.on('data', (chunk) => {
      text += chunk.toString()
      if (!text.endsWith(BODY)) return
      requests.push(text)
      answer(socket)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  const { port } = server.address() as AddressInfo
  return { requests, sockets, port, url: `http://localhost:${port}/oauth/token?x=%2F` }
}

/** Posts, with a deadline that no test comes to unless it says so. */
function post(url: string, limits: { sendInMs?: number; deadlineInMs?: number } = {}) {
  const nowMs = systemClock.monotonicMs()
  return sendOnce(
    systemClock,
    { url, headers: HEADERS, body: BODY },
    {
      sendBeforeMs: nowMs + (limits.sendInMs ?? 30_000),
      deadlineMs: nowMs + (limits.deadlineInMs ?? 30_000),
    },
    lookup,
  )
}

const WHOLE = 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Odd: 1\r\nX-Odd: 2\r\n\r\nhello'

t.test('the request goes out as it was given, once, on a connection of its own', async (t) => {
  const server = await startServer(t, (socket) => socket.write(WHOLE))
  t.strictSame(await post(server.url), {
    kind: 'answered',
    status: 200,
    headers: { 'content-length': '5', 'x-odd': ['1', '2'] },
    body: 'hello',
  })
  const [text = ''] = server.requests
  t.ok(text.startsWith('POST /oauth/token?x=%2F HTTP/1.1\r\n'), text)
  t.match(text, /\r\nauthorization: Basic eA==\r\n/i)
  t.match(text, /\r\ncontent-type: application\/x-www-form-urlencoded\r\n/i)
  t.match(text, /\r\ncontent-length: 41\r\n/i)
  t.match(text, /\r\nconnection: close\r\n/i)
  t.ok(text.endsWith(`\r\n\r\n${BODY}`))
  await post(server.url)
  t.equal(server.sockets.length, 2)
})

t.test('whatever the status, the whole answer is told and nothing is followed', async (t) => {
  for (const [head, status] of [
    ['HTTP/1.1 302 Found\r\nLocation: /elsewhere', 302],
    ['HTTP/1.1 401 Unauthorized', 401],
    ['HTTP/1.1 503 Busy\r\nRetry-After: 0', 503],
  ] as const) {
    const server = await startServer(t, (socket) =>
      socket.write(`${head}\r\nContent-Length: 2\r\n\r\nno`),
    )
    t.match(await post(server.url), { kind: 'answered', status, body: 'no' })
    t.equal(server.requests.length, 1)
  }
})

t.test('a head in advance is no answer', async (t) => {
  const server = await startServer(t, (socket) =>
    socket.write(`HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n${WHOLE}`),
  )
  t.match(await post(server.url), { kind: 'answered', status: 200, body: 'hello' })
  const broken = await startServer(t, (socket) => socket.end('HTTP/1.1 103 Early Hints\r\n\r\n'))
  t.match(await post(broken.url), { kind: 'unknown', status: undefined, partialBody: /^$/ })
})

t.test('a body of many pieces and of any letters comes through', async (t) => {
  const text = 'ä€😀'.repeat(1_000)
  const bytes = Buffer.from(text)
  const server = await startServer(t, (socket) => {
    socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${bytes.length}\r\n\r\n`)
    socket.write(bytes.subarray(0, 4_001))
    setTimeout(() => socket.write(bytes.subarray(4_001)), 20)
  })
  t.match(await post(server.url), { kind: 'answered', body: text })
})

t.test('of a connection that breaks, what had come is kept', async (t) => {
  const cases: ReadonlyArray<readonly [sent: string, status: number | undefined, body: string]> = [
    ['', undefined, ''],
    ['HTTP/1.1 200 OK\r\nContent-Le', undefined, ''],
    ['HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n', 200, ''],
    [
      'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"refresh_token":"r"',
      200,
      '{"refresh_token":"r"',
    ],
    ['HTTP/1.1 502 Bad\r\nContent-Length: 100\r\n\r\nx', 502, 'x'],
  ]
  for (const [sent, status, partialBody] of cases) {
    const server = await startServer(t, (socket) => socket.end(sent))
    t.match(await post(server.url), { kind: 'unknown', status, partialBody })
    t.equal(server.requests.length, 1, 'and it is not sent again')
  }
  const server = await startServer(t, resetSocket)
  t.match(await post(server.url), { kind: 'unknown', reason: 'econnreset', partialBody: /^$/ })
})

t.test('an answer without a length that is cut off is no success without its token', async (t) => {
  const text = JSON.stringify({ access_token: 'at', refresh_token: 'rt', expires_in: 600 })
  const cutAt = async (length: number) => {
    const server = await startServer(t, (socket) =>
      socket.end(`HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n${text.slice(0, length)}`),
    )
    return readTokenAnswer(await post(server.url))
  }
  t.match(await cutAt(text.length), { kind: 'granted', tokens: { refreshToken: 'rt' } })
  t.match(await cutAt(text.indexOf(',"expires')), {
    kind: 'granted',
    tokens: { refreshToken: 'rt' },
  })
  t.match(await cutAt(text.indexOf('t","expires')), { kind: 'in_doubt', reason: 'unreadable' })
  t.match(await cutAt(text.indexOf(',"refresh')), { kind: 'in_doubt', reason: 'unreadable' })
})

t.test('an answer that is none is unknown, by a constant', async (t) => {
  const server = await startServer(t, (socket) => socket.end('SSH-2.0-OpenSSH\r\n\r\n'))
  const end = await post(server.url)
  t.match(end, { kind: 'unknown', status: undefined, partialBody: /^$/ })
  t.match((end as { reason: string }).reason, /^[a-z0-9_]{2,48}$/)
})

t.test('an answer beyond 256 KiB is cut off, and its beginning kept', async (t) => {
  const server = await startServer(t, (socket) => {
    socket.write('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')
    const chunk = `4000\r\n${'x'.repeat(0x4000)}\r\n`
    for (let i = 0; i < 64; i += 1) socket.write(chunk)
  })
  const end = await post(server.url)
  if (end.kind !== 'unknown') throw new Error(end.kind)
  t.match(end, { status: 200, reason: 'und_err_res_exceeded_max_size' })
  t.ok(end.partialBody.length > 0 && end.partialBody.length <= 262_144)
  const allowed = await startServer(t, (socket) =>
    socket.write(`HTTP/1.1 200 OK\r\nContent-Length: 262144\r\n\r\n${'x'.repeat(262_144)}`),
  )
  t.match(await post(allowed.url), { kind: 'answered', status: 200 })
})

t.test('a head beyond 16 KiB is refused', async (t) => {
  const server = await startServer(t, (socket) =>
    socket.write(`HTTP/1.1 200 OK\r\nX-Long: ${'x'.repeat(20_000)}\r\nContent-Length: 0\r\n\r\n`),
  )
  t.match(await post(server.url), {
    kind: 'unknown',
    reason: /headers_overflow/,
    status: undefined,
  })
})

t.test('what finds no server, or an address that must not be, was not sent', async (t) => {
  const server = await startServer(t, () => undefined)
  const { port } = server
  const refusing = createServer().listen(0, '127.0.0.1')
  await once(refusing, 'listening')
  const { port: gone } = refusing.address() as AddressInfo
  refusing.close()
  await once(refusing, 'close')
  t.match(await post(`http://127.0.0.1:${gone}/`), { kind: 'not_sent', reason: 'econnrefused' })
  const nowMs = systemClock.monotonicMs()
  const refused = await sendOnce(
    systemClock,
    { url: `http://stand-in:${port}/`, headers: {}, body: BODY },
    { sendBeforeMs: nowMs + 30_000, deadlineMs: nowMs + 30_000 },
    createUpstreamLookup({
      allowPrivate: false,
      resolve: (_name, _options, callback) => callback(null, [{ address: '127.0.0.1', family: 4 }]),
    }),
  )
  t.strictSame(refused, { kind: 'not_sent', reason: 'address_refused' })
  t.equal(server.sockets.length, 0)
})

t.test('an error without a code, or with an odd one, has a constant too', async (t) => {
  for (const [code, reason] of [
    [undefined, 'error'],
    [7, 'error'],
    ['host secret.example', 'error'],
    ['X', 'error'],
    ['E'.repeat(49), 'error'],
    ['-EX', 'error'],
    ['EX-', 'error'],
    ['E'.repeat(48), 'e'.repeat(48)],
    ['E_9', 'e_9'],
  ] as const) {
    const nowMs = systemClock.monotonicMs()
    const end = await sendOnce(
      systemClock,
      { url: 'http://stand-in/', headers: {}, body: BODY },
      { sendBeforeMs: nowMs + 30_000, deadlineMs: nowMs + 30_000 },
      (_name, _options, callback) =>
        callback(Object.assign(new Error('no'), { code }) as NodeJS.ErrnoException, ''),
    )
    t.strictSame(end, { kind: 'not_sent', reason }, String(code))
  }
})

/** The first is enough on a machine that has time; on a busy one a request may come to the server only after it. */
const DEADLINES_MS = [300, 2_000, 10_000]

// ── Limits ───────────────────────────────────────────────────────────────────────────────────────

t.test('after the last moment to send nothing is even connected', async (t) => {
  const server = await startServer(t, (socket) => socket.write(WHOLE))
  const late = { kind: 'not_sent', reason: 'send_deadline' }
  t.strictSame(await post(server.url, { sendInMs: 0 }), late)
  t.strictSame(await post(server.url, { sendInMs: -1 }), late)
  t.equal(server.sockets.length, 0)
})

t.test('a connection that comes too late is given up before the first byte', async (t) => {
  const server = await startServer(t, (socket) => socket.write(WHOLE))
  let bytes = 0
  // The process was paused between the connection and the request.
  const instants = [0, 0, 101]
  const clock = { monotonicMs: () => instants.shift() ?? 101 }
  const request = { url: server.url, headers: HEADERS, body: BODY }
  const end = await sendOnce(clock, request, { sendBeforeMs: 100, deadlineMs: 60_000 }, lookup)
  for (const socket of server.sockets) bytes += socket.bytesRead
  t.strictSame(end, { kind: 'not_sent', reason: 'send_deadline' })
  t.equal(bytes, 0)
  const inTime = { monotonicMs: () => 0 }
  t.match(await sendOnce(inTime, request, { sendBeforeMs: 100, deadlineMs: 60_000 }, lookup), {
    kind: 'answered',
  })
})

t.test('a request sent at the very last moment is sent', async (t) => {
  const server = await startServer(t, (socket) => socket.write(WHOLE))
  const instants = [0, 0, 100]
  const clock = { monotonicMs: () => instants.shift() ?? 100 }
  const request = { url: server.url, headers: HEADERS, body: BODY }
  const end = await sendOnce(clock, request, { sendBeforeMs: 100, deadlineMs: 60_000 }, lookup)
  t.match(end, { kind: 'answered' })
})

t.test('a name that is never resolved ends with the time to send', async (t) => {
  const nowMs = systemClock.monotonicMs()
  const end = await sendOnce(
    systemClock,
    { url: 'http://stand-in/', headers: {}, body: BODY },
    { sendBeforeMs: nowMs + 50, deadlineMs: nowMs + 60_000 },
    () => undefined,
  )
  t.match(end, { kind: 'not_sent', reason: 'und_err_connect_timeout' })
})

t.test('at the deadline the wait is over, and what came is kept', async (t) => {
  const server = await startServer(t, (socket) =>
    socket.write('HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"refresh'),
  )
  for (const deadlineInMs of DEADLINES_MS) {
    const startedAtMs = systemClock.monotonicMs()
    const end = await post(server.url, { deadlineInMs })
    if (end.kind === 'unknown' && end.status === undefined && deadlineInMs < 9_000) continue
    t.strictSame(end, {
      kind: 'unknown',
      reason: 'deadline',
      status: 200,
      partialBody: '{"refresh',
    })
    t.ok(systemClock.monotonicMs() - startedAtMs >= deadlineInMs - 1)
    break
  }
  const [socket] = server.sockets
  if (socket?.destroyed === false) await once(socket, 'close')
  t.pass('the connection is closed')
})

t.test(
  'an answer that waits when a paused process wakes behind its deadline is read',
  async (t) => {
    let deadlineMs = 0
    let isInTime = false
    const server = await startServer(t, (socket) => {
      isInTime = systemClock.monotonicMs() < deadlineMs
      socket.write(WHOLE)
      // Nothing in this process runs until both the timer is due and the answer is there.
      while (systemClock.monotonicMs() < deadlineMs + 20);
    })
    for (const deadlineInMs of DEADLINES_MS) {
      deadlineMs = systemClock.monotonicMs() + deadlineInMs
      const end = await post(server.url, { deadlineInMs })
      if (!isInTime && deadlineInMs < 9_000) continue
      t.match(end, { kind: 'answered', body: 'hello' })
      break
    }
  },
)

t.test('a call that has ended keeps no process alive', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((one) => one === 'Timeout').length
  const server = await startServer(t, (socket) => socket.write(WHOLE))
  const before = timers()
  await post(server.url)
  t.equal(timers(), before)
})

t.test('a deadline that is over already is one that is over now', async (t) => {
  const server = await startServer(t, () => undefined)
  t.match(await post(server.url, { deadlineInMs: -1_000 }), { reason: 'deadline' })
})

t.test('a certificate that nobody vouches for gets no request', async (t) => {
  const directory = t.testdir()
  const [key = '', cert = ''] = ['key.pem', 'cert.pem'].map((name) => join(directory, name))
  const curve = '-newkey ec -pkeyopt ec_paramgen_curve:P-256'
  execFileSync(
    'openssl',
    `req -x509 ${curve} -nodes -days 1 -subj /CN=localhost -keyout ${key} -out ${cert}`.split(' '),
    { stdio: 'ignore' },
  )
  let received = ''
  const server = createTlsServer({ key: readFileSync(key), cert: readFileSync(cert) }, (socket) => {
    socket.on('error', () => undefined)
    socket.on('data', (chunk) => (received += chunk.toString()))
  }).listen(0, '127.0.0.1')
  server.on('tlsClientError', () => undefined)
  await once(server, 'listening')
  t.teardown(() => server.close())
  const { port } = server.address() as AddressInfo
  t.strictSame(await post(`https://localhost:${port}/`), {
    kind: 'not_sent',
    reason: 'depth_zero_self_signed_cert',
  })
  t.equal(received, '')
})
