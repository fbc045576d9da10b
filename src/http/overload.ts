// Whether the process keeps up with what it is asked. One that does not makes everybody wait, until they give up and ask
// again; so what costs work is refused until it does. What is at hand, and probes, are answered meanwhile.

import type { Log } from '../ports.ts'

const TICK_MS = 100
/** A collection of garbage, or a process that was paused, is late once. */
const LATE_TICKS = 3
/** Overload may come and go every second; it is told this often. */
const NOTE_INTERVAL_MS = 10_000

export interface Overload {
  /** Tells whether a request that has come now is to be refused, and counts it if so. */
  sheds(): boolean
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
    sheds() {
      if (delayMs === 0 || lateTicks < LATE_TICKS) return false
      shed += 1
      return true
    },
    stop: () => clearInterval(timer),
  }
}
