// Forward-auth: a gateway carries the data and asks here, for each call, whether it may pass and with which token.
// The gateway authenticates itself by its API key and names the user that it has authenticated; no other header says who
// calls. The answers are 200, 401, 403 and 503 alone, because gateways understand no others.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import type { Caller } from '../callers.ts'
import { BrokerError, type ProblemCode } from '../errors.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import type { Ports } from '../ports.ts'
import { readForwardTarget } from '../request-target.ts'
import { type App, noteFailure } from './app.ts'
import {
  type CallerAuth,
  callerOf,
  requireAllowedCall,
  requireRight,
  requireVisibleUser,
} from './caller-auth.ts'
import { CALLER_SECURITY } from './openapi.ts'
import { asBrokerError, problemResponses } from './problem.ts'
import { sendProblem } from './problem-answers.ts'
import { METHODS } from './proxy-routes.ts'

const PATH = '/v1/forward-auth'
/** Before the target of a call that stands in the path itself. */
const PATH_PREFIX = /^\/v1\/forward-auth(?=\/)/
/** The target of a call that stands in a header is all of it. */
const NO_PREFIX = /^(?=\/)/

/** Pairs of headers in which gateways tell the call that they ask about. */
const ORIGINALS = [
  { method: 'x-original-method', target: 'x-original-uri' },
  { method: 'x-forwarded-method', target: 'x-forwarded-uri' },
] as const

const PROBLEMS: readonly ProblemCode[] = [
  'grant_not_found',
  'confirmation_pending',
  'reauthentication_required',
  'request_invalid',
  'caller_unauthenticated',
  'caller_forbidden',
  'uri_too_long',
  'rate_limited',
  'integrity_failure',
  'temporarily_unavailable',
  'client_rejected_by_pagero',
]

const BrokerUserHeader = Type.String({
  description:
    'Key of the user that the gateway has authenticated. Never let one of the client through.',
  examples: ['alice'],
})
const OriginalUriHeader = Type.String({
  description:
    'Path and query of the call at Pagero, raw; Traefik sends them as `X-Forwarded-Uri`. Needed when the caller has a `proxy_allow`.',
  examples: ['/document/v1/documents?limit=10'],
})
const OriginalMethodHeader = Type.String({
  description: 'Method of the call; Traefik sends it as `X-Forwarded-Method`.',
  examples: ['GET'],
})

const ANSWER = {
  description: 'The call may pass. There is no body.',
  type: 'null',
  headers: {
    Authorization: {
      type: 'string',
      description: '`Bearer` and the access token, which the gateway puts into the call to Pagero.',
    },
  },
} as const

const SHARED_DESCRIPTION =
  'Every answer but 200 is 401 (only a login helps), 403 (refused for good) or 503 (try again after `Retry-After`), with the problem code in `X-Broker-Problem` and the problem document as its body.\n\n' +
  'A caller with a `proxy_allow` is answered only for calls that it covers. The target follows the rules of the proxied API: dot segments, empty segments, `;` and escaped slashes are refused. When more than one place tells the call, all of them must tell the same.'

export interface ForwardAuthParts {
  auth: CallerAuth
  accessTokens: Pick<AccessTokens, 'fresh'>
  ports: Pick<Ports, 'audit' | 'log'>
}

/**
 * `GET /v1/forward-auth`, and every method of the proxied API under `/v1/forward-auth/{path}`; right `proxy:call`.
 * @see {@link https://nginx.org/en/docs/http/ngx_http_auth_request_module.html nginx auth_request}
 */
export function registerForwardAuthRoutes(app: App, parts: ForwardAuthParts): void {
  const {
    auth,
    ports: { log },
  } = parts

  const { onRequest } = requireRight(auth, 'proxy:call')
  const errorHandler = (
    error: FastifyError | BrokerError,
    request: FastifyRequest,
    reply: FastifyReply,
  ): void => {
    const known = asBrokerError(error)
    noteFailure(log, request, known, error)
    void sendProblem(reply.header('x-broker-problem', known.code), request, 'gateway', known)
  }
  const shared = {
    tags: ['proxy'],
    security: CALLER_SECURITY,
    response: { 200: ANSWER, ...problemResponses('gateway', PROBLEMS) },
  }

  app.get(
    PATH,
    {
      onRequest,
      errorHandler,
      // It would hand a token out, and count as one.
      exposeHeadRoute: false,
      config: {
        swaggerTransform: describeHeaders([
          ['X-Broker-User', true, BrokerUserHeader],
          ['X-Original-URI', false, OriginalUriHeader],
          ['X-Original-Method', false, OriginalMethodHeader],
        ]),
      },
      schema: {
        ...shared,
        operationId: 'forwardAuth',
        summary: 'Ask whether a call may pass a gateway, and with which token',
        description: `For nginx \`auth_request\` and Traefik ForwardAuth: the gateway carries the data, and puts the \`Authorization\` of this answer into the call to Pagero.\n\n${SHARED_DESCRIPTION}`,
      },
    },
    (request, reply) => answer(parts, request, reply, readOriginals(request)),
  )

  app.route({
    method: [...METHODS],
    url: `${PATH}/*`,
    onRequest,
    errorHandler,
    exposeHeadRoute: false,
    config: { swaggerTransform: describeHeaders([['X-Broker-User', true, BrokerUserHeader]]) },
    schema: {
      ...shared,
      operationId: 'forwardAuthOfPath',
      summary: 'The same for gateways that ask with the call’s own method and path',
      description: `For Envoy \`ext_authz\` over HTTP with the \`path_prefix\` \`${PATH}\`.\n\n${SHARED_DESCRIPTION}`,
      params: Type.Object({
        '*': Type.String({
          description: "Path of the call at Pagero's API, and the query behind it.",
          examples: ['document/v1/documents'],
        }),
      }),
    },
    handler(request, reply) {
      const { method } = request
      const { target } = readForwardTarget(request.raw.url ?? '', PATH_PREFIX)
      return answer(parts, request, reply, [{ method, target }, ...readOriginals(request)])
    },
  })
}

