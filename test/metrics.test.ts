// What Prometheus is told: counts of events, tokens and requests; readings of the process and of the database; all of it
// from a real replica too, and no user in it.

import { sql } from 'kysely'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import type { UserKey } from '../src/grant.ts'
import { sharedCheck } from '../src/http/health-routes.ts'
import { createMetrics } from '../src/metrics.ts'
import type { Audit, Census } from '../src/record-stores.ts'
import { createCensus } from '../src/postgres/census.ts'
import type { Readings } from '../src/readings.ts'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { keepingLog } from './support/keeping-log.ts'
import type { Replica } from './support/replica.ts'
import { standingClock } from './support/stored-grants.ts'

/** Samples by name and labels, as they stand in the text. */
type Samples = ReadonlyMap<string, number>

function samplesOf(exposition: string): Samples {
  const lines = exposition.split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    lines.map((line) => {
      const at = line.lastIndexOf(' ')
      return [line.slice(0, at).replace(/^pagero_broker_/, ''), Number(line.slice(at + 1))]
    }),
  )
}

const CENSUS: Census = {
  grants: { active: 5, suspect: 1, reauthentication_required: 2, revoked: 0 },
  expiringWithinDays: new Map([
    [7, 1],
    [30, 2],
    [90, 3],
  ]),
  webhooksPending: 4,
  webhooksDead: 6,
  revocationsPending: 7,
}

const READINGS: Readings = {
  rotationsInFlight: () => 3,
  grantsCached: () => 11,
  spoolEntries: () => 2,
  auditEventsWaiting: () => 13,
  auditEventsDropped: () => 4,
  secondsSinceHeartbeat: () => 2.5,
  checks: async () => ({ database: 'ok', spool: 'not writable' }),
  warnings: () => ({ callers_file: 'the last good one is in force' }),
  databaseConnections: () => ({ total: 9, idle: 4, waiting: 1 }),
  requestsShed: () => 8,
  logLinesDropped: () => 0,
  census: async () => CENSUS,
}

/** Metrics of a process whose clock stands, and what they say now. */
function setMetrics(readings: Readings = READINGS) {
  const clock = standingClock()
  const log = keepingLog()
  const metrics = createMetrics({ clock, log })
  metrics.read(readings)
  return { clock, log, metrics, samples: async () => samplesOf(await metrics.exposition()) }
}

// ── Counts ───────────────────────────────────────────────────────────────────────────────────────

t.test('every event of the log is counted and goes on into it', async (t) => {
  const { log, metrics, samples } = setMetrics()
  const failed = { user: 'alice', reason: 'disk' }
  metrics.log.error('spool_write_failed', failed)
  metrics.log.error('spool_write_failed', failed)
  metrics.log.warn('login_refused')
  metrics.log.info('login_completed')
  metrics.log.debug('token_adopted', { generation: 2 })
  metrics.log.trace('nothing_worth_counting')
  const found = await samples()
  t.equal(found.get('events_total{event="spool_write_failed",level="error"}'), 2)
  t.equal(found.get('events_total{event="login_refused",level="warn"}'), 1)
  t.equal(found.get('events_total{event="login_completed",level="info"}'), 1)
  t.equal(found.get('events_total{event="token_adopted",level="debug"}'), 1)
  t.notOk([...found.keys()].some((key) => key.includes('nothing_worth')))
  t.strictSame(
    log.events.map(({ event }) => event),
    ['spool_write_failed', 'spool_write_failed', 'login_refused', 'login_completed'].concat(
      'token_adopted',
      'nothing_worth_counting',
    ),
  )
  t.match(log.events[0], { level: 'error', ...failed })
})

t.test(
  'what has not happened yet stands at zero, so that its first time is a change',
  async (t) => {
    const found = await setMetrics().samples()
    for (const key of [
      'events_total{event="grant_went_back",level="error"}',
      'refresh_attempts_total{cause="recovery",outcome="in_doubt"}',
      'grants_condemned_total{cause="rotation_lost"}',
      'breaker_open{reason="rejected_client"}',
      'refresh_attempt_seconds_count',
    ]) {
      t.equal(found.get(key), 0, key)
    }
  },
)

