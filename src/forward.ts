// The forwarder: one request to Pagero's API and its answer, streamed both ways over undici's dispatcher.
// It calls one origin only, follows no redirect and sends nothing twice but a refused GET or HEAD after a renewal.
// Which header fields pass is decided in forward-headers.ts, what a failure means in forward-failure.ts.

import type { IncomingMessage, ServerResponse } from 'node:http'
import type { LookupFunction } from 'node:net'
import type { Readable } from 'node:stream'
import { type Dispatcher, errors, Pool } from 'undici'
import { createEnding } from './answer-together.ts'
import type { Config } from './config.ts'
import { type AnswerSettings, openAnswer } from './forward-answer.ts'
import { asForwardError, proxyStatusOf, upstreamRefused } from './forward-failure.ts'
import { passedRequestFields } from './forward-headers.ts'
import { createForwardQueue, type ForwardQueue } from './forward-queue.ts'
import { arrivedBody, hasBody, openUpload, refuseTooLarge } from './forward-upload.ts'
import type { UserKey } from './grant.ts'
import { resetSocket } from './reset-socket.ts'
import { CONNECTION_LIFE_MS, createUpstreamLookup } from './upstream-address.ts'

/** Header section of an answer: as much as the broker takes from its own clients. */
const HEADER_BYTES_MAX = 16_384
/** Below the idle timeout of the usual servers (5 s and more), so that a reused connection is rarely a closed one. */
const KEEP_ALIVE_MS = 4_000
/** What nginx logs for a client that has gone: no status of the protocol, since nobody is there to read one. */
const CLIENT_GONE = 499

export type ForwardSettings = Config['proxy'] & {
  /** An origin: scheme, host, port. */
  apiUrl: string
  /** Names the broker in Via and Proxy-Status: the same on all replicas, and no host name. */
  viaPseudonym: string
  /** Finds the API's addresses; without one, private addresses are refused. */
  lookup?: LookupFunction
}

export interface ForwardCall {
  /** Whose call it is: one user's calls do not use up all connections. */
  user: UserKey
  method: string
  /** Path and query as {@link readForwardTarget} of request-target.ts returns them. */
  target: string
  accessToken: string
  /** Path that stands for the API's root at the broker: what a Location is rewritten to. */
  locationPrefix: string
  /** Fields that the broker adds to the answer, flat: security and CORS. Names are lower-case. */
  responseHeaders: readonly string[]
  /** Called right before the call goes out with a token, the first time and the second. */
  onSend?: () => void
  /** Called at most once, when the token is refused and the call can be repeated. Undefined = there is no newer one. */
  renew?: () => Promise<string | undefined>
}

export interface Forwarded {
  status: number
  /** `broker` when the client left before there was an answer. */
  source: 'upstream' | 'broker'
  /** False when the answer was cut: the client left, the upstream broke off, or a limit was reached. */
  complete: boolean
}

export interface Forwarder {
  /**
   * Forwards a request and writes the answer onto the raw response. While it throws, nothing has been written; after
   * the first byte a failure destroys the response, so that no cut answer looks whole.
   *
   * @throws BrokerError `request_invalid`, `loop_detected`, `payload_too_large`, `upstream_refused`,
   *   `upstream_unreachable`, `upstream_timeout`, `temporarily_unavailable` when no connection is free or while
   *   shutting down
   */
  forward(request: IncomingMessage, response: ServerResponse, call: ForwardCall): Promise<Forwarded>
  /** The Proxy-Status of an error that the broker answers with (RFC 9209). */
  proxyStatusOf(error: unknown): string
  /** Resolves when all calls in flight have ended; further ones are refused. */
  close(): Promise<void>
}

/** The connections to the API, and who may use one. */
interface Line {
  pool: Pool
  queue: ForwardQueue
  endTogether: AnswerSettings['endTogether']
}

/** One client request with what its attempts share. */
interface Exchange {
  request: IncomingMessage
  response: ServerResponse
  call: ForwardCall
  settings: ForwardSettings
  origin: string
  /** Fields for the upstream but Authorization. */
  passed: readonly string[]
  /** The body, if it is there already; else, if there is one, the stream that it comes by. */
  body: Buffer | undefined
  upload: Readable | undefined
  /** By `performance.now()`. */
  deadlineMs: number
}

