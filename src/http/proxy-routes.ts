// The proxied API on either listener: `/v1/users/{user}/pagero/*` for services, `/api/*` for pages.
// A route checks the target and who calls, gets the token, and leaves the raw streams to the forwarder. The body is
// never read here, whatever its type; what comes before the first byte of an answer is a problem like any other.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { Type } from 'typebox'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import type { AuditEvent } from '../audit-event.ts'
import { BrokerError, type ProblemCode } from '../errors.ts'
import type { Forwarded, Forwarder } from '../forward.ts'
import type { UserKey } from '../grant.ts'
import type { Audit, Log } from '../ports.ts'
import { type ForwardTarget, readForwardTarget } from '../request-target.ts'
import { type App, NO_CONTENT_TYPE } from './app.ts'
import { leaveBody } from './connections.ts'
import { asBrokerError, type Listener, problemDocument, problemResponses } from './problem.ts'
import { answerProblem } from './problem-answers.ts'
import { UserParameters } from './user-parameter.ts'

/** Methods of Pagero's API. */
export const METHODS = ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'] as const

/** Name of the request decorator that holds what the first hook has found out. */
const PROXIED_CALL = 'proxiedCall'

const PATH_PARAMETER = Type.String({
  description:
    "Path at Pagero's API, and the query behind it. Both travel byte for byte: nothing is decoded, merged or sorted. Dot segments, empty segments, `;` and escaped slashes are refused.",
  examples: ['document/v1/documents'],
})

/** What differs between the two listeners. */
const SURFACES = {
  internal: {
    url: '/v1/users/:user/pagero/*',
    /** The raw path up to the target. The router has seen the decoded one. */
    prefix: /^\/v1\/users\/[A-Za-z0-9._~@:+%-]+\/pagero(?=\/)/,
    operationId: 'callPageroAsUser',
    params: Type.Object({ ...UserParameters.properties, '*': PATH_PARAMETER }),
    example: 'GET /v1/users/alice/pagero/document/v1/documents?direction=Received&limit=10',
    codes: ['caller_unauthenticated', 'caller_forbidden'],
  },
  public: {
    url: '/api/*',
    prefix: /^\/api(?=\/)/,
    operationId: 'callPagero',
    params: Type.Object({ '*': PATH_PARAMETER }),
    example: "fetch('/api/document/v1/documents?limit=10', { headers: { 'X-CSRF': '1' } })",
    codes: ['session_required', 'csrf_refused'],
  },
} as const satisfies Record<Listener, object>

const PROBLEMS: readonly ProblemCode[] = [
  'request_invalid',
  'grant_not_found',
  'confirmation_pending',
  'reauthentication_required',
  'payload_too_large',
  'uri_too_long',
  'rate_limited',
  'upstream_refused',
  'upstream_unreachable',
  'upstream_timeout',
  'loop_detected',
  'temporarily_unavailable',
  'client_rejected_by_pagero',
  'integrity_failure',
]

export interface ProxyRouteParts {
  listener: Listener
  /**
   * Authenticates the request and decides whether it may make this call; returns whose token it goes with, and who
   * is on record for it.
   * Runs before anything of the body is read. `path` is raw, without the query.
   * @throws BrokerError
   */
  authorize: (request: FastifyRequest, call: { method: string; path: string }) => Promise<OnBehalf>
  accessTokens: Pick<AccessTokens, 'fresh' | 'replaceRejected'>
  forwarder: Forwarder
  audit: Audit
  log: Log
  /** OpenAPI security requirement of the operations. */
  security?: ReadonlyArray<Record<string, string[]>>
}

type OnBehalf = { user: UserKey } & Required<Pick<AuditEvent, 'actor' | 'name'>>

interface ProxiedCall extends OnBehalf {
  target: ForwardTarget
}

/** Adds the proxied API to a listener: GET, HEAD, POST, PUT, PATCH and DELETE under its prefix. */
export function registerProxyRoutes(app: App, parts: ProxyRouteParts): void {
  const { listener, forwarder } = parts
  const surface = SURFACES[listener]

  // A scope of its own, so that its parser that parses nothing stays within it.
  void app.register(async (scope) => {
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', (_request, _payload, done) => done(null))
    scope.decorateRequest(PROXIED_CALL, null)
    scope.setErrorHandler((error: FastifyError | BrokerError, _request, reply) => {
      const known = asBrokerError(error)
      reply.header('proxy-status', forwarder.proxyStatusOf(known))
      // On to the error handler of the app, which answers.
      throw known
    })
    scope.route({
      method: [...METHODS],
      url: surface.url,
      exposeHeadRoute: false,
      schema: schemaOf(parts),
      config: { swaggerTransform: describeBody },
      async onRequest(request) {
        const target = readForwardTarget(request.raw.url ?? '', surface.prefix)
        const { method } = request
        const onBehalf = await parts.authorize(request, { method, path: target.path })
        request.setDecorator<ProxiedCall>(PROXIED_CALL, { target, ...onBehalf })
        leaveBody(request.raw)
        // None is parsed here, so Fastify need not look.
        if (request.headers['content-type'] !== undefined) request.headers = NO_CONTENT_TYPE
      },
      handler: (request, reply) => forwardCall(parts, request, reply),
    })
  })
}

