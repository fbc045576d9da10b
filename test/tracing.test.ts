// Traces: what a collector is told by a real replica, and what it is not told.

import { randomBytes, randomUUID } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import { connect } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import type { TokenOutcome } from '../src/grant.ts'
import type { Successor } from '../src/grant-stores.ts'
import type { Ports } from '../src/ports.ts'
import { startTracing } from '../src/tracing.ts'
import { type CollectedSpan, type Collector, startCollector } from './support/collector.ts'
import { createTestDatabase } from './support/database.ts'
import { type Fleet, setFleet, until } from './support/fleet.ts'
import { keepingLog } from './support/keeping-log.ts'
import type { Replica } from './support/replica.ts'
import { answer, startUpstream, type Upstream } from './support/upstream.ts'

const USER = 'alice@example.com'
const TRACE_ID = '4bf92f3577b34da6a3ce929d0e0e4736'
const PARENT_ID = '00f067aa0ba902b7'
const TOKEN_ROUTE = 'GET /v1/users/:user/access-token'
const TOKEN_CALL = 'POST /oauth/v2/oauth-token'
const LIMIT_MS = 20_000
const PAGERO = {
  tokenUrl: 'http://127.0.0.1:1/token',
  revokeUrl: 'http://127.0.0.1:1/revoke',
  apiUrl: 'http://127.0.0.1:1',
}
const NO_STORES = {
  ...{ grants: {}, attempts: {}, imports: {}, revocations: {}, loginTransactions: {} },
  ...{ connectLinks: {}, pendingGrants: {}, sessionTickets: {}, sessions: {} },
  ...{ outbox: {}, auditEvents: { list: async () => [] } },
}

interface Setting {
  fleet: Fleet
  replica: Replica
  collector: Collector
  api: Upstream
  /** In place of the API's answers: none is given. */
  answering?: () => unknown
}

/** A replica that traces, with a grant of `USER` that is to be refreshed. */
async function setReplica(t: Test, env: Readonly<Record<string, string>> = {}): Promise<Setting> {
  const collector = await startCollector(t)
  const setting = {} as Setting
  const api = await startUpstream(t, (call) => setting.answering?.() ?? answer(call, 200, '{}'))
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({
    url,
    test: t,
    env: { OTEL_EXPORTER_OTLP_ENDPOINT: collector.url, PAGERO_API_URL: api.url, ...env },
  })
  await fleet.connect([USER])
  await fleet.expire()
  const replica = await fleet.add({ name: 'traced' })
  return Object.assign(setting, { fleet, replica, collector, api })
}

function ask(
  { replica }: Pick<Setting, 'replica'>,
  path: string,
  headers: Readonly<Record<string, string>> = {},
  method = 'GET',
): Promise<Response> {
  return fetch(replica.origin + path, {
    method,
    headers: { authorization: replica.authorization, ...headers },
  })
}

const tokenPath = `/v1/users/${USER}/access-token`
const traceparent = (flags: '00' | '01', traceId = TRACE_ID) =>
  `00-${traceId}-${PARENT_ID}-${flags}`
const newTraceId = () => randomBytes(16).toString('hex')

/** Waits for the span of a request, which ends last. */
async function collected({ collector }: Setting, name: string): Promise<CollectedSpan> {
  const find = () => collector.spans.find((span) => span.name === name)
  await until(() => find() !== undefined, LIMIT_MS, `a span ${name}`)
  return find() as CollectedSpan
}

function namesWithin(spans: readonly CollectedSpan[], parent: CollectedSpan): string[] {
  return spans.filter((span) => span.parentSpanId === parent.spanId).map(({ name }) => name)
}

