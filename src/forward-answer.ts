// The answer on its way down: head, body and end, written onto the raw response as the upstream sends them.
// The body is counted, never parsed, with back-pressure. Nothing here knows the client library or decides on failures.

import type { IncomingMessage, ServerResponse } from 'node:http'
import {
  type AnswerContext,
  answerFields,
  fieldOf,
  type ReceivedFields,
} from './forward-headers.ts'
import { hasBody } from './forward-upload.ts'

/** An answer of so many bytes at most leaves with its head in one write: copying it costs less than a second one. */
const ONE_WRITE_BYTES_MAX = 16_384
/** Long enough for the client to read an early answer, too short to be fed by one that does not stop sending. */
export const LINGER_MS = 1_000

export interface AnswerSettings extends Omit<AnswerContext, 'status'> {
  bytesMax: number
  /** How long the client may leave the broker waiting with bytes that it does not read. */
  idleTimeoutMs: number
  /** Ends an answer with a text; see `answer-together.ts`. */
  endTogether: (response: ServerResponse, text: string) => void
}

/** The upstream has more to say than this broker passes on. */
class AnswerTooLargeError extends Error {
  readonly code = 'ANSWER_TOO_LARGE'
}

export interface Answer {
  /** Undefined while nothing has been written. */
  status(): number | undefined
  /** Writes the head, unless it announces too much. @throws AnswerTooLargeError */
  begin(status: number, received: ReceivedFields): void
  /**
   * Passes on a chunk. False means: no more before `onReadable`; the client does not keep up.
   * @throws AnswerTooLargeError
   */
  write(chunk: Buffer): boolean
  /** Whether its last byte has been given: nothing can be added. */
  isEnded(): boolean
  /** Ends the answer, if its last byte has not done so already. */
  end(): void
  /** Lets go of the response. */
  release(): void
}

/** What a client that does not keep up comes to: it catches up, or has not read for too long. */
export interface ReaderEvents {
  onReadable: () => void
  onStalled: () => void
}

/** Opens the answer to a request. */
export function openAnswer(
  request: IncomingMessage,
  response: ServerResponse,
  settings: AnswerSettings,
  reader: ReaderEvents,
): Answer {
  const withBody = hasBody(request)
  /** Whether something of the body is still on its way through the broker. */
  const isUploading = () => withBody && !request.readableEnded
  let status: number | undefined
  let bytes = 0
  let isGivenWhole = false
  let bytesExpected: number | undefined
  let slowReaderTimer: NodeJS.Timeout | undefined

  const onDrain = () => {
    clearTimeout(slowReaderTimer)
    reader.onReadable()
  }
  const isEnded = () => isGivenWhole || response.writableEnded
  const count = (more: number) => {
    bytes += more
    if (bytes > settings.bytesMax) throw new AnswerTooLargeError()
  }
  response.on('drain', onDrain)

  return {
    // No getter: V8 makes a hidden class for each object that has one, and keeps with it, until the next large collection,
    // all that the getter sees; that was a third of what a call costs.
    status: () => status,
    isEnded,
    begin(receivedStatus, received) {
      const fields = answerFields(received, { ...settings, status: receivedStatus })
      const length = fieldOf(fields, 'content-length')
      bytesExpected = length === undefined ? undefined : Number(length)
      if (request.method !== 'HEAD' && bytesExpected !== undefined) {
        if (bytesExpected > settings.bytesMax) throw new AnswerTooLargeError()
      }
      // With a part of the request unread, the connection cannot be used again.
      if (withBody && !request.complete) fields.push('connection', 'close')
      response.writeHead(receivedStatus, fields)
      status = receivedStatus
      // Fields and first bytes usually come in one read, and then leave in one write.
      queueMicrotask(() => {
        if (bytes === 0 && !response.writableEnded) response.flushHeaders()
      })
    },
    write(chunk) {
      count(chunk.length)
      if (bytes === bytesExpected && !isUploading()) {
        // As text of as many characters Node sends it with the head; the bytes are the same.
        const isSmall = chunk.length === bytes && bytes <= ONE_WRITE_BYTES_MAX
        isGivenWhole = true
        if (isSmall) settings.endTogether(response, chunk.toString('latin1'))
        else response.end(chunk)
        return true
      }
      if (response.write(chunk)) return true
      clearTimeout(slowReaderTimer)
      slowReaderTimer = setTimeout(reader.onStalled, settings.idleTimeoutMs)
      return false
    },
    end() {
      clearTimeout(slowReaderTimer)
      if (!isEnded()) endAnswer(request, response)
    },
    release() {
      clearTimeout(slowReaderTimer)
      response.off('drain', onDrain)
    },
  }
}

/**
 * Ends an answer. While the client still sends its body, the end is held back until it stops, at most a second, and
 * what it sends is thrown away: closing at once would reset the connection, and with it the answer.
 * Such an answer must carry `Connection: close`.
 */
export function endAnswer(
  request: IncomingMessage,
  response: ServerResponse,
  lastChunk?: string,
): void {
  if (!hasBody(request)) {
    response.end(lastChunk)
    return
  }
  // What is left of the body must be read, or the next request on the connection never is.
  request.resume()
  if (request.complete) {
    response.end(lastChunk)
    return
  }
  if (lastChunk === undefined) response.flushHeaders()
  else response.write(lastChunk)
  const end = () => {
    clearTimeout(timer)
    request.off('end', end).off('close', end)
    response.end()
  }
  const timer = setTimeout(end, LINGER_MS)
  request.on('end', end).on('close', end)
}
