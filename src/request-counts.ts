// Requests that were answered, and tokens that were given out, counted. All of these stand on the way of every token, so the
// counts are plain numbers, and become metrics when they are asked for.

import { Counter, Histogram, type Registry } from 'prom-client'

const BUCKETS_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]

/** An answered request, as it is counted. */
export interface Answered {
  method: string
  /** The pattern of a route, never a path as it was sent. */
  route: string
  status: number
  durationMs: number
}

/** Of a request for which no route was found, or looked for. */
export const NO_ROUTE = '(none)'

/** Counts the requests of one listener. To note one never throws, and never waits. */
export interface RequestCounts {
  note(answered: Answered): void
  /** Returns what counts answers of one kind that took no time worth telling of; `note` would cost as much as they do. */
  ofQuick(answered: Omit<Answered, 'durationMs'>): () => void
}

/** Makes what makes the counts of a listener. */
export function createRequestCounts(
  registry: Registry,
): (listener: 'public' | 'internal') => RequestCounts {
  interface Series {
    labels: { listener: string; method: string; route: string; status: string }
    count: number
  }
  const known = new Map<string, Series>()
  const requests: Counter<'listener' | 'method' | 'route' | 'status'> = new Counter({
    name: 'pagero_broker_http_requests_total',
    help: 'Requests answered to the end. Where no route was found, or looked for, it is (none); what was no HTTP is not counted.',
    labelNames: ['listener', 'method', 'route', 'status'],
    registers: [registry],
    collect() {
      requests.reset()
      for (const { labels, count } of known.values()) requests.inc(labels, count)
    },
  })
  const seconds = new Histogram({
    name: 'pagero_broker_http_request_seconds',
    help: 'Time to answer a request to the end, but for most tokens from memory and refusals at the door: they take microseconds.',
    labelNames: ['listener', 'route'],
    buckets: BUCKETS_SECONDS,
    registers: [registry],
  })

  return (listener) => {
    function seriesOf({ method, route, status }: Omit<Answered, 'durationMs'>): Series {
      const key = `${listener} ${method} ${status} ${route}`
      let series = known.get(key)
      if (series === undefined) {
        series = { labels: { listener, method, route, status: String(status) }, count: 0 }
        known.set(key, series)
      }
      return series
    }
    return {
      note(answered) {
        seriesOf(answered).count += 1
        const { route, durationMs } = answered
        if (Number.isFinite(durationMs)) seconds.observe({ listener, route }, durationMs / 1000)
      },
      ofQuick(answered) {
        const series = seriesOf(answered)
        return () => {
          series.count += 1
        }
      },
    }
  }
}

/** Makes what counts by caller, at the price of a look-up. */
export function createCallerCounts(
  registry: Registry,
  { name, help }: { name: string; help: string },
): (caller: string) => void {
  const counts = new Map<string, number>()
  const counter: Counter<'caller'> = new Counter({
    name,
    help,
    labelNames: ['caller'],
    registers: [registry],
    collect() {
      counter.reset()
      for (const [caller, count] of counts) counter.inc({ caller }, count)
    },
  })
  return (caller) => void counts.set(caller, (counts.get(caller) ?? 0) + 1)
}