interface OriginalCall {
  method: string
  /** Raw path and query. */
  target: string
}

/** Decides about the call, and answers with the token. */
async function answer(
  parts: ForwardAuthParts,
  request: FastifyRequest,
  reply: FastifyReply,
  originals: readonly OriginalCall[],
): Promise<void> {
  const { auth, accessTokens, ports } = parts
  const caller = callerOf(request)
  const user = readUserHeader(request)
  checkCall(auth, request, caller, originals)
  await requireVisibleUser(auth, request, caller, user)
  const { accessToken, fingerprint } = await accessTokens.fresh(user)
  ports.audit.record({
    action: 'token_handed_out',
    actor: 'caller',
    name: caller.name,
    user,
    requestId: request.id,
    fingerprint,
  })
  void reply.header('authorization', `Bearer ${accessToken}`).send()
}

/**
 * Returns the user that the gateway names. Two such headers are none: Node joins them to what is no key.
 * @throws BrokerError `request_invalid`
 */
function readUserHeader(request: FastifyRequest): UserKey {
  const named = request.headers['x-broker-user']
  const user = typeof named === 'string' ? parseUserKey(named) : undefined
  if (user !== undefined) return user
  throw refusal('X-Broker-User', 'must be one key of a user')
}

/** The calls that the headers tell, at most one for each pair. Half a pair is none that could be checked. */
function readOriginals(request: FastifyRequest): OriginalCall[] {
  const { headers } = request
  const calls: OriginalCall[] = []
  for (const names of ORIGINALS) {
    const method = headers[names.method]
    const target = headers[names.target]
    if (method === undefined && target === undefined) continue
    if (typeof method !== 'string' || typeof target !== 'string') {
      throw refusal(names.target, `must come once, together with ${names.method}`)
    }
    calls.push({ method, target })
  }
  return calls
}

/**
 * Checks what is told of the call that the gateway asks about. A client can add headers where the gateway lets it, so
 * no place is believed before another.
 *
 * @throws BrokerError `request_invalid` for a target that the proxied API would refuse, for two that differ, and for none
 *   where `proxy_allow` asks for one; `uri_too_long`, `caller_forbidden`
 */
function checkCall(
  auth: CallerAuth,
  request: FastifyRequest,
  caller: Caller,
  originals: readonly OriginalCall[],
): void {
  const [call, ...others] = originals
  if (call === undefined) {
    if (caller.proxyAllow === undefined) return
    throw refusal('X-Original-URI', 'is needed, with X-Original-Method: the caller has proxy_allow')
  }
  if (others.some(({ method, target }) => method !== call.method || target !== call.target)) {
    throw refusal('X-Original-URI', 'differs from what another part of the request tells')
  }
  if (!METHODS.some((method) => method === call.method)) {
    throw refusal('X-Original-Method', `must be one of ${METHODS.join(', ')}`)
  }
  const { path } = readForwardTarget(call.target, NO_PREFIX)
  requireAllowedCall(auth, request, caller, { method: call.method, path })
}

function refusal(header: string, detail: string): BrokerError {
  return new BrokerError('request_invalid', `The gateway’s header ${header} ${detail}.`, {
    errors: [{ pointer: `headers/${header.toLowerCase()}`, detail }],
  })
}

/** Adds headers to the description alone: a schema of the route would have all of them checked once more. */
function describeHeaders(headers: ReadonlyArray<readonly [string, boolean, object]>) {
  const described = Type.Object(
    Object.fromEntries(
      headers.map(([name, required, schema]) => [name, required ? schema : Type.Optional(schema)]),
    ),
  )
  return <T extends object>({ schema, url }: { schema: T; url: string }) => ({
    url,
    schema: { ...schema, headers: described },
  })
}
