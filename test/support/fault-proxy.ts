// A TCP proxy whose line a test can spoil while it runs: in front of PostgreSQL or of the authorization server.
// It knows nothing of what it carries beyond the bytes that a test asks it to watch for.

import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import type { Test } from 'tap'
import { resetSocket } from '../../src/reset-socket.ts'

/** `up` is from the broker to the server, `down` the way back. */
type Direction = 'up' | 'down'

type Mode =
  /** Everything passes. */
  | 'pass'
  /** New connections are reset. */
  | 'refuse'
  /** Connections open and stay open, and nothing passes either way: a blackhole, half-open after it. */
  | 'stall'

/** A cut that waits for its moment; the first connection that reaches it is reset, and it is used up. */
export type Cut =
  /** After so many bytes in one direction of one connection; those bytes still pass. */
  | { after: number; direction: Direction }
  /** When these bytes go up: `before` they reach the server, or when its answer to them is on its way back. */
  | { at: string; when: 'before' | 'answered' }

export interface FaultProxy {
  port: number
  /** The same URL by way of the proxy. */
  through(url: string): string
  /** Where connections go from now on. */
  aim(port: number): void
  mode: Mode
  /** Each piece is held up for so long. */
  delayMs: number
  /** Cuts that are waiting. */
  cuts: Cut[]
  /** Resets every connection now. */
  cut(): void
  /** Connections that were opened so far. */
  opened: number
  /** Bytes that have come so far. */
  carried: Record<Direction, number>
  stop(): Promise<void>
}

interface Line {
  ends: [Socket, Socket]
  bytes: Record<Direction, number>
  /** The cut that comes with the server's next byte. */
  doomed: boolean
}

/** Starts a proxy to a port of this machine; it ends with the test, if one is given. */
export async function startFaultProxy(port: number, test?: Test): Promise<FaultProxy> {
  const lines = new Set<Line>()
  let target = port
  const server = createServer((client) => {
    proxy.opened += 1
    if (proxy.mode === 'refuse') {
      resetSocket(client)
      return
    }
    const upstream = connect(target, '127.0.0.1')
    const line: Line = { ends: [client, upstream], bytes: { up: 0, down: 0 }, doomed: false }
    lines.add(line)
    void carry(line, 'up', client, upstream)
    void carry(line, 'down', upstream, client)
  })

  async function carry(line: Line, direction: Direction, from: Socket, to: Socket): Promise<void> {
    from.setNoDelay(true)
    from.on('error', () => {})
    from.once('close', () => {
      lines.delete(line)
      to.destroySoon()
    })
    try {
      for await (const piece of from as AsyncIterable<Buffer>) {
        if (proxy.delayMs > 0) await new Promise((resolve) => setTimeout(resolve, proxy.delayMs))
        while (proxy.mode === 'stall' && !from.destroyed) {
          await new Promise((resolve) => setTimeout(resolve, 20))
        }
        if (from.destroyed) return
        const passing = spoil(line, direction, piece)
        if (passing === undefined) return reset(line)
        to.write(passing)
        if (passing.length < piece.length) {
          // Gives the last bytes time to be read before the reset overtakes them.
          setTimeout(() => reset(line), 20)
          return
        }
      }
    } catch {
      // The other end's close takes this one along.
    }
  }

  /** What passes of a piece: all of it, its beginning, or nothing and the line is cut. */
  function spoil(line: Line, direction: Direction, piece: Buffer): Buffer | undefined {
    if (line.doomed && direction === 'down') return undefined
    const before = line.bytes[direction]
    line.bytes[direction] += piece.length
    proxy.carried[direction] += piece.length
    const index = proxy.cuts.findIndex((cut) =>
      'at' in cut
        ? direction === 'up' && piece.includes(cut.at)
        : cut.direction === direction && before + piece.length > cut.after,
    )
    const cut = proxy.cuts[index]
    if (cut === undefined) return piece
    proxy.cuts.splice(index, 1)
    if ('after' in cut) return piece.subarray(0, Math.max(0, cut.after - before))
    if (cut.when === 'before') return undefined
    line.doomed = true
    return piece
  }

  function reset({ ends }: Line): void {
    for (const end of ends) resetSocket(end)
  }

  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const own = (server.address() as AddressInfo).port
  const proxy: FaultProxy = {
    port: own,
    through(text) {
      const url = new URL(text)
      url.hostname = '127.0.0.1'
      url.port = String(own)
      return url.href
    },
    aim: (next) => {
      target = next
    },
    mode: 'pass',
    delayMs: 0,
    cuts: [],
    cut: () => lines.forEach(reset),
    opened: 0,
    carried: { up: 0, down: 0 },
    async stop() {
      lines.forEach(reset)
      await new Promise((resolve) => server.close(resolve))
    },
  }
  test?.teardown(() => proxy.stop())
  return proxy
}
