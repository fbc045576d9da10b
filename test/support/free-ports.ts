// Ports for programs that must be told theirs before they start, and that keep them through a death and a restart.

import { createServer } from 'node:net'

/**
 * Below those that a system gives to whoever asks for any, which begin at 32,768 on Linux and at 49,152 on macOS: what a
 * program leaves for a while, nobody takes who needs not this one. Above 10,080, which `fetch` refuses.
 */
const FIRST_PORT = 10_100
const LAST_PORT = 32_000
/** Of two processes that were started one after the other; those of two test files seldom meet. */
const PORTS_APART = 97

let next = FIRST_PORT + ((process.pid * PORTS_APART) % (LAST_PORT - FIRST_PORT))

/** Returns ports that are free now, and that no later call in this process returns. */
export async function freePorts(count: number): Promise<number[]> {
  const ports: number[] = []
  for (let tried = 0; ports.length < count; tried += 1) {
    if (tried > LAST_PORT - FIRST_PORT) throw new Error('no port is free')
    const port = next
    next = port < LAST_PORT ? port + 1 : FIRST_PORT
    if (await isFree(port)) ports.push(port)
  }
  return ports
}

function isFree(port: number): Promise<boolean> {
  const server = createServer()
  return new Promise((resolve) => {
    server.once('error', () => resolve(false))
    server.listen({ port, host: '127.0.0.1' }, () => server.close(() => resolve(true)))
  })
}
