// What both listeners have in common: limits, security headers, problems, 405, the request log.
// Fastify's own logger and default handlers stay off: they write the URL, and with it the authorization code.

import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import '@fastify/swagger' // for the members of a route's schema that it adds
import fastify, { type FastifyError, type FastifyRequest } from 'fastify'
import { BrokerError } from '../errors.ts'
import { hasBody } from '../forward-upload.ts'
import type { Clock, Log } from '../ports.ts'
import { type Answered, NO_ROUTE, type RequestCounts } from '../request-counts.ts'
import type { Tracing } from '../tracing.ts'
import { type Connections, watchConnections } from './connections.ts'
import { wasShed } from './overload.ts'
import { asBrokerError, type Listener, ProblemSchema } from './problem.ts'
import { sendProblem } from './problem-answers.ts'
import { METHODS, refuseBeforeRouting, refuseUnrouted, requestIdOf } from './refusals.ts'
import { createRequestSpans } from './request-spans.ts'

/** 16 KiB, Node's own default, said aloud: beyond it the answer is 431. */
const HEADER_BYTES_MAX = 16_384
/** Bodies of the broker's own routes; proxied ones have limits of their own. */
const BODY_BYTES_MAX = 65_536
const HEADERS_TIMEOUT_MS = 10_000
/** Longer than the idle timeout of the usual load balancers (60 s), so that the broker never closes first. */
const KEEP_ALIVE_TIMEOUT_MS = 72_000
const REQUESTS_PER_SOCKET_MAX = 1_000
/** A user key of 255 characters, each of them percent-encoded, with room to spare. */
const PATH_PARAMETER_CHARACTERS_MAX = 1_024

/** On every answer that does not say otherwise. Pages and the docs set a policy of their own. */
export const SECURITY_HEADERS: Readonly<Record<string, string>> = {
  'content-security-policy':
    "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
  'cross-origin-opener-policy': 'same-origin',
}

/** Laid over the fields of a request: Fastify answers 415 to a type that it cannot parse, though there be nothing to parse. */
export const NO_CONTENT_TYPE = { 'content-type': undefined }

export interface AppSettings {
  listener: Listener
  /** Peers whose X-Forwarded-For is believed; none trusts nobody. */
  trustedProxies: readonly string[]
  /** Longest time for receiving one whole request, uploads included. */
  requestTimeoutMs: number
  /** How long a client may read nothing of an answer that waits for it. */
  answerIdleTimeoutMs: number
  /** Send Strict-Transport-Security: browsers reach the listener over TLS. */
  tls: boolean
  /** Counts what is answered. */
  counts?: RequestCounts | undefined
  /** Traces what is answered. */
  tracing?: Tracing | undefined
  /** Is given each request before the router is, and answers it or returns false. It leaves no trace in the request log. */
  answersAtOnce?: (request: IncomingMessage, response: ServerResponse) => boolean
  /**
   * The same for what takes its time to answer: it is given each request in its turn on the connection, and may give it
   * to the router later.
   */
  takesAtOnce?: (
    request: IncomingMessage,
    response: ServerResponse,
    route: (request: IncomingMessage, response: ServerResponse) => void,
  ) => boolean
}

/** The app of one listener, with TypeBox schemas as types. */
export type App = ReturnType<typeof createBareApp>

/**
 * Builds the app of one listener: what both have in common, then `routes`, then 405 for every other method of each path.
 * An answer is a problem document wherever a route does not decide otherwise.
 */
export async function buildApp(
  ports: { clock: Clock; log: Log },
  settings: AppSettings,
  routes: (app: App) => void | Promise<void>,
): Promise<App> {
  const app = createBareApp(ports, settings)
  const urls = new Set<string>()
  app.addHook('onRoute', (route) => void urls.add(route.url))
  await routes(app)
  await app.after()
  refuseOtherMethods(app, urls)
  await app.ready()
  return app
}

