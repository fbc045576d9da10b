// Connections over raw sockets: what shuts down at once and what is still answered, bodies that do not arrive, and what
// may be written onto a socket behind an answer.

import { once } from 'node:events'
import { type AddressInfo, connect, type Socket } from 'node:net'
import { Readable } from 'node:stream'
import { mock } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import Type from 'typebox'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { BrokerError } from '../src/errors.ts'
import { type App, buildApp } from '../src/http/app.ts'
import { silentLog } from './support/silent-log.ts'
import { startProxy } from './support/proxy.ts'
import { answer, startUpstream } from './support/upstream.ts'

const HEAD = 'HTTP/1.1\r\nHost: broker.example\r\n'
const JSON_OF_1000 = 'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n'
const PIECES = 12
const PIECE = 'streamed'
const STREAMED = PIECE.repeat(PIECES)
const ANSWER_IDLE_TIMEOUT_MS = 30_000
/** More than the buffers of both sides hold. */
const LARGE_BYTES = 30_000_000

async function* stream(): AsyncGenerator<string> {
  for (let i = 0; i < PIECES; i += 1) {
    await delay(200)
    yield PIECE
  }
}

async function startApp(t: Test): Promise<{ app: App; port: number }> {
  const app = await buildApp(
    { clock: systemClock, log: silentLog },
    {
      listener: 'internal',
      trustedProxies: [],
      requestTimeoutMs: 900_000,
      answerIdleTimeoutMs: ANSWER_IDLE_TIMEOUT_MS,
      tls: false,
    },
    (app) => {
      app.get('/short', () => ({}))
      app.get('/stream', (_request, reply) => reply.send(Readable.from(stream())))
      app.get('/large', () => Buffer.alloc(LARGE_BYTES, 'x'))
      app.get('/late', async () => {
        await delay(500)
        return {}
      })
      app.post('/things', { schema: { body: Type.Object({}) } }, () => ({}))
      const refuse = async () => {
        throw new BrokerError('caller_unauthenticated', 'Who is it?')
      }
      app.post('/refused', { onRequest: refuse }, () => ({}))
    },
  )
  t.teardown(() => {
    app.server.closeAllConnections()
    return app.close()
  })
  await app.listen({ host: '127.0.0.1', port: 0 })
  return { app, port: (app.server.address() as AddressInfo).port }
}

interface Client {
  socket: Socket
  received(): string
  closed: Promise<void>
}

/** Sends bytes, and keeps what comes until the broker closes. */
async function send(t: Test, port: number, bytes: string): Promise<Client> {
  const socket = connect(port, '127.0.0.1')
  t.teardown(() => socket.destroy())
  let received = ''
  socket.on('data', (chunk) => (received += chunk.toString('latin1')))
  // The broker may reset a connection that it gives up.
  socket.on('error', () => undefined)
  const closed = new Promise<void>((resolve) => socket.on('close', () => resolve()))
  await once(socket, 'connect')
  if (bytes !== '') socket.write(bytes)
  return { socket, received: () => received, closed }
}

async function until(condition: () => boolean): Promise<void> {
  for (const end = performance.now() + 30_000; !condition(); await delay(5)) {
    if (performance.now() > end) throw new Error('it did not come to that')
  }
}

t.test('a shutdown waits for no connection on which there is nothing to answer', async (t) => {
  const { app, port } = await startApp(t)
  const idle = await send(t, port, `GET /short ${HEAD}\r\n`)
  const clients = [
    idle,
    await send(t, port, ''),
    await send(t, port, `GET /short ${HEAD}`),
    await send(t, port, `POST /things ${HEAD}${JSON_OF_1000}{`),
    await send(t, port, `GET /short ${HEAD}\r\nGET /sho`),
  ]
  await until(() => idle.received().includes('200 OK'))
  await delay(100)
  const askedMs = performance.now()
  await app.close()
  const tookMs = performance.now() - askedMs
  t.ok(tookMs < 2_500, `it takes ${Math.round(tookMs)} ms`)
  await Promise.all(clients.map(({ closed }) => closed))
})

