// What metrics read of the process, and of the database, when they are asked for.

import { Counter, Gauge, type Registry } from 'prom-client'
import { GRANT_STATES } from './grant.ts'
import { inTime } from './in-time.ts'
import type { Clock, Log } from './ports.ts'
import type { Census } from './record-stores.ts'

const PREFIX = 'pagero_broker_'

/** Every grant is looked at for it: so no more often than this, and where it takes long a hundredth of the time. */
const CENSUS_INTERVAL_MS = 60_000
const CENSUS_SHARE = 1 / 100
/** However long one takes, there is another before it is too old. */
const CENSUS_PAUSE_MAX_MS = 5 * 60_000
/** An answer waits so long for a census; the next one has it. */
const CENSUS_WAIT_MS = 1_000
/** One that is older tells of nothing that is still so. */
const CENSUS_AGE_MAX_MS = 15 * 60_000

/** What is read when metrics are asked for. */
export interface Readings {
  rotationsInFlight(): number
  grantsCached(): number
  spoolEntries(): number
  auditEventsWaiting(): number
  auditEventsDropped(): number
  /** Since the database last took a word of this replica. */
  secondsSinceHeartbeat(): number
  databaseConnections(): { total: number; idle: number; waiting: number }
  requestsShed(): number
  logLinesDropped(): number
  /** What `/readyz` says of each: `ok`, or what is wrong. Takes some seconds at most. */
  checks(): Promise<Readonly<Record<string, string>>>
  /** What should be mended although the process is ready, by name. */
  warnings(): Readonly<Record<string, string>>
  /** Takes as long as it takes to look at every grant. */
  census(): Promise<Census>
}

/** Values by their labels. */
type Samples<Label extends string> = Iterable<readonly [Readonly<Record<Label, string>>, number]>

/** Adds them to what the registry tells. Once. */
export function addReadings(
  registry: Registry,
  readings: Readings,
  ports: { clock: Clock; log: Pick<Log, 'warn'> },
): void {
  const gauge = (name: string, help: string, read: () => number) =>
    addGauge(registry, { name, help, labelNames: [] }, () => [[{}, read()]])
  const counter = (name: string, help: string, read: () => number) => {
    const one: Counter = new Counter({
      name: PREFIX + name,
      help,
      registers: [registry],
      collect() {
        one.reset()
        one.inc(read())
      },
    })
  }
  gauge(
    'rotations_in_flight',
    'Grants being refreshed by this replica.',
    readings.rotationsInFlight,
  )
  gauge('grants_cached', 'Grants in memory, with their tokens.', readings.grantsCached)
  gauge(
    'spool_entries',
    'Answers of Pagero in the spool. One that is stored stays for SPOOL_RETENTION_SECONDS.',
    readings.spoolEntries,
  )
  gauge(
    'audit_events_waiting',
    'Rows that are yet to be written into the audit record; equal events of a second are one.',
    readings.auditEventsWaiting,
  )
  gauge(
    'heartbeat_age_seconds',
    'Time since the database last took a word of this replica: a heartbeat, or that of a probe or of this.',
    readings.secondsSinceHeartbeat,
  )
  counter(
    'audit_events_dropped_total',
    'Events that the audit record has no room for while PostgreSQL takes none; a row tells their number later.',
    readings.auditEventsDropped,
  )
  counter(
    'requests_shed_total',
    'Requests refused because the process, or the database, does not keep up.',
    readings.requestsShed,
  )
  counter(
    'log_lines_dropped_total',
    'Lines of the log lost because nobody read them in time.',
    readings.logLinesDropped,
  )
  addGauge(
    registry,
    {
      name: 'database_connections',
      help: 'Connections to PostgreSQL, and how many wait for one.',
      labelNames: ['state'],
    },
    () => {
      const { total, idle, waiting } = readings.databaseConnections()
      return [
        [{ state: 'used' }, total - idle],
        [{ state: 'idle' }, idle],
        [{ state: 'awaited' }, waiting],
      ]
    },
  )
  addGauge(
    registry,
    {
      name: 'check_failing',
      help: '1 where a check of /readyz fails. One that does makes the replica unready.',
      labelNames: ['check'],
    },
    async () =>
      Object.entries(await readings.checks()).map(([check, result]) => [
        { check },
        result === 'ok' ? 0 : 1,
      ]),
  )
  addGauge(
    registry,
    { name: 'warning', help: '1 for what /readyz warns of.', labelNames: ['warning'] },
    () => Object.keys(readings.warnings()).map((warning) => [{ warning }, 1]),
  )
  addCensus(registry, readings.census, ports)
}

