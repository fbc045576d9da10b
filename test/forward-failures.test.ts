// What a client sees when a call fails, and what the upstream does not: no call twice, no cut answer that looks whole.

import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { once } from 'node:events'
import { type IncomingMessage, request as httpRequest } from 'node:http'
import { createServer, type AddressInfo, connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createServer as createTlsServer } from 'node:tls'
import t, { type Test } from 'tap'
import type { AuditEvent } from '../src/audit-event.ts'
import { BrokerError } from '../src/errors.ts'
import { systemClock } from '../src/clock.ts'
import { createForwarder } from '../src/forward.ts'
import { proxyStatusOf, upstreamRefused } from '../src/forward-failure.ts'
import { buildApp } from '../src/http/app.ts'
import type { UserKey } from '../src/grant.ts'
import type { Log } from '../src/ports.ts'
import { resetSocket } from '../src/reset-socket.ts'
import {
  PROXY_LIMITS,
  PSEUDONYM,
  type RawAnswer,
  requestText,
  sendRaw,
  startProxy,
} from './support/proxy.ts'
import { answer, startUpstream } from './support/upstream.ts'

const silent = (): void => undefined
const SILENT: Log = { trace: silent, debug: silent, info: silent, warn: silent, error: silent }

/** Status, code and Proxy-Status of a problem, and that it is a whole and safe one. */
function problemOf(t: Test, answered: RawAnswer): [number, string, string] {
  t.same(answered.values('content-type'), ['application/problem+json; charset=utf-8'])
  t.same(answered.values('cache-control'), ['no-store'])
  t.same(answered.values('x-content-type-options'), ['nosniff'])
  t.notMatch(answered.body, /127\.0\.0\.1|localhost|ECONN|UND_ERR/, 'nothing of what is behind')
  const { status, code, detail } = JSON.parse(answered.body)
  t.equal(status, answered.status)
  t.type(detail, 'string')
  const [proxyStatus = ''] = answered.values('proxy-status')
  return [status, code, proxyStatus.replace(`${PSEUDONYM}; `, '')]
}

async function closedPort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

t.test(
  'an upstream that refuses connections is a 502, and is named in the log alone',
  async (t) => {
    const proxy = await startProxy(t, { apiUrl: `http://127.0.0.1:${await closedPort()}` })
    for (const text of [
      requestText('GET /api/a'),
      `${requestText('POST /api/a', ['Content-Length: 3'])}abc`,
    ]) {
      const answered = await sendRaw(proxy.port, text)
      t.strictSame(problemOf(t, answered), [
        502,
        'upstream_unreachable',
        'error=connection_refused',
      ])
    }
    const failures = proxy.lines.filter(({ event }) => event === 'forward_failed')
    t.equal(failures.length, 2)
    t.match(failures[0]?.fields, {
      status: 502,
      code: 'upstream_unreachable',
      error: { code: 'ECONNREFUSED' },
    })
  },
)

t.test('a name that does not resolve is a 502', async (t) => {
  const proxy = await startProxy(t, { apiUrl: 'http://nowhere.invalid' })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.strictSame(problemOf(t, answered), [502, 'upstream_unreachable', 'error=dns_error'])
})

