// Forward-auth: a gateway carries the data and asks here, for each call, whether it may pass and with which token.
// The gateway authenticates itself by its API key and names the user that it has authenticated; no other header says who
// calls. The answers are 200, 401, 403 and 503 alone, because gateways understand no others.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import type { BrokerError, ProblemCode } from '../errors.ts'
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
import { type OriginalCall, readAskedCall, readGatewayUser } from './forward-auth-call.ts'
import { throwKeptFailure } from './kept-failure.ts'
import { CALLER_SECURITY } from './openapi.ts'
import { asBrokerError, problemResponses } from './problem.ts'
import { sendProblem } from './problem-answers.ts'
import { PROXIED_METHODS } from './proxied-call.ts'

/** Most of its answers are given before the router is asked: see `ready-token.ts`. */
export const FORWARD_AUTH_PATH = '/v1/forward-auth'
/** Before the target of a call that stands in the path itself. */
const PATH_PREFIX = /^\/v1\/forward-auth(?=\/)/
/** Of every answer with a token. */
export const FORWARD_AUTH_FIELDS = { 'cache-control': 'no-store' } as const

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
    FORWARD_AUTH_PATH,
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
    (request, reply) => answer(parts, request, reply),
  )

  app.route({
    method: [...PROXIED_METHODS],
    url: `${FORWARD_AUTH_PATH}/*`,
    onRequest,
    errorHandler,
    exposeHeadRoute: false,
    config: { swaggerTransform: describeHeaders([['X-Broker-User', true, BrokerUserHeader]]) },
    schema: {
      ...shared,
      operationId: 'forwardAuthOfPath',
      summary: 'The same for gateways that ask with the call’s own method and path',
      description: `For Envoy \`ext_authz\` over HTTP with the \`path_prefix\` \`${FORWARD_AUTH_PATH}\`.\n\n${SHARED_DESCRIPTION}`,
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
      return answer(parts, request, reply, { method, target })
    },
  })
}

/** Decides about the call, and answers with the token. `own` is the call that the request line tells. */
async function answer(
  parts: ForwardAuthParts,
  request: FastifyRequest,
  reply: FastifyReply,
  ...own: OriginalCall[]
): Promise<void> {
  const { auth, accessTokens, ports } = parts
  const caller = callerOf(request)
  const user = readGatewayUser(request.headers)
  const call = readAskedCall(request.headers, caller, own)
  if (call !== undefined) requireAllowedCall(auth, request, caller, call)
  await requireVisibleUser(auth, request, caller, user)
  throwKeptFailure(request.raw)
  const { accessToken, fingerprint } = await accessTokens.fresh(user)
  ports.audit.record({
    action: 'token_handed_out',
    actor: 'caller',
    name: caller.name,
    user,
    requestId: request.id,
    fingerprint,
  })
  void reply.headers({ ...FORWARD_AUTH_FIELDS, authorization: `Bearer ${accessToken}` }).send()
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
