// Grants as operators and applications see them: state and dates, disconnecting, the ledger. Never a token, sealed or not.

import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import { disconnectGrant } from '../connect.ts'
import { BrokerError, grantNotFound } from '../errors.ts'
import type { Ports } from '../ports.ts'
import type { Revoker } from '../revocation.ts'
import { endSessionsOf } from '../session.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireCaller } from './caller-auth.ts'
import {
  attemptBody,
  EXAMPLE_ATTEMPTS,
  EXAMPLE_GRANT,
  grantBody,
  GrantSchema,
  pendingGrantBody,
  RefreshAttempt,
  RefreshAttemptList,
} from './grant-schemas.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { readUserKey, UserParameters } from './user-parameter.ts'

const PAGE_SIZE = 100
/** Keeps one answer under 200 KiB. */
const PAGE_SIZE_MAX = 500

export interface GrantRouteParts {
  auth: CallerAuth
  ports: Pick<
    Ports,
    'log' | 'audit' | 'sealer' | 'grants' | 'pendingGrants' | 'imports' | 'attempts' | 'sessions'
  >
  revoker: Pick<Revoker, 'kick'>
  accessTokens: Pick<AccessTokens, 'forget'>
}

/** The routes under `/v1/users/{user}` that show and end a grant. */
export function registerGrantRoutes(app: App, parts: GrantRouteParts): void {
  const { auth, ports, revoker, accessTokens } = parts
  for (const schema of [GrantSchema, RefreshAttempt, RefreshAttemptList]) app.addSchema(schema)
  const problems = problemResponses('internal', [
    'request_invalid',
    'caller_unauthenticated',
    'caller_forbidden',
    'grant_not_found',
    'temporarily_unavailable',
  ])

  app.get(
    '/v1/users/:user/grant',
    {
      ...requireCaller(auth, 'grant:read'),
      schema: {
        operationId: 'getGrant',
        summary: "Look at a user's grant",
        description:
          'State and dates of the grant. A disconnected one is shown with the state `revoked` until the user logs in again. Where nothing is in use and a connection waits for confirmation, that is shown, with the state `pending_confirmation`; an older grant that is in use is shown as it is.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        response: {
          200: jsonAnswer({ description: 'The grant.', schema: 'Grant', example: EXAMPLE_GRANT }),
          ...problems,
        },
      },
    },
    async (request) => {
      const user = readUserKey(request)
      const grant = await ports.grants.find(user)
      if (grant !== undefined && grant.state !== 'revoked') return grantBody(grant)
      const pending = await ports.pendingGrants.findWaiting(user)
      if (pending !== undefined) return pendingGrantBody(pending)
      if (grant === undefined) throw grantNotFound()
      return grantBody(grant)
    },
  )

  app.delete(
    '/v1/users/:user/grant',
    {
      ...requireCaller(auth, 'grant:manage'),
      schema: {
        operationId: 'disconnectGrant',
        summary: 'Disconnect a user',
        description:
          'Closes the grant at once, ends the sessions of the user, and has the refresh token revoked at Pagero in the background, for as long as that takes. A connection that waits for confirmation, or an import that waits for Pagero, ends likewise. A second call answers 404.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        response: { 204: { description: 'Disconnected.', type: 'null' }, ...problems },
      },
    },
    async (request, reply) => {
      const user = readUserKey(request)
      if (!(await disconnectGrant(ports, user))) throw grantNotFound()
      accessTokens.forget(user)
      revoker.kick()
      const { name } = callerOf(request)
      const requestId = request.id
      ports.log.info('grant_disconnected_by_caller', { requestId, user, caller: name })
      ports.audit.record({ action: 'grant_disconnected', actor: 'caller', name, user, requestId })
      return reply.code(204).send(null)
    },
  )

  app.delete(
    '/v1/users/:user/sessions',
    {
      ...requireCaller(auth, 'grant:manage'),
      schema: {
        operationId: 'endSessions',
        summary: "End a user's browser sessions",
        description:
          'Ends every browser session of the user; on every replica within a second. The grant stays: whoever logs in again finds it as it was.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        response: { 204: { description: 'Ended.', type: 'null' }, ...problems },
      },
    },
    async (request, reply) => {
      const user = readUserKey(request)
      if ((await ports.grants.find(user)) === undefined) throw grantNotFound()
      const { name } = callerOf(request)
      const requestId = request.id
      const count = await endSessionsOf(ports, user)
      ports.log.info('sessions_ended_by_caller', { requestId, user, caller: name, count })
      ports.audit.record({ action: 'sessions_ended', actor: 'caller', name, user, requestId })
      return reply.code(204).send(null)
    },
  )

  app.get(
    '/v1/users/:user/refresh-attempts',
    {
      ...requireCaller(auth, 'ops:read'),
      schema: {
        operationId: 'listRefreshAttempts',
        summary: 'Read the ledger of refreshes',
        description:
          'Every presentation of a refresh token of this user, newest first. Each was written down before Pagero was called.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        querystring: Type.Object(
          {
            after: Type.Optional(
              Type.String({
                format: 'uuid',
                description: '`next` of the page before.',
                examples: ['0b7c1a52-6f0e-4f86-9a3e-7d5a3b1c2d4e'],
              }),
            ),
            limit: Type.Optional(
              Type.Integer({
                minimum: 1,
                maximum: PAGE_SIZE_MAX,
                default: PAGE_SIZE,
                description: 'Entries on a page.',
                examples: [PAGE_SIZE],
              }),
            ),
          },
          { additionalProperties: false },
        ),
        response: {
          200: jsonAnswer({
            description: 'A page of the ledger.',
            schema: 'RefreshAttemptList',
            example: EXAMPLE_ATTEMPTS,
          }),
          ...problems,
        },
      },
    },
    async (request) => {
      const user = readUserKey(request)
      const { after, limit = PAGE_SIZE } = request.query
      if ((await ports.grants.find(user)) === undefined) throw grantNotFound()
      // One more than asked for tells whether there is a next page.
      // The format lets `urn:uuid:` through, which the database does not read.
      const known = after === undefined || !after.startsWith('urn:')
      const attempts = known
        ? await ports.attempts.list(user, { after, limit: limit + 1 })
        : undefined
      if (attempts === undefined) {
        throw new BrokerError('request_invalid', 'after is not a cursor of this list.')
      }
      const items = attempts.slice(0, limit)
      const next = attempts.length > limit ? (items.at(-1)?.attemptId ?? null) : null
      return { items: items.map(attemptBody), next }
    },
  )
}
