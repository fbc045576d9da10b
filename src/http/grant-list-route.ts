// The list of grants for operators: by state, by the time they still have, page by page. It shows a caller the users
// that it may see, and no others.

import Type from 'typebox'
import { GRANT_STATES, type GrantState, parseUserKey, USER_KEY_PATTERN } from '../grant.ts'
import type { Ports } from '../ports.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireRight } from './caller-auth.ts'
import { EXAMPLE_GRANT, grantBody } from './grant-schemas.ts'
import { CALLER_SECURITY } from './openapi.ts'
import { listAnswers, listOf, PAGE_SIZE, pageOf, pageParameters } from './paging.ts'

/** ISO 8601 duration of whole units, at most four digits each: enough for centuries, too little for a query to hang on. */
const DURATION =
  '^P(?=\\d|T\\d)(?:\\d{1,4}Y)?(?:\\d{1,4}M)?(?:\\d{1,4}W)?(?:\\d{1,4}D)?(?:T(?=\\d)(?:\\d{1,4}H)?(?:\\d{1,4}M)?(?:\\d{1,4}S)?)?$'

/** `GET /v1/grants`. */
export function registerGrantListRoute(
  app: App,
  { auth, ports }: { auth: CallerAuth; ports: Pick<Ports, 'grants'> },
): void {
  app.addSchema(listOf('Grant'))
  app.get(
    '/v1/grants',
    {
      ...requireRight(auth, 'ops:read'),
      schema: {
        operationId: 'listGrants',
        summary: 'List grants',
        description:
          'Grants in the order of their user keys, of the users that this caller may see. `expires_within` finds those whose earlier expiry lies within the duration, or is past. A connection that waits for confirmation is no grant yet and is not listed: it lasts a quarter of an hour.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        querystring: Type.Object(
          {
            state: Type.Optional(
              Type.Enum([...GRANT_STATES], {
                type: 'string',
                description: 'Only grants in this state.',
                examples: ['active'],
              }),
            ),
            expires_within: Type.Optional(
              Type.String({
                pattern: DURATION,
                description: 'ISO 8601 duration.',
                examples: ['P90D'],
              }),
            ),
            ...pageParameters('Grants', { pattern: USER_KEY_PATTERN, example: 'alice' }),
          },
          { additionalProperties: false },
        ),
        response: listAnswers('grants', 'Grant', EXAMPLE_GRANT),
      },
    },
    async (request) => {
      const { state, expires_within: expiresWithin, after, limit = PAGE_SIZE } = request.query
      const grants = await ports.grants.list({
        state: state as GrantState | undefined,
        expiresWithin,
        users: callerOf(request).users,
        after: after === undefined ? undefined : parseUserKey(after),
        limit: limit + 1,
      })
      return pageOf(grants, limit, { body: grantBody, cursor: ({ user }) => user })
    },
  )
}
