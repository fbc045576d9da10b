// Each request of a listener as a span of a trace. It begins before the first hook, so that all that the request waits for
// is a part of it, and ends when nothing more of its answer is to come, whoever has written that.

import type { IncomingMessage } from 'node:http'
import { NO_ROUTE } from '../request-counts.ts'
import type { RequestSpan, Tracing } from '../tracing.ts'
import type { App } from './app.ts'
import type { Listener } from './problem.ts'

/** Asked for every few seconds by machines: traces of these would hide all others. */
const NOT_TRACED: ReadonlySet<string> = new Set(['/livez', '/readyz', '/metrics'])

/** Traces the requests of an app that has no hooks yet. */
export function traceRequests(app: App, tracing: Tracing, listener: Listener): void {
  const spans = new WeakMap<IncomingMessage, RequestSpan>()

  app.addHook('onRequest', (request, reply, done) => {
    const route = request.routeOptions.url ?? NO_ROUTE
    if (NOT_TRACED.has(route)) {
      done()
      return
    }
    const span = tracing.begin(request.raw, { listener, requestId: request.id })
    spans.set(request.raw, span)
    const { raw } = reply
    raw.once('close', () => {
      const status = raw.headersSent ? raw.statusCode : undefined
      span.end({ route, status, isWhole: raw.writableFinished })
    })
    span.run(done)
  })

  // With the last byte of a body the rest begins, and that byte belongs to the connection.
  app.addHook('preValidation', (request, _reply, done) => {
    const span = spans.get(request.raw)
    if (span === undefined) done()
    else span.run(done)
  })
}
