// When each alert fires, and what is nearly so and is not worth one. A minute lies between two samples; instants and series
// are in minutes since the beginning.

import type { Labels } from './prometheus.ts'

/** Samples of a series, as promtool reads them; undefined: there is no such series. */
export type Values = string | undefined

interface Situation {
  /** What is unlike an ordinary day, by series as a broker serves it. On the first replica alone, unless it is everywhere. */
  series: Readonly<Record<string, Values>>
  everywhere?: true
  atMinutes: number
}

export interface AlertCase extends Situation {
  alert: string
  /** What tells this one from others of its name. */
  labels?: Labels
  /** As the summary tells it. */
  value?: string
  almost?: Situation | Situation[]
}

/** In place of a number of samples: until the end of the case. */
export const REST = 'xREST'

const steady = (value: number): string => `${value}+0${REST}`
const rising = (eachMinute: number): string => `0+${eachMinute}${REST}`
/** Zero, and from that minute on another value. */
const from = (minute: number, value: number): string => `0+0x${minute - 1} ${value}+0${REST}`
/** Nothing, and from that minute on a value: a process that is scraped for the first time. */
const born = (minute: number, value: number): string => `_x${minute} ${value}+0${REST}`

export const REPLICAS = ['broker-1:3001', 'broker-2:3001'] as const
const [instance] = REPLICAS
const HERE: Labels = { instance }
const HERE_IN_JOB: Labels = { instance, job: 'pagero-broker' }

const event = (name: string, level = 'error') =>
  `pagero_broker_events_total{event="${name}",level="${level}"}`
const attempts = (cause: string, outcome: string) =>
  `pagero_broker_refresh_attempts_total{cause="${cause}",outcome="${outcome}"}`
const condemned = (cause: string) => `pagero_broker_grants_condemned_total{cause="${cause}"}`
const requests = (route: string, status: number, listener = 'internal') =>
  `pagero_broker_http_requests_total{listener="${listener}",method="GET",route="${route}",status="${status}"}`
const TOKEN = '/v1/users/:user/access-token'
const START = 'process_start_time_seconds'
const failing = (check: string) => `pagero_broker_check_failing{check="${check}"}`
const warning = (name: string) => `pagero_broker_warning{warning="${name}"}`
const EXPIRING = (days: number) => `pagero_broker_grants_expiring{within_days="${days}"}`
const queue = (name: string, state: string) =>
  `pagero_broker_queue_entries{queue="${name}",state="${state}"}`

/** It has happened once, half an hour and more after the replica began. */
const once = (alert: string, name: string, others: Partial<AlertCase> = {}): AlertCase => ({
  alert,
  series: { [event(name)]: from(60, 1) },
  atMinutes: 65,
  labels: HERE,
  almost: { series: { [event(name)]: from(60, 1) }, atMinutes: 95 },
  ...others,
})
/** It was told at the start, before anybody could read it, and holds until the next one. */
const sinceStart = (alert: string, name: string): AlertCase => ({
  alert,
  series: { [event(name)]: born(10, 1), [START]: born(10, 570) },
  atMinutes: 200,
  labels: HERE,
})

/** An ordinary day: what is unlike the zeros and figures of a broker that has just begun. */
export const ORDINARY: Readonly<Record<string, Values>> = {
  up: steady(1),
  [START]: steady(-100_000),
  nodejs_eventloop_lag_p99_seconds: steady(0.02),
  pagero_broker_heartbeat_age_seconds: steady(2),
  [warning('callers_file')]: undefined,
  [warning('caller_keys')]: undefined,
  [attempts('ahead', 'granted')]: rising(5),
  [attempts('min_ttl', 'granted')]: rising(1),
  [attempts('ahead', 'in_doubt')]: from(100, 2),
  [condemned('revoked_or_expired')]: from(700, 2),
  [condemned('lifetime_over')]: from(800, 40),
  [event('heartbeat_failed', 'warn')]: from(300, 6),
  [event('grant_store_failed', 'warn')]: from(300, 3),
  [event('revocation_failed', 'warn')]: from(300, 9),
  [queue('revocations', 'pending')]: `4+0x600 0+0x10 7+0x800 0+0x10 2+0${REST}`,
  [queue('webhooks', 'pending')]: `3+0x600 18+0x10 5+0${REST}`,
  [requests(TOKEN, 200)]: rising(600),
  [requests(TOKEN, 503)]: rising(1),
  [requests('/v1/users/:user/pagero/*', 200)]: rising(60),
  [requests('/v1/users/:user/pagero/*', 503)]: rising(1),
  [requests('/api/*', 200, 'public')]: rising(60),
}

