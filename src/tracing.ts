// Traces: what each request waited for, told to an OpenTelemetry collector. Loaded only where there is one.
// The core knows nothing of it: its ports are wrapped, and what belongs together is known by the asynchronous context.
// No span holds a path or a query as sent, a user, a message of an error, or a field of a request: they name routes,
// statements, outcomes and codes alone. Nothing that goes wrong here can cost a request, and least of all a token.

import type { IncomingMessage } from 'node:http'
import {
  type Attributes,
  context,
  isSpanContextValid,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  type SpanOptions,
  SpanStatusCode,
  trace,
} from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { resourceFromAttributes } from '@opentelemetry/resources'
import {
  ParentBasedSampler,
  TraceIdRatioBasedSampler,
  TracerProvider,
} from '@opentelemetry/sdk-trace'
import type { PageroSettings, TraceSettings } from './config.ts'
import { BrokerError } from './errors.ts'
import type { Forwarder } from './forward.ts'
import type { TokenOutcome } from './grant.ts'
import { reduceError } from './log.ts'
import type { Clock, Log, Ports } from './ports.ts'
import type { AroundRefresh } from './refresh.ts'
import { NO_ROUTE } from './request-counts.ts'
import { createSpanSender } from './span-sender.ts'

/** How long a stop waits for a collector that does not answer. */
const STOP_WAIT_MS = 2_000
/** No attribute here is as long. */
const ATTRIBUTE_CHARACTERS_MAX = 256

/** One request on its way through the broker. */
export interface RequestSpan {
  /** Whether the collector will be told of it. */
  readonly isRecorded: boolean
  /** Runs what answers the request, or a part of it: what it waits for becomes a part of the span. */
  run<T>(work: () => T): T
  /** Says what is asked for: the pattern of a route, never a path as it was sent. */
  describe(about: { route: string; requestId: string }): void
  /** Ends it. `status` is undefined where no answer was begun; `isWhole` tells whether it was sent to its end. */
  end(answered: { status: number | undefined; isWhole: boolean }): void
}

export interface Tracing {
  /**
   * Begins the span of a request. On the internal listener it goes on with the caller's trace (W3C Trace Context); a
   * browser's is nobody's word, so there it begins one.
   */
  begin(request: IncomingMessage, listener: 'public' | 'internal'): RequestSpan
  /** The id of the trace that the running code belongs to, if it is to be sent. */
  traceId(): string | undefined
  /** Returns ports whose calls to the database, the spool and Pagero are spans, where they belong to a request. */
  ports(ports: Ports): Ports
  /** Makes a span of each refresh; one that comes back to a token in doubt belongs to nobody, and begins a trace. */
  aroundRefresh: AroundRefresh
  /** Returns a forwarder whose calls are spans. */
  forwarder(forwarder: Forwarder): Forwarder
  /** Sends what waits, two seconds at most. Further spans are lost. */
  stop(): Promise<void>
}

