// A reset that leaves nothing behind.

import type { Socket } from 'node:net'

/**
 * Ends a connection by a reset, so that what its other end has not read does not wait for it in the kernel.
 *
 * One that is being shut down just now is destroyed instead: libuv refuses to reset it (`uv_tcp_close_reset` answers
 * EINVAL), and Node then takes it for closed, which it is not: the descriptor stays open, `close` never comes, and the
 * process spins in its exit for ever.
 */
export function resetSocket(socket: Socket): void {
  const isBeingShutDown =
    socket.writableEnded && !socket.writableFinished && socket.writableLength === 0
  if (isBeingShutDown) socket.destroy()
  else socket.resetAndDestroy()
}
