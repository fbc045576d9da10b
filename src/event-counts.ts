// What the log is told, counted, and what of it tells of refreshes: so metrics cannot forget what the log says, and nothing in
// the core knows of them.

import { Counter, Gauge, Histogram, type Registry } from 'prom-client'
import { BREAKER_FAULTS } from './breaker.ts'
import { ATTEMPT_OUTCOMES, DEATH_CAUSES, REFRESH_CAUSES } from './grant.ts'
import type { LogFields } from './ports.ts'

export type Level = 'debug' | 'info' | 'warn' | 'error'

/** A call to Pagero ends within 45 s. */
const ATTEMPT_BUCKETS_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 45]

/**
 * Events of the log that somebody is to be woken for, or told of in the morning; see `deploy/prometheus/alerts.yml`. They
 * stand at zero before they happen: of a series that begins with one, Prometheus does not see that it has grown. What a
 * process tells before it is scraped for the first time begins with one all the same, and the rules look for that.
 */
export const ALERTING_EVENTS = {
  audit_not_written: 'error',
  audit_row_kept: 'error',
  database_may_forget: 'error',
  database_not_accepted: 'error',
  encryption_key_unusable: 'error',
  grant_store_failed: 'warn',
  grant_went_back: 'error',
  heartbeat_failed: 'warn',
  import_unreadable: 'error',
  late_answer_unreadable: 'error',
  refresh_token_orphaned: 'error',
  replaced_refresh_token_unreadable: 'error',
  request_failed: 'error',
  revocation_failed: 'warn',
  revocation_unreadable: 'error',
  spool_entries_not_read: 'error',
  spool_entry_unreadable: 'error',
  spool_not_writable: 'error',
  spool_write_failed: 'error',
  webhook_dead: 'error',
} as const satisfies Record<string, 'info' | 'warn' | 'error'>

/** Makes what counts them, for a fifth of a microsecond each. */
export function createEventCounts(
  registry: Registry,
): (level: Level, event: string, fields?: LogFields) => void {
  const registers = [registry]
  const events = new Counter({
    name: 'pagero_broker_events_total',
    help: 'Events of the log by name, also those that its level leaves out; but not traces, answered requests, nor what the process says as it ends.',
    labelNames: ['event', 'level'],
    registers,
  })
  for (const [event, level] of Object.entries(ALERTING_EVENTS)) events.inc({ event, level }, 0)
  const attempts = new Counter({
    name: 'pagero_broker_refresh_attempts_total',
    help: 'Refresh tokens presented to Pagero, by what they were presented for and what came of it.',
    labelNames: ['cause', 'outcome'],
    registers,
  })
  for (const cause of REFRESH_CAUSES) {
    for (const outcome of ATTEMPT_OUTCOMES) attempts.inc({ cause, outcome }, 0)
  }
  const attemptSeconds = new Histogram({
    name: 'pagero_broker_refresh_attempt_seconds',
    help: "From the arming of a grant to Pagero's answer, or to the end of waiting for it.",
    buckets: ATTEMPT_BUCKETS_SECONDS,
    registers,
  })
  const condemned = new Counter({
    name: 'pagero_broker_grants_condemned_total',
    help: 'Grants whose refresh token Pagero refuses for good, by cause. Of these rotation_lost is a loss of ours.',
    labelNames: ['cause'],
    registers,
  })
  for (const cause of DEATH_CAUSES) condemned.inc({ cause }, 0)
  const breakerOpen = new Gauge({
    name: 'pagero_broker_breaker_open',
    help: '1 while Pagero does not answer, or does not accept the client: nothing is refreshed then but for single probes.',
    labelNames: ['reason'],
    registers,
  })
  const closeBreaker = () => {
    for (const reason of BREAKER_FAULTS) breakerOpen.set({ reason }, 0)
  }
  closeBreaker()

  return (level, event, { cause = '', outcome = '', reason = '', durationMs = 0 } = {}) => {
    // Requests are counted by themselves, whether the log tells of each or not.
    if (event === 'request_answered') return
    events.inc({ event, level })
    if (event === 'refresh_attempt_finished') {
      attempts.inc({ cause, outcome })
      attemptSeconds.observe(durationMs / 1000)
    } else if (event === 'grant_condemned') {
      condemned.inc({ cause })
    } else if (event === 'breaker_opened') {
      // It may have been open, for another reason.
      closeBreaker()
      breakerOpen.set({ reason }, 1)
    } else if (event === 'breaker_closed') {
      closeBreaker()
    }
  }
}