t.test('attempts, verdicts and the breaker are told by their events', async (t) => {
  const { metrics, samples } = setMetrics()
  const finished = (cause: string, outcome: string, durationMs: number) =>
    metrics.log.info('refresh_attempt_finished', { cause, outcome, durationMs })
  finished('expiry', 'granted', 80)
  finished('expiry', 'granted', 700)
  finished('ahead', 'in_doubt', 45_000)
  metrics.log.warn('grant_condemned', { user: 'alice', cause: 'lifetime_over' })
  metrics.log.error('breaker_opened', { reason: 'unreachable' })
  const open = await samples()
  t.equal(open.get('refresh_attempts_total{cause="expiry",outcome="granted"}'), 2)
  t.equal(open.get('refresh_attempts_total{cause="ahead",outcome="in_doubt"}'), 1)
  t.equal(open.get('refresh_attempt_seconds_bucket{le="0.1"}'), 1)
  t.equal(open.get('refresh_attempt_seconds_bucket{le="1"}'), 2)
  t.equal(open.get('refresh_attempt_seconds_bucket{le="45"}'), 3)
  t.equal(open.get('refresh_attempt_seconds_sum'), 45.78)
  t.equal(open.get('grants_condemned_total{cause="lifetime_over"}'), 1)
  t.equal(open.get('breaker_open{reason="unreachable"}'), 1)
  t.equal(open.get('breaker_open{reason="rejected_client"}'), 0)
  metrics.log.error('breaker_opened', { reason: 'rejected_client' })
  const other = await samples()
  t.equal(other.get('breaker_open{reason="unreachable"}'), 0, 'one reason at a time')
  t.equal(other.get('breaker_open{reason="rejected_client"}'), 1)
  metrics.log.info('breaker_closed', { reason: 'rejected_client' })
  const closed = await samples()
  t.equal(closed.get('breaker_open{reason="rejected_client"}'), 0)
})

t.test('what cannot be counted is logged all the same, and nobody is told', async (t) => {
  const { log, metrics, samples } = setMetrics()
  metrics.log.info('refresh_attempt_finished', { cause: 'expiry', durationMs: Number.NaN })
  t.match(log.events, [{ event: 'refresh_attempt_finished' }])
  const route = '/livez'
  metrics.requestsOf('public').note({ method: 'GET', route, status: 200, durationMs: Number.NaN })
  const found = await samples()
  t.equal(found.get('refresh_attempt_seconds_count'), 0)
  t.equal(
    found.get('http_requests_total{listener="public",method="GET",route="/livez",status="200"}'),
    1,
  )
})

t.test('tokens and calls are counted by caller, those of sessions under no name', async (t) => {
  const { metrics, samples } = setMetrics()
  const recorded: unknown[] = []
  const audit: Audit = metrics.counted({ record: (event) => void recorded.push(event) })
  const user = 'alice' as UserKey
  audit.record({ action: 'token_handed_out', actor: 'caller', name: 'erp', user })
  audit.record({ action: 'token_handed_out', actor: 'caller', name: 'erp', user })
  audit.record({ action: 'call_proxied', actor: 'caller', name: 'archive', user })
  audit.record({ action: 'call_proxied', actor: 'session', name: user, user })
  audit.record({ action: 'logged_out', actor: 'session', name: user, user })
  const found = await samples()
  t.equal(found.get('tokens_handed_out_total{caller="erp"}'), 2)
  t.equal(found.get('calls_proxied_total{caller="archive"}'), 1)
  t.equal(found.get('calls_proxied_total{caller=""}'), 1)
  t.notMatch(await metrics.exposition(), /alice/)
  t.equal(recorded.length, 5, 'all of it is on record')
})

