// Bodies through the forwarder: byte for byte, as they come, at the pace of the slower side, and without a limit but the set one.

import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import {
  createServer,
  type IncomingMessage,
  request as httpRequest,
  type RequestListener,
} from 'node:http'
import { type AddressInfo, connect } from 'node:net'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { resetSocket } from '../src/reset-socket.ts'
import { PSEUDONYM, requestText, sendRaw, startProxy } from './support/proxy.ts'
import { answer, startUpstream } from './support/upstream.ts'

const MIB = 1_048_576

/** An upstream that streams; the one on a bare socket keeps what it gets. */
async function startHttpUpstream(
  t: { teardown(fn: () => unknown): void },
  listener: RequestListener,
): Promise<string> {
  const server = createServer(listener).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

async function until(condition: () => boolean, withinMs = 2_000): Promise<boolean> {
  for (const end = performance.now() + withinMs; performance.now() < end; await sleep(5)) {
    if (condition()) return true
  }
  return condition()
}

/** A chunk and how often it is sent make the body; nothing of its size is ever in memory. 1 GiB in the long form. */
const CHUNK = randomBytes(MIB)
const TIMES = process.env['SOAK'] === '1' ? 1024 : 200
/** A busy machine takes minutes for what a quiet one does in seconds. */
const UNHURRIED = { idleTimeoutMs: 60_000, totalTimeoutMs: 900_000 }
const DIGEST = digestOf(Readable.from(repeat()))

function* repeat(): Generator<Buffer> {
  for (let i = 0; i < TIMES; i += 1) yield CHUNK
}

async function digestOf(stream: AsyncIterable<Buffer>): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of stream) hash.update(chunk)
  return hash.digest('hex')
}

/** Runs something and returns how far the resident memory rose meanwhile, in bytes. */
async function memoryGrowth(run: () => Promise<void>): Promise<number> {
  const before = process.memoryUsage().rss
  let highest = before
  const timer = setInterval(() => {
    highest = Math.max(highest, process.memoryUsage().rss)
  }, 5)
  await run()
  clearInterval(timer)
  return highest - before
}

t.test(`${TIMES} MiB go down and up unchanged, in flat memory`, async (t) => {
  const digests: string[] = []
  const apiUrl = await startHttpUpstream(t, (request, response) => {
    if (request.method === 'GET') {
      Readable.from(repeat()).pipe(response)
      return
    }
    const finish = async () => {
      digests.push(await digestOf(request))
      response.end()
    }
    void finish()
  })
  const proxy = await startProxy(t, { apiUrl, limits: UNHURRIED })
  const download = async () => {
    const outgoing = httpRequest(`${proxy.url}/api/file`).end()
    const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
    t.equal(await digestOf(incoming), await DIGEST)
  }
  const upload = async (headers: Record<string, string>) => {
    const outgoing = httpRequest(`${proxy.url}/api/files`, { method: 'POST', headers })
    Readable.from(repeat()).pipe(outgoing)
    const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
    t.equal(incoming.statusCode, 200)
    incoming.resume()
    t.equal(digests.pop(), await DIGEST)
  }
  // Once before measuring, so that pools and code are warm.
  await download()
  const growth = await memoryGrowth(async () => {
    await download()
    await upload({})
    await upload({ 'content-length': String(TIMES * MIB) })
  })
  t.ok(growth < 64 * MIB, `${Math.round(growth / MIB)} MiB`)
})

t.test(
  'a client that does not read stops the upstream, and one that reads again gets it all',
  async (t) => {
    let sent = 0
    const apiUrl = await startHttpUpstream(t, (_request, response) => {
      const body = Readable.from(repeat())
      body.on('data', (chunk: Buffer) => {
        sent += chunk.length
      })
      body.pipe(response)
    })
    const proxy = await startProxy(t, { apiUrl, limits: UNHURRIED })
    const outgoing = httpRequest(`${proxy.url}/api/file`).end()
    const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
    await sleep(500)
    const stopped = sent
    t.ok(stopped < 32 * MIB, `${Math.round(stopped / MIB)} MiB were sent to nobody`)
    await sleep(300)
    t.equal(sent, stopped, 'and no more')
    t.equal(await digestOf(incoming), await DIGEST)
  },
)

t.test(
  'an upstream that does not read stops the client, and one that reads again gets it all',
  async (t) => {
    let received: IncomingMessage | undefined
    let digest: string | undefined
    const apiUrl = await startHttpUpstream(t, (request, response) => {
      received = request
      request.on('end', () => response.end())
    })
    const proxy = await startProxy(t, { apiUrl, limits: UNHURRIED })
    const outgoing = httpRequest(`${proxy.url}/api/files`, { method: 'POST' })
    let sent = 0
    const body = Readable.from(repeat())
    body.on('data', (chunk: Buffer) => {
      sent += chunk.length
    })
    body.pipe(outgoing)
    await sleep(500)
    const stopped = sent
    t.ok(stopped < 32 * MIB, `${Math.round(stopped / MIB)} MiB were sent to nobody`)
    await sleep(300)
    t.equal(sent, stopped, 'and no more')
    if (received !== undefined) digest = await digestOf(received)
    t.equal(digest, await DIGEST)
    const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
    t.equal(incoming.statusCode, 200)
    incoming.resume()
  },
)

