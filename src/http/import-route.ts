// Taking over a refresh token from another system. The token is in the body of one request and nowhere else.

import Type from 'typebox'
import { BrokerError } from '../errors.ts'
import type { Importer } from '../import.ts'
import type { Ports } from '../ports.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireCaller } from './caller-auth.ts'
import { EXAMPLE_GRANT, grantBody } from './grant-schemas.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { readApplicationUserKey, UserParameters } from './user-parameter.ts'

/** `PUT /v1/users/{user}/grant`. */
export function registerImportRoute(
  app: App,
  {
    auth,
    importer,
    ports,
  }: { auth: CallerAuth; importer: Importer; ports: Pick<Ports, 'audit' | 'log'> },
): void {
  app.put(
    '/v1/users/:user/grant',
    {
      ...requireCaller(auth, 'grant:manage'),
      schema: {
        operationId: 'importGrant',
        summary: 'Take over a refresh token from another system',
        description:
          'Proves the refresh token by one refresh, and only then makes it the grant of this user; an older grant is then revoked. The token that you send is spent by it: the other system must not use it any more. While Pagero does not answer the import goes on by itself; a login or a disconnection that comes meanwhile is what counts then, and the token is revoked. Sending the same request again is safe and tells how the first one ended.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        body: Type.Object(
          {
            refresh_token: Type.String({ minLength: 1, maxLength: 8192 }),
            obtained_at: Type.String({
              format: 'date-time',
              description:
                'When the user logged in to get it: three years are counted from here. Not in the future.',
            }),
          },
          {
            additionalProperties: false,
            examples: [
              {
                refresh_token: '_1XBPWQQ_e61b091b-4d5c-4b4f-9d3e-0a1b2c3d4e5f',
                obtained_at: '2026-03-02T08:15:00Z',
              },
            ],
          },
        ),
        response: {
          200: jsonAnswer({
            description: 'The grant, proven and in use.',
            schema: 'Grant',
            example: EXAMPLE_GRANT,
          }),
          ...problemResponses('internal', [
            'request_invalid',
            'caller_unauthenticated',
            'caller_forbidden',
            'grant_not_found',
            'reauthentication_required',
            'payload_too_large',
            'unsupported_media_type',
            'temporarily_unavailable',
            'client_rejected_by_pagero',
          ]),
        },
      },
    },
    async (request) => {
      const user = readApplicationUserKey(request)
      const { refresh_token: refreshToken } = request.body
      // The schema's format lets leap seconds and offsets without minutes through, which no Date takes.
      const obtainedAt = new Date(request.body.obtained_at)
      if (Number.isNaN(obtainedAt.getTime())) throw unreadable('obtained_at')
      // Half a surrogate pair can neither be sealed nor be sent as it is.
      if (!refreshToken.isWellFormed()) throw unreadable('refresh_token')
      const grant = await importer.takeOver({ user, refreshToken, obtainedAt })
      const { name } = callerOf(request)
      const requestId = request.id
      ports.log.info('grant_imported_by_caller', { requestId, user, caller: name })
      ports.audit.record({ action: 'grant_imported', actor: 'caller', name, user, requestId })
      return grantBody(grant)
    },
  )
}

function unreadable(member: string): BrokerError {
  const detail = 'cannot be read'
  return new BrokerError('request_invalid', `${member} ${detail}.`, {
    errors: [{ pointer: `body/${member}`, detail }],
  })
}