t.test('requests are counted by route and status, and timed unless they were quick', async (t) => {
  const { metrics, samples } = setMetrics()
  const counts = metrics.requestsOf('internal')
  const route = '/v1/users/:user/access-token'
  const quick = counts.ofQuick({ method: 'GET', route, status: 200 })
  for (let i = 0; i < 5; i += 1) quick()
  counts.note({ method: 'GET', route, status: 200, durationMs: 3 })
  counts.note({ method: 'GET', route, status: 503, durationMs: 10_000 })
  metrics.requestsOf('public').note({ method: 'GET', route: '/livez', status: 200, durationMs: 1 })
  const found = await samples()
  const requests = (labels: string) => found.get(`http_requests_total{listener=${labels}}`)
  t.equal(requests(`"internal",method="GET",route="${route}",status="200"`), 6)
  t.equal(requests(`"internal",method="GET",route="${route}",status="503"`), 1)
  t.equal(requests('"public",method="GET",route="/livez",status="200"'), 1)
  t.equal(found.get(`http_request_seconds_count{listener="internal",route="${route}"}`), 2)
  const bucket = (le: string) =>
    found.get(`http_request_seconds_bucket{le="${le}",listener="internal",route="${route}"}`)
  t.equal(bucket('0.0025'), 0)
  t.equal(bucket('0.005'), 1)
  t.equal(bucket('30'), 2)
  t.equal((await samples()).size, found.size, 'asked again it says the same')
})

// ── Readings ─────────────────────────────────────────────────────────────────────────────────────

t.test('what can be read at any time is read when it is asked for', async (t) => {
  let spoolEntries = 2
  const { samples } = setMetrics({ ...READINGS, spoolEntries: () => spoolEntries })
  const found = await samples()
  t.equal(found.get('rotations_in_flight'), 3)
  t.equal(found.get('grants_cached'), 11)
  t.equal(found.get('spool_entries'), 2)
  t.equal(found.get('audit_events_waiting'), 13)
  t.equal(found.get('database_connections{state="used"}'), 5)
  t.equal(found.get('database_connections{state="idle"}'), 4)
  t.equal(found.get('database_connections{state="awaited"}'), 1)
  t.equal(found.get('requests_shed_total'), 8)
  t.equal(found.get('log_lines_dropped_total'), 0)
  t.equal(found.get('audit_events_dropped_total'), 4)
  t.equal(found.get('heartbeat_age_seconds'), 2.5)
  t.equal(found.get('check_failing{check="database"}'), 0)
  t.equal(found.get('check_failing{check="spool"}'), 1)
  t.equal(found.get('warning{warning="callers_file"}'), 1)
  t.equal(found.get('grants{state="active"}'), 5)
  t.equal(found.get('grants{state="revoked"}'), 0)
  t.equal(found.get('grants_expiring{within_days="30"}'), 2)
  t.equal(found.get('queue_entries{queue="webhooks",state="pending"}'), 4)
  t.equal(found.get('queue_entries{queue="webhooks",state="dead"}'), 6)
  t.equal(found.get('queue_entries{queue="revocations",state="pending"}'), 7)
  spoolEntries = 20
  t.equal((await samples()).get('spool_entries'), 20)
})

t.test(
  'a census is taken once a minute however many ask, and less often if it is slow',
  async (t) => {
    let taken = 0
    let tookMs = 0
    const { clock, samples } = setMetrics({
      ...READINGS,
      async census() {
        taken += 1
        clock.pass(tookMs)
        return CENSUS
      },
    })
    await Promise.all([samples(), samples(), samples()])
    t.equal(taken, 1)
    clock.pass(59_999)
    await samples()
    t.equal(taken, 1)
    clock.pass(1)
    tookMs = 3_000
    await samples()
    t.equal(taken, 2)
    clock.pass(299_999)
    await samples()
    t.equal(taken, 2, 'a hundredth of the time at most')
    clock.pass(1)
    await samples()
    t.equal(taken, 3)
  },
)