type AttemptEnd = { kind: 'ended'; forwarded: Forwarded } | { kind: 'refused'; status: number }

/** Creates the forwarder with its connections. Throws on an `apiUrl` that is more than an origin. */
export function createForwarder(settings: ForwardSettings): Forwarder {
  const { origin, pathname, search } = new URL(settings.apiUrl)
  if (pathname !== '/' || search !== '') throw new TypeError('apiUrl must be an origin')
  const pool = new Pool(origin, {
    connections: settings.connections,
    // One request on a connection at a time: undici repeats nothing then, not even a GET.
    pipelining: 1,
    allowH2: false,
    keepAliveTimeout: KEEP_ALIVE_MS,
    clientTtl: CONNECTION_LIFE_MS,
    maxHeaderSize: HEADER_BYTES_MAX,
    headersTimeout: settings.headersTimeoutMs,
    bodyTimeout: settings.idleTimeoutMs,
    strictContentLength: true,
    connect: {
      timeout: settings.connectTimeoutMs,
      rejectUnauthorized: true,
      minVersion: 'TLSv1.2',
      lookup: settings.lookup ?? createUpstreamLookup({ allowPrivate: false }),
    },
  })
  const queue = createForwardQueue({
    connections: settings.connections,
    connectionsPerUser: settings.connectionsPerUser,
    waitingMax: settings.waitingMax,
    // Whoever waits for the first byte of an answer waits for the connection too.
    waitMs: settings.headersTimeoutMs,
  })
  const line: Line = { pool, queue, endTogether: createEnding() }

  return {
    async forward(request, response, call) {
      const { httpVersion, rawHeaders } = request
      const passed = passedRequestFields(rawHeaders, settings.viaPseudonym)
      passed.push('via', `${httpVersion} ${settings.viaPseudonym}`)
      const exchange: Exchange = {
        request,
        response,
        call,
        settings,
        origin,
        passed,
        body: undefined,
        upload: undefined,
        deadlineMs: performance.now() + settings.totalTimeoutMs,
      }
      if (hasBody(request)) {
        const limits = {
          bytesMax: settings.requestBytesMax,
          idleTimeoutMs: settings.idleTimeoutMs,
          bytesPerSecondMin: settings.requestBytesPerSecondMin,
        }
        refuseTooLarge(request, limits)
        exchange.body = await arrivedBody(request)
        if (exchange.body === undefined) exchange.upload = openUpload(request, limits)
        const length = request.headers['content-length']
        if (length !== undefined) passed.push('content-length', String(Number(length)))
      }

      const first = await attempt(line, exchange, call.accessToken)
      if (first.kind === 'ended') return first.forwarded
      const renewed = await renewedToken(exchange, first.status)
      const second = await attempt(line, exchange, renewed)
      if (second.kind === 'ended') return second.forwarded
      throw upstreamRefused(second.status)
    },
    proxyStatusOf: (error) => proxyStatusOf(settings.viaPseudonym, error),
    close: () => pool.close(),
  }
}

/**
 * Returns another access token for a call that was refused and can be repeated.
 * @throws BrokerError `upstream_refused` when there is none, or the call is not one to repeat
 */
async function renewedToken({ request, call }: Exchange, status: number): Promise<string> {
  const repeatable = (call.method === 'GET' || call.method === 'HEAD') && !hasBody(request)
  if (status !== 401 || !repeatable || call.renew === undefined) throw upstreamRefused(status)
  const renewed = await call.renew().catch((error: unknown) => {
    throw upstreamRefused(status, error)
  })
  if (renewed === undefined) throw upstreamRefused(status)
  return renewed
}

/**
 * Sends the request once. Resolves when the answer is out, or cut, or the client has gone; or, with nothing written,
 * when the upstream refuses the credential.
 * @throws BrokerError while nothing has been written
 */