/** Adds a gauge that tells what `read` returns when it is asked for, and nothing besides. */
function addGauge<Label extends string>(
  registry: Registry,
  { name, ...described }: { name: string; help: string; labelNames: Label[] },
  read: () => Samples<Label> | Promise<Samples<Label>>,
): void {
  const gauge: Gauge<Label> = new Gauge({
    name: PREFIX + name,
    ...described,
    registers: [registry],
    async collect() {
      const samples = await read()
      gauge.reset()
      for (const [labels, value] of samples) gauge.set(labels, value)
    },
  })
}

/** What concerns all replicas alike: each tells the same, so take the greatest and not the sum. */
function addCensus(
  registry: Registry,
  take: Readings['census'],
  ports: { clock: Clock; log: Pick<Log, 'warn'> },
): void {
  const latest = createLatestCensus(take, ports)
  /** Tells nothing where nothing is known. */
  const gauge = <Label extends string>(
    name: string,
    help: string,
    labelNames: Label[],
    samplesOf: (census: Census) => Samples<Label>,
  ) =>
    addGauge(registry, { name, help, labelNames }, async () => {
      const census = await latest()
      return census === undefined ? [] : samplesOf(census)
    })
  gauge('grants', 'Grants in the database, by state.', ['state'], ({ grants }) =>
    GRANT_STATES.map((state) => [{ state }, grants[state]]),
  )
  gauge(
    'grants_expiring',
    'Active grants whose refresh token ends within so many days, those of fewer days among them.',
    ['within_days'],
    ({ expiringWithinDays }) =>
      [...expiringWithinDays].map(([days, count]) => [{ within_days: String(days) }, count]),
  )
  gauge(
    'queue_entries',
    'What is yet to be sent: events to the webhook, and to Pagero refresh tokens to revoke. Dead ones were given up.',
    ['queue', 'state'],
    ({ webhooksPending, webhooksDead, revocationsPending }) => [
      [{ queue: 'webhooks', state: 'pending' }, webhooksPending],
      [{ queue: 'webhooks', state: 'dead' }, webhooksDead],
      [{ queue: 'revocations', state: 'pending' }, revocationsPending],
    ],
  )
}

/** Returns what returns the newest census; undefined where there is none that still says anything. */
function createLatestCensus(
  take: Readings['census'],
  { clock, log }: { clock: Clock; log: Pick<Log, 'warn'> },
): () => Promise<Census | undefined> {
  let latest: { census: Census; takenAtMs: number } | undefined
  let dueAtMs = Number.NEGATIVE_INFINITY
  let taking: Promise<void> | undefined

  async function takeOne(): Promise<void> {
    const startedMs = clock.monotonicMs()
    let pauseMs = CENSUS_INTERVAL_MS
    try {
      latest = { census: await take(), takenAtMs: startedMs }
      const fairMs = (clock.monotonicMs() - startedMs) / CENSUS_SHARE
      pauseMs = Math.min(Math.max(pauseMs, fairMs), CENSUS_PAUSE_MAX_MS)
    } catch (error) {
      // What took its time may have been a connection that was lost, and nothing was looked at.
      log.warn('census_failed', { error })
    }
    dueAtMs = clock.monotonicMs() + pauseMs
  }

  return async () => {
    if (clock.monotonicMs() >= dueAtMs) {
      taking ??= takeOne().finally(() => {
        taking = undefined
      })
    }
    if (taking !== undefined) await inTime(clock, taking, CENSUS_WAIT_MS)
    if (latest === undefined) return undefined
    return clock.monotonicMs() - latest.takenAtMs > CENSUS_AGE_MAX_MS ? undefined : latest.census
  }
}
