// Each request of a listener as a span of a trace. It begins before anything is decided about the request, so that all that
// it waits for is a part of it, and ends when nothing more of its answer is to come, whoever has written that.

import type { IncomingMessage, ServerResponse } from 'node:http'
import { NO_ROUTE } from '../request-counts.ts'
import type { RequestSpan, Tracing } from '../tracing.ts'
import type { App } from './app.ts'
import type { Listener } from './problem.ts'

/** Asked for every few seconds by machines: traces of these would hide all others. */
const NOT_TRACED: ReadonlySet<string> = new Set(['/livez', '/readyz', '/metrics'])

export interface RequestSpans {
  /** Begins the span of a request and runs what answers it. */
  begin(request: IncomingMessage, response: ServerResponse, work: () => void): void
  /** Runs what goes on with a request that was begun, maybe in the middle of something else. */
  goOn<T>(request: IncomingMessage, work: () => T): T
  /** Tells whether a request that was begun is to be sent to the collector. */
  isRecorded(request: IncomingMessage): boolean
  /** Lets the app say what its requests are. It must have no hooks yet: what they wait for belongs to the spans. */
  watch(app: App): void
}

/** Makes the spans of a listener. */
export function createRequestSpans(tracing: Tracing, listener: Listener): RequestSpans {
  const spans = new WeakMap<IncomingMessage, RequestSpan>()

  function goOn<T>(request: IncomingMessage, work: () => T): T {
    const span = spans.get(request)
    return span === undefined ? work() : span.run(work)
  }

  return {
    begin(request, response, work) {
      const [path = ''] = (request.url ?? '').split('?', 1)
      if (NOT_TRACED.has(path)) {
        work()
        return
      }
      const span = tracing.begin(request, listener)
      spans.set(request, span)
      if (span.isRecorded) {
        response.once('close', () => {
          const status = response.headersSent ? response.statusCode : undefined
          span.end({ status, isWhole: response.writableFinished })
        })
      }
      span.run(work)
    },
    goOn,
    isRecorded: (request) => spans.get(request)?.isRecorded === true,
    watch(app) {
      app.addHook('onRequest', (request, _reply, done) => {
        const route = request.routeOptions.url ?? NO_ROUTE
        spans.get(request.raw)?.describe({ route, requestId: request.id })
        goOn(request.raw, done)
      })
      // The last byte of an answer may go out together with those of others.
      app.addHook('onResponse', (request, _reply, done) => goOn(request.raw, done))
    },
  }
}
