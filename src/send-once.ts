// One POST on one fresh connection, never repeated by anything below. It tells three ends apart: answered, surely
// not sent, and unknown. What was received before a connection broke is kept, since a successor token may be in it.

import type { LookupFunction } from 'node:net'
import { Client, type Dispatcher } from 'undici'
import type { Clock } from './ports.ts'
import { createUpstreamLookup } from './upstream-address.ts'

/** Far above any token answer; what is beyond it is cut off. */
const ANSWER_BYTES_MAX = 262_144
/**
 * After the deadline the socket is read once more: a process that was paused wakes with its timer due and the answer
 * already waiting.
 */
const LAST_READ_MS = 250

export type SendResult =
  | {
      kind: 'answered'
      status: number
      headers: Readonly<Record<string, string | string[] | undefined>>
      body: string
    }
  | { kind: 'not_sent'; reason: string }
  | { kind: 'unknown'; reason: string; status: number | undefined; partialBody: string }

export interface Post {
  url: string
  headers: Readonly<Record<string, string>>
  body: string
}

/**
 * Posts once, over HTTP/1.1 on a connection of its own, and reads the whole answer. Never throws, never follows
 * a redirect. Both limits are instants of `clock.monotonicMs()`: nothing is sent after `sendBeforeMs`, nothing is
 * waited for after `deadlineMs`. Without `lookup`, private addresses are refused.
 */
export async function sendOnce(
  clock: Pick<Clock, 'monotonicMs'>,
  post: Post,
  limits: { sendBeforeMs: number; deadlineMs: number },
  lookup: LookupFunction = createUpstreamLookup({ allowPrivate: false }),
): Promise<SendResult> {
  const connectTimeoutMs = Math.ceil(limits.sendBeforeMs - clock.monotonicMs())
  if (connectTimeoutMs <= 0) return { kind: 'not_sent', reason: 'send_deadline' }
  const url = new URL(post.url)
  const client = new Client(url.origin, {
    allowH2: false,
    pipelining: 1,
    maxRequestsPerClient: 1,
    maxHeaderSize: 16_384,
    maxResponseSize: ANSWER_BYTES_MAX,
    // The one deadline is ours; the client's own timers would not know of it.
    headersTimeout: 0,
    bodyTimeout: 0,
    connect: {
      timeout: connectTimeoutMs,
      rejectUnauthorized: true,
      minVersion: 'TLSv1.2',
      maxCachedSessions: 0,
      keepAlive: false,
      lookup,
    },
  })
  let deadlineTimer: NodeJS.Timeout | undefined
  const end = () => void client.destroy(DONE).catch(() => undefined)
  try {
    return await new Promise<SendResult>((resolve) => {
      let sent = false
      let status: number | undefined
      let headers: Readonly<Record<string, string | string[] | undefined>> = {}
      const chunks: Buffer[] = []
      const received = () => Buffer.concat(chunks).toString('utf8')
      const giveUp = (reason: string) =>
        resolve(
          sent
            ? { kind: 'unknown', reason, status, partialBody: received() }
            : { kind: 'not_sent', reason },
        )
      const handler: Dispatcher.DispatchHandler = {
        onRequestStart(controller) {
          // Called right before the first byte is written, in the same turn.
          if (clock.monotonicMs() > limits.sendBeforeMs) {
            controller.abort(new SendDeadlineError())
            return
          }
          sent = true
        },
        onResponseStart(_controller, statusCode, responseHeaders) {
          if (statusCode < 200) return
          status = statusCode
          headers = responseHeaders
        },
        onResponseData(_controller, chunk) {
          chunks.push(chunk)
        },
        onResponseEnd() {
          resolve({ kind: 'answered', status: status ?? 0, headers, body: received() })
          end()
        },
        onResponseError(_controller, error) {
          giveUp(reasonOf(error))
        },
      }
      deadlineTimer = setTimeout(
        () => {
          deadlineTimer = setTimeout(() => giveUp('deadline'), LAST_READ_MS)
        },
        Math.max(0, limits.deadlineMs - clock.monotonicMs()),
      )
      client.dispatch(
        {
          method: 'POST',
          path: url.pathname + url.search,
          headers: post.headers,
          body: post.body,
          idempotent: false,
          reset: true,
        },
        handler,
      )
    })
  } finally {
    clearTimeout(deadlineTimer)
    end()
  }
}

/** One for all: the client would make an error of its own each time, which costs more than the rest of its end. */
const DONE = new Error('the call is over')

class SendDeadlineError extends Error {
  readonly code = 'send_deadline'
}

/** A constant for the log: the error's code, never its message, which names hosts and addresses. */
function reasonOf(error: Error): string {
  const { code } = error as NodeJS.ErrnoException
  return typeof code === 'string' && /^[A-Za-z0-9_]{2,48}$/.test(code)
    ? code.toLowerCase()
    : 'error'
}