t.test(
  'multipart with a quoted boundary, no Content-Type and an odd one pass byte for byte',
  async (t) => {
    const upstream = await startUpstream(t, async (call) => {
      await call.body
      answer(call, 201, '{"id":"7"}', ['Content-Type: application/json'])
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    const part =
      '--a b\r\nContent-Disposition: form-data; name="payload"; filename="i.xml"\r\n\r\n<a\u00ff/>\r\n--a b--\r\n'
    for (const type of [
      'multipart/form-data; boundary="a b"',
      'Application/JSON ;  charset=UTF-8',
      'application/json',
      'text/plain',
      'nonsense',
      undefined,
    ]) {
      const fields = type === undefined ? [] : [`Content-Type: ${type}`]
      const answered = await sendRaw(
        proxy.port,
        `${requestText('POST /api/file/v1/files', [...fields, `Content-Length: ${part.length}`])}${part}`,
      )
      t.equal(answered.status, 201, type ?? 'none')
      t.equal(answered.body, '{"id":"7"}')
      const call = upstream.calls.at(-1)
      t.same(call?.values('content-type'), type === undefined ? [] : [type])
      t.equal((await call?.body)?.toString('latin1'), part)
    }
  },
)

t.test('compressed and partial answers pass untouched', async (t) => {
  const gzipped = randomBytes(500)
  const upstream = await startUpstream(t, (call) =>
    answer(call, 206, gzipped, ['Content-Encoding: gzip', 'Content-Range: bytes 0-499/9000']),
  )
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.equal(answered.status, 206)
  t.same(answered.values('content-encoding'), ['gzip'])
  t.same(answered.values('content-range'), ['bytes 0-499/9000'])
  t.equal(answered.body, gzipped.toString('latin1'))
})

t.test('events and fields arrive as they come, not when the answer ends', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    call.socket.write(
      'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n',
    )
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const outgoing = httpRequest(`${proxy.url}/api/events`).end()
  const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
  t.equal(incoming.headers['content-type'], 'text/event-stream', 'before there is any event')
  const socket = upstream.calls[0]?.socket
  for (const event of ['data: 1\n\n', 'data: 2\n\n', 'data: 3\n\n']) {
    const arrival = once(incoming, 'data')
    socket?.write(`${event.length.toString(16)}\r\n${event}\r\n`)
    t.equal(String((await arrival)[0]), event)
  }
  socket?.write('0\r\nX-Canary: trailer\r\n\r\n')
  await once(incoming, 'end')
  t.same(incoming.trailers, {})
  t.equal(incoming.complete, true)
})

/** A request that leaves the connection open for the next. */
function keepAlive(line: string): string {
  return `${line} HTTP/1.1\r\nHost: a\r\n\r\n`
}

t.test('HEAD, 204 and 304 have no body, and the connection serves on', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    const { socket, line } = call
    if (line.startsWith('HEAD')) socket.write('HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n')
    else if (call.target === '/204') socket.write('HTTP/1.1 204 No Content\r\n\r\n')
    else if (call.target === '/204-odd')
      socket.write('HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n')
    else if (call.target === '/304') socket.write('HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n')
    else answer(call, 200, 'last')
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const answered = await sendRaw(
    proxy.port,
    keepAlive('HEAD /api/a') +
      keepAlive('GET /api/204') +
      keepAlive('GET /api/204-odd') +
      keepAlive('GET /api/304') +
      requestText('GET /api/a'),
  )
  t.same(answered.values('content-length'), ['12345'])
  const rest = answered.body.split(/(?=HTTP\/1\.1 )/)
  t.strictSame(
    rest.map((text) => [
      text.slice(9, 12),
      /\r\ncontent-length: (\d+)/.exec(text)?.[1],
      text.split('\r\n\r\n')[1],
    ]),
    [
      ['204', undefined, ''],
      ['204', undefined, ''],
      ['304', undefined, ''],
      ['200', '4', 'last'],
    ],
  )
})