t.test(
  'an upstream that breaks off before the first byte is a 502, and is called once',
  async (t) => {
    const upstream = await startUpstream(t, async (call) => {
      await call.body
      if (call.target === '/reset') resetSocket(call.socket)
      else call.socket.end()
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    for (const method of ['GET', 'HEAD', 'PUT', 'DELETE', 'POST']) {
      for (const target of ['/reset', '/closed']) {
        const before = upstream.calls.length
        const answered = await sendRaw(proxy.port, requestText(`${method} /api${target}`))
        t.equal(answered.status, 502, method)
        t.same(answered.values('proxy-status'), [`${PSEUDONYM}; error=connection_terminated`])
        t.equal(upstream.calls.length, before + 1, `${method} ${target}`)
      }
    }
  },
)

t.test('a connection that the upstream closes between two calls costs no call twice', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (upstream.calls.length === 1) answer(call, 200)
    else resetSocket(call.socket)
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  t.equal((await sendRaw(proxy.port, requestText('GET /api/a'))).status, 200)
  t.equal((await sendRaw(proxy.port, requestText('GET /api/b'))).status, 502)
  await sleep(100)
  t.equal(upstream.calls.length, 2)
  t.equal(upstream.connections(), 1, 'on the connection that was kept')
})

t.test(
  'an upstream that breaks off after the first byte breaks the connection to the client',
  async (t) => {
    const upstream = await startUpstream(t, (call) => {
      const head = call.target === '/length' ? 'Content-Length: 100' : 'Transfer-Encoding: chunked'
      call.socket.write(
        `HTTP/1.1 200 OK\r\n${head}\r\n\r\n${call.target === '/length' ? '' : '3\r\n'}abc`,
      )
      setTimeout(() => resetSocket(call.socket), 50)
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    for (const target of ['/length', '/chunked']) {
      const outgoing = httpRequest(`${proxy.url}/api${target}`).end()
      const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
      t.equal(incoming.statusCode, 200)
      incoming.resume()
      await t.rejects(once(incoming, 'end'), { code: 'ECONNRESET' }, target)
    }
    // Here nothing else tells the end of a cut answer from that of a whole one.
    const old = sendRaw(proxy.port, 'GET /api/chunked HTTP/1.0\r\nHost: a\r\n\r\n')
    await t.rejects(old, { code: 'ECONNRESET' }, 'HTTP/1.0')
    t.equal(upstream.calls.length, 3)
  },
)

t.test('an answer shorter than it says never looks whole', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    call.socket.end('HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\nabc')
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const outgoing = httpRequest(`${proxy.url}/api/a`).end()
  const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
  incoming.resume()
  await t.rejects(once(incoming, 'end'), { code: 'ECONNRESET' })
})

t.test(
  'an answer that is not HTTP, switches protocols or has no end to its head is a 502',
  async (t) => {
    const upstream = await startUpstream(t, ({ socket, target }) => {
      if (target === '/101') {
        socket.write(
          'HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n',
        )
      } else if (target === '/100') {
        socket.write('HTTP/1.1 100 Continue\r\n\r\n')
      } else if (target === '/ssh') {
        socket.write('SSH-2.0-OpenSSH_9.6\r\n')
      } else if (target === '/two-lengths') {
        socket.write('HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab')
      } else {
        socket.write(`HTTP/1.1 200 OK\r\nX-Long: ${'a'.repeat(20_000)}\r\n\r\n`)
      }
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url })
    for (const [target, error] of [
      ['/101', 'connection_terminated'],
      ['/100', 'connection_terminated'],
      ['/ssh', 'http_protocol_error'],
      ['/two-lengths', 'http_response_incomplete'],
      ['/long', 'http_response_header_section_size'],
    ] as const) {
      const answered = await sendRaw(
        proxy.port,
        requestText(`GET /api${target}`, ['Upgrade: h2c', 'HTTP2-Settings: AAMAAABk']),
      )
      t.strictSame(problemOf(t, answered), [502, 'upstream_unreachable', `error=${error}`], target)
    }
  },
)

t.test('an upstream that does not answer in time is a 504', async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { headersTimeoutMs: 200 } })
  for (const text of [
    requestText('GET /api/a'),
    `${requestText('POST /api/a', ['Content-Length: 3'])}abc`,
  ]) {
    const answered = await sendRaw(proxy.port, text)
    t.strictSame(problemOf(t, answered), [504, 'upstream_timeout', 'error=http_response_timeout'])
    await upstream.calls.at(-1)?.closed
  }
  t.equal(upstream.calls.length, 2)
})

