// What Prometheus is told. Most counts come from what the log and the audit record are told anyway, so that nothing in the
// core knows of metrics, and none can forget what the log says. What can be read at any time is read when it is asked for.
// Every label is from a list that is closed: names of events, routes, outcomes and callers. No user and no secret is in any.

import { collectDefaultMetrics, Registry } from 'prom-client'
import { createEventCounts, type Level } from './event-counts.ts'
import type { Clock, Log, LogFields } from './ports.ts'
import { addReadings, type Readings } from './readings.ts'
import type { Audit } from './record-stores.ts'
import { createCallerCounts, createRequestCounts, type RequestCounts } from './request-counts.ts'

export interface Metrics {
  /** The log that the metrics were made with: what goes through this one is counted. */
  log: Log
  /** Likewise the audit record. */
  counted(audit: Audit): Audit
  requestsOf(listener: 'public' | 'internal'): RequestCounts
  /** Begins to tell of these as well. Once. */
  read(readings: Readings): void
  /** Everything, in the text format of Prometheus. Any number of calls at once. */
  exposition(): Promise<string>
  readonly contentType: string
}

/** Makes the metrics of a process. */
export function createMetrics({ clock, log }: { clock: Clock; log: Log }): Metrics {
  const registry = new Registry()
  collectDefaultMetrics({ register: registry })
  const noteEvent = createEventCounts(registry)
  const requestsOf = createRequestCounts(registry)
  const handedOut = createCallerCounts(registry, {
    name: 'pagero_broker_tokens_handed_out_total',
    help: 'Access tokens given to callers, and to gateways for them.',
  })
  const proxied = createCallerCounts(registry, {
    name: 'pagero_broker_calls_proxied_total',
    help: "Calls made to Pagero's API. Those of browser sessions have no caller.",
  })

  const at =
    (level: Level) =>
    (event: string, fields?: LogFields): void => {
      log[level](event, fields)
      try {
        noteEvent(level, event, fields)
      } catch {
        // Whoever logs may have a token in hand that is not stored yet: to count is not worth that.
      }
    }

  const countedLog: Log = {
    ...log,
    trace: (event, fields) => log.trace(event, fields),
    debug: at('debug'),
    info: at('info'),
    warn: at('warn'),
    error: at('error'),
  }

  return {
    log: countedLog,
    counted: (audit) => ({
      record(event) {
        const { action, actor } = event
        // The name of a session is its user.
        const caller = actor === 'caller' ? (event.name ?? '') : ''
        if (action === 'token_handed_out') handedOut(caller)
        else if (action === 'call_proxied') proxied(caller)
        audit.record(event)
      },
    }),
    requestsOf,
    read: (readings) => addReadings(registry, readings, { clock, log: countedLog }),
    exposition: () => registry.metrics(),
    contentType: registry.contentType,
  }
}
