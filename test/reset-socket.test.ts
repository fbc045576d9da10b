// A reset of a connection at each moment of its end leaves neither a descriptor nor a process behind.

import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { setImmediate as turn } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { resetSocket } from '../src/reset-socket.ts'

const MORE_THAN_THE_KERNEL_TAKES_BYTES = 50_000_000
/** A start takes less than half a second; where it takes longer, the test says that it has not seen what it looks for. */
const SPINNING_MS = 5_000
const LIMIT_MS = 60_000

const MOMENTS: Record<string, (socket: Socket) => void | Promise<void>> = {
  'that is idle': () => {},
  'that has bytes to write': (socket) => {
    socket.write(Buffer.alloc(MORE_THAN_THE_KERNEL_TAKES_BYTES))
  },
  'that is to end after its bytes': (socket) => {
    socket.end(Buffer.alloc(MORE_THAN_THE_KERNEL_TAKES_BYTES))
  },
  'that is being shut down': (socket) => {
    socket.end()
  },
  'that has been shut down': async (socket) => {
    socket.end()
    await once(socket, 'finish')
    await turn()
  },
}

for (const [name, prepare] of Object.entries(MOMENTS)) {
  t.test(`a connection ${name}`, async (t) => {
    const { socket, other } = await connection(t)
    other.on('error', () => {})
    const over = new Promise((resolve) => other.once('close', resolve))
    const before = sockets()
    await prepare(socket)
    const closed = once(socket, 'close')
    resetSocket(socket)
    await closed
    other.resume()
    // Its own half is open yet where the end came before the reset.
    other.end()
    await over
    await turn()
    t.equal(sockets(), before - 2, 'both ends are gone')
  })
}

t.test('Node alone leaves one behind, and its exit spins', (t) => {
  const { signal, stdout } = inNode('socket.resetAndDestroy()', SPINNING_MS)
  t.equal(stdout, 'done ', 'it has done all that it had to')
  t.equal(signal, 'SIGKILL', 'or resetSocket is no longer needed')
  t.end()
})

t.test('the process ends', (t) => {
  t.match(inNode('resetSocket(socket)', LIMIT_MS), { status: 0, stdout: 'done closed' })
  t.end()
})

async function connection(t: Test): Promise<{ socket: Socket; other: Socket }> {
  const server = createServer({ allowHalfOpen: true })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const other = connect((server.address() as AddressInfo).port, '127.0.0.1')
  const [socket] = (await once(server, 'connection')) as [Socket]
  t.teardown(() => server.close())
  return { socket, other }
}

/** Open sockets of this process. */
function sockets(): number {
  return process.getActiveResourcesInfo().filter((kind) => /TCPSocketWrap/.test(kind)).length
}

/** A process that does this to a connection it has just begun to shut down; it is killed after so long. */
function inNode(
  statement: string,
  limitMs: number,
): { status: number | null; signal: string | null; stdout: string } {
  const program = `
    import { writeSync } from 'node:fs'
    import { connect, createServer } from 'node:net'
    import { resetSocket } from '${new URL('../src/reset-socket.ts', import.meta.url).href}'
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      socket.on('error', () => {})
      socket.on('close', () => writeSync(1, 'closed'))
      socket.end()
      ${statement}
      writeSync(1, 'done ')
      server.close()
      other.destroy()
    })
    let other
    server.listen(0, '127.0.0.1', () => {
      other = connect(server.address().port, '127.0.0.1').on('error', () => {})
    })`
  const { status, signal, stdout } = spawnSync(
    process.execPath,
    ['--input-type=module', '--eval', program],
    { encoding: 'utf8', timeout: limitMs, killSignal: 'SIGKILL' },
  )
  return { status, signal, stdout }
}
