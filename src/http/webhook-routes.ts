// Events that the webhook has not confirmed: those on their way, and those given up, which an operator may have delivered
// again. A caller sees those of the users that it may see, and no others.

import Type from 'typebox'
import { BrokerError } from '../errors.ts'
import { GRANT_EVENTS, parseUserKey } from '../grant.ts'
import type { Ports } from '../ports.ts'
import type { WebhookDelivery } from '../record-stores.ts'
import type { QueueWorker } from '../queue.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireRight } from './caller-auth.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { listAnswers, listOf, PAGE_SIZE, pageOf, pageParameters, userFilter } from './paging.ts'
import { problemResponses } from './problem.ts'

const STATES = ['pending', 'dead'] as const

const WebhookDeliverySchema = Type.Object(
  {
    id: Type.String({ format: 'uuid', description: 'Sent as `webhook-id`.' }),
    type: Type.Enum([...GRANT_EVENTS], { type: 'string', description: 'What happened.' }),
    user: Type.String({ description: 'Whose grant it happened to.' }),
    occurred_at: Type.String({ format: 'date-time', description: 'When it happened.' }),
    state: Type.Enum([...STATES], {
      type: 'string',
      description:
        '`pending`: on its way, or waiting for its turn. `dead`: given up after three days, or because the receiver answered 410; later events of the user are delivered all the same.',
    }),
    attempts: Type.Integer({ description: 'Attempts so far, one that is being made included.' }),
    last_attempt_at: Type.Unsafe<unknown>({
      type: ['string', 'null'],
      format: 'date-time',
      description: 'Null before the first.',
    }),
    last_failure: Type.Unsafe<unknown>({
      type: ['string', 'null'],
      description:
        'What the last attempt failed with, such as `http_500`, `deadline`, `econnrefused`; null while one is being made.',
    }),
    next_attempt_at: Type.Unsafe<unknown>({
      type: ['string', 'null'],
      format: 'date-time',
      description:
        'Not before this, and not before the earlier events of the user; null when it is dead.',
    }),
  },
  { $id: 'WebhookDelivery', description: 'An event that the webhook has not confirmed.' },
)

const EXAMPLE = {
  id: '3f0c8a52-6f0e-4f86-9a3e-7d5a3b1c2d4e',
  type: 'grant.reauthentication_required',
  user: 'alice',
  occurred_at: '2026-11-23T12:00:00.000Z',
  state: 'dead',
  attempts: 97,
  last_attempt_at: '2026-11-26T11:31:00.000Z',
  last_failure: 'http_500',
  next_attempt_at: null,
}

/** `GET /v1/webhook-deliveries`, and `POST …/{id}/redeliver`. */
export function registerWebhookRoutes(
  app: App,
  parts: {
    auth: CallerAuth
    ports: Pick<Ports, 'log' | 'outbox'>
    sender: Pick<QueueWorker, 'kick'> | undefined
  },
): void {
  const { auth, ports, sender } = parts
  for (const schema of [WebhookDeliverySchema, listOf('WebhookDelivery')]) app.addSchema(schema)

  app.get(
    '/v1/webhook-deliveries',
    {
      ...requireRight(auth, 'ops:read'),
      schema: {
        operationId: 'listWebhookDeliveries',
        summary: 'List events that the webhook has not confirmed',
        description:
          'Oldest first, of the users that this caller may see. What was delivered is not kept. A dead event is kept for a month.',
        tags: ['webhooks'],
        security: CALLER_SECURITY,
        querystring: Type.Object(
          {
            state: Type.Optional(
              Type.Enum([...STATES], {
                type: 'string',
                description: 'Only events in this state.',
                examples: ['dead'],
              }),
            ),
            user: userFilter('Only events of this user.'),
            ...pageParameters('Events', { pattern: '^[1-9][0-9]{0,14}$', example: '4711' }),
          },
          { additionalProperties: false },
        ),
        response: listAnswers('events', 'WebhookDelivery', EXAMPLE),
      },
    },
    async (request) => {
      const { state, user, after, limit = PAGE_SIZE } = request.query
      const deliveries = await ports.outbox.list({
        state: state as WebhookDelivery['state'] | undefined,
        user: user === undefined ? undefined : parseUserKey(user),
        users: callerOf(request).users,
        after: after === undefined ? undefined : Number(after),
        limit: limit + 1,
      })
      return pageOf(deliveries, limit, {
        body: deliveryBody,
        cursor: ({ position }) => String(position),
      })
    },
  )

  app.post(
    '/v1/webhook-deliveries/:id/redeliver',
    {
      ...requireRight(auth, 'grant:manage'),
      schema: {
        operationId: 'redeliverWebhook',
        summary: 'Have an event delivered again',
        description:
          'Makes an event due now that is dead, or that waits after a failure; it has three days again. One that is being delivered at this moment is left alone.',
        tags: ['webhooks'],
        security: CALLER_SECURITY,
        params: Type.Object({
          id: Type.String({
            pattern: '^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$',
            description: 'Id of the event.',
            examples: [EXAMPLE.id],
          }),
        }),
        response: {
          202: jsonAnswer({
            description: 'It is due.',
            schema: 'WebhookDelivery',
            example: {
              ...EXAMPLE,
              state: 'pending',
              attempts: 0,
              next_attempt_at: '2026-11-26T12:00:00.000Z',
            },
          }),
          ...problemResponses('internal', [
            'request_invalid',
            'caller_unauthenticated',
            'caller_forbidden',
            'not_found',
            'temporarily_unavailable',
          ]),
        },
      },
    },
    async (request, reply) => {
      const { id } = request.params
      const caller = callerOf(request)
      const delivery = await ports.outbox.deliverAgain(id, caller.users)
      if (delivery === undefined) {
        throw new BrokerError('not_found', 'There is no such event waiting for its delivery.')
      }
      sender?.kick()
      ports.log.info('webhook_redelivered', {
        requestId: request.id,
        eventId: id,
        user: delivery.user,
        caller: caller.name,
      })
      return reply.code(202).send(deliveryBody(delivery))
    },
  )
}

function deliveryBody(delivery: WebhookDelivery) {
  return {
    id: delivery.eventId,
    type: delivery.type,
    user: delivery.user,
    occurred_at: delivery.occurredAt.toISOString(),
    state: delivery.state,
    attempts: delivery.attemptCount,
    last_attempt_at: delivery.lastAttemptAt?.toISOString() ?? null,
    last_failure: delivery.lastFailure,
    next_attempt_at: delivery.state === 'dead' ? null : delivery.nextAttemptAt.toISOString(),
  }
}