t.test(
  'an answer of unknown length is chunked, or ends with the connection for HTTP/1.0',
  async (t) => {
    const upstream = await startUpstream(t, ({ socket }) => {
      socket.end('HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end')
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
    t.same(answered.values('transfer-encoding'), ['chunked'])
    t.equal(answered.body, 'd\r\nuntil the end\r\n0\r\n\r\n')
    const old = await sendRaw(proxy.port, 'GET /api/a HTTP/1.0\r\nHost: a\r\n\r\n')
    t.same(old.values('transfer-encoding'), [])
    t.equal(old.body, 'until the end')
  },
)

t.test('interim answers stay here, and Expect is answered here', async (t) => {
  const upstream = await startUpstream(t, async (call) => {
    await call.body
    call.socket.write('HTTP/1.1 103 Early Hints\r\nLink: </canary>; rel=preload\r\n\r\n')
    answer(call, 200, 'done')
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const answered = await sendRaw(
    proxy.port,
    `${requestText('POST /api/a', ['Expect: 100-continue', 'Content-Length: 3'])}abc`,
  )
  t.equal(answered.status, 100, "the broker's own")
  t.match(answered.body, /^HTTP\/1\.1 200 /)
  t.notMatch(answered.body, /103|canary/)
  t.same(upstream.calls[0]?.values('expect'), [])
})

t.test('a client that leaves ends the call to the upstream within a second', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (call.target === '/begun') {
      call.socket.write('HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc')
    }
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { connections: 1 } })
  const leave = async (text: string) => {
    const before = upstream.calls.length
    const socket = connect(proxy.port, '127.0.0.1')
    socket.on('error', () => undefined)
    socket.write(text)
    await until(() => upstream.calls.length > before)
    await sleep(50)
    resetSocket(socket)
    const left = performance.now()
    await upstream.calls.at(-1)?.closed
    t.ok(performance.now() - left < 1_000, text)
  }
  await leave(requestText('GET /api/waiting'))
  await leave(requestText('GET /api/begun'))
  await leave(`${requestText('POST /api/upload', ['Content-Length: 10'])}abc`)
  await leave(`${requestText('POST /api/upload', ['Transfer-Encoding: chunked'])}3\r\nabc\r\n`)
  await leave(`${requestText('POST /api/sent', ['Content-Length: 3'])}abc`)
  t.equal(upstream.calls.length, 5, 'and the only connection is free each time')
  t.same(
    proxy.lines.filter(({ event }) => event === 'forward_failed'),
    [],
    'which is no failure',
  )
})

t.test('a client that leaves the queue is never sent on', async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { connections: 1 } })
  const first = connect(proxy.port, '127.0.0.1')
  first.on('error', () => undefined)
  first.write(requestText('GET /api/first'))
  await until(() => upstream.calls.length === 1)
  const second = connect(proxy.port, '127.0.0.1')
  second.write(`${requestText('POST /api/second', ['Content-Length: 6'])}abc`)
  await sleep(100)
  second.destroy()
  await sleep(100)
  first.destroy()
  await upstream.calls[0]?.closed
  await sleep(200)
  t.same(
    upstream.calls.map(({ target }) => target),
    ['/first'],
  )
  void sendRaw(proxy.port, requestText('GET /api/third')).catch(() => undefined)
  t.ok(await until(() => upstream.calls.length === 2), 'the connection is free for the next')
  t.equal(upstream.calls[1]?.target, '/third')
})

t.test(
  'an answer that comes before the upload ends reaches the client, and ends the upload',
  async (t) => {
    const upstream = await startUpstream(t, (call) => {
      call.socket.pause()
      answer(call, 403, 'enough', ['Content-Type: text/plain'])
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    const outgoing = httpRequest(`${proxy.url}/api/files`, { method: 'POST' })
    outgoing.on('error', () => undefined)
    Readable.from(repeat()).pipe(outgoing)
    const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
    t.equal(incoming.statusCode, 403)
    t.equal(incoming.headers.connection, 'close')
    t.equal(incoming.headers['proxy-status'], `${PSEUDONYM}; received-status=403`)
    const chunks: Buffer[] = []
    for await (const chunk of incoming) chunks.push(chunk as Buffer)
    t.equal(Buffer.concat(chunks).toString(), 'enough')
    upstream.calls[0]?.socket.resume()
    await upstream.calls[0]?.closed
  },
)

t.test('an echo runs both ways at once', async (t) => {
  const apiUrl = await startHttpUpstream(t, (request, response) => void request.pipe(response))
  const proxy = await startProxy(t, { apiUrl, limits: UNHURRIED })
  const outgoing = httpRequest(`${proxy.url}/api/echo`, { method: 'POST' })
  outgoing.write('one')
  const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
  t.equal(String((await once(incoming, 'data'))[0]), 'one', 'before the request has ended')
  outgoing.end('two')
  const rest: Buffer[] = []
  for await (const chunk of incoming) rest.push(chunk as Buffer)
  t.equal(Buffer.concat(rest).toString(), 'two')
  t.equal(incoming.complete, true)
})

function post(body: string): string {
  return `POST /api/a HTTP/1.1\r\nHost: a\r\nContent-Length: ${body.length}\r\n\r\n${body}`
}

t.test('requests on one connection follow each other, with and without bodies', async (t) => {
  const upstream = await startUpstream(t, async (call) => {
    answer(call, 200, String(await call.body))
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const large = 'x'.repeat(300_000)
  const answered = await sendRaw(
    proxy.port,
    `${post('1')}${post(large)}${post('3')}${requestText('GET /api/a')}`,
  )
  const bodies = answered.body.split(/HTTP\/1\.1 200 [^]*?\r\n\r\n/)
  t.strictSame(
    bodies.map((body) => body.length),
    [1, 300_000, 1, 0],
  )
  t.equal(upstream.calls.length, 4)
})
