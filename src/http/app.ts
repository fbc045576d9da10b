// What both listeners have in common: limits, checks before routing, security headers, problems, 405, the request log.
// Fastify's own logger and default handlers stay off: they write the URL, and with it the authorization code.

import { randomUUID } from 'node:crypto'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import '@fastify/swagger' // for the members of a route's schema that it adds
import fastify, { type FastifyError, type HTTPMethods } from 'fastify'
import { BrokerError } from '../errors.ts'
import type { Clock, Log } from '../ports.ts'
import {
  challengeFor,
  type Listener,
  problemDocument,
  ProblemSchema,
  reasonPhrase,
  sendProblem,
} from './problem.ts'

/** Methods that any route may have. Everything else is refused before routing. */
const METHODS: readonly HTTPMethods[] = ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS']

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

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/

/** On every answer that does not say otherwise. Pages and the docs set a policy of their own. */
const SECURITY_HEADERS: Readonly<Record<string, string>> = {
  'content-security-policy':
    "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
  'cross-origin-opener-policy': 'same-origin',
}

export interface AppSettings {
  listener: Listener
  /** Peers whose X-Forwarded-For is believed; none trusts nobody. */
  trustedProxies: readonly string[]
  /** Longest time for receiving one whole request, uploads included. */
  requestTimeoutMs: number
  /** Send Strict-Transport-Security: browsers reach the listener over TLS. */
  tls: boolean
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
  refuseOtherMethods(app, urls, settings.listener)
  await app.ready()
  return app
}

function createBareApp(ports: { clock: Clock; log: Log }, settings: AppSettings) {
  const { listener } = settings
  const app = fastify({
    logger: false,
    requestIdHeader: false,
    genReqId: (raw) => requestIdOf(raw),
    bodyLimit: BODY_BYTES_MAX,
    trustProxy: settings.trustedProxies.length === 0 ? false : [...settings.trustedProxies],
    exposeHeadRoutes: true,
    forceCloseConnections: 'idle',
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
    },
    serverFactory: (handler) => {
      const server = createServer(
        {
          maxHeaderSize: HEADER_BYTES_MAX,
          insecureHTTPParser: false,
          // Checked before routing, so that its absence is answered by a problem document too.
          requireHostHeader: false,
          headersTimeout: HEADERS_TIMEOUT_MS,
          // Node refuses a total that is shorter than the limit for the headers alone.
          requestTimeout: Math.max(settings.requestTimeoutMs, HEADERS_TIMEOUT_MS),
          keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
          connectionsCheckingInterval: 1_000,
        },
        (request, response) => {
          const refusal = refusalBeforeRouting(request)
          if (refusal === undefined) handler(request, response)
          else answerRefusal(request, response, listener, refusal)
        },
      )
      server.maxRequestsPerSocket = REQUESTS_PER_SOCKET_MAX
      server.on('clientError', (error, socket) =>
        answerClientError(error as NodeJS.ErrnoException, socket as Socket, listener),
      )
      return server
    },
  }).withTypeProvider<TypeBoxTypeProvider>()

  app.addSchema(ProblemSchema)

  // With callbacks: a promise for each hook of each request costs more than what these two do.
  const headers = settings.tls
    ? { ...SECURITY_HEADERS, 'strict-transport-security': 'max-age=63072000' }
    : SECURITY_HEADERS
  app.addHook('onRequest', (_request, reply, done) => {
    reply.headers(headers)
    done()
  })

  const tracesRequests = ports.log.writes?.('debug') ?? true
  app.addHook('onResponse', (request, reply, done) => {
    done()
    if (reply.statusCode < 500 && !tracesRequests) return
    const fields = {
      requestId: request.id,
      method: request.method,
      route: request.routeOptions.url ?? '(none)',
      status: reply.statusCode,
      durationMs: Math.round(reply.elapsedTime * 10) / 10,
    }
    if (reply.statusCode >= 500) ports.log.warn('request_answered', fields)
    else ports.log.debug('request_answered', fields)
  })

  app.setErrorHandler((error: FastifyError | BrokerError, request, reply) => {
    const known = asBrokerError(error)
    if (known.code === 'internal_error' || known.code === 'integrity_failure') {
      ports.log.error('request_failed', {
        requestId: request.id,
        route: request.routeOptions.url ?? '(none)',
        code: known.code,
        error: known.cause ?? error,
      })
    }
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

/** Gives each path the answer 405 with `Allow` for the methods that it has not got (RFC 9110 section 15.5.6). */
function refuseOtherMethods(app: App, urls: ReadonlySet<string>, listener: Listener): void {
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
      handler: (request, reply) =>
        sendProblem(
          reply.header('allow', allow),
          request,
          listener,
          new BrokerError('method_not_allowed', `This resource has the methods ${allow}.`),
        ),
    })
  }
}