function attempt(line: Line, exchange: Exchange, accessToken: string): Promise<AttemptEnd> {
  const { pool, queue } = line
  const { request, response, upload, call } = exchange
  return new Promise((resolve, reject) => {
    let upstream: Dispatcher.DispatchController | undefined
    let isSent = false
    let over = false
    let leaveQueue = () => {}
    const answer = openAnswer(request, response, answerSettings(exchange, line), {
      onReadable: () => upstream?.resume(),
      onStalled: () => cut(),
    })

    /** Whatever undici reports afterwards comes too late. */
    const release = () => {
      over = true
      clearTimeout(totalTimer)
      // Once sent, the call keeps its connection until undici has let go of it.
      if (!isSent) leaveQueue()
      response.off('close', onClose)
      answer.release()
    }
    const stop = () => {
      upstream?.abort(new errors.RequestAbortedError())
      upload?.destroy()
    }
    const finish = (complete: boolean) => {
      release()
      if (!complete) stop()
      resolve({ kind: 'ended', forwarded: forwardedAs(answer.status(), complete) })
    }
    /** Breaks the connection off, so that no cut answer looks whole. A pipelined response has no socket yet. */
    const cut = () => {
      const { socket, httpVersion } = request
      // What a client has not read would wait for it in the kernel, for as long as it likes; and with HTTP/1.0 the end of
      // a connection is the end of an answer.
      if (socket.writableLength > 0 || httpVersion === '1.0') resetSocket(socket)
      response.destroy()
      socket.destroy()
      finish(false)
    }
    const fail = (failure: unknown) => {
      if (over || answer.isEnded()) return
      if (answer.status() !== undefined) {
        cut()
        return
      }
      release()
      stop()
      reject(asForwardError(failure))
    }
    const onTotalTimeout = () => {
      if (answer.isEnded()) cut()
      else fail(new errors.HeadersTimeoutError('total timeout'))
    }
    const onClose = () => finish(response.writableFinished)
    const totalTimer = setTimeout(onTotalTimeout, exchange.deadlineMs - performance.now())
    if (response.destroyed) {
      onClose()
      return
    }
    response.on('close', onClose)
    upload?.on('error', fail)

    const handler: Dispatcher.DispatchHandler = {
      onRequestStart(controller) {
        upstream = controller
        // The client left while the call waited for a connection.
        if (over) stop()
      },
      onResponseStart(_controller, status, received) {
        // Interim answers (103 and kin) are not for the client: their fields would pass unread.
        if (status < 200) return
        if (status === 401 || status === 407) {
          release()
          stop()
          resolve({ kind: 'refused', status })
          return
        }
        answer.begin(status, received)
      },
      onResponseData(controller, chunk) {
        if (!over && !answer.write(chunk)) controller.pause()
      },
      onResponseEnd() {
        leaveQueue()
        if (over) return
        // First, or it would go on pausing the request, which the end of the answer reads on.
        upload?.destroy()
        answer.end()
      },
      onResponseError(_controller, error) {
        leaveQueue()
        fail(error)
      },
    }
    const send = (leave: () => void) => {
      leaveQueue = leave
      isSent = true
      call.onSend?.()
      pool.dispatch(requestOptions(exchange, accessToken), handler)
    }
    leaveQueue = queue.enter(call.user, send, fail)
  })
}

function requestOptions(
  { call, passed, body, upload }: Exchange,
  accessToken: string,
): Dispatcher.DispatchOptions {
  return {
    method: call.method,
    path: call.target,
    headers: [...passed, 'authorization', `Bearer ${accessToken}`],
    body: upload ?? body ?? null,
  }
}

function answerSettings(
  { call, settings, origin }: Exchange,
  { endTogether }: Pick<Line, 'endTogether'>,
): AnswerSettings {
  return {
    viaPseudonym: settings.viaPseudonym,
    requestUrl: origin + call.target,
    locationPrefix: call.locationPrefix,
    brokerFields: call.responseHeaders,
    bytesMax: settings.responseBytesMax,
    idleTimeoutMs: settings.idleTimeoutMs,
    endTogether,
  }
}

function forwardedAs(status: number | undefined, complete: boolean): Forwarded {
  if (status === undefined) return { status: CLIENT_GONE, source: 'broker', complete: false }
  return { status, source: 'upstream', complete }
}