t.test('the total time ends a call at every stage', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (call.target === '/begun')
      call.socket.write('HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc')
  })
  const limits = { totalTimeoutMs: 300, connections: 1 }
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits })
  const [waiting, queued] = await Promise.all([
    sendRaw(proxy.port, requestText('GET /api/waiting')),
    sendRaw(proxy.port, requestText('GET /api/queued')),
  ])
  t.strictSame(problemOf(t, waiting), [504, 'upstream_timeout', 'error=http_response_timeout'])
  t.strictSame(problemOf(t, queued), [504, 'upstream_timeout', 'error=http_response_timeout'])
  const begun = await sendRaw(proxy.port, requestText('GET /api/begun'))
  t.equal(begun.status, 200)
  t.match(begun.body, /abc$/, 'and then the connection closes')
  await upstream.calls.at(-1)?.closed
})

t.test('silence in the middle of an answer ends it', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    call.socket.write('HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc')
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { idleTimeoutMs: 200 } })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.equal(answered.body, 'abc')
  await upstream.calls[0]?.closed
  t.match(
    proxy.lines.filter(({ event }) => event.startsWith('forward_')),
    [
      {
        event: 'forward_cut',
        fields: { method: 'GET', route: '/api/*', upstreamStatus: 200, requestId: String },
      },
    ],
    'and leaves a trace',
  )
})

t.test('a client that stops sending, or stops reading, is given up', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (call.target === '/large') answer(call, 200, Buffer.alloc(30_000_000))
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { idleTimeoutMs: 300 } })
  const stopped = await sendRaw(
    proxy.port,
    `${requestText('POST /api/a', ['Content-Length: 10'])}abc`,
  )
  t.strictSame(problemOf(t, stopped), [400, 'request_invalid', 'error=http_request_error'])
  await upstream.calls[0]?.closed

  const reader = connect(proxy.port, '127.0.0.1').pause()
  reader.on('error', () => undefined)
  reader.write(requestText('GET /api/large'))
  while (upstream.calls.length < 2) await sleep(5)
  await upstream.calls[1]?.closed
  t.pass('the upstream is let go')
  // Reset, and not only closed: what lies in the kernel for it goes too.
  const closed = new Promise((resolve) => reader.once('close', resolve))
  reader.resume()
  await closed
  t.ok(reader.bytesRead < 30_000_000, 'and the client sees that it is not whole')
  t.match(
    proxy.lines.filter(({ event }) => event === 'forward_cut'),
    [{ fields: { upstreamStatus: 200 } }],
  )
})

t.test(
  'a body that trickles in is given up, one that is slow and fast enough passes',
  async (t) => {
    const upstream = await startUpstream(t, (call) => {
      void call.body.then((body) => answer(call, 200, `${body.length} bytes`))
    })
    const limits = { idleTimeoutMs: 1_000, requestBytesPerSecondMin: 1_000 }
    const proxy = await startProxy(t, { apiUrl: upstream.url, limits })
    const upload = async (bytes: number, pieceBytes: number) => {
      const socket = connect(proxy.port, '127.0.0.1')
      const answered = once(socket, 'data') as Promise<[Buffer]>
      socket.on('error', () => undefined)
      socket.write(requestText('POST /api/a', [`Content-Length: ${bytes}`]))
      let sent = 0
      const timer = setInterval(() => {
        const piece = Math.min(pieceBytes, bytes - sent)
        sent += piece
        if (piece > 0 && socket.writable) socket.write(Buffer.alloc(piece))
      }, 100)
      const [text] = await answered
      clearInterval(timer)
      socket.destroy()
      return text.toString()
    }
    // Never silent for as long as it may be; and a small one takes no longer than that as a whole.
    t.match(await upload(100_000, 10), /^HTTP\/1\.1 400 [^]*comes too slowly/)
    t.match(await upload(990, 10), /^HTTP\/1\.1 400 /)
    for (const call of upstream.calls) await call.closed
    t.match(await upload(30_000, 1_000), /^HTTP\/1\.1 200 [^]*30000 bytes$/)
  },
)