t.test('a refresh is told of step by step, as a part of the trace of whoever asked', async (t) => {
  const setting = await setReplica(t)
  const { collector, replica, fleet } = setting
  const requestId = 'f3a6f0fb-2b1e-4a2c-9d1f-0c9a3e1b7a55'
  const answered = await ask(setting, tokenPath, {
    traceparent: traceparent('01'),
    'x-request-id': requestId,
  })
  t.equal(answered.status, 200)
  const request = await collected(setting, TOKEN_ROUTE)
  t.match(request, { traceId: TRACE_ID, parentSpanId: PARENT_ID, kind: 2, isError: false })
  t.strictSame(request.attributes, {
    'http.request.method': 'GET',
    'url.scheme': 'http',
    'pagero_broker.listener': 'internal',
    'pagero_broker.request_id': requestId,
    'http.route': '/v1/users/:user/access-token',
    'http.response.status_code': 200,
  })
  const { spans } = collector
  t.ok(
    spans.every(({ traceId }) => traceId === TRACE_ID),
    'one trace',
  )
  t.same(namesWithin(spans, request), ['grants.findMany', 'grants.find', 'refresh'])
  const refresh = await collected(setting, 'refresh')
  t.match(refresh, { kind: 1, attributes: { 'pagero_broker.cause': 'expiry' } })
  t.same(namesWithin(spans, refresh), [
    ...['grants.arm', TOKEN_CALL, 'spool.write', 'grants.store'],
  ])
  const [call] = spans.filter(({ name }) => name === TOKEN_CALL)
  t.match(call, { kind: 3, isError: false })
  t.strictSame(call?.attributes, {
    'http.request.method': 'POST',
    'server.address': '127.0.0.1',
    'server.port': Number(new URL(fleet.env['PAGERO_TOKEN_URL'] ?? '').port),
    'pagero_broker.grant_type': 'refresh_token',
    'pagero_broker.outcome': 'granted',
    'http.response.status_code': 200,
  })
  const [arm] = spans.filter(({ name }) => name === 'grants.arm')
  t.match(arm, { kind: 3, attributes: { 'db.system.name': 'postgresql' } })
  t.match(collector.resources[0], {
    'service.name': 'pagero-token-broker',
    'service.instance.id': 'traced',
  })
  t.equal(collector.requests[0]?.target, '/v1/traces')
  t.equal(fleet.refreshes().length, 1)
  t.notOk(
    fleet.lookAlike.record.some(({ headers }) => /traceparent/i.test(JSON.stringify(headers))),
    'Pagero is told of no trace',
  )
  const line = replica.log.find(({ event }) => event === 'refresh_attempt_finished')
  t.equal(line?.['traceId'], TRACE_ID, 'the log names the trace')
})

t.test('nothing in a trace tells of a user, a path or a secret', async (t) => {
  const setting = await setReplica(t, { LOG_LEVEL: 'debug' })
  const { collector, api, fleet } = setting
  const path = `/v1/users/${USER}/pagero/document/v1/documents/INVOICE-4711?secret=S3CRET`
  const fields = {
    'x-secret': 'F1ELD',
    baggage: 'user=B4GGAGE',
    traceparent: traceparent('01'),
    tracestate: 'app=ST4TE',
  }
  t.equal((await ask(setting, path, fields)).status, 200)
  const request = await collected(setting, 'GET /v1/users/:user/pagero/*')
  const call = collector.spans.find(({ name }) => name === 'GET')
  t.match(call, {
    kind: 3,
    traceId: request.traceId,
    attributes: { 'server.address': '127.0.0.1', 'http.response.status_code': 200 },
  })
  t.strictSame(api.calls[0]?.values('traceparent'), [], 'Pagero is told of no trace')
  t.equal((await ask(setting, `/v1/users/${USER}/grant`, {}, 'DELETE')).status, 204)
  await collected(setting, 'DELETE /v1/users/:user/grant')
  t.equal((await ask(setting, '/nothing/UNKN0WN')).status, 404)
  await collected(setting, 'GET (none)')
  const text = collector.requests.map(({ body }) => body).join('\n')
  t.match(text, /"POST \/oauth\/v2\/oauth-token"/)
  for (const secret of [
    'alice',
    'example.com',
    'INVOICE',
    'S3CRET',
    'F1ELD',
    'B4GGAGE',
    'ST4TE',
    'UNKN0WN',
  ])
    t.notMatch(text, secret)
  const given = fleet.lookAlike.record.flatMap(({ form }) => Object.values(form))
  t.ok(given.length > 1)
  for (const value of given.filter((one) => one.length > 20)) t.notOk(text.includes(value))
})

