// Whether the process keeps up with what it is asked, and PostgreSQL with what it asks. Where not, everybody waits, until
// they give up and ask again, and a rotation waits among them; so a part of what costs work is refused, as large as it must
// be. Probes, and tokens that are in memory, are answered meanwhile.

import type { IncomingMessage, ServerResponse } from 'node:http'
import { unavailable } from '../errors.ts'
import type { Log } from '../ports.ts'
import type { App } from './app.ts'
import { hasFailed } from './kept-failure.ts'
import type { Listener } from './problem.ts'
import { answerProblem } from './problem-answers.ts'
import { requestIdOf } from './refusals.ts'

const TICK_MS = 100
/** A collection of garbage, or a process that was paused, is late once. */
const LATE_TICKS = 3
/** Statements that wait for a connection: some tenths of a second of what PostgreSQL does in the pool's connections. */
const STATEMENTS_WAITING_MAX = 1_000
/**
 * Of what costs work a late process admits a smaller share at each tick, and a larger one once it is on time: what it can
 * do is found so, and done. Never less than the least share: to refuse costs work too, and one that only refuses does nothing.
 */
const SHARE_FACTOR_WHEN_LATE = 0.7
const SHARE_STEP_ON_TIME = 0.05
const SHARE_MIN = 0.1
/** Overload may come and go every second; it is told this often. */
const NOTE_INTERVAL_MS = 10_000

/** How the process is must be known most of all while it does not keep up. */
const PROBES: ReadonlySet<string | undefined> = new Set(['/livez', '/readyz', '/metrics'])

/** Made once: the trace of where each was made would cost more than all else. */
export const SHED_REFUSAL = unavailable(
  'The broker has more to do than it can. Nothing was done for this request.',
  1,
)

const SHED = Symbol('shed')
type WeighedRequest = IncomingMessage & { [SHED]?: boolean }

/** Tells whether a request was refused for overload: of those the log has the number alone. */
export function wasShed(request: WeighedRequest): boolean {
  return request[SHED] === true
}

/** Tells whether a request is to be refused for overload. It is decided once for each, wherever it is asked first. */
export function isShed(overload: Pick<Overload, 'refuses'>, request: WeighedRequest): boolean {
  // What has come to its end before the router must be told what it came to.
  if (hasFailed(request)) request[SHED] = false
  request[SHED] ??= !isAnswered(request) && overload.refuses()
  return request[SHED]
}

/** Probes, and what a browser asks before it asks: that is answered before anything is looked at. */
function isAnswered({ method, url }: IncomingMessage): boolean {
  return method === 'OPTIONS' || PROBES.has(url?.split('?', 1)[0])
}

export interface Overload {
  /** Tells whether there is more to do now than can be done. */
  isThere(): boolean
  /** Tells whether this request, which costs work, is to be refused, and counts it. */
  refuses(): boolean
  /** Requests refused so far. */
  shed(): number
  stop(): void
}

/** Makes the part of what costs work that is admitted, from 0 to 1, by the ticks that were late and those that were not. */
export function createShare(): { note(isLate: boolean): void; now(): number } {
  let share = 1
  let lateTicks = 0
  return {
    note(isLate) {
      lateTicks = isLate ? lateTicks + 1 : 0
      if (lateTicks >= LATE_TICKS) share = Math.max(SHARE_MIN, share * SHARE_FACTOR_WHEN_LATE)
      else if (!isLate) share = Math.min(1, share + SHARE_STEP_ON_TIME)
    },
    now: () => share,
  }
}

/**
 * Begins to watch whether the event loop comes to its timers later than `delayMs`, and how many statements wait for a
 * connection. One for a process: it has one loop, and one pool. With a delay of 0 it tells of neither.
 */
export function watchOverload(
  { log }: { log: Pick<Log, 'warn'> },
  { delayMs, statementsWaiting }: { delayMs: number; statementsWaiting: () => number },
): Overload {
  const isOn = delayMs !== 0
  let dueMs = performance.now() + TICK_MS
  const share = createShare()
  let shed = 0
  let toldOf = 0
  let notedAtMs = Number.NEGATIVE_INFINITY
  const timer = setInterval(() => {
    const nowMs = performance.now()
    share.note(isOn && nowMs - dueMs > delayMs)
    dueMs = nowMs + TICK_MS
    if (shed === toldOf || nowMs - notedAtMs < NOTE_INTERVAL_MS) return
    log.warn('requests_shed', { count: shed - toldOf })
    notedAtMs = nowMs
    toldOf = shed
  }, TICK_MS)
  timer.unref()
  const isQueueLong = () => isOn && statementsWaiting() > STATEMENTS_WAITING_MAX
  return {
    isThere: () => share.now() < 1 || isQueueLong(),
    refuses() {
      // By chance: whoever comes in turns, as pages do, would have the same turn each time.
      const isAdmitted = !isQueueLong() && Math.random() < share.now()
      if (!isAdmitted) shed += 1
      return !isAdmitted
    },
    shed: () => shed,
    stop: () => clearInterval(timer),
  }
}

/**
 * Refuses requests while there is overload, but probes and what has failed already. It does so as early as the app's routes
 * can be told apart: so the answer is one that its client can read, whether that is a page, a service or a person.
 */
export function refuseOverload(app: App, overload: Pick<Overload, 'refuses'>): void {
  app.addHook('onRequest', (request, _reply, done) => {
    if (isShed(overload, request.raw)) done(SHED_REFUSAL)
    else done()
  })
}

/** Makes the same refusal before the router, where its client needs no more than the problem: it costs half as much. */
export function answerShed(
  request: IncomingMessage,
  response: ServerResponse,
  { listener, fields }: { listener: Listener; fields: Readonly<Record<string, string>> },
): void {
  const requestId = requestIdOf(request)
  answerProblem(request, response, { listener, fields, requestId, error: SHED_REFUSAL })
}