t.test('without a database the last census holds for a while, then nothing is told', async (t) => {
  let isAway = false
  const { clock, samples } = setMetrics({
    ...READINGS,
    census: () => (isAway ? Promise.reject(new Error('away')) : Promise.resolve(CENSUS)),
  })
  t.equal((await samples()).get('grants{state="active"}'), 5)
  isAway = true
  clock.pass(14 * 60_000)
  t.equal((await samples()).get('grants{state="active"}'), 5)
  clock.pass(61_000)
  const found = await samples()
  t.notOk([...found.keys()].some((key) => /^(grants|grants_expiring|queue_entries)\{/.test(key)))
  t.equal(found.get('spool_entries'), 2, 'all else is told')
  isAway = false
  clock.pass(60_000)
  t.equal((await samples()).get('grants{state="active"}'), 5)
})

t.test('one that hangs until it is given up is tried again a minute later', async (t) => {
  let taken = 0
  const { clock, log, samples } = setMetrics({
    ...READINGS,
    async census() {
      taken += 1
      if (taken > 1) return CENSUS
      clock.pass(10_000)
      throw new Error('the statement took too long')
    },
  })
  t.notOk((await samples()).has('grants{state="active"}'))
  t.match(log.events, [{ level: 'warn', event: 'census_failed' }])
  clock.pass(60_000)
  t.equal((await samples()).get('grants{state="active"}'), 5)
})

t.test('whoever asks for a check while it runs has the result of that', async (t) => {
  let runs = 0
  const running = Promise.withResolvers<string>()
  const clock = standingClock()
  const check = sharedCheck(clock, () => {
    runs += 1
    return runs === 1 ? running.promise : Promise.resolve(undefined)
  })
  const asked = [check(), check(), check()]
  clock.pass(2_000)
  t.equal(await check(), undefined, 'but not of one that hangs')
  running.resolve('not writable')
  t.strictSame(await Promise.all(asked), ['not writable', 'not writable', 'not writable'])
  t.equal(runs, 2)
  t.equal(await check(), undefined)
  t.equal(runs, 3, 'the next one is run anew')
})

t.test('an answer does not wait for a census that takes long', async (t) => {
  const taking = Promise.withResolvers<Census>()
  const { clock, samples } = setMetrics({ ...READINGS, census: () => taking.promise })
  const asked = samples()
  // Those who ask have begun to wait by then.
  await delay(50)
  clock.pass(1_000)
  t.notOk((await asked).has('grants{state="active"}'))
  taking.resolve(CENSUS)
  await taking.promise
  t.equal((await samples()).get('grants{state="active"}'), 5, 'the next one has it')
})

t.test('the census counts grants by state and end, and what is queued', async (t) => {
  const { database } = await createTestDatabase(t)
  const census = createCensus(database)
  const EMPTY = { active: 0, suspect: 0, reauthentication_required: 0, revoked: 0 }
  t.strictSame(await census(), {
    grants: EMPTY,
    expiringWithinDays: new Map([
      [7, 0],
      [30, 0],
      [90, 0],
    ]),
    webhooksPending: 0,
    webhooksDead: 0,
    revocationsPending: 0,
  })
  const add = (user: string, state: string, rollingDays: number, absoluteDays = 1_000) =>
    sql`
    insert into grants (user_id, login_id, generation, state, authenticated_at, rotated_at,
      rolling_expires_at, absolute_expires_at)
    values (${user}, gen_random_uuid(), 1, ${state}, now(), now(),
      now() + make_interval(days => ${rollingDays}), now() + make_interval(days => ${absoluteDays}))
    `.execute(database.db)
  await add('past', 'active', -1)
  await add('week', 'active', 6)
  await add('month', 'active', 200, 29)
  await add('quarter', 'active', 89)
  await add('far', 'active', 91)
  await add('suspect', 'suspect', 3)
  await add('dead', 'reauthentication_required', 3)
  await add('dead-too', 'reauthentication_required', 3)
  await sql`
    insert into outbox (user_id, type, grant_state, generation, expires_at, state)
    values ('a', 'grant.connected', 'active', 1, now(), 'pending'),
      ('b', 'grant.connected', 'active', 1, now(), 'dead'),
      ('c', 'grant.connected', 'active', 1, now(), 'dead')`.execute(database.db)
  await sql`
    insert into revocations (revocation_id, user_id, token_sealed, key_id)
    values (gen_random_uuid(), 'a', 'x', 'k')`.execute(database.db)
  t.strictSame(await census(), {
    grants: { ...EMPTY, active: 5, suspect: 1, reauthentication_required: 2 },
    expiringWithinDays: new Map([
      [7, 2],
      [30, 3],
      [90, 4],
    ]),
    webhooksPending: 1,
    webhooksDead: 2,
    revocationsPending: 1,
  })
})

// ── A replica ────────────────────────────────────────────────────────────────────────────────────

async function scrape({ origin }: Replica): Promise<{ text: string; samples: Samples }> {
  const response = await fetch(`${origin}/metrics`)
  const text = await response.text()
  if (response.status !== 200) throw new Error(`/metrics answered ${response.status}: ${text}`)
  return { text, samples: samplesOf(text) }
}

async function untilSampled(
  t: Test,
  replica: Replica,
  what: string,
  holds: (samples: Samples) => boolean,
): Promise<Samples> {
  const givenUpAtMs = performance.now() + 30_000
  for (;;) {
    const { samples } = await scrape(replica)
    if (holds(samples) || performance.now() > givenUpAtMs) {
      t.ok(holds(samples), what)
      return samples
    }
    await delay(50)
  }
}

t.test('a replica tells what it has done, to whoever reaches the internal listener', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t, env: { TOKEN_CACHE_TRUST_MS: '60000' } })
  const replica = await fleet.add()
  await fleet.connect(['alice@nordvik.example', 'bob@nordvik.example', 'carol@nordvik.example'])
  await fleet.expire(['bob@nordvik.example', 'carol@nordvik.example'])

  for (let i = 0; i < 4; i += 1) {
    t.equal((await replica.token('alice@nordvik.example')).status, 200)
  }
  t.equal((await replica.token('bob@nordvik.example')).status, 200, 'refreshed')
  t.equal((await replica.token('nobody@nordvik.example')).status, 404)
  t.equal((await fetch(`${replica.origin}/v1/users/alice/access-token`)).status, 401)
  t.equal((await fetch(`${replica.origin}/secret-path`)).status, 404)
  t.equal((await fetch(`${replica.origin}/livez`, { method: 'PROPFIND' })).status, 405)
  await fleet.lookAlike.revokeLogin(await fleet.refreshToken('carol@nordvik.example'))
  t.equal((await replica.token('carol@nordvik.example')).status, 409)

  const gateway = { authorization: replica.authorization, 'x-broker-user': 'alice@nordvik.example' }
  t.equal((await fetch(`${replica.origin}/v1/forward-auth`, { headers: gateway })).status, 200)
  const proxied = await fetch(
    `${replica.origin}/v1/users/alice@nordvik.example/pagero/document/v1/documents`,
    { headers: { authorization: replica.authorization } },
  )
  await proxied.arrayBuffer()
  const tooLong = `${replica.origin}/v1/users/${'a'.repeat(1_025)}/grant`
  t.equal((await fetch(tooLong, { headers: gateway })).status, 400)
  const { status: ofNobody } = await fetch(`${replica.publicOrigin}/auth/session`)

  // The census, which takes its time on a busy machine, is the last that comes.
  await untilSampled(t, replica, 'counted', (found) => found.has('grants{state="active"}'))
  const { text, samples } = await scrape(replica)
  const requests = (labels: string) => samples.get(`http_requests_total{listener=${labels}}`)
  const token = 'route="/v1/users/:user/access-token"'
  t.equal(requests(`"internal",method="GET",${token},status="200"`), 5)
  t.equal(requests(`"internal",method="GET",${token},status="401"`), 1)
  t.equal(requests(`"internal",method="GET",${token},status="404"`), 1)
  t.equal(requests(`"internal",method="GET",${token},status="409"`), 1)
  t.equal(requests('"internal",method="GET",route="(none)",status="404"'), 1)
  t.equal(requests('"internal",method="GET",route="(none)",status="400"'), 1)
  t.equal(requests('"internal",method="GET",route="/v1/forward-auth",status="200"'), 1)
  t.equal(
    requests(`"internal",method="GET",route="/v1/users/:user/pagero/*",status="${proxied.status}"`),
    1,
  )
  t.equal(requests(`"public",method="GET",route="/auth/session",status="${ofNobody}"`), 1)
  t.equal(requests('"internal",method="(other)",route="(none)",status="405"'), 1)
  t.equal(
    samples.get(
      'http_request_seconds_count{listener="internal",route="/v1/users/:user/access-token"}',
    ),
    5,
    'three of eight were in memory',
  )
  t.equal(
    [...samples].find(([key]) => key.startsWith('tokens_handed_out_total{'))?.[1],
    6,
    'each token once, and that of the gateway',
  )
  t.equal(samples.get('refresh_attempts_total{cause="expiry",outcome="granted"}'), 1)
  t.equal(samples.get('refresh_attempts_total{cause="expiry",outcome="refused"}'), 1)
  t.equal(
    samples.get('refresh_attempts_total{cause="recovery",outcome="refused"}'),
    1,
    'to be sure',
  )
  t.equal(samples.get('grants_condemned_total{cause="revoked_or_expired"}'), 1)
  t.equal(samples.get('grants_condemned_total{cause="rotation_lost"}'), 0)
  t.equal(samples.get('refresh_attempt_seconds_count'), 3)
  t.equal(samples.get('grants{state="active"}'), 2)
  t.equal(samples.get('grants{state="reauthentication_required"}'), 1)
  t.equal(samples.get('grants_cached'), 3, 'that of the refused one has not been asked for since')
  t.equal(samples.get('spool_entries'), 1)
  t.equal(samples.get('rotations_in_flight'), 0)
  t.ok((samples.get('heartbeat_age_seconds') ?? 60) < 60)
  t.equal(samples.get('check_failing{check="database"}'), 0)
  t.ok((samples.get('process_resident_memory_bytes') ?? 0) > 10_000_000)
  t.notMatch(text, /nordvik|secret-path/, 'no user, and nothing that a client has sent')

  const answer = await fetch(`${replica.origin}/metrics`)
  t.match(answer.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  t.equal(answer.headers.get('cache-control'), 'no-store')
  t.equal((await fetch(`${replica.publicOrigin}/metrics`)).status, 404, 'not for browsers')
})