t.test('a failure is told by its code, and costs nobody the trace', async (t) => {
  const setting = await setReplica(t)
  const { fleet } = setting
  fleet.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 503, times: 99 })
  t.equal((await ask(setting, tokenPath)).status, 503)
  const request = await collected(setting, TOKEN_ROUTE)
  t.match(request, { isError: true, attributes: { 'error.type': '503' } })
  t.equal(request.parentSpanId, undefined)
  t.match(await collected(setting, 'refresh'), {
    isError: true,
    attributes: { 'error.type': 'temporarily_unavailable' },
  })
  t.match(await collected(setting, TOKEN_CALL), {
    isError: true,
    attributes: { 'pagero_broker.outcome': 'not_processed', 'http.response.status_code': 503 },
  })
})

t.test('an answer that its client did not wait for is told as cut', async (t) => {
  const setting = await setReplica(t)
  const { api, replica } = setting
  const gone = new AbortController()
  const held = Promise.withResolvers<void>()
  const path = `/v1/users/${USER}/pagero/document/v1/documents`
  setting.answering = () => {
    held.resolve()
    return true
  }
  const asked = fetch(replica.origin + path, {
    headers: { authorization: replica.authorization },
    signal: gone.signal,
  })
  await held.promise
  gone.abort()
  await t.rejects(asked)
  const request = await collected(setting, 'GET /v1/users/:user/pagero/*')
  t.match(request, { attributes: { 'error.type': 'cut' } })
  t.notOk('http.response.status_code' in request.attributes, 'there was none')
  t.match(await collected(setting, 'GET'), { isError: true, attributes: { 'error.type': 'cut' } })
  t.equal(api.calls.length, 1)
})

t.test('what a request brings with its body is a part of its trace as well', async (t) => {
  const setting = await setReplica(t)
  const { replica, collector } = setting
  const body = { rejected: 'x'.repeat(43) }
  t.equal((await replica.call('POST', tokenPath, body)).status, 200)
  const request = await collected(setting, 'POST /v1/users/:user/access-token')
  const within = collector.spans.filter(({ traceId }) => traceId === request.traceId)
  t.ok(within.some(({ name }) => name === 'grants.arm'))
})

t.test('callers decide what is traced, browsers do not, and probes are not', async (t) => {
  const setting = await setReplica(t, { OTEL_TRACES_SAMPLER_ARG: '0' })
  const { replica, collector } = setting
  t.equal((await ask(setting, tokenPath)).status, 200, 'none by itself')
  t.equal((await ask(setting, tokenPath, { traceparent: traceparent('00') })).status, 200)
  t.equal((await ask(setting, '/readyz', { traceparent: traceparent('01') })).status, 200)
  const login = `${replica.publicOrigin}/auth/session`
  t.equal((await fetch(login, { headers: { traceparent: traceparent('01') } })).status, 403)
  t.equal((await ask(setting, tokenPath, { traceparent: traceparent('01') })).status, 200)
  await collected(setting, TOKEN_ROUTE)
  t.same(
    collector.spans.filter(({ kind }) => kind === 2).map(({ name }) => name),
    [TOKEN_ROUTE],
  )
  t.equal(collector.spans.filter(({ traceId }) => traceId !== TRACE_ID).length, 0)
})

