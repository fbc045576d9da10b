// Access tokens for backend services: ask for a fresh one, or report one that Pagero has refused.
// Nothing here decides about tokens; that is access-token.ts. Answers are never cached and have no ETag.

import type { FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens, FreshToken } from '../access-token.ts'
import type { ProblemCode } from '../errors.ts'
import type { Audit } from '../record-stores.ts'
import { accessTokenJson } from './access-token-json.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireCaller } from './caller-auth.ts'
import { throwKeptFailure } from './kept-failure.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { readUserKey, UserParameters } from './user-parameter.ts'

/** A day: far beyond the life of any access token, and small enough to reckon with. */
const MIN_TTL_SECONDS_MAX = 86_400

const EXAMPLE_FINGERPRINT = 'n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg'

const AccessToken = Type.Object(
  {
    access_token: Type.String({ description: "Pagero's access token. Opaque: do not parse it." }),
    token_type: Type.Enum(['Bearer'], { type: 'string' }),
    expires_in: Type.Integer({ description: 'Seconds that it still lives, rounded down.' }),
    expires_at: Type.String({ format: 'date-time', description: 'When it ends.' }),
    scope: Type.String({ description: 'As Pagero granted it; empty is normal there.' }),
    fingerprint: Type.String({
      description: 'base64url of SHA-256 of the access token, 43 characters.',
    }),
  },
  { $id: 'AccessToken', description: 'An access token, and how long it lives.' },
)

const RejectedToken = Type.Object(
  {
    rejected: Type.String({
      description: 'Fingerprint of the access token that Pagero refused.',
      pattern: '^[A-Za-z0-9_-]{43}$',
    }),
  },
  {
    additionalProperties: false,
    description: 'The access token that does not work any more.',
    examples: [{ rejected: EXAMPLE_FINGERPRINT }],
  },
)

const PROBLEMS: readonly ProblemCode[] = [
  'request_invalid',
  'caller_unauthenticated',
  'caller_forbidden',
  'grant_not_found',
  'confirmation_pending',
  'reauthentication_required',
  'integrity_failure',
  'temporarily_unavailable',
  'client_rejected_by_pagero',
]

const ANSWER = jsonAnswer({
  description: 'The access token, which is to be used at once.',
  schema: 'AccessToken',
  example: {
    access_token: '_0XBPWQQ_5d3c6b6e-1f6e-4a5f-9f0a-2f1d4b1c8e7a',
    token_type: 'Bearer',
    expires_in: 540,
    expires_at: '2026-11-23T12:09:00.000Z',
    scope: '',
    fingerprint: EXAMPLE_FINGERPRINT,
  },
})

/** URL of the route. */
export const TOKEN_ROUTE = '/v1/users/:user/access-token'

export interface TokenRouteParts {
  auth: CallerAuth
  accessTokens: AccessTokens
  audit: Audit
}

/** Of every answer with a token. Most of them are given before the router is asked: see `ready-token.ts`. */
export const TOKEN_FIELDS = {
  'cache-control': 'no-store',
  pragma: 'no-cache',
  'content-type': 'application/json; charset=utf-8',
} as const

/** `GET` and `POST /v1/users/{user}/access-token`; right `token:read`. */
export function registerTokenRoutes(app: App, parts: TokenRouteParts): void {
  const { accessTokens, audit } = parts
  const hooks = requireCaller(parts.auth, 'token:read')
  app.addSchema(AccessToken)

  /** Answers with the token, and leaves on record who was given which. */
  function handOut(request: FastifyRequest, reply: FastifyReply, token: FreshToken): FastifyReply {
    audit.record({
      action: 'token_handed_out',
      actor: 'caller',
      name: callerOf(request).name,
      user: readUserKey(request),
      requestId: request.id,
      fingerprint: token.fingerprint,
    })
    return reply.headers(TOKEN_FIELDS).send(accessTokenJson(token))
  }

  app.get(
    TOKEN_ROUTE,
    {
      ...hooks,
      // A HEAD could cost a refresh and would show nothing of it.
      exposeHeadRoute: false,
      schema: {
        operationId: 'getAccessToken',
        summary: 'Get a fresh access token',
        description:
          'Answers at once while the token is fresh, and renews it otherwise. Callers that ask at the same time share one renewal.\n\n' +
          'Without `min_ttl`, while Pagero is away, a token that still lives is given out until it ends.',
        tags: ['tokens'],
        security: CALLER_SECURITY,
        params: UserParameters,
        querystring: Type.Object(
          {
            min_ttl: Type.Optional(
              Type.Integer({
                description:
                  'Seconds that the token must still live. At most half its whole life; 30 unless the operator has set another default.',
                minimum: 0,
                maximum: MIN_TTL_SECONDS_MAX,
                examples: [60],
              }),
            ),
          },
          { additionalProperties: false },
        ),
        response: { 200: ANSWER, ...problemResponses('internal', PROBLEMS) },
      },
    },
    async (request, reply) => {
      throwKeptFailure(request.raw)
      const { min_ttl: minTtlSeconds } = request.query
      const token = await accessTokens.fresh(
        readUserKey(request),
        minTtlSeconds === undefined ? {} : { minTtlSeconds },
      )
      return handOut(request, reply, token)
    },
  )

  app.post(
    '/v1/users/:user/access-token',
    {
      ...hooks,
      schema: {
        operationId: 'replaceAccessToken',
        summary: 'Report a refused access token and get another',
        description:
          'For when Pagero answers 401 to a token that should still live. The token is renewed only if the reported one is still the current one; otherwise the newer one is given out at once. ' +
          'At most one forced renewal for a user in 30 seconds: within them, and for an unknown fingerprint, the present token is the answer.',
        tags: ['tokens'],
        security: CALLER_SECURITY,
        params: UserParameters,
        body: RejectedToken,
        response: {
          200: ANSWER,
          ...problemResponses('internal', [
            ...PROBLEMS,
            'payload_too_large',
            'unsupported_media_type',
          ]),
        },
      },
    },
    async (request, reply) => {
      const user = readUserKey(request)
      const token = await accessTokens.replaceRejected(user, request.body.rejected)
      return handOut(request, reply, token)
    },
  )
}
