// Answers that are ended together, over real sockets.

import { once } from 'node:events'
import { createServer, get } from 'node:http'
import { type AddressInfo, connect } from 'node:net'
import { text } from 'node:stream/consumers'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { buildApp } from '../src/http/app.ts'
import { createEnding } from '../src/answer-together.ts'
import { silentLog } from './support/silent-log.ts'

/** Serves each path as its own answer. `onRequest` is called with the number of each request, before it is answered. */
async function startServer(t: Test, onRequest: (count: number) => void): Promise<number> {
  const end = createEnding()
  let count = 0
  const server = createServer((request, response) => {
    count += 1
    onRequest(count)
    const { url = '' } = request
    response.writeHead(200, ['content-length', String(url.length)])
    if (url === '/gone') response.destroy()
    end(response, url)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  return (server.address() as AddressInfo).port
}

async function ask(port: number, path: string): Promise<string> {
  const [response] = await once(get({ port, host: '127.0.0.1', path, agent: false }), 'response')
  return text(response)
}

/** Holds up the event loop until everything that was sent waits to be read: so it is read in one turn. */
function holdUp(): void {
  const untilMs = performance.now() + 300
  while (performance.now() < untilMs);
}

t.test('each client gets its own answer, however many come in one turn', async (t) => {
  const port = await startServer(t, (count) => {
    if (count === 1) holdUp()
  })
  const paths = Array.from({ length: 300 }, (_, index) => `/answer-${index}`)
  t.same(await Promise.all(paths.map((path) => ask(port, path))), paths)
})

t.test('whose connection has gone holds up nobody', async (t) => {
  const port = await startServer(t, (count) => {
    if (count === 1) holdUp()
  })
  const [gone, ...others] = await Promise.allSettled([
    ask(port, '/gone'),
    ask(port, '/answer-1'),
    ask(port, '/answer-2'),
  ])
  t.equal(gone.status, 'rejected')
  t.same(
    others.map((other) => (other.status === 'fulfilled' ? other.value : other.reason)),
    ['/answer-1', '/answer-2'],
  )
})

t.test('an answer waits for the others of its turn, and no longer', async (t) => {
  const end = createEnding()
  const order: string[] = []
  const response = (name: string) => ({ end: () => order.push(name) }) as never
  end(response('first'), '')
  end(response('second'), '')
  order.push('looked at')
  await new Promise((resolve) => setImmediate(resolve))
  t.same(order, ['looked at', 'first', 'second'])
})

t.test('sixty-four answers wait for no others', async (t) => {
  const end = createEnding()
  let ended = 0
  for (let i = 0; i < 64; i += 1) {
    end({ end: () => (ended += 1) } as never, '')
  }
  t.equal(ended, 64)
  end({ end: () => (ended += 1) } as never, '')
  t.equal(ended, 64)
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(ended, 65)
})

/** Where each request is traced, none is answered before the router. */
const quietLog = { ...silentLog, writes: (level: string) => level !== 'debug' }

const TOKEN = 'GET /token HTTP/1.1\r\nHost: broker.example\r\n'
/** What comes with requests in one segment, and the statuses of the answers in their order. */
const SEGMENTS: ReadonlyArray<[name: string, segment: string, statuses: readonly string[]]> = [
  ['garbage', `${TOKEN}\r\n!!!\r\n\r\n`, ['200', '400']],
  ['a second request and garbage', `${TOKEN}\r\n${TOKEN}\r\n!!!\r\n\r\n`, ['200', '200', '400']],
  [
    'CONNECT',
    `${TOKEN}\r\nCONNECT a.example:1 HTTP/1.1\r\nHost: a.example\r\n\r\n`,
    ['200', '405'],
  ],
  ['a request behind the last', `${TOKEN}Connection: close\r\n\r\n${TOKEN}\r\n`, ['200']],
  ['too large a head', `${TOKEN}\r\n${TOKEN}X: ${'a'.repeat(17_000)}\r\n\r\n`, ['200', '431']],
]

for (const [name, segment, statuses] of SEGMENTS) {
  t.test(`an answer that waits is not overtaken by the refusal of ${name}`, async (t) => {
    const end = createEnding()
    const app = await buildApp(
      { clock: systemClock, log: quietLog },
      {
        listener: 'internal',
        trustedProxies: [],
        requestTimeoutMs: 30_000,
        answerIdleTimeoutMs: 30_000,
        tls: false,
        answersAtOnce(request, response) {
          if (request.url !== '/token') return false
          response.writeHead(200, ['content-length', '5'])
          end(response, 'token')
          return true
        },
      },
      () => undefined,
    )
    t.teardown(() => app.close())
    await app.listen({ host: '127.0.0.1', port: 0 })
    const socket = connect((app.server.address() as AddressInfo).port, '127.0.0.1')
    socket.write(segment)
    const received = await text(socket)
    t.same(
      [...received.matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, status]) => status),
      statuses,
    )
    t.equal(
      received.split('token').length,
      statuses.filter((status) => status === '200').length + 1,
    )
  })
}
