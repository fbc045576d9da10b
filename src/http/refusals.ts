// What is refused before any route is looked for: requests that Fastify's router would let through and a token proxy
// must not, and bytes that Node's parser makes no request of.

import { randomUUID } from 'node:crypto'
import type { IncomingMessage, Server, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import type { HTTPMethods } from 'fastify'
import { BrokerError } from '../errors.ts'
import { NO_ROUTE, type RequestCounts } from '../request-counts.ts'
import type { AppSettings } from './app.ts'
import type { Connections } from './connections.ts'
import type { Listener } from './problem.ts'
import { answerOnSocket, answerProblem } from './problem-answers.ts'

/** Methods that any route may have. Everything else is refused before routing. */
export const METHODS: readonly HTTPMethods[] = [
  'GET',
  'HEAD',
  'POST',
  'PUT',
  'PATCH',
  'DELETE',
  'OPTIONS',
]

/** The method as it is counted: of those that are no method here there are many. */
export function methodOf({ method }: IncomingMessage): string {
  return METHODS.find((known) => known === method) ?? '(other)'
}

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/

const BOOT_ID = randomUUID()
/** What the ids of one process have in common: random, and marked as a UUID of version 8 (RFC 9562 section 5.8). */
const REQUEST_ID_PREFIX = `${BOOT_ID.slice(0, 14)}8${BOOT_ID.slice(15, 24)}`
let requestIds = 0

/** Counts on: a random id for each request costs ten times as much, and nobody need guess these. */
function newRequestId(): string {
  requestIds += 1
  return REQUEST_ID_PREFIX + requestIds.toString(16).padStart(12, '0')
}

/** The client's own id of a request if it is a UUID, and a new one otherwise. */
export function requestIdOf(request: IncomingMessage): string {
  const given = request.headers['x-request-id']
  return typeof given === 'string' && UUID.test(given) ? given : newRequestId()
}

interface RefusalParts {
  listener: Listener
  /** Fields of every answer. */
  headers: Readonly<Record<string, string>>
  connections: Pick<Connections, 'begin' | 'isFree' | 'endAfterAnswers'>
  counts: RequestCounts | undefined
}

/**
 * Returns the listener of a server's requests: those that may be routed go on to `route`, unless one of `early` has
 * them, the others are answered.
 */
export function refuseBeforeRouting(
  parts: RefusalParts,
  route: (request: IncomingMessage, response: ServerResponse) => void,
  early: Required<Pick<AppSettings, 'answersAtOnce' | 'takesAtOnce'>>,
): (request: IncomingMessage, response: ServerResponse) => void {
  return (request, response) => {
    const refusal = refusalOf(request)
    // Nothing is upgraded here, but Node reads no further request behind one that asks for it.
    if (request.headers.upgrade !== undefined) response.shouldKeepAlive = false
    // These are out before the turn ends; what could be written in their place meanwhile waits: see `refuseUnrouted`.
    if (refusal === undefined && early.answersAtOnce(request, response)) return
    parts.connections.begin(request, response, () => {
      if (refusal !== undefined) answerRefusal(parts, request, response, refusal)
      else if (!early.takesAtOnce(request, response, route)) route(request, response)
    })
  }
}

/**
 * Answers what a server does not tell its listener of requests: faults of the parser, CONNECT, and expectations. The first
 * two come in the middle of a turn, in which answers to requests before them may be waiting to be sent together: so they
 * are told after those.
 */
export function refuseUnrouted(server: Server, parts: RefusalParts): void {
  const { listener, headers, connections } = parts
  const refuse = (socket: Socket, error: BrokerError, fields = {}) => {
    if (!socket.writable) socket.destroy()
    // Behind an answer that has begun, or is due, a refusal would be read as a part of it, or in its place.
    else if (!connections.isFree(socket)) connections.endAfterAnswers(socket)
    else {
      const requestId = newRequestId()
      answerOnSocket(socket, { listener, requestId, error, fields: { ...headers, ...fields } })
    }
  }
  server.on('clientError', (error: NodeJS.ErrnoException, stream) => {
    const socket = stream as Socket
    const refusal = parserRefusalOf(error, socket)
    if (refusal === undefined) socket.destroy()
    else setImmediate(refuse, socket, refusal)
  })
  server.on('connect', (_request, stream) => {
    // Node has let go of the socket, and with it of its errors.
    stream.on('error', () => stream.destroy())
    setImmediate(refuse, stream as Socket, methodNotAllowed(), ALLOW)
  })
  server.on('checkExpectation', (request, response) => {
    connections.begin(request, response, () => {
      answerRefusal(parts, request, response, unknownExpectation())
    })
  })
}

const ALLOW = { allow: METHODS.join(', ') }

function methodNotAllowed(): BrokerError {
  return new BrokerError('method_not_allowed', 'No resource here has this method.')
}

function unknownExpectation(): BrokerError {
  return new BrokerError('request_invalid', 'Expect may only be 100-continue.')
}

function answerRefusal(
  { listener, headers, counts }: RefusalParts,
  request: IncomingMessage,
  response: ServerResponse,
  error: BrokerError,
): void {
  const fields = {
    ...headers,
    ...(error.code === 'method_not_allowed' ? ALLOW : {}),
    connection: 'close',
  }
  answerProblem(request, response, { listener, requestId: requestIdOf(request), error, fields })
  counts?.ofQuick({ method: methodOf(request), route: NO_ROUTE, status: response.statusCode })()
}

/** Why a request goes no further (RFC 9112 sections 3.2 and 6.1). */
function refusalOf(request: IncomingMessage): BrokerError | undefined {
  const { httpVersion, url = '', method = '' } = request
  const invalid = (detail: string) => new BrokerError('request_invalid', detail)
  if (httpVersion !== '1.1' && httpVersion !== '1.0') return invalid('Speak HTTP/1.1.')
  if (!METHODS.includes(method as HTTPMethods)) return methodNotAllowed()
  if (!url.startsWith('/')) return invalid('The request target must be a path.')
  if (url.includes('#')) return invalid('The request target must not contain a fragment.')
  if (!isUtf8Encoded(url)) return invalid('The path has a percent-escape that is not UTF-8.')
  const { 'transfer-encoding': transferEncoding, expect } = request.headers
  if (expect !== undefined && expect.toLowerCase() !== '100-continue') return unknownExpectation()
  if (transferEncoding !== undefined) {
    // Whoever spoke HTTP/1.0 before us did not read the framing, and may take the body for another request.
    if (httpVersion === '1.0') return invalid('HTTP/1.0 has no Transfer-Encoding.')
    if (transferEncoding !== 'chunked') return invalid('Transfer-Encoding may only be chunked.')
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

/** What an error below HTTP is to the client; undefined where there is nobody to tell, or nothing that was asked. */
function parserRefusalOf(error: NodeJS.ErrnoException, socket: Socket): BrokerError | undefined {
  switch (error.code) {
    case 'ECONNRESET':
      return undefined
    case 'HPE_HEADER_OVERFLOW':
      return new BrokerError('headers_too_large', 'The header section is larger than 16 KiB.')
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      // A browser opens connections ahead of need; an answer there would be taken for that to its next request.
      if (socket.bytesRead === 0) return undefined
      return new BrokerError('request_invalid', 'The request did not arrive in time.')
    default:
      return new BrokerError('request_invalid', 'This is not a valid HTTP/1.1 request.')
  }
}
