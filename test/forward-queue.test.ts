// The queue in front of the connections to the API, and bodies that need no stream because they are there already.

import { once } from 'node:events'
import { createServer } from 'node:http'
import { type AddressInfo, connect } from 'node:net'
import t from 'tap'
import { createForwardQueue } from '../src/forward-queue.ts'
import { arrivedBody } from '../src/forward-upload.ts'

t.test('one user fills neither the connections nor the queue alone', (t) => {
  const limits = { connections: 4, connectionsPerUser: 2, waitingMax: 4, waitMs: 60_000 }
  const queue = createForwardQueue(limits)
  const begun: string[] = []
  const refused: string[] = []
  const leaving = new Map<string, () => void>()
  const enter = (name: string) => {
    const [user = ''] = name
    const leave = queue.enter(
      user,
      () => begun.push(name),
      () => refused.push(name),
    )
    leaving.set(name, leave)
  }
  for (const name of ['a1', 'a2', 'a3', 'a4', 'a5', 'a6']) enter(name)
  t.strictSame(
    [begun, refused],
    [
      ['a1', 'a2'],
      ['a5', 'a6'],
    ],
  )
  for (const name of ['b1', 'b2', 'c1', 'b3', 'd1']) enter(name)
  t.strictSame(begun.slice(2), ['b1', 'b2'])
  t.strictSame(refused.slice(2), ['d1'], 'when all places are taken nobody waits')
  leaving.get('b1')?.()
  t.strictSame(begun.slice(4), ['c1'], 'whoever has what is free, in the order of asking')
  leaving.get('a3')?.()
  leaving.get('a3')?.()
  enter('a7')
  enter('a8')
  t.strictSame(refused.slice(3), ['a8'], 'a place that was left is free once')
  for (const leave of leaving.values()) leave()
  t.strictSame(begun.slice(5), ['a4', 'b3', 'a7'])
  for (const name of ['e1', 'e2', 'e3', 'e4']) enter(name)
  t.strictSame(begun.slice(-2), ['e1', 'e2'], 'all have been given back')
  for (const leave of leaving.values()) leave()
  t.end()
})

t.test(
  'a small body that came with its head is there at once, and the connection goes on',
  async (t) => {
    const bodies: Array<string | undefined> = []
    const server = createServer((request, response) => {
      void arrivedBody(request).then(async (body) => {
        bodies.push(body?.toString())
        if (body === undefined) request.resume()
        if (!request.readableEnded) await once(request, 'end')
        response.end('done')
      })
    })
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    t.teardown(() => server.close())
    const socket = connect((server.address() as AddressInfo).port, '127.0.0.1')
    t.teardown(() => socket.destroy())
    let answers = ''
    socket.setEncoding('latin1').on('data', (text: string) => (answers += text))
    const head = 'POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n'
    const answered = async (count: number) => {
      while (answers.split('done').length <= count) await once(socket, 'data')
    }
    socket.write(`${head}first`)
    await answered(1)
    socket.write(`${head}other${head}third`)
    await answered(3)
    socket.write(head)
    await new Promise((resolve) => setTimeout(resolve, 20))
    socket.write('later')
    await answered(4)
    t.strictSame(bodies, ['first', 'other', 'third', undefined])
  },
)
