// The list of grants for operators: by state, by the time they still have, page by page. It shows a caller the users
// that it may see, and no others.

import Type from 'typebox'
import { BrokerError } from '../errors.ts'
import { GRANT_STATES, type GrantState, parseUserKey } from '../grant.ts'
import type { Ports } from '../ports.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireRight } from './caller-auth.ts'
import { EXAMPLE_GRANT, grantBody, GrantList } from './grant-schemas.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'

const PAGE_SIZE = 100
/** Keeps one answer under 400 KiB. */
const PAGE_SIZE_MAX = 500
/** ISO 8601 duration of whole units, at most four digits each: enough for centuries, too little for a query to hang on. */
const DURATION =
  '^P(?=\\d|T\\d)(?:\\d{1,4}Y)?(?:\\d{1,4}M)?(?:\\d{1,4}W)?(?:\\d{1,4}D)?(?:T(?=\\d)(?:\\d{1,4}H)?(?:\\d{1,4}M)?(?:\\d{1,4}S)?)?$'

/** `GET /v1/grants`. */
export function registerGrantListRoute(
  app: App,
  { auth, ports }: { auth: CallerAuth; ports: Pick<Ports, 'grants'> },
): void {
  app.addSchema(GrantList)
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
            after: Type.Optional(
              Type.String({
                description: '`next` of the page before.',
                maxLength: 255,
                examples: ['alice'],
              }),
            ),
            limit: Type.Optional(
              Type.Integer({
                minimum: 1,
                maximum: PAGE_SIZE_MAX,
                default: PAGE_SIZE,
                description: 'Grants on a page.',
                examples: [PAGE_SIZE],
              }),
            ),
          },
          { additionalProperties: false },
        ),
        response: {
          200: jsonAnswer({
            description: 'A page of grants.',
            schema: 'GrantList',
            example: { items: [EXAMPLE_GRANT], next: null },
          }),
          ...problemResponses('internal', [
            'request_invalid',
            'caller_unauthenticated',
            'caller_forbidden',
            'temporarily_unavailable',
          ]),
        },
      },
    },
    async (request) => {
      const {
        state,
        expires_within: expiresWithin,
        after: cursor,
        limit = PAGE_SIZE,
      } = request.query
      const after = cursor === undefined ? undefined : parseUserKey(cursor)
      if (cursor !== undefined && after === undefined) {
        throw new BrokerError('request_invalid', 'after is not a cursor of this list.', {
          errors: [{ pointer: 'querystring/after', detail: 'is not a cursor of this list' }],
        })
      }
      const grants = await ports.grants.list({
        state: state as GrantState | undefined,
        expiresWithin,
        users: callerOf(request).users,
        after,
        // One more than asked for tells whether there is a next page.
        limit: limit + 1,
      })
      const items = grants.slice(0, limit)
      return {
        items: items.map(grantBody),
        next: grants.length > limit ? (items.at(-1)?.user ?? null) : null,
      }
    },
  )
}