t.test("a browser's request begins a trace of its own, whatever it says", async (t) => {
  const setting = await setReplica(t)
  const { replica } = setting
  const headers = { traceparent: traceparent('01'), cookie: '__Host-broker-session=COOKIE' }
  await fetch(`${replica.publicOrigin}/auth/session`, { headers })
  const request = await collected(setting, 'GET /auth/session')
  t.match(request, { parentSpanId: undefined, attributes: { 'pagero_broker.listener': 'public' } })
  t.not(request.traceId, TRACE_ID)
})

t.test('malformed and doubled contexts begin a trace of their own', async (t) => {
  const setting = await setReplica(t)
  const wrong = [
    ...['', 'x', `00-${'0'.repeat(32)}-${PARENT_ID}-01`, `ff-${TRACE_ID}-${PARENT_ID}-01`],
    `${traceparent('01')}, ${traceparent('01')}`,
  ]
  for (const value of wrong) {
    t.equal((await ask(setting, tokenPath, { traceparent: value })).status, 200)
  }
  await until(
    () => setting.collector.spans.filter(({ name }) => name === TOKEN_ROUTE).length === 5,
    LIMIT_MS,
    'five spans',
  )
  t.notOk(setting.collector.spans.some(({ traceId }) => traceId === TRACE_ID))
})

t.test('a collector that is away costs traces, and nothing else', async (t) => {
  const setting = await setReplica(t)
  const { collector, replica, fleet } = setting
  collector.status = 400
  t.equal((await ask(setting, tokenPath)).status, 200)
  const said = (event: string) => replica.log.filter((line) => line.event === event)
  await until(() => said('traces_not_exported').length > 0, LIMIT_MS, 'word of it')
  t.equal((await ask(setting, tokenPath)).status, 200)
  await until(() => collector.requests.length > 1, LIMIT_MS, 'another try')
  await delay(300)
  t.equal(said('traces_not_exported').length, 1, 'it is said once a minute')
  t.equal(collector.spans.length, 0)
  collector.status = 200
  t.equal((await ask(setting, tokenPath)).status, 200)
  await until(() => said('traces_exported_again').length > 0, LIMIT_MS, 'word that it is back')
  t.match(await fleet.row(USER), { state: 'active', generation: 2, phase: 'idle' })
  t.same(await fleet.lost(), [], 'the grant has the token that works')
  t.match(said('traces_exported_again'), [{ count: Number }])
})

t.test('a stop sends what waits, and waits two seconds at most for a collector', async (t) => {
  const setting = await setReplica(t, { SHUTDOWN_LISTEN_SECONDS: '0' })
  const { collector, replica, fleet } = setting
  t.equal((await ask(setting, tokenPath)).status, 200)
  t.equal(await replica.kill('SIGTERM'), 0)
  t.ok(collector.spans.some(({ name }) => name === TOKEN_ROUTE))

  collector.status = 0
  await replica.start()
  await fleet.expire()
  t.equal((await ask(setting, tokenPath)).status, 200)
  const beganMs = performance.now()
  t.equal(await replica.kill('SIGTERM'), 0)
  const tookMs = performance.now() - beganMs
  t.ok(tookMs > 1_500 && tookMs < 10_000, `${Math.round(tookMs)} ms`)
})

t.test('the collector is given the fields that it wants', async (t) => {
  const setting = await setReplica(t, {
    OTEL_EXPORTER_OTLP_HEADERS: 'x-api-key=a%20key%2C%20with%20a%20comma, x-tenant=7',
    OTEL_SERVICE_NAME: 'billing.broker',
  })
  const { collector, replica } = setting
  t.equal((await ask(setting, tokenPath)).status, 200)
  await collected(setting, TOKEN_ROUTE)
  t.match(collector.requests[0]?.headers, {
    'content-type': 'application/json',
    'x-api-key': 'a key, with a comma',
    'x-tenant': '7',
  })
  t.equal(collector.resources[0]?.['service.name'], 'billing.broker')
  t.notMatch(JSON.stringify(replica.log), 'with a comma')
})