export const ALERT_CASES: readonly AlertCase[] = [
  // ── Replicas ───────────────────────────────────────────────────────────────────────────────────
  {
    alert: 'PageroBrokerNoReplica',
    series: { up: steady(0) },
    everywhere: true,
    atMinutes: 2,
    almost: { series: { up: steady(0) }, atMinutes: 10 },
  },
  { alert: 'PageroBrokerNoReplica', series: { up: undefined }, everywhere: true, atMinutes: 2 },
  {
    alert: 'PageroBrokerReplicaDown',
    series: { up: steady(0) },
    atMinutes: 4,
    labels: HERE_IN_JOB,
    almost: { series: { up: '1+0x10 0+0x1 1+0x100' }, atMinutes: 14 },
  },
  {
    alert: 'PageroBrokerReplicaUnready',
    series: { [failing('spool')]: from(60, 1) },
    atMinutes: 66,
    labels: { ...HERE, check: 'spool' },
    almost: { series: { [failing('draining')]: from(60, 1) }, atMinutes: 66 },
  },
  {
    alert: 'PageroBrokerReplicaRestarts',
    series: { [START]: '-100+0x10 600+300x3 1500+0x100' },
    atMinutes: 30,
    labels: HERE_IN_JOB,
    value: '4',
    almost: { series: { [START]: '-100+0x10 600+0x10 1200+0x100' }, atMinutes: 30 },
  },
  {
    alert: 'PageroBrokerEventLoopLate',
    series: { nodejs_eventloop_lag_p99_seconds: steady(0.6) },
    atMinutes: 11,
    labels: HERE_IN_JOB,
    almost: { series: { nodejs_eventloop_lag_p99_seconds: steady(0.4) }, atMinutes: 30 },
  },
  {
    alert: 'PageroBrokerRequestsShed',
    series: { pagero_broker_requests_shed_total: rising(10) },
    atMinutes: 12,
    labels: HERE_IN_JOB,
    almost: { series: { pagero_broker_requests_shed_total: from(60, 500) }, atMinutes: 70 },
  },
  {
    alert: 'PageroBrokerLogLinesDropped',
    series: { pagero_broker_log_lines_dropped_total: from(60, 5) },
    atMinutes: 65,
    labels: HERE_IN_JOB,
  },

  // ── The database ───────────────────────────────────────────────────────────────────────────────
  {
    alert: 'PageroBrokerDatabaseAway',
    series: {
      pagero_broker_heartbeat_age_seconds: steady(120),
    },
    atMinutes: 11,
    labels: HERE,
    value: '2m 0s',
    almost: { series: { pagero_broker_heartbeat_age_seconds: steady(60) }, atMinutes: 11 },
  },
  {
    alert: 'PageroBrokerDatabaseUnsteady',
    series: { [event('heartbeat_failed', 'warn')]: from(60, 40) },
    atMinutes: 65,
    labels: HERE,
    value: '40',
    almost: { series: { [event('heartbeat_failed', 'warn')]: from(60, 20) }, atMinutes: 65 },
  },
  sinceStart('PageroBrokerDatabaseNotAccepted', 'database_not_accepted'),
  sinceStart('PageroBrokerDatabaseMayForget', 'database_may_forget'),
  once('PageroBrokerGrantWentBack', 'grant_went_back'),
  {
    alert: 'PageroBrokerGrantsNotStored',
    series: { [event('grant_store_failed', 'warn')]: rising(20) },
    atMinutes: 20,
    labels: HERE,
    almost: [
      { series: { [event('grant_store_failed', 'warn')]: from(60, 100) }, atMinutes: 71 },
      { series: { [event('grant_store_failed', 'warn')]: rising(1) }, atMinutes: 60 },
    ],
  },
  {
    alert: 'PageroBrokerCensusMissing',
    series: Object.fromEntries(
      ['active', 'suspect', 'reauthentication_required', 'revoked'].map((state) => [
        `pagero_broker_grants{state="${state}"}`,
        undefined,
      ]),
    ),
    everywhere: true,
    atMinutes: 32,
  },

  // ── The spool ──────────────────────────────────────────────────────────────────────────────────
  once('PageroBrokerSpoolNotWritable', 'spool_write_failed'),
  once('PageroBrokerSpoolNotWritable', 'spool_not_writable'),
  once('PageroBrokerSpoolUnreadable', 'spool_entries_not_read'),
  once('PageroBrokerSpoolUnreadable', 'spool_entry_unreadable'),
  {
    // Found by the first pass after a start.
    alert: 'PageroBrokerSpoolUnreadable',
    series: { [event('spool_entry_unreadable')]: born(100, 1), [START]: born(100, 5_990) },
    atMinutes: 105,
    labels: HERE,
    almost: {
      series: { [event('spool_entry_unreadable')]: born(100, 1), [START]: born(100, 5_990) },
      atMinutes: 131,
    },
  },
  {
    alert: 'PageroBrokerSpoolCrowded',
    series: { pagero_broker_spool_entries: steady(85_000) },
    atMinutes: 6,
    labels: HERE_IN_JOB,
    value: '85000',
    almost: { series: { pagero_broker_spool_entries: steady(80_000) }, atMinutes: 30 },
  },

  // ── Settings ───────────────────────────────────────────────────────────────────────────────────
  sinceStart('PageroBrokerEncryptionKeyUnusable', 'encryption_key_unusable'),
  {
    alert: 'PageroBrokerCallersFileInvalid',
    series: { [warning('callers_file')]: born(10, 1) },
    atMinutes: 12,
    labels: HERE,
  },
  {
    alert: 'PageroBrokerCallerKeysAway',
    series: { [warning('caller_keys')]: born(10, 1) },
    atMinutes: 30,
    labels: HERE,
  },

  // ── Grants ─────────────────────────────────────────────────────────────────────────────────────
  {
    alert: 'PageroBrokerGrantLost',
    series: { [condemned('rotation_lost')]: from(60, 1) },
    atMinutes: 65,
    labels: { cause: 'rotation_lost' },
    value: '1',
    almost: { series: { [condemned('lifetime_over')]: from(60, 10) }, atMinutes: 65 },
  },
  {
    // A killed process has started again, and its first refresh tells what the kill has cost: as many as one time before.
    alert: 'PageroBrokerGrantLost',
    series: {
      [condemned('rotation_lost')]: `2+0x98 _x2 2+0x100`,
      [START]: `-100000+0x98 _x2 5990+0x100`,
    },
    atMinutes: 105,
    labels: { cause: 'rotation_lost' },
    value: '2',
    almost: { series: { [condemned('rotation_lost')]: steady(2) }, atMinutes: 105 },
  },
  {
    alert: 'PageroBrokerGrantLost',
    series: { [condemned('restored_database')]: from(60, 7) },
    atMinutes: 65,
    labels: { cause: 'restored_database' },
    value: '7',
  },
  {
    alert: 'PageroBrokerGrantsRefused',
    series: { [condemned('revoked_or_expired')]: from(200, 14) },
    atMinutes: 1_500,
    value: '16',
    almost: { series: { [condemned('revoked_or_expired')]: from(200, 7) }, atMinutes: 1_500 },
  },
  {
    alert: 'PageroBrokerGrantsEndWithinAWeek',
    series: { [EXPIRING(7)]: steady(3), [EXPIRING(30)]: steady(3) },
    everywhere: true,
    atMinutes: 61,
    value: '3',
    almost: { series: { [EXPIRING(30)]: steady(3) }, atMinutes: 61 },
  },
  {
    alert: 'PageroBrokerGrantsEndWithinAMonth',
    series: { [EXPIRING(7)]: steady(3), [EXPIRING(30)]: steady(5) },
    everywhere: true,
    atMinutes: 61,
    value: '2',
    almost: { series: { [EXPIRING(7)]: steady(3), [EXPIRING(30)]: steady(3) }, atMinutes: 61 },
  },

  // ── Pagero ─────────────────────────────────────────────────────────────────────────────────────
  {
    alert: 'PageroBrokerClientRejected',
    series: { 'pagero_broker_breaker_open{reason="rejected_client"}': steady(1) },
    atMinutes: 2,
    labels: HERE,
  },
  {
    // Pagero was away, and refuses the client when it is back: the breaker has not closed in between.
    alert: 'PageroBrokerClientRejected',
    series: {
      'pagero_broker_breaker_open{reason="unreachable"}': steady(1),
      [attempts('ahead', 'rejected_client')]: rising(12),
    },
    atMinutes: 5,
    labels: HERE,
    almost: {
      series: { 'pagero_broker_breaker_open{reason="unreachable"}': steady(1) },
      atMinutes: 5,
    },
  },
  {
    alert: 'PageroBrokerPageroUnreachable',
    series: { 'pagero_broker_breaker_open{reason="unreachable"}': steady(1) },
    atMinutes: 12,
    labels: HERE,
    almost: {
      series: {
        'pagero_broker_breaker_open{reason="unreachable"}': steady(1),
        [attempts('ahead', 'granted')]: steady(70),
        [attempts('min_ttl', 'granted')]: steady(8),
      },
      atMinutes: 60,
    },
  },
  {
    alert: 'PageroBrokerRefreshesInDoubt',
    series: { [attempts('ahead', 'in_doubt')]: rising(1) },
    atMinutes: 30,
    value: '7.692%',
    almost: [
      { series: { [attempts('ahead', 'in_doubt')]: rising(0.5) }, atMinutes: 60 },
      {
        series: {
          [attempts('ahead', 'granted')]: steady(0),
          [attempts('ahead', 'in_doubt')]: from(50, 2),
        },
        everywhere: true,
        atMinutes: 55,
      },
    ],
  },
  {
    alert: 'PageroBrokerNeedlessRefreshes',
    series: { [attempts('rejected', 'granted')]: rising(20) },
    atMinutes: 90,
    value: '68.75%',
    almost: [
      { series: { [attempts('min_ttl', 'granted')]: rising(5) }, atMinutes: 90 },
      {
        series: {
          [attempts('ahead', 'granted')]: steady(0),
          [attempts('min_ttl', 'granted')]: from(50, 20),
        },
        everywhere: true,
        atMinutes: 90,
      },
    ],
  },

  // ── Requests ───────────────────────────────────────────────────────────────────────────────────
  once('PageroBrokerRequestFailed', 'request_failed'),
  {
    alert: 'PageroBrokerServerErrors',
    series: { [requests(TOKEN, 503)]: rising(99) },
    atMinutes: 20,
    value: '7.692%',
    almost: [
      { series: { [requests('/readyz', 503)]: rising(200) }, atMinutes: 60 },
      { series: { [requests(TOKEN, 503)]: rising(50) }, atMinutes: 60 },
      { series: { [requests(TOKEN, 200)]: steady(0) }, everywhere: true, atMinutes: 60 },
    ],
  },
  {
    alert: 'PageroBrokerProxiedCallsFail',
    series: { [requests('/api/*', 502, 'public')]: rising(78) },
    atMinutes: 30,
    value: '25%',
    almost: [
      { series: { [requests('/api/*', 502, 'public')]: rising(30) }, atMinutes: 60 },
      {
        series: {
          [requests('/v1/users/:user/pagero/*', 200)]: steady(0),
          [requests('/api/*', 200, 'public')]: steady(0),
        },
        everywhere: true,
        atMinutes: 60,
      },
    ],
  },

  // ── The audit record ───────────────────────────────────────────────────────────────────────────
  once('PageroBrokerAuditNotWritten', 'audit_not_written'),
  {
    alert: 'PageroBrokerAuditEventsDropped',
    series: { pagero_broker_audit_events_dropped_total: from(60, 9) },
    atMinutes: 65,
    labels: HERE_IN_JOB,
    value: '9',
  },
  once('PageroBrokerAuditRowChanged', 'audit_row_kept'),
  {
    alert: 'PageroBrokerAuditWaiting',
    series: { pagero_broker_audit_events_waiting: steady(6_000) },
    atMinutes: 3,
    labels: HERE_IN_JOB,
    value: '6000',
    almost: { series: { pagero_broker_audit_events_waiting: steady(5_000) }, atMinutes: 30 },
  },

  // ── Queues ─────────────────────────────────────────────────────────────────────────────────────
  once('PageroBrokerWebhookDead', 'webhook_dead', { labels: {}, value: '1' }),
  {
    alert: 'PageroBrokerWebhooksPending',
    series: { [queue('webhooks', 'pending')]: rising(1) },
    everywhere: true,
    atMinutes: 120,
    value: '120',
    almost: [
      { series: { [queue('webhooks', 'pending')]: steady(200) }, everywhere: true, atMinutes: 120 },
      { series: { [queue('webhooks', 'pending')]: rising(0.1) }, everywhere: true, atMinutes: 180 },
      { series: { [queue('webhooks', 'pending')]: rising(1) }, everywhere: true, atMinutes: 85 },
    ],
  },
  {
    alert: 'PageroBrokerRevocationsPending',
    series: { [queue('revocations', 'pending')]: steady(2) },
    everywhere: true,
    atMinutes: 1_441,
    value: '2',
    almost: {
      series: { [queue('revocations', 'pending')]: `2+0x700 0+0x0 2+0${REST}` },
      everywhere: true,
      atMinutes: 1_500,
    },
  },
  {
    alert: 'PageroBrokerRevocationsFail',
    series: { [event('revocation_failed', 'warn')]: rising(1) },
    atMinutes: 150,
    value: '60',
    almost: [
      { series: { [event('revocation_failed', 'warn')]: from(60, 40) }, atMinutes: 119 },
      { series: { [event('revocation_failed', 'warn')]: rising(0.4) }, atMinutes: 150 },
    ],
  },
  once('PageroBrokerTokenNotRevoked', 'refresh_token_orphaned', {
    labels: { event: 'refresh_token_orphaned' },
  }),
  once('PageroBrokerTokenNotRevoked', 'late_answer_unreadable', {
    labels: { event: 'late_answer_unreadable' },
  }),
  once('PageroBrokerTokenNotRevoked', 'replaced_refresh_token_unreadable', {
    labels: { event: 'replaced_refresh_token_unreadable' },
  }),
  once('PageroBrokerTokenNotRevoked', 'revocation_unreadable', {
    labels: { event: 'revocation_unreadable' },
  }),
  once('PageroBrokerImportUnreadable', 'import_unreadable', { labels: {} }),
]