/** Turns what Fastify throws into an error of ours; what is unknown tells nothing. */
export function asBrokerError(error: FastifyError | BrokerError): BrokerError {
  if (error instanceof BrokerError) return error
  if (error.validation !== undefined) {
    const where = error.validationContext ?? 'request'
    return new BrokerError('request_invalid', `The ${where} does not fit the schema.`, {
      errors: error.validation.map((problem) => ({
        pointer: `${where}${problem.instancePath}`,
        detail: problem.message ?? 'is not valid',
      })),
    })
  }
  switch (error.code) {
    case 'FST_ERR_CTP_BODY_TOO_LARGE':
      return new BrokerError('payload_too_large', 'The body is larger than the limit.')
    case 'FST_ERR_CTP_INVALID_MEDIA_TYPE':
      return new BrokerError('unsupported_media_type', 'Send application/json.')
    case 'FST_ERR_CTP_INVALID_JSON_BODY':
    case 'FST_ERR_CTP_EMPTY_JSON_BODY':
      return new BrokerError('request_invalid', 'The body is not valid JSON.')
    default:
  }
  if (error.statusCode !== undefined && error.statusCode >= 400 && error.statusCode < 500) {
    return new BrokerError('request_invalid', 'The request is malformed.')
  }
  return new BrokerError(
    'internal_error',
    'The broker met something it did not expect.',
    {},
    { cause: error },
  )
}

function requestIdOf(raw: IncomingMessage): string {
  const given = raw.headers['x-request-id']
  return typeof given === 'string' && UUID.test(given) ? given : randomUUID()
}

/** What Fastify's router would let through and a token proxy must not (RFC 9112 sections 3.2 and 6.1). */
function refusalBeforeRouting(request: IncomingMessage): BrokerError | undefined {
  const { httpVersion, url = '', method = '' } = request
  const invalid = (detail: string) => new BrokerError('request_invalid', detail)
  if (httpVersion !== '1.1' && httpVersion !== '1.0') return invalid('Speak HTTP/1.1.')
  if (!METHODS.includes(method as HTTPMethods)) {
    return new BrokerError('method_not_allowed', 'No resource here has this method.')
  }
  if (!url.startsWith('/')) return invalid('The request target must be a path.')
  if (url.includes('#')) return invalid('The request target must not contain a fragment.')
  if (!isUtf8Encoded(url)) return invalid('The path has a percent-escape that is not UTF-8.')
  const transferEncoding = request.headers['transfer-encoding']
  if (transferEncoding !== undefined && transferEncoding !== 'chunked') {
    return invalid('Transfer-Encoding may only be chunked.')
  }
  let hosts = 0
  let authorizations = 0
  for (let i = 0; i < request.rawHeaders.length; i += 2) {
    const name = request.rawHeaders[i] ?? ''
    // By length first: most names are neither, and need not be lowered to be told so.
    if (name.length === 4) hosts += Number(name.toLowerCase() === 'host')
    else if (name.length === 13) authorizations += Number(name.toLowerCase() === 'authorization')
  }
  // HTTP/1.0 knows no Host; probes of load balancers come so.
  if (hosts > 1 || (hosts === 0 && httpVersion === '1.1')) {
    return invalid('Send exactly one Host header.')
  }
  if (authorizations > 1) return invalid('Send at most one Authorization header.')
  return undefined
}

function isUtf8Encoded(url: string): boolean {
  if (!url.includes('%')) return true
  const query = url.indexOf('?')
  try {
    decodeURIComponent(query === -1 ? url : url.slice(0, query))
    return true
  } catch {
    return false
  }
}

function answerRefusal(
  request: IncomingMessage,
  response: ServerResponse,
  listener: Listener,
  error: BrokerError,
): void {
  const { status, document } = problemDocument(error, { listener, requestId: requestIdOf(request) })
  const headers: Record<string, string> = {
    ...SECURITY_HEADERS,
    'content-type': 'application/problem+json; charset=utf-8',
    'cache-control': 'no-store',
    connection: 'close',
  }
  if (status === 405) headers['allow'] = METHODS.join(', ')
  if (status === 401) headers['www-authenticate'] = challengeFor(listener)
  response.writeHead(status, headers).end(JSON.stringify(document))
}

/** The parser's own refusals, as problem documents too. */
function answerClientError(error: NodeJS.ErrnoException, socket: Socket, listener: Listener): void {
  if (error.code === 'ECONNRESET' || !socket.writable) {
    socket.destroy()
    return
  }
  const refusal =
    error.code === 'HPE_HEADER_OVERFLOW'
      ? new BrokerError('headers_too_large', 'The header section is larger than 16 KiB.')
      : new BrokerError('request_invalid', 'This is not a valid HTTP/1.1 request.')
  const { status, document } = problemDocument(refusal, { listener, requestId: randomUUID() })
  const body = JSON.stringify(document)
  socket.end(
    `HTTP/1.1 ${status} ${reasonPhrase(status)}\r\n` +
      'content-type: application/problem+json; charset=utf-8\r\n' +
      'cache-control: no-store\r\nconnection: close\r\n' +
      `content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
  )
}