t.test("one user's calls leave connections to others, and only so many wait", async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const limits = { connections: 3, connectionsPerUser: 2, waitingMax: 2, headersTimeoutMs: 60_000 }
  const names = ['alice', 'bob'] as const
  let user: (typeof names)[number] = 'alice'
  const events: AuditEvent[] = []
  const proxy = await startProxy(t, {
    apiUrl: upstream.url,
    limits,
    parts: {
      audit: { record: (event) => void events.push(event) },
      authorize: async () => ({ user: user as UserKey, actor: 'session', name: user }),
    },
  })
  const targets = () => upstream.calls.map(({ target }) => target)
  const answers = new Map<string, Promise<RawAnswer>>()
  const call = (whose: typeof user, target: string) => {
    user = whose
    answers.set(target, sendRaw(proxy.port, requestText(`GET /api${target}`)))
    return sleep(50)
  }
  const reached = async (...expected: string[]) => {
    const endMs = performance.now() + 5_000
    while (upstream.calls.length < expected.length && performance.now() < endMs) await sleep(5)
    t.strictSame(targets(), expected)
  }
  const end = (target: string) => {
    for (const one of upstream.calls) if (one.target === target) answer(one, 200, target)
    return answers.get(target)
  }

  await call('alice', '/a1')
  await call('alice', '/a2')
  await reached('/a1', '/a2')
  await call('alice', '/a3')
  await call('bob', '/b1')
  await reached('/a1', '/a2', '/b1')
  await call('bob', '/b2')
  await call('bob', '/b3')
  const refused = await answers.get('/b3')
  t.equal(refused?.status, 503, 'a third that would wait')
  t.match(refused?.body, '"code":"temporarily_unavailable"')
  t.same(refused?.values('retry-after'), ['1'])
  t.same(refused?.values('proxy-status'), [`${PSEUDONYM}; error=connection_limit_reached`])

  await end('/b1')
  await reached('/a1', '/a2', '/b1', '/b2')
  await end('/a1')
  await reached('/a1', '/a2', '/b1', '/b2', '/a3')
  for (const target of ['/a2', '/b2', '/a3']) t.equal((await end(target))?.body, target)
  await call('bob', '/b4')
  await call('bob', '/b5')
  await call('alice', '/a4')
  t.equal(upstream.calls.length, 8, 'every connection has been given back')
  for (const target of ['/b4', '/b5', '/a4']) t.equal((await end(target))?.body, target)
  t.equal(events.length, 8, 'a call that was refused a connection is on no record')
})

t.test('a connection is given back however a call ends, and waited for only so long', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (call.target === '/reset') resetSocket(call.socket)
    if (call.target === '/early') answer(call, 403, 'enough')
    if (call.target === '/refused') answer(call, 401, 'no')
    if (call.target === '/silent-body')
      call.socket.write('HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n')
    if (call.target === '/fine') answer(call, 200, 'fine')
  })
  const limits = { connections: 1, headersTimeoutMs: 700, idleTimeoutMs: 500, requestBytesMax: 10 }
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits })
  for (const [text, status] of [
    [requestText('GET /api/reset'), 502],
    [requestText('GET /api/silent'), 504],
    [requestText('GET /api/silent-body'), 200],
    [requestText('GET /api/refused'), 401],
    [`${requestText('POST /api/early', ['Content-Length: 9'])}abc`, 403],
    [`${requestText('POST /api/stopped', ['Content-Length: 9'])}abc`, 400],
    [`${requestText('POST /api/over', ['Transfer-Encoding: chunked'])}b\r\nabcdefghijk\r\n`, 413],
  ] as const) {
    t.equal((await sendRaw(proxy.port, text)).status, status, text)
    t.equal((await sendRaw(proxy.port, requestText('GET /api/fine'))).body, 'fine')
  }
  const [first, second] = await Promise.all([
    sendRaw(proxy.port, requestText('GET /api/silent')),
    sleep(50).then(() => sendRaw(proxy.port, requestText('GET /api/waiting'))),
  ])
  t.equal(first.status, 504)
  t.ok([503, 504].includes(second.status), 'which comes first, its wait or the other call, is open')
  t.equal((await sendRaw(proxy.port, requestText('GET /api/fine'))).body, 'fine')
})

