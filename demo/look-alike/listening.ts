// Opening and closing the look-alike's servers.

import type { Server } from 'node:http'
import type { AddressInfo } from 'node:net'

/** Listens and returns the port; 0 takes any free one. */
export async function listen(server: Server, host: string, port: number): Promise<number> {
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(port, host, resolve)
  })
  return (server.address() as AddressInfo).port
}

/** Stops listening and cuts what is still connected. */
export async function close(server: Server): Promise<void> {
  const closed = new Promise<void>((resolve) => server.close(() => resolve()))
  server.closeAllConnections()
  await closed
}
