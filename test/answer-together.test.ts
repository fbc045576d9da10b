// Answers that are ended together, over real sockets.

import { once } from 'node:events'
import { createServer, get } from 'node:http'
import type { AddressInfo } from 'node:net'
import { text } from 'node:stream/consumers'
import t, { type Test } from 'tap'
import { createEnding } from '../src/answer-together.ts'

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
  const response = (name: string) => ({ destroyed: false, end: () => order.push(name) }) as never
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
    end({ destroyed: false, end: () => (ended += 1) } as never, '')
  }
  t.equal(ended, 64)
  end({ destroyed: false, end: () => (ended += 1) } as never, '')
  t.equal(ended, 64)
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(ended, 65)
})