t.test('a server that does not answer and a database that is away show', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t })
  const replica = await fleet.add()
  const users = Array.from({ length: 8 }, (_, i) => `user-${i}`)
  await fleet.connect(users)
  await fleet.expire(users)
  fleet.toServer.mode = 'refuse'
  await Promise.all(users.map((user) => replica.token(user)))
  const open = await untilSampled(t, replica, 'the breaker is open', (samples) =>
    Boolean(samples.get('breaker_open{reason="unreachable"}')),
  )
  t.ok((open.get('refresh_attempts_total{cause="expiry",outcome="not_processed"}') ?? 0) > 0)
  fleet.toServer.mode = 'pass'
  const tokens = async () => Promise.all(users.map((user) => replica.token(user)))
  await untilSampled(t, replica, 'and closed again', (samples) => {
    tokens().catch(() => undefined)
    return samples.get('breaker_open{reason="unreachable"}') === 0
  })

  fleet.toDatabase.mode = 'refuse'
  fleet.toDatabase.cut()
  const away = await untilSampled(t, replica, 'heartbeats fail, and grow old', (samples) =>
    Boolean(
      samples.get('events_total{event="heartbeat_failed",level="warn"}') &&
      (samples.get('heartbeat_age_seconds') ?? 0) > 1,
    ),
  )
  t.equal(away.get('check_failing{check="database"}'), 1)
  t.equal(away.get('check_failing{check="spool"}'), 0)
  fleet.toDatabase.mode = 'pass'
  const back = await untilSampled(
    t,
    replica,
    'and succeed again',
    (samples) => (samples.get('heartbeat_age_seconds') ?? 1) < 1,
  )
  t.equal(back.get('check_failing{check="database"}'), 0)
})