/** Begins to trace. Once in a process: the context of a trace is the process's. */
export function startTracing(
  settings: TraceSettings,
  pagero: Pick<PageroSettings, 'tokenUrl' | 'revokeUrl' | 'apiUrl'>,
  { clock, log, replica }: { clock: Clock; log: Log; replica: string },
): Tracing {
  const provider = new TracerProvider({
    resource: resourceFromAttributes({
      'service.name': settings.serviceName,
      'service.instance.id': replica,
    }),
    sampler: new ParentBasedSampler({ root: new TraceIdRatioBasedSampler(settings.sampledShare) }),
    spanLimits: { attributeValueLengthLimit: ATTRIBUTE_CHARACTERS_MAX },
    spanProcessors: [createSpanSender(settings, { clock, log })],
  })
  const tracer = provider.getTracer('pagero-token-broker')
  const propagator = new W3CTraceContextPropagator()
  context.setGlobalContextManager(new AsyncLocalStorageContextManager())

  const isRecorded = (): boolean => trace.getActiveSpan()?.isRecording() === true

  /** Does the work in a span of its own, within the one that is under way if there is one. */
  async function inSpan<T>(
    name: string,
    options: SpanOptions,
    work: () => Promise<T>,
    note?: (span: Span, result: T) => void,
  ): Promise<T> {
    const span = quietly(() => tracer.startSpan(name, options))
    if (span === undefined) return work()
    try {
      const result = await context.with(trace.setSpan(context.active(), span), work)
      quietly(() => note?.(span, result))
      return result
    } catch (error) {
      quietly(() => fail(span, typeOf(error)))
      throw error
    } finally {
      quietly(() => span.end())
    }
  }

  /** Each function of a store in a span; what runs by itself, such as the heartbeat, is no part of anything. */
  function stored<T extends { [K in keyof T]: (...values: never[]) => Promise<unknown> }>(
    name: string,
    store: T,
  ): T {
    const options = { kind: SpanKind.CLIENT, attributes: { 'db.system.name': 'postgresql' } }
    const traced = Object.entries(store).map(([operation, ask]) => {
      const run = ask as (...values: unknown[]) => Promise<unknown>
      return [
        operation,
        (...values: unknown[]) =>
          isRecorded()
            ? inSpan(`${name}.${operation}`, options, () => run(...values))
            : run(...values),
      ]
    })
    return Object.fromEntries(traced) as T
  }

  return {
    begin(request, listener) {
      const parent =
        listener === 'internal' ? (quietly(() => parentOf(request)) ?? ROOT_CONTEXT) : ROOT_CONTEXT
      const method = request.method ?? ''
      const attributes = {
        'http.request.method': method,
        'url.scheme': 'http',
        'pagero_broker.listener': listener,
      }
      const span = quietly(() =>
        tracer.startSpan(`${method} ${NO_ROUTE}`, { kind: SpanKind.SERVER, attributes }, parent),
      )
      const inside = span === undefined ? undefined : trace.setSpan(parent, span)
      return {
        isRecorded: span?.isRecording() === true,
        run: (work) => (inside === undefined ? work() : context.with(inside, work)),
        describe({ route, requestId }) {
          quietly(() => {
            span?.updateName(`${method} ${route}`)
            span?.setAttribute('pagero_broker.request_id', requestId)
            if (route !== NO_ROUTE) span?.setAttribute('http.route', route)
          })
        },
        end({ status, isWhole }) {
          quietly(() => {
            if (status !== undefined) span?.setAttribute('http.response.status_code', status)
            if (status !== undefined && status >= 500 && span) fail(span, String(status))
            else if (!isWhole) span?.setAttribute('error.type', 'cut')
            span?.end()
          })
        },
      }
    },

    traceId() {
      const about = trace.getActiveSpan()?.isRecording() && trace.getActiveSpan()?.spanContext()
      return about && isSpanContextValid(about) ? about.traceId : undefined
    },

    ports(ports) {
      const { authorizationServer: server, spool } = ports
      const tokenCall = (grantType: string, present: () => Promise<TokenOutcome>) =>
        inSpan(
          nameOf('POST', pagero.tokenUrl),
          {
            kind: SpanKind.CLIENT,
            attributes: { ...callTo(pagero.tokenUrl), 'pagero_broker.grant_type': grantType },
          },
          present,
          noteOutcome,
        )
      return {
        ...ports,
        authorizationServer: {
          ...server,
          exchangeCode: (...given) =>
            tokenCall('authorization_code', () => server.exchangeCode(...given)),
          refresh: (...given) => tokenCall('refresh_token', () => server.refresh(...given)),
          revoke: (...given) =>
            inSpan(
              nameOf('POST', pagero.revokeUrl),
              { kind: SpanKind.CLIENT, attributes: callTo(pagero.revokeUrl) },
              () => server.revoke(...given),
              (span, isConfirmed) => {
                if (!isConfirmed) fail(span, 'not_confirmed')
              },
            ),
        },
        spool: {
          ...spool,
          write: (successor) => inSpan('spool.write', {}, () => spool.write(successor)),
        },
        grants: stored('grants', ports.grants),
        attempts: stored('attempts', ports.attempts),
        imports: stored('imports', ports.imports),
        revocations: stored('revocations', ports.revocations),
        loginTransactions: stored('login_transactions', ports.loginTransactions),
        connectLinks: stored('connect_links', ports.connectLinks),
        pendingGrants: stored('pending_grants', ports.pendingGrants),
        sessionTickets: stored('session_tickets', ports.sessionTickets),
        sessions: stored('sessions', ports.sessions),
        outbox: stored('outbox', ports.outbox),
        auditEvents: {
          ...ports.auditEvents,
          ...stored('audit_events', { list: ports.auditEvents.list }),
        },
      }
    },

    aroundRefresh: (cause, work) =>
      inSpan(
        'refresh',
        { attributes: { 'pagero_broker.cause': cause }, root: cause === 'recovery' },
        work,
      ),

    forwarder: (forwarder) => ({
      ...forwarder,
      forward: (request, response, call) =>
        inSpan(
          call.method,
          { kind: SpanKind.CLIENT, attributes: callTo(pagero.apiUrl, call.method) },
          () => forwarder.forward(request, response, call),
          (span, { status, source, complete }) => {
            if (source === 'upstream') span.setAttribute('http.response.status_code', status)
            if (!complete) fail(span, 'cut')
            else if (status >= 400) fail(span, String(status))
          },
        ),
    }),

    async stop() {
      const ended = provider.shutdown().catch(() => undefined)
      await Promise.race([ended, clock.sleep(STOP_WAIT_MS)])
      context.disable()
    },
  }

  function parentOf({ headers }: IncomingMessage) {
    return propagator.extract(ROOT_CONTEXT, headers, {
      // Of `tracestate`, which may hold anything, nothing is passed on: so nothing of it is taken.
      get: (fields, name) => (name === 'traceparent' ? fields[name] : undefined),
      keys: (fields) => Object.keys(fields),
    })
  }
}

/** Does what nobody's answer may depend on. */
function quietly<T>(work: () => T): T | undefined {
  try {
    return work()
  } catch {
    return undefined
  }
}

/** As OpenTelemetry names HTTP calls; the paths of these are settings, and no user's. */
function nameOf(method: string, url: string): string {
  return `${method} ${new URL(url).pathname}`
}

function callTo(url: string, method = 'POST'): Attributes {
  const { hostname, port, protocol } = new URL(url)
  return {
    'http.request.method': method,
    'server.address': hostname,
    'server.port': Number(port) || (protocol === 'https:' ? 443 : 80),
  }
}

function noteOutcome(span: Span, outcome: TokenOutcome): void {
  span.setAttribute('pagero_broker.outcome', outcome.kind)
  if (outcome.httpStatus !== undefined) {
    span.setAttribute('http.response.status_code', outcome.httpStatus)
  }
  if (outcome.kind !== 'granted') fail(span, outcome.kind)
}

function fail(span: Span, errorType: string): void {
  span.setAttribute('error.type', errorType).setStatus({ code: SpanStatusCode.ERROR })
}

/** As the log tells of errors: by code or class. Messages may quote anything. */
function typeOf(error: unknown): string {
  const { class: name, code } = reduceError(error)
  return error instanceof BrokerError ? error.code : (code ?? name)
}