t.test('a body over the limit is a 413, whether it says its length or not', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    void call.body.then(() => answer(call, 200))
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { requestBytesMax: 1_000 } })
  const announced = await sendRaw(
    proxy.port,
    requestText('POST /api/a', ['Content-Length: 1001', 'Expect: 100-continue']),
  )
  t.match(announced.body, /^HTTP\/1\.1 413 /)
  t.equal(upstream.calls.length, 0, 'the announced one is never begun')

  const chunked = await sendRaw(
    proxy.port,
    `${requestText('POST /api/a', ['Transfer-Encoding: chunked'])}3e9\r\n${'a'.repeat(1_001)}\r\n`,
  )
  t.strictSame(problemOf(t, chunked), [413, 'payload_too_large', 'error=http_request_error'])
  t.same(chunked.values('connection'), ['close'])
  for (const call of upstream.calls) await call.closed

  const counted = upstream.calls.length
  for (const text of [
    `${requestText('POST /api/a', ['Content-Length: 1000'])}${'a'.repeat(1_000)}`,
    `${requestText('POST /api/a', ['Transfer-Encoding: chunked'])}3e8\r\n${'a'.repeat(1_000)}\r\n0\r\n\r\n`,
  ]) {
    t.equal((await sendRaw(proxy.port, text)).status, 200, 'the limit itself passes')
  }
  t.equal(upstream.calls.length, counted + 2)
})

t.test('a client in the middle of a large upload can read its 413', async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const proxy = await startProxy(t, {
    apiUrl: upstream.url,
    limits: { requestBytesMax: 1_000_000 },
  })
  const outgoing = httpRequest(`${proxy.url}/api/files`, { method: 'POST' })
  outgoing.on('error', () => undefined)
  const timer = setInterval(() => outgoing.write(Buffer.alloc(100_000)), 5)
  const [incoming] = (await once(outgoing, 'response')) as [IncomingMessage]
  clearInterval(timer)
  t.equal(incoming.statusCode, 413)
  const chunks: Buffer[] = []
  for await (const chunk of incoming) chunks.push(chunk as Buffer)
  t.match(Buffer.concat(chunks).toString(), '"code":"payload_too_large"')
})

t.test(
  'a client that goes on sending after its answer is read for a moment, not reset',
  async (t) => {
    const upstream = await startUpstream(t, (call) => {
      if (call.target === '/early') answer(call, 403, 'enough')
    })
    const proxy = await startProxy(t, {
      apiUrl: upstream.url,
      limits: { requestBytesMax: 100_000_000 },
    })
    for (const [target, length, status] of [
      ['/early', 90_000_000, 403],
      ['/over', 100_000_001, 413],
    ] as const) {
      const socket = connect(proxy.port, '127.0.0.1')
      const errors: Error[] = []
      socket.on('error', (error) => errors.push(error))
      socket.write(`${requestText(`POST /api${target}`, [`Content-Length: ${length}`])}begun`)
      const [head] = (await once(socket, 'data')) as [Buffer]
      t.match(head.toString(), `HTTP/1.1 ${status} `, target)
      const answered = performance.now()
      // More than the buffers of both sides hold: it goes through only if somebody reads.
      await new Promise((resolve) => socket.write(Buffer.alloc(15_000_000), resolve))
      t.same(errors, [], target)
      await once(socket.resume(), 'close')
      const openMs = performance.now() - answered
      t.ok(openMs > 500 && openMs < 5_000, `and then it is closed, after ${Math.round(openMs)} ms`)
    }
  },
)

t.test('a body over the limit that waits for a connection is refused at once', async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const proxy = await startProxy(t, {
    apiUrl: upstream.url,
    limits: { requestBytesMax: 1_000, connections: 1 },
  })
  const first = connect(proxy.port, '127.0.0.1')
  first.write(requestText('GET /api/first'))
  while (upstream.calls.length === 0) await sleep(5)
  const waiting = [1, 2].map(() =>
    sendRaw(
      proxy.port,
      `${requestText('POST /api/a', ['Transfer-Encoding: chunked'])}3e9\r\n${'a'.repeat(1_001)}\r\n`,
    ),
  )
  for (const answered of await Promise.all(waiting)) t.equal(answered.status, 413)
  first.destroy()
  await upstream.calls[0]?.closed
  await sleep(100)
  t.equal(upstream.calls.length, 1)
})

