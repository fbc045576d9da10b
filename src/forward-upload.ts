// The body of a request on its way up: counted, never parsed, with back-pressure.
// The client's stream is read through a stream of ours, because whoever sends a stream on may destroy it, and destroying
// a request closes its connection: the client would never see the answer.

import type { IncomingMessage } from 'node:http'
import { Readable } from 'node:stream'
import { BrokerError } from './errors.ts'

/** What one upload may hold in memory: as much as a socket reads at once. */
const BUFFER_BYTES = 65_536

export interface UploadLimits {
  bytesMax: number
  /** How long the client may send nothing, or too little, while it could send. */
  idleTimeoutMs: number
  /** On the average over that time; the end of the body is always enough. 0: anything is. */
  bytesPerSecondMin: number
}

/** Tells whether a request has a body (RFC 9112 section 6.3). */
export function hasBody(request: IncomingMessage): boolean {
  return (
    request.headers['transfer-encoding'] !== undefined ||
    Number(request.headers['content-length'] ?? 0) > 0
  )
}

/**
 * Returns the whole body of a request if it is small and has come with the head, as most bodies do, and undefined if
 * it is still to come: then it takes a stream.
 */
export async function arrivedBody(request: IncomingMessage): Promise<Buffer | undefined> {
  const length = Number(request.headers['content-length'] ?? 0)
  if (length === 0 || length > BUFFER_BYTES) return undefined
  // The parser tells of the head before it goes on to what came with it; and of the end after this.
  await Promise.resolve()
  if (request.readableLength !== length) return undefined
  const body = request.read() as Buffer
  // Or its end is never told of.
  request.resume()
  return body
}

/**
 * Returns the body of a request as a stream with back-pressure. It fails with `payload_too_large` when the body
 * outgrows the limit, and with `request_invalid` when it stops arriving or comes too slowly. Destroying it leaves the request alone.
 */
export function openUpload(request: IncomingMessage, limits: UploadLimits): Readable {
  /** What must come within each idle timeout. */
  const bytesPerWait = (limits.bytesPerSecondMin * limits.idleTimeoutMs) / 1000
  let bytes = 0
  let bytesDue = 0
  let idleTimer: NodeJS.Timeout | undefined
  const awaitClient = () => {
    clearTimeout(idleTimer)
    idleTimer = setTimeout(onIdle, limits.idleTimeoutMs)
    bytesDue = bytes + bytesPerWait
  }
  const onIdle = () => {
    upload.destroy(
      new BrokerError('request_invalid', 'The body has stopped arriving, or comes too slowly.'),
    )
  }
  const onData = (chunk: Buffer) => {
    bytes += chunk.length
    if (bytes > limits.bytesMax) {
      upload.destroy(tooLarge(limits))
    } else if (upload.push(chunk)) {
      if (bytes < bytesDue) return
      bytesDue = bytes + bytesPerWait
      idleTimer?.refresh()
    } else {
      request.pause()
      clearTimeout(idleTimer)
    }
  }
  const onEnd = () => {
    clearTimeout(idleTimer)
    upload.push(null)
  }
  const upload = new Readable({
    highWaterMark: BUFFER_BYTES,
    read() {
      if (!request.isPaused() || request.readableEnded) return
      awaitClient()
      request.resume()
    },
    destroy(error, callback) {
      clearTimeout(idleTimer)
      request.off('data', onData).off('end', onEnd)
      callback(error)
    },
  })
  awaitClient()
  request.on('data', onData).on('end', onEnd)
  return upload
}

/** @throws BrokerError `payload_too_large` when the announced length is over the limit */
export function refuseTooLarge(request: IncomingMessage, limits: UploadLimits): void {
  if (Number(request.headers['content-length'] ?? 0) > limits.bytesMax) throw tooLarge(limits)
}

function tooLarge(limits: UploadLimits): BrokerError {
  return new BrokerError(
    'payload_too_large',
    `The body is larger than ${limits.bytesMax} bytes, the limit of this broker.`,
  )
}
