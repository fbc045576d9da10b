// A cable between the broker and PostgreSQL that a test can pull out and put back in.

import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import type { Test } from 'tap'
import { resetSocket } from '../../src/reset-socket.ts'

export interface Relay {
  /** The database's URL through the relay. */
  url: string
  /** Cuts every connection and refuses new ones. */
  cut(): void
  mend(): void
}

/** Starts a relay to the server of a database URL; it ends with the test. */
export async function startRelay(test: Test, url: string): Promise<Relay> {
  const target = new URL(url)
  const sockets = new Set<Socket>()
  let whole = true
  const server = createServer((client) => {
    if (!whole) {
      resetSocket(client)
      return
    }
    const upstream = connect(Number(target.port), target.hostname)
    for (const [one, other] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      sockets.add(one)
      one.on('error', () => {})
      one.once('close', () => {
        sockets.delete(one)
        other.destroy()
      })
      one.pipe(other)
    }
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const cut = () => {
    whole = false
    for (const socket of sockets) resetSocket(socket)
  }
  test.teardown(() => {
    cut()
    server.close()
  })
  const relayed = new URL(url)
  relayed.hostname = '127.0.0.1'
  relayed.port = String((server.address() as AddressInfo).port)
  return {
    url: relayed.href,
    cut,
    mend: () => {
      whole = true
    },
  }
}