// ── Which trace something belongs to ─────────────────────────────────────────────────────────────

const USERS = ['a', 'b', 'c', 'd', 'e', 'f'].map((name) => `${name}@example.com`)

t.test('requests that come in one piece each keep to their own trace', async (t) => {
  const setting = await setReplica(t)
  const { collector, replica, fleet } = setting
  await fleet.connect(USERS)
  const traceIds = USERS.map(newTraceId)
  const requests = USERS.map((user, index) => {
    const body = index % 2 === 0 ? '' : JSON.stringify({ rejected: 'x'.repeat(43) })
    const head = [
      `${body === '' ? 'GET' : 'POST'} /v1/users/${user}/access-token HTTP/1.1`,
      ...['host: a', `authorization: ${replica.authorization}`],
      `traceparent: ${traceparent('01', traceIds[index])}`,
      ...(body === '' ? [] : ['content-type: application/json', `content-length: ${body.length}`]),
    ]
    return `${head.join('\r\n')}\r\n\r\n${body}`
  })
  const { hostname, port } = new URL(replica.origin)
  const socket = connect(Number(port), hostname)
  t.teardown(() => socket.destroy())
  let received = ''
  socket.setEncoding('utf8').on('data', (text) => (received += String(text)))
  socket.write(requests.join(''))
  const answered = () => received.split('HTTP/1.1 200').length - 1
  await until(() => answered() === USERS.length, LIMIT_MS, 'all answers')
  const servers = () => collector.spans.filter(({ kind }) => kind === 2)
  await until(() => servers().length === USERS.length, LIMIT_MS, 'all spans')
  for (const [index, traceId] of traceIds.entries()) {
    const own = collector.spans.filter((span) => span.traceId === traceId)
    const [server] = own.filter(({ kind }) => kind === 2)
    t.match(server?.name, index % 2 === 0 ? /^GET/ : /^POST/)
    t.ok(own.length > 1, 'what it waited for is there')
    t.ok(own.every(({ kind, parentSpanId }) => kind === 2 || parentSpanId === server?.spanId))
  }
})

t.test('answers that go out together are logged each with its own trace', async (t) => {
  const setting = await setReplica(t, { LOG_LEVEL: 'debug' })
  const { replica, fleet, api } = setting
  await fleet.connect(USERS)
  setting.answering = () => undefined
  const traceOf = new Map<string, string>()
  for (let round = 0; round < 8; round += 1) {
    await Promise.all(
      USERS.map(async (user) => {
        const [requestId, traceId] = [randomUUID(), newTraceId()]
        traceOf.set(requestId, traceId)
        const fields = { 'x-request-id': requestId, traceparent: traceparent('01', traceId) }
        const response = await ask(setting, `/v1/users/${user}/pagero/document/v1/a`, fields)
        await response.arrayBuffer()
      }),
    )
  }
  t.equal(api.calls.length, traceOf.size)
  const lines = () =>
    replica.log.filter(
      ({ event, requestId }) => event === 'request_answered' && traceOf.has(requestId as string),
    )
  await until(() => lines().length === traceOf.size, LIMIT_MS, 'all lines')
  for (const line of lines()) t.equal(line['traceId'], traceOf.get(line['requestId'] as string))
})

t.test('coming back to a token in doubt begins a trace of its own', async (t) => {
  const setting = await setReplica(t)
  const { collector, fleet, replica } = setting
  fleet.lookAlike.faults.push({ endpoint: 'token', kind: 'status', status: 500, times: 2 })
  const asked = await ask(setting, tokenPath, { traceparent: traceparent('01') })
  t.equal(asked.status, 503)
  const find = () =>
    collector.spans.find(
      ({ name, isError, attributes }) =>
        name === 'refresh' && attributes['pagero_broker.cause'] === 'recovery' && !isError,
    )
  await until(() => find() !== undefined, LIMIT_MS, 'the recovery')
  const recovery = find() as CollectedSpan
  t.equal(recovery.parentSpanId, undefined)
  t.not(recovery.traceId, TRACE_ID)
  t.same(namesWithin(collector.spans, recovery), [
    ...['grants.arm', TOKEN_CALL, 'spool.write', 'grants.store'],
  ])
  const lines = replica.log.filter(({ event }) => event === 'refresh_attempt_finished')
  t.equal(lines.at(-1)?.['traceId'], recovery.traceId)
})