function createBareApp(ports: { clock: Clock; log: Log }, settings: AppSettings) {
  const { listener } = settings
  const headers = securityHeaders(settings)
  /** One for each address of the listener. */
  const watched: Connections[] = []
  const spans = settings.tracing && createRequestSpans(settings.tracing, listener)
  // Where the log tells of each request, and while the listener closes, all go through the router; so do those that are
  // traced, to be told of in one way.
  let { answersAtOnce, takesAtOnce } = settings
  if (ports.log.writes?.('debug') ?? true) answersAtOnce = takesAtOnce = undefined
  const mayBeQuick = (request: IncomingMessage): boolean => spans?.isRecorded(request) !== true
  const app = fastify({
    logger: false,
    requestIdHeader: false,
    genReqId: (raw) => requestIdOf(raw),
    bodyLimit: BODY_BYTES_MAX,
    trustProxy: settings.trustedProxies.length === 0 ? false : [...settings.trustedProxies],
    exposeHeadRoutes: true,
    forceCloseConnections: 'idle',
    // Fastify's own would destroy the connection although answers are due on it; see refusals.ts.
    clientErrorHandler: () => undefined,
    return503OnClosing: false,
    onProtoPoisoning: 'error',
    onConstructorPoisoning: 'error',
    routerOptions: {
      maxParamLength: PATH_PARAMETER_CHARACTERS_MAX,
      caseSensitive: true,
      ignoreTrailingSlash: false,
      ignoreDuplicateSlashes: false,
    },
    ajv: { customOptions: { removeAdditional: false, coerceTypes: true, allErrors: false } },
    frameworkErrors: (error, request, reply) => {
      void sendProblem(reply, request, listener, asBrokerError(error))
      // Fastify calls no hook for these.
      const { method } = request
      settings.counts?.ofQuick({ method, route: NO_ROUTE, status: reply.statusCode })()
    },
    serverFactory: (handler) => {
      const server = createServer({
        maxHeaderSize: HEADER_BYTES_MAX,
        insecureHTTPParser: false,
        // Checked before routing, so that its absence is answered by a problem document too.
        requireHostHeader: false,
        headersTimeout: HEADERS_TIMEOUT_MS,
        // Node refuses a total that is shorter than the limit for the headers alone.
        requestTimeout: Math.max(settings.requestTimeoutMs, HEADERS_TIMEOUT_MS),
        keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
        connectionsCheckingInterval: 1_000,
      })
      server.maxRequestsPerSocket = REQUESTS_PER_SOCKET_MAX
      const connections = watchConnections(server, settings)
      watched.push(connections)
      const parts = { listener, headers, connections, counts: settings.counts }
      const refuseOrRoute = refuseBeforeRouting(parts, handler, {
        answersAtOnce: (request, response) =>
          mayBeQuick(request) && answersAtOnce?.(request, response) === true,
        takesAtOnce(request, response, route) {
          const take = () => takesAtOnce?.(request, response, route) === true
          return spans === undefined ? take() : mayBeQuick(request) && spans.goOn(request, take)
        },
      })
      if (spans === undefined) server.on('request', refuseOrRoute)
      else {
        server.on('request', (request, response) =>
          spans.begin(request, response, () => refuseOrRoute(request, response)),
        )
      }
      refuseUnrouted(server, parts)
      return server
    },
  }).withTypeProvider<TypeBoxTypeProvider>()

  spans?.watch(app)
  app.addSchema(ProblemSchema)

  app.addHook('preClose', async () => {
    answersAtOnce = takesAtOnce = undefined
    for (const connections of watched) connections.close()
  })

  // With callbacks: a promise for each hook of each request costs more than what these do.
  app.addHook('onRequest', (request, reply, done) => {
    reply.headers(headers)
    // A route without a schema for bodies takes none, and what type none is of does not matter.
    if (
      request.raw.headers['content-type'] !== undefined &&
      !hasBody(request.raw) &&
      request.routeOptions.schema?.body === undefined
    ) {
      request.headers = NO_CONTENT_TYPE
    }
    done()
  })

  app.addHook('onResponse', (request, reply, done) => {
    done()
    noteAnswered(
      { log: ports.log, counts: settings.counts },
      {
        requestId: request.id,
        method: request.method,
        route: request.routeOptions.url ?? NO_ROUTE,
        status: reply.statusCode,
        durationMs: reply.elapsedTime,
      },
      { isLogged: !wasShed(request.raw) },
    )
  })

  app.setErrorHandler((error: FastifyError | BrokerError, request, reply) => {
    const known = asBrokerError(error)
    noteFailure(ports.log, request, known, error)
    return sendProblem(reply, request, listener, known)
  })

  app.setNotFoundHandler((request, reply) =>
    sendProblem(
      reply,
      request,
      listener,
      new BrokerError('not_found', 'There is nothing at this path on this listener.'),
    ),
  )

  return app
}

/** The security headers of a listener's answers. */
export function securityHeaders({
  tls,
}: Pick<AppSettings, 'tls'>): Readonly<Record<string, string>> {
  return tls
    ? { ...SECURITY_HEADERS, 'strict-transport-security': 'max-age=63072000' }
    : SECURITY_HEADERS
}

/** A request that has been answered, as the log tells of it. */
export interface AnsweredRequest extends Answered {
  requestId: string
}

/** Counts an answer, and tells the log of it: of the broker's faults always, of others only where it traces each request. */
export function noteAnswered(
  { log, counts }: { log: Log; counts: RequestCounts | undefined },
  { durationMs, ...answered }: AnsweredRequest,
  { isLogged = true } = {},
): void {
  const { method, route, status } = answered
  counts?.note({ method, route, status, durationMs })
  if (!isLogged) return
  const level = answered.status >= 500 ? 'warn' : 'debug'
  if (level === 'debug' && log.writes?.('debug') === false) return
  log[level]('request_answered', { ...answered, durationMs: Math.round(durationMs * 10) / 10 })
}

/** Leaves on record what an operator must look at. */
export function noteFailure(
  log: Log,
  request: FastifyRequest,
  known: BrokerError,
  error: FastifyError | BrokerError,
): void {
  if (known.code !== 'internal_error' && known.code !== 'integrity_failure') return
  log.error('request_failed', {
    requestId: request.id,
    route: request.routeOptions.url ?? NO_ROUTE,
    code: known.code,
    error: known.cause ?? error,
  })
}

/** Gives each path the answer 405 with `Allow` for the methods that it has not got (RFC 9110 section 15.5.6). */
function refuseOtherMethods(app: App, urls: ReadonlySet<string>): void {
  for (const url of [...urls]) {
    // The router is asked, because Fastify tells its hook of a route with and without a slash only once.
    const present = METHODS.filter((method) => app.hasRoute({ method, url }))
    const others = METHODS.filter((method) => !present.includes(method))
    if (others.length === 0) continue
    const allow = present.toSorted().join(', ')
    app.route({
      method: others,
      url,
      schema: { hide: true },
      exposeHeadRoute: false,
      // Before the body is looked at: its type does not matter to a method that is not there.
      onRequest: async (_request, reply) => {
        reply.header('allow', allow)
        throw new BrokerError('method_not_allowed', `This resource has the methods ${allow}.`)
      },
      handler: () => undefined,
    })
  }
}