t.test('a shutdown answers whole what has been asked, and then closes', async (t) => {
  const { app, port } = await startApp(t)
  const streaming = await send(t, port, `GET /stream ${HEAD}\r\n`)
  await until(() => streaming.received().includes(PIECE))
  const late = await send(t, port, `GET /late ${HEAD}\r\n`)
  await delay(50)
  const askedMs = performance.now()
  await app.close()
  const tookMs = performance.now() - askedMs
  t.ok(tookMs < 4_000, `it takes ${Math.round(tookMs)} ms`)
  await Promise.all([streaming.closed, late.closed])
  t.match(late.received(), /^HTTP\/1\.1 200 OK\r\n/)
  t.match(late.received(), /\r\nconnection: close\r\n/i, 'and says so where it still can')
  const body = streaming.received().split('\r\n\r\n').slice(1).join('')
  t.equal(body.replaceAll(/\r\n|^8$|^0$/gm, ''), STREAMED)
  t.ok(streaming.received().endsWith('0\r\n\r\n'))
})

t.test('a shutdown lets a proxied upload arrive', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    void call.body.then((body) => answer(call, 200, `${body.length} bytes`))
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const client = await send(t, proxy.port, `POST /api/files ${HEAD}Content-Length: 31\r\n\r\nx`)
  await until(() => upstream.calls.length === 1)
  const closing = proxy.close()
  for (let sent = 0; sent < 30; sent += 1) {
    client.socket.write('x')
    await delay(80)
  }
  await closing
  await client.closed
  t.match(client.received(), /^HTTP\/1\.1 200 [^]*31 bytes$/)
})

t.test('garbage behind a request never becomes a part of its answer', async (t) => {
  const { port } = await startApp(t)
  const begun = await send(t, port, `GET /stream ${HEAD}\r\n`)
  await until(() => begun.received().includes(PIECE))
  begun.socket.write('\0garbage\r\n\r\n')
  await begun.closed
  t.equal(begun.received().split('HTTP/1.1').length, 2, 'there is one head')
  t.ok(begun.received().endsWith('0\r\n\r\n'), 'and the answer is whole')

  for (const garbage of ['\0garbage\r\n\r\n', `CONNECT x:1 ${HEAD}\r\n`]) {
    const due = await send(t, port, `GET /late ${HEAD}\r\n${garbage}`)
    await due.closed
    t.match(due.received(), /^HTTP\/1\.1 200 [^]*\r\n\r\n\{\}$/, 'nor does it cost the answer')
  }

  const after = await send(t, port, `GET /short ${HEAD}\r\n`)
  await until(() => after.received().endsWith('{}'))
  after.socket.write('\0garbage\r\n\r\n')
  await after.closed
  t.match(after.received(), /^HTTP\/1\.1 200 [^]*\r\n\r\n\{\}HTTP\/1\.1 400 [^]*request_invalid/)
})

t.test(
  'a request that does not arrive in time is refused, a silent connection closed',
  async (t) => {
    const { app, port } = await startApp(t)
    const accepted: Socket[] = []
    app.server.on('connection', (socket) => accepted.push(socket))
    const silent = await send(t, port, '')
    const begun = await send(t, port, `GET /short ${HEAD}`)
    await until(() => (accepted[1]?.bytesRead ?? 0) > 0)
    // What Node's own check does after ten seconds.
    const error = Object.assign(new Error(), { code: 'ERR_HTTP_REQUEST_TIMEOUT' })
    for (const socket of accepted) app.server.emit('clientError', error, socket)
    await Promise.all([silent.closed, begun.closed])
    t.equal(silent.received(), '')
    t.match(begun.received(), /^HTTP\/1\.1 400 [^]*did not arrive in time/)
  },
)

