// Stands where Pagero's API stands: a server on a bare socket that keeps every byte of a request as it came,
// and answers with whatever bytes a test wants, well-formed or not.

import { createServer, type Socket } from 'node:net'
import type { AddressInfo } from 'node:net'
import { once } from 'node:events'

export interface UpstreamCall {
  /** `GET /a HTTP/1.1` */
  line: string
  /** The second word of the line. */
  target: string
  /** Lower-case name and raw value of each field, in the order they came. */
  fields: ReadonlyArray<readonly [name: string, value: string]>
  /** All values of a field. */
  values(name: string): string[]
  /** Bytes behind the head, framing included, as far as they have come. */
  received(): Buffer
  /** Resolves with the body, without its framing, when it is whole. */
  body: Promise<Buffer>
  /** Resolves when the connection has closed. */
  closed: Promise<void>
  socket: Socket
}

export interface Upstream {
  url: string
  port: number
  calls: UpstreamCall[]
  /** Connections accepted so far. */
  connections(): number
}

interface Teardown {
  teardown(fn: () => unknown): void
}

/** Starts an upstream that answers each request head with `respond`; closed at teardown. */
export async function startUpstream(
  t: Teardown,
  respond: (call: UpstreamCall) => unknown,
): Promise<Upstream> {
  const calls: UpstreamCall[] = []
  const sockets = new Set<Socket>()
  let connections = 0
  const server = createServer((socket) => {
    connections += 1
    sockets.add(socket)
    socket.setNoDelay(true)
    socket.on('error', () => undefined)
    const closed = new Promise<void>((resolve) => {
      socket.on('close', () => {
        sockets.delete(socket)
        resolve()
      })
    })
    readCalls(socket, closed, (call) => {
      calls.push(call)
      respond(call)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(async () => {
    for (const socket of sockets) socket.destroy()
    server.close()
    await once(server, 'close')
  })
  const { port } = server.address() as AddressInfo
  return { url: `http://127.0.0.1:${port}`, port, calls, connections: () => connections }
}

/** Writes a whole answer with a Content-Length. `fields` are lines such as `Content-Type: text/plain`. */
export function answer(
  call: UpstreamCall,
  status: number,
  body: string | Buffer = '',
  fields: readonly string[] = [],
): void {
  const lines = [
    `HTTP/1.1 ${status} Status`,
    ...fields,
    `Content-Length: ${Buffer.byteLength(body)}`,
  ]
  call.socket.write(
    Buffer.concat([Buffer.from(`${lines.join('\r\n')}\r\n\r\n`, 'latin1'), Buffer.from(body)]),
  )
}

function readCalls(
  socket: Socket,
  closed: Promise<void>,
  onCall: (call: UpstreamCall) => void,
): void {
  let pending: Buffer = Buffer.alloc(0)
  let current: { done: (rest: Buffer) => boolean } | undefined
  socket.on('data', (chunk: Buffer) => {
    pending = Buffer.concat([pending, chunk])
    for (;;) {
      if (current !== undefined) {
        if (!current.done(pending)) return
        current = undefined
      }
      const headEnd = pending.indexOf('\r\n\r\n')
      if (headEnd === -1) return
      const head = pending.subarray(0, headEnd).toString('latin1')
      pending = pending.subarray(headEnd + 4)
      const { promise: body, resolve: resolveBody } = Promise.withResolvers<Buffer>()
      const call = openCall({ socket, closed, head, received: () => pending, body })
      const read = bodyReader(call)
      current = {
        done(bytes) {
          const end = read(bytes)
          if (end === undefined) return false
          pending = bytes.subarray(end.length)
          resolveBody(end.body)
          return true
        },
      }
      onCall(call)
    }
  })
}

function openCall(
  parts: Pick<UpstreamCall, 'socket' | 'closed' | 'received' | 'body'> & { head: string },
): UpstreamCall {
  const { head, ...rest } = parts
  const [line = '', ...lines] = head.split('\r\n')
  const fields = lines.map((text) => {
    const colon = text.indexOf(':')
    return [text.slice(0, colon).toLowerCase(), text.slice(colon + 1).trim()] as const
  })
  return {
    line,
    target: line.split(' ')[1] ?? '',
    fields,
    values: (name) => fields.filter(([field]) => field === name).map(([, value]) => value),
    ...rest,
  }
}

/** Returns a function that finds the end of the body in the bytes so far. */
function bodyReader(
  call: UpstreamCall,
): (bytes: Buffer) => { length: number; body: Buffer } | undefined {
  if (call.values('transfer-encoding').includes('chunked')) return readChunked
  const length = Number(call.values('content-length')[0] ?? 0)
  return (bytes) =>
    bytes.length < length ? undefined : { length, body: Buffer.from(bytes.subarray(0, length)) }
}

function readChunked(bytes: Buffer): { length: number; body: Buffer } | undefined {
  const chunks: Buffer[] = []
  let at = 0
  for (;;) {
    const lineEnd = bytes.indexOf('\r\n', at)
    if (lineEnd === -1) return undefined
    const size = Number.parseInt(bytes.subarray(at, lineEnd).toString('latin1'), 16)
    const end = lineEnd + 2 + size
    if (bytes.length < end + 2) return undefined
    if (size === 0) return { length: end + 2, body: Buffer.concat(chunks) }
    chunks.push(bytes.subarray(lineEnd + 2, end))
    at = end + 2
  }
}
