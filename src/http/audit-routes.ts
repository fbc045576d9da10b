// The audit record for operators, newest first, page by page: events of the users that the caller may see, and what
// concerns no user for those who may see all.

import Type from 'typebox'
import { AUDIT_ACTIONS, type AuditAction, type AuditRow } from '../audit-event.ts'
import { BrokerError } from '../errors.ts'
import { parseUserKey } from '../grant.ts'
import type { Ports } from '../ports.ts'
import type { AuditFilter } from '../record-stores.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireRight } from './caller-auth.ts'
import { CALLER_SECURITY } from './openapi.ts'
import { listAnswers, listOf, PAGE_SIZE, pageOf, pageParameters, userFilter } from './paging.ts'

const ACTIONS = Object.keys(AUDIT_ACTIONS) as AuditAction[]
/** Instant, chain and row, as `cursorOf` joins them. */
const CURSOR =
  /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}) (\d{1,15})$/

function nullable(description: string) {
  return Type.Unsafe<unknown>({ type: ['string', 'null'], description })
}

const AuditEventSchema = Type.Object(
  {
    at: Type.String({ format: 'date-time', description: 'When it happened.' }),
    action: Type.String({ description: 'What was done.' }),
    outcome: Type.Enum(['succeeded', 'refused', 'failed'], {
      type: 'string',
      description: '`refused`: by the rules of the broker. `failed`: for another reason.',
    }),
    actor: Type.Object(
      {
        kind: Type.Enum(['caller', 'session', 'operator', 'broker', 'anyone'], {
          type: 'string',
          description:
            'A calling service, a browser session, a command or a file of the operator, the broker by itself, or somebody who is not authenticated.',
        }),
        name: nullable('Name of the caller, or user of the session.'),
      },
      { description: 'By whom.' },
    ),
    user: nullable('Whose grant it concerns.'),
    count: Type.Integer({
      description: 'How often: equal events that come faster than one a second are added up.',
    }),
    fingerprint: nullable('Fingerprint of the access token that was given out or used.'),
    request_id: nullable('As in the log and in `X-Request-Id`; null for several requests.'),
    details: Type.Unsafe<object>({
      type: 'object',
      additionalProperties: true,
      description: 'More about it, depending on the action; never a secret.',
    }),
    replica: Type.String({ description: 'Which replica recorded it.' }),
    chain: Type.String({ format: 'uuid', description: 'Chain of rows that the event is in.' }),
    sequence: Type.Integer({ description: 'Its place there.' }),
  },
  { $id: 'AuditEvent', description: 'Something that was done, or tried.' },
)

const EXAMPLE_ROW = {
  at: '2026-11-23T12:00:00.000Z',
  action: 'token_handed_out',
  outcome: 'succeeded',
  actor: { kind: 'caller', name: 'invoice-sync' },
  user: 'alice',
  count: 1,
  fingerprint: 'n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg',
  request_id: '5f0c8a52-6f0e-4f86-9a3e-7d5a3b1c2d4e',
  details: {},
  replica: 'broker-1',
  chain: '0d9f7a52-6f0e-4f86-9a3e-7d5a3b1c2d4e',
  sequence: 4711,
}

/** `GET /v1/audit-events`. */
export function registerAuditRoutes(
  app: App,
  { auth, ports }: { auth: CallerAuth; ports: Pick<Ports, 'auditEvents'> },
): void {
  for (const schema of [AuditEventSchema, listOf('AuditEvent')]) app.addSchema(schema)
  app.get(
    '/v1/audit-events',
    {
      ...requireRight(auth, 'ops:read'),
      schema: {
        operationId: 'listAuditEvents',
        summary: 'Read the audit record',
        description:
          'Newest first, of the users that this caller may see. Events that concern no user are shown to callers whose `users` has `*`. An event is here a moment after it happened.',
        tags: ['operations'],
        security: CALLER_SECURITY,
        querystring: Type.Object(
          {
            user: userFilter('Only events that concern this user.'),
            action: Type.Optional(
              Type.Enum(ACTIONS, {
                type: 'string',
                description: 'Only this action.',
                examples: ['token_handed_out'],
              }),
            ),
            ...pageParameters('Events', {
              pattern: '^[A-Za-z0-9_-]{1,200}$',
              example: cursorOf('2026-11-23T12:00:00.000Z', EXAMPLE_ROW.chain, 4711),
            }),
          },
          { additionalProperties: false },
        ),
        response: listAnswers('events', 'AuditEvent', EXAMPLE_ROW),
      },
    },
    async (request) => {
      const { user, action, after, limit = PAGE_SIZE } = request.query
      const rows = await ports.auditEvents.list({
        users: callerOf(request).users,
        user: user === undefined ? undefined : parseUserKey(user),
        action: action as AuditAction | undefined,
        after: after === undefined ? undefined : readCursor(after),
        limit: limit + 1,
      })
      return pageOf(rows, limit, {
        body: eventBody,
        cursor: ({ at, chainId, sequence }) => cursorOf(at.toISOString(), chainId, sequence),
      })
    },
  )
}

function cursorOf(at: string, chainId: string, sequence: number): string {
  return Buffer.from(`${at} ${chainId} ${sequence}`, 'latin1').toString('base64url')
}

function readCursor(cursor: string): AuditFilter['after'] {
  const [, time = '', chainId = '', sequence] =
    CURSOR.exec(Buffer.from(cursor, 'base64url').toString('latin1')) ?? []
  const at = new Date(time)
  if (Number.isNaN(at.getTime())) {
    throw new BrokerError('request_invalid', 'after is not a cursor of this list.', {
      errors: [{ pointer: 'querystring/after', detail: 'is not a cursor of this list' }],
    })
  }
  return { at, chainId, sequence: Number(sequence) }
}

function eventBody(row: AuditRow) {
  return {
    at: row.at.toISOString(),
    action: row.action,
    outcome: row.outcome,
    actor: { kind: row.actorKind, name: row.actorName },
    user: row.user,
    count: row.count,
    fingerprint: row.fingerprint,
    request_id: row.requestId,
    details: row.details,
    replica: row.replica,
    chain: row.chainId,
    sequence: row.sequence,
  }
}
