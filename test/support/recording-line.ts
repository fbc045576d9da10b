// A line to a listener that keeps every byte the listener sends: what its clients have really received.

import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import type { Test } from 'tap'

export interface RecordingLine {
  port: number
  /** Where connections lead; told later, because a listener may have to know this port before it starts. */
  target: number
  /** All that has come back, of all connections. */
  received(): Buffer
}

/** Starts a line; it ends with the test. */
export async function startRecordingLine(test: Test): Promise<RecordingLine> {
  const chunks: Buffer[] = []
  const sockets = new Set<Socket>()
  const line: RecordingLine = { port: 0, target: 0, received: () => Buffer.concat(chunks) }
  const server = createServer((client) => {
    const listener = connect(line.target, '127.0.0.1')
    listener.on('data', (chunk: Buffer) => chunks.push(chunk))
    for (const [one, other] of [
      [client, listener],
      [listener, client],
    ] as const) {
      sockets.add(one)
      one.on('error', () => {})
      one.once('close', () => {
        sockets.delete(one)
        other.destroySoon()
      })
      one.pipe(other)
    }
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  line.port = (server.address() as AddressInfo).port
  test.teardown(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return line
}
