// Whether the process keeps up with what it is asked. One that does not makes everybody wait, until they give up and ask
// again; so what costs work is refused until it does. What is at hand, and probes, are answered meanwhile.

import type { IncomingMessage } from 'node:http'
import { BrokerError } from '../errors.ts'
import type { Log } from '../ports.ts'
import type { App } from './app.ts'
import { hasFailed } from './kept-failure.ts'

const TICK_MS = 100
/** A collection of garbage, or a process that was paused, is late once. */
const LATE_TICKS = 3
/** Overload may come and go every second; it is told this often. */
const NOTE_INTERVAL_MS = 10_000

/** How the process is must be known most of all while it does not keep up. */
const PROBES: ReadonlySet<string | undefined> = new Set(['/livez', '/readyz'])

const SHED = Symbol('shed')
type ShedRequest = IncomingMessage & { [SHED]?: true }

/** Tells whether a request was refused for overload: of those the log has the number alone. */
export function wasShed(request: ShedRequest): boolean {
  return request[SHED] === true
}

export interface Overload {
  /** Tells whether what costs work is to be refused now. */
  isThere(): boolean
  /** Counts a request that was refused for it. */
  noteShed(): void
  stop(): void
}

/** Begins to watch whether the event loop comes to its timers later than `delayMs`. One for a process: it has one loop. */
export function watchOverload({ log }: { log: Pick<Log, 'warn'> }, delayMs: number): Overload {
  let dueMs = performance.now() + TICK_MS
  let lateTicks = 0
  let shed = 0
  let notedAtMs = Number.NEGATIVE_INFINITY
  const timer = setInterval(() => {
    const nowMs = performance.now()
    lateTicks = nowMs - dueMs > delayMs ? lateTicks + 1 : 0
    dueMs = nowMs + TICK_MS
    if (shed === 0 || nowMs - notedAtMs < NOTE_INTERVAL_MS) return
    log.warn('requests_shed', { count: shed })
    notedAtMs = nowMs
    shed = 0
  }, TICK_MS)
  timer.unref()
  return {
    isThere: () => delayMs !== 0 && lateTicks >= LATE_TICKS,
    noteShed() {
      shed += 1
    },
    stop: () => clearInterval(timer),
  }
}

/**
 * Refuses all requests but probes, and what has failed already, while there is overload, as early as the app's routes can be told apart: so the answer is
 * one that its client can read, whether that is a page, a service or a person.
 */
export function refuseOverload(app: App, overload: Omit<Overload, 'stop'>): void {
  app.addHook('onRequest', (request, _reply, done) => {
    // What has come to its end before the router costs nothing more, and must be told what it came to.
    const isCheap = PROBES.has(request.routeOptions.url) || hasFailed(request.raw)
    if (isCheap || !overload.isThere()) {
      done()
      return
    }
    overload.noteShed()
    ;(request.raw as ShedRequest)[SHED] = true
    done(
      new BrokerError(
        'temporarily_unavailable',
        'The broker has more to do than it can. Nothing was done for this request.',
        { retryAfterSeconds: 1 },
      ),
    )
  })
}