async function forwardCall(
  parts: ProxyRouteParts,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<FastifyReply> {
  const { accessTokens, audit, forwarder } = parts
  const { target, ...onBehalf } = request.getDecorator<ProxiedCall>(PROXIED_CALL)
  const { user } = onBehalf
  const record = (action: 'call_proxied' | 'call_repeated', { fingerprint }: FreshToken) =>
    audit.record({
      action,
      ...onBehalf,
      requestId: request.id,
      fingerprint,
      details: { method: request.method },
    })
  const token = await accessTokens.fresh(user)
  // Before the token leaves, not after: an upload may take a quarter of an hour.
  record('call_proxied', token)
  reply.hijack()
  try {
    const forwarded = await forwarder.forward(request.raw, reply.raw, {
      user,
      method: request.method,
      target: target.target,
      accessToken: token.accessToken,
      locationPrefix: target.prefix,
      responseHeaders: flatHeaders(reply),
      async renew() {
        const current = await accessTokens.replaceRejected(user, token.fingerprint)
        if (current.fingerprint === token.fingerprint) return undefined
        record('call_repeated', current)
        return current.accessToken
      },
    })
    if (!forwarded.complete) noteCut(parts, request, forwarded)
  } catch (error) {
    answerFailure(parts, request, reply, error)
  }
  return reply
}

/** What the hooks of the listener have added by now: security headers, and CORS where it applies. */
function flatHeaders(reply: FastifyReply): string[] {
  const flat: string[] = []
  for (const [name, value] of Object.entries(reply.getHeaders())) {
    if (value === undefined) continue
    for (const one of Array.isArray(value) ? value : [value]) flat.push(name, String(one))
  }
  return flat
}

/** Leaves on record that a client did not get all of an answer, or none because it had gone. */
function noteCut({ log }: ProxyRouteParts, request: FastifyRequest, forwarded: Forwarded): void {
  const { status, source } = forwarded
  log.warn('forward_cut', {
    requestId: request.id,
    method: request.method,
    route: request.routeOptions.url ?? '(none)',
    ...(source === 'upstream' ? { upstreamStatus: status } : { status }),
  })
}

/** Answers a call that could not be forwarded. It may come while the client still sends its body. */
function answerFailure(
  { listener, forwarder, log }: ProxyRouteParts,
  request: FastifyRequest,
  reply: FastifyReply,
  error: unknown,
): void {
  const { status, document } = problemDocument(error, { listener, requestId: request.id })
  log.warn('forward_failed', {
    requestId: request.id,
    status,
    code: String(document['code']),
    error: error instanceof BrokerError ? error.cause : error,
  })
  const fields = { ...reply.getHeaders(), 'proxy-status': forwarder.proxyStatusOf(error) }
  answerProblem(request.raw, reply.raw, { listener, requestId: request.id, error, fields })
}

/** Adds the request body to the description alone: a schema of the route would have it read and checked. */
function describeBody<T extends object>({ schema, url }: { schema: T; url: string }) {
  const body = { content: { '*/*': { schema: {} } } }
  return { url, schema: { ...schema, body } }
}

function schemaOf({ listener, security }: ProxyRouteParts) {
  const surface = SURFACES[listener]
  return {
    operationId: surface.operationId,
    summary: "Call Pagero's API with the user's token",
    description:
      `Passes the call to Pagero's API and its answer back, for example \`${surface.example}\`.\n\n` +
      'Bodies stream both ways and are never read by the broker, so every media type passes, multipart uploads and PDF downloads among them. ' +
      'Header fields pass by an allow-list: of the request `Accept`, `Accept-Encoding`, `Accept-Language`, `Content-Type`, `Content-Encoding`, `Content-Language`, `Prefer`, `Range` and the conditional ones; ' +
      'of the answer those that describe its content, `ETag`, `Last-Modified`, `Retry-After`, `Allow`, `Date`, `X-Request-Id`, `X-Correlation-Id`, and a `Location` within the API, rewritten to a path here.\n\n' +
      "`Proxy-Status` tells who answered: with `received-status` the answer, and its status, is Pagero's; with `error` the broker made it, and it is a problem document.\n\n" +
      'Nothing is repeated, but for a GET or HEAD whose token Pagero refused: it is sent once more with a renewed one. Redirects are not followed.',
    tags: ['proxy'],
    ...(security === undefined ? {} : { security }),
    params: surface.params,
    response: {
      '2XX': {
        description: "Pagero's own answer, as are all others with `received-status`.",
        content: { '*/*': { schema: {} } },
      },
      ...problemResponses(listener, [...surface.codes, ...PROBLEMS]),
    },
  }
}