t.test(
  'an answer over the limit is a 502 when it says so, and is cut when it does not',
  async (t) => {
    const upstream = await startUpstream(t, (call) => {
      const { socket, target } = call
      if (target === '/announced') answer(call, 200, 'a'.repeat(1_001))
      else if (target === '/most') answer(call, 200, 'a'.repeat(1_000))
      else if (call.line.startsWith('HEAD'))
        socket.write('HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n')
      else
        socket.write(
          `HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n${'a'.repeat(1_001)}\r\n0\r\n\r\n`,
        )
    })
    const proxy = await startProxy(t, { apiUrl: upstream.url, limits: { responseBytesMax: 1_000 } })
    const announced = await sendRaw(proxy.port, requestText('GET /api/announced'))
    t.strictSame(problemOf(t, announced), [
      502,
      'upstream_unreachable',
      'error=http_response_body_size',
    ])
    const chunked = await sendRaw(proxy.port, requestText('GET /api/chunked'))
    t.notMatch(chunked.body, /\r\n0\r\n\r\n$/, 'without its end')
    for (const { closed } of upstream.calls) await closed
    t.equal((await sendRaw(proxy.port, requestText('GET /api/most'))).body.length, 1_000)
    const head = await sendRaw(proxy.port, requestText('HEAD /api/file'))
    t.same(head.values('content-length'), ['5000'], 'what HEAD tells of is not sent')
  },
)

t.test('a GET that the upstream refuses is sent once more, with the renewed token', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    if (call.values('authorization')[0] === 'Bearer new') answer(call, 200, 'yes')
    else answer(call, 401, 'canary', ['WWW-Authenticate: Bearer canary'])
  })
  for (const method of ['GET', 'HEAD']) {
    const before = upstream.calls.length
    const events: AuditEvent[] = []
    const proxy = await startProxy(t, {
      apiUrl: upstream.url,
      tokens: ['old', 'new'],
      parts: { audit: { record: (event) => void events.push(event) } },
    })
    const answered = await sendRaw(proxy.port, requestText(`${method} /api/a?b=c`))
    t.equal(answered.status, 200)
    t.equal(answered.body, method === 'GET' ? 'yes' : '')
    t.equal(proxy.renewals(), 1)
    t.match(events, [{ action: 'call_proxied' }, { action: 'call_repeated' }])
    t.not(events[0]?.fingerprint, events[1]?.fingerprint)
    t.strictSame(
      upstream.calls.slice(before).map((call) => [call.line, ...call.values('authorization')]),
      [
        [`${method} /a?b=c HTTP/1.1`, 'Bearer old'],
        [`${method} /a?b=c HTTP/1.1`, 'Bearer new'],
      ],
    )
  }
})

t.test('what is not sure to be repeatable is not repeated, and renews nothing', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 401, 'canary'))
  const proxy = await startProxy(t, { apiUrl: upstream.url, tokens: ['old', 'new'] })
  const calls = [
    `${requestText('POST /api/a', ['Content-Length: 3'])}abc`,
    requestText('POST /api/a'),
    requestText('PUT /api/a'),
    requestText('PATCH /api/a'),
    requestText('DELETE /api/a'),
    `${requestText('GET /api/a', ['Content-Length: 3'])}abc`,
  ]
  for (const text of calls) {
    const answered = await sendRaw(proxy.port, text)
    t.strictSame(problemOf(t, answered), [401, 'upstream_refused', 'received-status=401'])
    t.same(answered.values('www-authenticate'), [])
    t.notMatch(answered.body, 'canary')
  }
  t.equal(upstream.calls.length, calls.length)
  t.equal(proxy.renewals(), 0)
})

