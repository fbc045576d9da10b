// What is done to grants as a whole, now and then: noting their use, finding those due for something, listing them,
// dropping what is of no more use.

import { sql } from 'kysely'
import { IMPORT_USERS, type UserKey } from '../grant.ts'
import type { ExpiryWarning, GrantStore } from '../grant-stores.ts'
import { type Database, SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import { GRANT_COLUMNS, type GrantRow, grantOf } from './grant-rows.ts'
import { EVENT_COLUMNS, writeEvents } from './outbox-events.ts'
import { prepare } from './prepared.ts'
import { now } from './time.ts'
import { likePatternOf } from './user-patterns.ts'

/** The part of the store of grants that works on many of them. `refreshTokenLifetime` is an ISO 8601 duration. */
export function createGrantUpkeep(
  { db }: Pick<Database, 'db'>,
  { refreshTokenLifetime, events = false }: { refreshTokenLifetime: string; events?: boolean },
): Pick<
  GrantStore,
  'touch' | 'findUndecided' | 'findKeepAliveDue' | 'takeExpiryWarnings' | 'sweep' | 'list'
> {
  // In the order of the keys and past what is locked: no two of these, and no refresh, wait for each other.
  const touch = prepare<{ users: readonly UserKey[] }>(
    db,
    'touch',
    (value) => sql`
      update grants set last_used_at = ${now}
      where user_id in (
        select user_id from grants where user_id = any(${value('users')})
        order by user_id for update skip locked)`,
  )

  return {
    touch: (users) =>
      throughDatabase(async () => {
        await touch({ users })
      }),

    findUndecided: ({ replica, after, limit }) =>
      throughDatabase(async () => {
        // It may read the whole table, at the start of a process or of the database: an index would cost each refresh
        // more than that. The ledger is asked only where the last attempt has failed.
        const { rows } = await sql<GrantRow>`
          select ${GRANT_COLUMNS}, ${now} as read_at from grants g
          where g.user_id > ${after ?? ''}
            and ((g.owner = ${replica}
                and ((g.phase = 'armed' and g.state = 'active') or g.state = 'suspect'))
              or (g.phase = 'idle' and g.state = 'active' and g.next_retry_at is not null and exists (
                select 1 from refresh_attempts a
                where a.user_id = g.user_id and a.login_id = g.login_id
                  and a.generation = g.generation and (a.outcome = 'in_doubt' or a.outcome is null)
                  and ${replica} in (a.replica, g.owner))))
          order by g.user_id limit ${limit}`.execute(db)
        return rows.map(grantOf)
      }),

    findKeepAliveDue: ({ after, limit }) =>
      throughDatabase(async () => {
        // Spread over a thirty-sixth of the lifetime (a month of three years), so that grants of one day do not
        // come due on one day; the hash makes a grant's place in it the same on every replica.
        // Sought by the index on rotated_at, which takes an instant that is read once; in the order of the keys, every
        // grant there is would be looked at for the few that are due, or for none.
        const { rows } = await sql<GrantRow>`
          with due as materialized (
            select user_id as due_user from grants
            where state = 'active' and phase = 'idle'
              and rotated_at < (select ${now}) - ${refreshTokenLifetime}::interval / 2
              and ${now} > rotated_at + (rolling_expires_at - rotated_at)
                * (0.5 + (abs(hashtext(user_id)::bigint) % 1000) / 36000.0)
              and (next_retry_at is null or next_retry_at <= ${now})
          )
          select ${GRANT_COLUMNS}, ${now} as read_at from due join grants g on g.user_id = due_user
          where due_user > ${after ?? ''}
          order by due_user limit ${limit}`.execute(db)
        return rows.map(grantOf)
      }),

    takeExpiryWarnings: (limit) =>
      throughDatabase(async () => {
        const withinDays = sql`case
          when least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '7 days' then 7
          when least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '30 days' then 30
          else 90
        end`
        const { rows } = await sql<ExpiryWarning>`
          with near as (
            select user_id as near_user, ${withinDays} as within_days
            from grants
            where state = 'active'
              and least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '90 days'
              and (expiry_warned_days is null or expiry_warned_days > ${withinDays})
            -- Locked as it was read: a login of this moment begins anew, and waits or is passed over.
            limit ${limit} for update skip locked
          ), warned as (
            update grants g set expiry_warned_days = near.within_days
            from near
            where g.user_id = near.near_user
            returning ${EVENT_COLUMNS}, expiry_warned_days
          ), told as (${writeEvents(events, {
            changed: 'warned',
            type: sql`'grant.expiring'`,
            withinDays: sql`expiry_warned_days`,
          })})
          select user_id as "user", expiry_warned_days as "withinDays" from warned`.execute(db)
        return rows
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { rows } = await sql<{ count: number }>`
          with dead as (
            select user_id from grants
            where state = 'reauthentication_required' and refresh_token_sealed is not null
              and condemned_at < ${now} - interval '30 days'
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), emptied as (
            update grants set
              refresh_token_sealed = null, key_id = null, access_token_sealed = null,
              access_token_requested_at = null, access_token_expires_at = null,
              access_token_fingerprint = null
            where user_id in (select user_id from dead)
            returning 1
          ), old as (
            select attempt_id from refresh_attempts
            where armed_at < ${now} - interval '90 days' and outcome is not null
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), forgotten as (
            delete from refresh_attempts where attempt_id in (select attempt_id from old)
            returning 1
          )
          select greatest(
            (select count(*) from emptied), (select count(*) from forgotten))::int as count`.execute(
          db,
        )
        return rows[0]?.count ?? 0
      }),

    list: (filter) =>
      throughDatabase(async () => {
        const patterns = filter.users.map(likePatternOf)
        const { rows } = await sql<GrantRow>`
          select ${GRANT_COLUMNS}, ${now} as read_at from grants g
          where g.user_id > ${filter.after ?? ''}
            and g.user_id like any(${patterns}) and g.user_id not like ${likePatternOf(IMPORT_USERS)}
            and (${filter.state ?? null}::text is null or g.state = ${filter.state ?? null})
            and (${filter.expiresWithin ?? null}::interval is null
              or least(g.rolling_expires_at, g.absolute_expires_at)
                <= ${now} + ${filter.expiresWithin ?? null}::interval)
          order by g.user_id limit ${filter.limit}`.execute(db)
        return rows.map(grantOf)
      }),
  }
}
