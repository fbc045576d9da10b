// What is under way on each connection of a listener, and when one is closed although its client would keep it: when
// the broker shuts down, when a body does not arrive, when an answer is not read, and when it came before the body was.
// What is answered, and why, is for others to decide.

import type { IncomingMessage, Server, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { LINGER_MS } from '../forward-answer.ts'
import { hasBody } from '../forward-upload.ts'
import { resetSocket } from '../reset-socket.ts'

/** Of one listener; what comes beyond is closed unread. At some 20 KiB for each, a flood of them costs 200 MiB at most. */
const CONNECTIONS_MAX = 10_000
/** For a whole body of 64 KiB, the most that the broker's own routes take. */
const BODY_TIMEOUT_MS = 30_000
/** While the broker shuts down, so long may a connection go on without a whole request on it. */
const SHUTDOWN_PATIENCE_MS = 1_000

export interface Connections {
  /**
   * Takes note of a request that has arrived, until its answer is out or its connection gone, and calls `answer` when
   * those before it on the connection have been answered: what a client sends one behind the other is not done at once,
   * or out of order, or after an answer that ends the connection (RFC 9112 sections 9.3.2 and 9.6).
   */
  begin(request: IncomingMessage, response: ServerResponse, answer: () => void): void
  /** Tells whether something written onto the socket now is read as what it is, and not as part of another answer. */
  isFree(socket: Socket): boolean
  /** Ends a connection on which nothing more can be understood, as soon as what was asked before has been answered. */
  endAfterAnswers(socket: Socket): void
  /**
   * Ends what no answer is due on, once the server takes no more connections: idle ones at once, silent ones and unfinished
   * requests within a second or two. Requests that are being answered keep their connections until they have been.
   */
  close(): void
}

/** Of a request whose body must arrive in time: the timer that ends its connection. A map of them costs each request more. */
const BODY_TIMER = Symbol('body timer')
type BoundedRequest = IncomingMessage & { [BODY_TIMER]?: NodeJS.Timeout | undefined }

/** Leaves the body of a request, however long it takes, to a route that keeps limits of its own. */
export function leaveBody(request: BoundedRequest): void {
  if (request[BODY_TIMER] === undefined) return
  clearTimeout(request[BODY_TIMER])
  request[BODY_TIMER] = undefined
}

function isBounded(request: BoundedRequest): boolean {
  return request[BODY_TIMER] !== undefined
}

/** Begins to keep account of the connections of a server. */
export function watchConnections(
  server: Server,
  limits: { answerIdleTimeoutMs: number },
): Connections {
  /** In the order of their requests; only the first is being answered. */
  const underWay = new Map<Socket, Set<ServerResponse>>()
  /** What is to be done for the others. */
  const waiting = new WeakMap<ServerResponse, () => void>()
  const ending = new WeakSet<Socket>()
  let closing = false

  server.maxConnections = CONNECTIONS_MAX
  server.on('connection', (socket) => {
    underWay.set(socket, new Set())
    socket.on('close', () => underWay.delete(socket))
  })
  // When nothing has moved either way for so long; Node has a longer time of its own for between two requests.
  server.setTimeout(limits.answerIdleTimeoutMs, (socket) => {
    // An answer that is still to come is waited for, and a body that does not come has limits of its own.
    const isDue = (underWay.get(socket)?.size ?? 0) > 0
    // Reset, or what has not been read would wait in the kernel, for as long as its client likes.
    if (socket.writableLength > 0) resetSocket(socket)
    else if (!isDue) socket.destroy()
  })

  // One function for all answers: there is one on the way to every token.
  function onAnswered(this: ServerResponse): void {
    const { req: request } = this
    const { socket } = request
    const responses = underWay.get(socket)
    responses?.delete(this)
    const [next] = responses ?? []
    const isLast = closing ? next === undefined : ending.has(socket) && next?.req.complete !== true
    if (isLast) socket.destroySoon()
    else if (isBounded(request) && !request.complete) boundBody(request, LINGER_MS)
    else leaveBody(request)
    // Where that answer has ended the connection, what waits behind it is not done any more.
    if (next !== undefined && socket.writable) start(next)
  }

  function start(response: ServerResponse): void {
    const answer = waiting.get(response)
    waiting.delete(response)
    if (hasBody(response.req)) boundBody(response.req, BODY_TIMEOUT_MS)
    answer?.()
  }

  function sweep(): void {
    for (const [socket, responses] of underWay) {
      if ([...responses].every(isUnfinished)) socket.destroy()
    }
  }

  return {
    begin(request, response, answer) {
      const responses = underWay.get(request.socket)
      responses?.add(response)
      response.on('close', onAnswered)
      if (responses !== undefined && responses.size > 1) {
        waiting.set(response, answer)
        return
      }
      if (hasBody(request)) boundBody(request, BODY_TIMEOUT_MS)
      answer()
    },
    isFree(socket) {
      const [first, second] = underWay.get(socket) ?? []
      // A fault in the middle of a request's body is told in the place of its answer.
      return (
        first === undefined || (second === undefined && !first.headersSent && !first.req.complete)
      )
    },
    endAfterAnswers(socket) {
      const [first] = underWay.get(socket) ?? []
      if (first?.req.complete === true) ending.add(socket)
      else socket.destroySoon()
    },
    close() {
      closing = true
      for (const responses of underWay.values()) {
        // Those before it on the same connection must not close it.
        const last = [...responses].at(-1)
        if (last !== undefined) last.shouldKeepAlive = false
      }
      // A server that never listened has no connections, and never says that it has closed.
      if (!server.listening) return
      const sweeping = setInterval(sweep, SHUTDOWN_PATIENCE_MS)
      server.once('close', () => clearInterval(sweeping))
    },
  }
}

function boundBody(request: BoundedRequest, timeoutMs: number): void {
  leaveBody(request)
  request[BODY_TIMER] = setTimeout(() => {
    if (!request.complete) request.socket.destroy()
  }, timeoutMs)
}

/** Its client still owes the broker a part of it, and no answer has begun. */
function isUnfinished({ req: request, headersSent }: ServerResponse): boolean {
  return isBounded(request) && !request.complete && !headersSent
}