t.test(
  'a 401 that stays costs two calls at most, and none when there is no newer token',
  async (t) => {
    const upstream = await startUpstream(t, (call) =>
      answer(call, 401, 'canary', ['WWW-Authenticate: Bearer canary', 'Set-Cookie: canary=1']),
    )
    for (const [tokens, calls] of [
      [['old', 'new', 'newer'], 2],
      [['only'], 1],
    ] as const) {
      const before = upstream.calls.length
      const proxy = await startProxy(t, { apiUrl: upstream.url, tokens })
      const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
      t.strictSame(problemOf(t, answered), [401, 'upstream_refused', 'received-status=401'])
      t.same(answered.values('www-authenticate'), [])
      t.notMatch(`${JSON.stringify(answered.fields)}${answered.body}`, 'canary')
      t.equal(upstream.calls.length, before + calls)
      t.equal(proxy.renewals(), 1)
    }
  },
)

t.test('an upstream refusal carries no challenge of the broker, its own 401 does', async (t) => {
  const ports = { clock: systemClock, log: SILENT }
  const settings = {
    trustedProxies: [],
    requestTimeoutMs: 1_000,
    answerIdleTimeoutMs: 1_000,
    tls: false,
  }
  const app = await buildApp(ports, { ...settings, listener: 'internal' }, (scope) => {
    scope.get('/refused', () => Promise.reject(upstreamRefused(401)))
    scope.get('/unknown', () => Promise.reject(new BrokerError('caller_unauthenticated', 'Who?')))
  })
  t.teardown(() => app.close())
  const refused = await app.inject('/refused')
  t.equal(refused.statusCode, 401)
  t.notOk('www-authenticate' in refused.headers)
  const unknown = await app.inject('/unknown')
  t.equal(unknown.statusCode, 401)
  t.match(unknown.headers['www-authenticate'], /^Bearer /)
})

t.test('a 407 is a 502, and its body does not pass', async (t) => {
  const upstream = await startUpstream(t, (call) =>
    answer(call, 407, 'canary', ['Proxy-Authenticate: Basic realm="canary"']),
  )
  const proxy = await startProxy(t, { apiUrl: upstream.url, tokens: ['old', 'new'] })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.strictSame(problemOf(t, answered), [502, 'upstream_refused', 'received-status=407'])
  t.notMatch(`${JSON.stringify(answered.fields)}${answered.body}`, 'canary')
  t.equal(proxy.renewals(), 0)
})

t.test('a renewal that fails leaves the 401, and tells what it knows of the grant', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 401))
  const dead = new BrokerError('reauthentication_required', 'Log in again.', {
    cause: 'revoked_or_expired',
    reconnectUrl: 'https://broker.example/auth/login',
  })
  const away = new BrokerError('temporarily_unavailable', 'Away.', { retryAfterSeconds: 5 })
  for (const [error, cause] of [
    [dead, 'revoked_or_expired'],
    [away, undefined],
    [new Error('canary'), undefined],
  ] as const) {
    const token = {
      accessToken: 'old',
      expiresInSeconds: 600,
      expiresAt: new Date(),
      scope: '',
      fingerprint: 'f',
    }
    const proxy = await startProxy(t, {
      apiUrl: upstream.url,
      parts: {
        accessTokens: { fresh: async () => token, replaceRejected: () => Promise.reject(error) },
      },
    })
    const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
    t.strictSame(problemOf(t, answered), [401, 'upstream_refused', 'received-status=401'])
    const problem = JSON.parse(answered.body)
    t.equal(problem.cause, cause)
    t.equal(problem.reconnect_url, cause && 'https://broker.example/auth/login')
    t.notMatch(answered.body, 'canary')
  }
  t.equal(upstream.calls.length, 3)
})

t.test('no token, no call: the problem is that of the token', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, {
    apiUrl: upstream.url,
    parts: {
      accessTokens: {
        fresh: () =>
          Promise.reject(
            new BrokerError('temporarily_unavailable', 'Later.', { retryAfterSeconds: 7 }),
          ),
        replaceRejected: () => Promise.reject(new Error('not to be called')),
      },
    },
  })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.strictSame(problemOf(t, answered), [
    503,
    'temporarily_unavailable',
    'error=proxy_internal_response',
  ])
  t.same(answered.values('retry-after'), ['7'])
  t.equal(upstream.calls.length, 0)
})

