// The proxied API on either listener: `/v1/users/{user}/pagero/*` for services, `/api/*` for pages.
// A route checks the target and who calls, gets the token, and leaves the raw streams to proxied-call.ts. The body is
// never read here, whatever its type; what comes before the first byte of an answer is a problem like any other.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { Type } from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import type { BrokerError, ProblemCode } from '../errors.ts'
import { type ForwardTarget, readForwardTarget } from '../request-target.ts'
import { type App, NO_CONTENT_TYPE } from './app.ts'
import { leaveBody } from './connections.ts'
import { asBrokerError, type Listener, problemResponses } from './problem.ts'
import {
  type CallParts,
  makeProxiedCall,
  type OnBehalf,
  PROXIED_METHODS,
  PROXY_ROUTES,
} from './proxied-call.ts'
import { UserParameters } from './user-parameter.ts'

/** Name of the request decorator that holds what the first hook has found out. */
const ALLOWED_CALL = 'allowedCall'

const PATH_PARAMETER = Type.String({
  description:
    "Path at Pagero's API, and the query behind it. Both travel byte for byte: nothing is decoded, merged or sorted. Dot segments, empty segments, `;` and escaped slashes are refused.",
  examples: ['document/v1/documents'],
})

/** What the documentation tells of each listener. */
const SURFACES = {
  internal: {
    operationId: 'callPageroAsUser',
    params: Type.Object({ ...UserParameters.properties, '*': PATH_PARAMETER }),
    example: 'GET /v1/users/alice/pagero/document/v1/documents?direction=Received&limit=10',
    codes: ['caller_unauthenticated', 'caller_forbidden'],
  },
  public: {
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

export interface ProxyRouteParts extends CallParts {
  /**
   * Authenticates the request and decides whether it may make this call; returns whose token it goes with, and who
   * is on record for it.
   * Runs before anything of the body is read. `path` is raw, without the query.
   * @throws BrokerError
   */
  authorize: (request: FastifyRequest, call: { method: string; path: string }) => Promise<OnBehalf>
  accessTokens: Pick<AccessTokens, 'fresh' | 'replaceRejected'>
  /** OpenAPI security requirement of the operations. */
  security?: ReadonlyArray<Record<string, string[]>>
}

interface AllowedCall {
  target: ForwardTarget
  onBehalf: OnBehalf
}

/** Adds the proxied API to a listener: GET, HEAD, POST, PUT, PATCH and DELETE under its prefix. */
export function registerProxyRoutes(app: App, parts: ProxyRouteParts): void {
  const { forwarder } = parts
  const { url, prefix } = PROXY_ROUTES[parts.listener]

  // A scope of its own, so that its parser that parses nothing stays within it.
  void app.register(async (scope) => {
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', (_request, _payload, done) => done(null))
    scope.decorateRequest(ALLOWED_CALL, null)
    scope.setErrorHandler((error: FastifyError | BrokerError, _request, reply) => {
      const known = asBrokerError(error)
      reply.header('proxy-status', forwarder.proxyStatusOf(known))
      // On to the error handler of the app, which answers.
      throw known
    })
    scope.route({
      method: [...PROXIED_METHODS],
      url,
      exposeHeadRoute: false,
      schema: schemaOf(parts),
      config: { swaggerTransform: describeBody },
      async onRequest(request) {
        const target = readForwardTarget(request.raw.url ?? '', prefix)
        const { method } = request
        const onBehalf = await parts.authorize(request, { method, path: target.path })
        request.setDecorator<AllowedCall>(ALLOWED_CALL, { target, onBehalf })
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
  const { target, onBehalf } = request.getDecorator<AllowedCall>(ALLOWED_CALL)
  const token = await parts.accessTokens.fresh(onBehalf.user)
  reply.hijack()
  await makeProxiedCall(parts, {
    request: request.raw,
    response: reply.raw,
    requestId: request.id,
    route: PROXY_ROUTES[parts.listener].url,
    target,
    onBehalf,
    token,
    fields: flatHeaders(reply),
  })
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