t.test('a body that has not arrived after 30 seconds ends its connection', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    void call.body.then((body) => answer(call, 200, `${body.length} bytes`))
  })
  const limits = { headersTimeoutMs: 90_000, idleTimeoutMs: 90_000, totalTimeoutMs: 90_000 }
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits })
  const { port } = await startApp(t)
  mock.timers.enable({ apis: ['setTimeout'] })
  t.teardown(() => mock.timers.reset())
  const dripping = await send(t, port, `POST /things ${HEAD}${JSON_OF_1000}{`)
  const uploading = await send(t, proxy.port, `POST /api/a ${HEAD}Content-Length: 9\r\n\r\n1`)
  while (upstream.calls.length === 0) await new Promise(setImmediate)
  const isClosed = ({ socket }: Client) => socket.closed
  mock.timers.tick(29_000)
  dripping.socket.write('1')
  await new Promise((resolve) => setImmediate(resolve))
  t.notOk(isClosed(dripping))
  mock.timers.tick(1_000)
  await dripping.closed
  t.equal(dripping.received(), '')
  mock.timers.reset()
  uploading.socket.write('23456789')
  await until(() => uploading.received().endsWith('9 bytes'))
  t.match(uploading.received(), /^HTTP\/1\.1 200 /, 'a proxied one has limits of its own')
})

t.test('a body that comes after its answer is not read for longer than a moment', async (t) => {
  const { port } = await startApp(t)
  const proxy = await startProxy(t, {
    apiUrl: 'http://127.0.0.1:1',
    parts: {
      authorize: async () => {
        throw new BrokerError('session_required', 'Who is it?')
      },
    },
  })
  for (const [to, line, status, closes] of [
    [proxy.port, 'POST /api/files', 401, true],
    [port, 'POST /refused', 401, true],
    [port, 'POST /things', 413, true],
    [port, 'POST *', 400, true],
    // Answered as if it had none.
    [port, 'GET /short', 200, false],
  ] as const) {
    const client = await send(
      t,
      to,
      `${line} ${HEAD}Content-Type: application/json\r\nContent-Length: 4000000000\r\n\r\n`,
    )
    await until(() => client.received().includes('\r\n\r\n'))
    t.match(client.received(), `HTTP/1.1 ${status} `, line)
    t.equal(/\r\nconnection: close\r\n/i.test(client.received()), closes)
    const answeredMs = performance.now()
    const sending = setInterval(() => client.socket.write('x'), 10)
    await client.closed
    clearInterval(sending)
    const openMs = performance.now() - answeredMs
    t.ok(openMs > 500 && openMs < 3_000, `closed after ${Math.round(openMs)} ms`)
  }
})

t.test('an answer that nobody reads is given up, one that is waited for is not', async (t) => {
  const { app, port } = await startApp(t)
  t.equal(app.server.timeout, ANSWER_IDLE_TIMEOUT_MS)
  const accepted: Socket[] = []
  app.server.on('connection', (socket) => accepted.push(socket))
  const reader = await send(t, port, '')
  reader.socket.pause()
  reader.socket.write(`GET /large ${HEAD}\r\n`)
  await until(() => (accepted[0]?.bytesWritten ?? 0) > LARGE_BYTES)
  const waiting = await send(t, port, `GET /late ${HEAD}\r\n`)
  await until(() => (accepted[1]?.bytesRead ?? 0) > 0)
  // What Node's own timer does when nothing has moved for as long.
  for (const socket of accepted) app.server.emit('timeout', socket)
  t.strictSame(
    accepted.map(({ destroyed }) => destroyed),
    [true, false],
  )
  reader.socket.resume()
  await reader.closed
  t.ok(reader.received().length < LARGE_BYTES, 'and the client sees that it is not whole')
  await until(() => waiting.received().endsWith('{}'))
  app.server.emit('timeout', accepted[1])
  await waiting.closed
})

t.test('a listener has a limit of connections', async (t) => {
  const { app, port } = await startApp(t)
  t.equal(app.server.maxConnections, 10_000)
  app.server.maxConnections = 1
  const first = await send(t, port, `GET /short ${HEAD}\r\n`)
  const second = await send(t, port, `GET /short ${HEAD}\r\n`)
  await second.closed
  t.equal(second.received(), '')
  await until(() => first.received().endsWith('{}'))
})