t.test('other refusals of the upstream pass as they are', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    answer(call, Number(call.target.slice(1)), 'why', [
      'Retry-After: 30',
      'Content-Type: text/plain',
    ])
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  for (const status of [400, 403, 404, 406, 415, 429, 500, 502, 503]) {
    const answered = await sendRaw(proxy.port, requestText(`GET /api/${status}`))
    t.equal(answered.status, status)
    t.equal(answered.body, 'why')
    t.same(answered.values('retry-after'), ['30'])
    t.same(answered.values('proxy-status'), [`${PSEUDONYM}; received-status=${status}`])
  }
  t.equal(upstream.calls.length, 9)
})

t.test('a server with a certificate that does not verify gets no request', async (t) => {
  const directory = t.testdir()
  const [key, cert] = ['key.pem', 'cert.pem'].map((name) => join(directory, name)) as [
    string,
    string,
  ]
  execFileSync(
    'openssl',
    `req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost -keyout ${key} -out ${cert}`.split(
      ' ',
    ),
    { stdio: 'ignore' },
  )
  let received = ''
  const server = createTlsServer({ key: readFileSync(key), cert: readFileSync(cert) }, (socket) => {
    socket.on('error', () => undefined)
    socket.on('data', (chunk) => {
      received += chunk.toString()
    })
  }).listen(0, '127.0.0.1')
  server.on('tlsClientError', () => undefined)
  await once(server, 'listening')
  t.teardown(() => server.close())
  const { port } = server.address() as AddressInfo
  const proxy = await startProxy(t, { apiUrl: `https://127.0.0.1:${port}` })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.strictSame(problemOf(t, answered), [502, 'upstream_unreachable', 'error=tls_certificate_error'])
  t.equal(received, '')
})

t.test('a listener without TLS where TLS is expected is a 502', async (t) => {
  const upstream = await startUpstream(t, () => undefined)
  const server = createServer((socket) => void socket.end('HTTP/1.1 400 Bad Request\r\n\r\n'))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const { port } = server.address() as AddressInfo
  const proxy = await startProxy(t, { apiUrl: `https://127.0.0.1:${port}` })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.strictSame(problemOf(t, answered), [502, 'upstream_unreachable', 'error=tls_protocol_error'])
  t.equal(upstream.calls.length, 0)
})

t.test('a forwarder that is closing refuses further calls, and ends those in flight', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    setTimeout(() => answer(call, 200, 'done'), 200)
  })
  const forwarder = createForwarder({
    ...PROXY_LIMITS,
    apiUrl: upstream.url,
    viaPseudonym: PSEUDONYM,
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url, parts: { forwarder } })
  const inFlight = sendRaw(proxy.port, requestText('GET /api/a'))
  while (upstream.calls.length === 0) await sleep(5)
  const closing = forwarder.close()
  const further = await sendRaw(proxy.port, requestText('GET /api/b'))
  t.equal(further.status, 503)
  t.match(further.body, '"code":"temporarily_unavailable"')
  t.equal((await inFlight).body, 'done')
  await closing
  t.equal(upstream.calls.length, 1)
})

t.test('an API URL that is more than an origin is refused at start', (t) => {
  for (const apiUrl of ['https://api.example/v1', 'https://api.example/?a=b']) {
    t.throws(
      () => createForwarder({ apiUrl, viaPseudonym: PSEUDONYM } as never),
      { message: 'apiUrl must be an origin' },
      apiUrl,
    )
  }
  t.end()
})

t.test('the error type of a failure is that of the call, never of what else went wrong', (t) => {
  const refused = Object.assign(new Error('database'), { code: 'ECONNREFUSED' })
  const status = (code: ConstructorParameters<typeof BrokerError>[0]) =>
    proxyStatusOf('p', new BrokerError(code, 'x', {}, { cause: refused }))
  t.equal(status('upstream_unreachable'), 'p; error=connection_refused')
  t.equal(status('temporarily_unavailable'), 'p; error=proxy_internal_response')
  t.equal(status('internal_error'), 'p; error=proxy_internal_error')
  t.equal(proxyStatusOf('p', refused), 'p; error=proxy_internal_error')
  t.end()
})
