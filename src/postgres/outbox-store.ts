// Events on their way to the webhook. A row leaves the outbox only when the receiver has confirmed it, or a month after
// it was given up; what a replica has taken comes back by itself if that replica dies. Each method is one statement.

import { type Selectable, sql } from 'kysely'
import type { OutboxStore, WebhookDelivery } from '../record-stores.ts'
import { type Database, SWEEP_ROWS_MAX, type Tables, throughDatabase } from './database.ts'
import { now, seconds } from './time.ts'
import { likePatternOf } from './user-patterns.ts'

/** Makes the store of events. Every method may be called at once, on any number of replicas. */
export function createOutboxStore({ db }: Pick<Database, 'db'>): OutboxStore {
  return {
    take: (limit, leaseSeconds) =>
      throughDatabase(async () => {
        // An event is committed before the next one of its user can be written: who sees this one sees those before it.
        const { rows } = await sql<OutboxRow>`
          with due as (
            select o.event_id from outbox o
            where o.state = 'pending' and o.next_attempt_at <= ${now} and o.give_up_at > ${now}
              and not exists (
                select 1 from outbox earlier
                where earlier.user_id = o.user_id and earlier.state = 'pending'
                  and earlier.position < o.position)
            order by o.next_attempt_at limit ${limit} for update skip locked
          )
          update outbox o set
            next_attempt_at = ${now} + ${seconds(leaseSeconds)}, last_attempt_at = ${now},
            attempt_count = o.attempt_count + 1, last_failure = null
          from due where o.event_id = due.event_id
          returning o.*`.execute(db)
        return rows.map(deliveryOf)
      }),

    done: (eventId) =>
      throughDatabase(async () => {
        await db.deleteFrom('outbox').where('event_id', '=', eventId).execute()
      }),

    retryLater: (eventId, failure, delaySeconds) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ state: 'pending' | 'dead' }>`
          update outbox set
            state = case when ${now} + ${seconds(delaySeconds)} < give_up_at then 'pending' else 'dead' end,
            next_attempt_at = ${now} + ${seconds(delaySeconds)}, last_failure = ${failure}
          where event_id = ${eventId}
          returning state`.execute(db)
        return rows[0]?.state ?? 'pending'
      }),

    giveUp: (eventId, failure) =>
      throughDatabase(async () => {
        await sql`
          update outbox set state = 'dead', give_up_at = ${now}, last_failure = ${failure}
          where event_id = ${eventId}`.execute(db)
      }),

    list: (filter) =>
      throughDatabase(async () => {
        const { rows } = await sql<OutboxRow>`
          select * from outbox
          where position > ${filter.after ?? 0} and user_id like any(${filter.users.map(likePatternOf)})
            and (${filter.state ?? null}::text is null or state = ${filter.state ?? null})
            and (${filter.user ?? null}::text is null or user_id = ${filter.user ?? null})
          order by position limit ${filter.limit}`.execute(db)
        return rows.map(deliveryOf)
      }),

    deliverAgain: (eventId, users) =>
      throughDatabase(async () => {
        const { rows } = await sql<OutboxRow>`
          update outbox set
            state = 'pending', attempt_count = 0, give_up_at = ${now} + interval '3 days',
            -- Without a failure it is due already, or on its way at this moment.
            next_attempt_at = case when last_failure is null then next_attempt_at else ${now} end
          where event_id = ${eventId} and user_id like any(${users.map(likePatternOf)})
          returning *`.execute(db)
        return rows.map(deliveryOf)[0]
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { rows } = await sql<{ count: number }>`
          with late as (
            select event_id from outbox
            where state = 'pending' and give_up_at < ${now} and next_attempt_at < ${now}
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), given_up as (
            update outbox set state = 'dead', last_failure = coalesce(last_failure, 'not_tried')
            where event_id in (select event_id from late)
            returning 1
          ), old as (
            select event_id from outbox
            where state = 'dead' and give_up_at < ${now} - interval '30 days'
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), forgotten as (
            delete from outbox where event_id in (select event_id from old)
            returning 1
          )
          select greatest(
            (select count(*) from given_up), (select count(*) from forgotten))::int as count`.execute(
          db,
        )
        return rows[0]?.count ?? 0
      }),
  }
}

type OutboxRow = Selectable<Tables['outbox']>

function deliveryOf(row: OutboxRow): WebhookDelivery {
  return {
    eventId: row.event_id,
    position: row.position,
    user: row.user_id,
    type: row.type,
    occurredAt: row.occurred_at,
    grantState: row.grant_state,
    cause: row.cause,
    generation: row.generation,
    expiresAt: row.expires_at,
    withinDays: row.within_days,
    state: row.state,
    nextAttemptAt: row.next_attempt_at,
    giveUpAt: row.give_up_at,
    attemptCount: row.attempt_count,
    lastAttemptAt: row.last_attempt_at,
    lastFailure: row.last_failure,
  }
}