t.test('reads for operators are told of as well', async (t) => {
  const setting = await setReplica(t)
  t.equal((await ask(setting, '/v1/audit-events')).status, 200)
  const request = await collected(setting, 'GET /v1/audit-events')
  t.same(namesWithin(setting.collector.spans, request), ['audit_events.list'])
})

// ── What is sent, and what is lost ───────────────────────────────────────────────────────────────

/** Traces in this process, with a clock whose hands stand but for `pass`. */
function traceHere(t: Test, endpoint: string) {
  const log = keepingLog()
  let nowMs = 0
  const clock = { ...systemClock, monotonicMs: () => nowMs }
  const settings = { endpoint, fields: undefined, serviceName: 'test', sampledShare: 1 }
  const tracing = startTracing(settings, PAGERO, { clock, log, replica: 'test' })
  t.teardown(() => tracing.stop())
  const request = { method: 'GET', headers: {} } as IncomingMessage
  return {
    tracing,
    log,
    pass: (ms: number) => void (nowMs += ms),
    trace(count: number) {
      for (let i = 0; i < count; i += 1) {
        tracing.begin(request, 'internal').end({ status: 200, isWhole: true })
      }
    },
  }
}

t.test('what cannot be told costs no token', async (t) => {
  const { tracing } = traceHere(t, 'http://127.0.0.1:1')
  const outcome: TokenOutcome = {
    kind: 'refused',
    get httpStatus(): number {
      throw new Error('not to be told')
    },
  }
  const present = { refresh: async () => outcome } as unknown as Ports['authorizationServer']
  const full = new Error('disk full')
  const spool = { write: () => Promise.reject(full) } as unknown as Ports['spool']
  const fewPorts = { authorizationServer: present, spool, ...NO_STORES } as unknown as Ports
  const ports = tracing.ports(fewPorts)
  const limits = { sendBeforeMs: 1, deadlineMs: 1 }
  t.equal(await ports.authorizationServer.refresh('token', limits), outcome)
  await t.rejects(ports.spool.write({} as Successor), full, 'and errors are passed on')
})

t.test('a stop sends as many as may wait, a slow collector or not', async (t) => {
  const collector = await startCollector(t)
  collector.delayMs = 300
  const { tracing, trace } = traceHere(t, collector.url)
  trace(2_000)
  await tracing.stop()
  t.equal(collector.spans.length, 2_000)
})

t.test('what there is no room for is lost, and that is told once a minute', async (t) => {
  const collector = await startCollector(t)
  collector.delayMs = 200
  const { tracing, log, trace, pass } = traceHere(t, collector.url)
  trace(5_000)
  const told = () => log.events.filter(({ event }) => event === 'traces_not_exported')
  t.match(told(), [{ count: 1 }])
  pass(60_000)
  trace(1)
  await tracing.stop()
  const counts = told().map(({ count }) => Number(count))
  t.equal(counts.length, 2)
  t.equal(collector.spans.length + counts.reduce((sum, count) => sum + count, 0), 5_001)
})

t.test('a collector that nobody can reach is told of with its code', async (t) => {
  const { tracing, log, trace } = traceHere(t, 'http://127.0.0.1:1')
  trace(3)
  await tracing.stop()
  await until(() => log.events.length > 0, LIMIT_MS, 'word of it')
  t.match(log.events, [{ event: 'traces_not_exported', count: 3, error: { code: 'ECONNREFUSED' } }])
})
