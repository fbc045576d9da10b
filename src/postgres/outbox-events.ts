// Writing events: a part of the statement that changes a grant, so that there is no event without the change and no
// change without the event. No column holds a secret.

import { type RawBuilder, sql } from 'kysely'
import { IMPORT_USERS } from '../grant.ts'
import { likePatternOf } from './user-patterns.ts'

/** What the change of a grant must return for its event. */
export const EVENT_COLUMNS = sql.raw(
  'user_id, state, state_reason, generation, rolling_expires_at, absolute_expires_at',
)

/**
 * Returns the INSERT that writes an event for each row of the CTE `changed`, which has the columns of
 * {@link EVENT_COLUMNS}; or nothing to do when nobody is told. `type` is an expression of text over these columns.
 *
 * The position is drawn while the grant's row is locked: the events of a user are in the order of the changes.
 */
export function writeEvents(
  told: boolean,
  event: {
    changed: 'placed' | 'recovered' | 'condemned' | 'warned'
    type: RawBuilder<string>
    withinDays?: RawBuilder<number>
  },
): RawBuilder<unknown> {
  if (!told) return sql`select 1`
  return sql`
    insert into outbox (user_id, type, grant_state, cause, generation, expires_at, within_days)
    select user_id, ${event.type}, state, case when state <> 'active' then state_reason end,
      generation, least(rolling_expires_at, absolute_expires_at),
      ${event.withinDays ?? sql`null::integer`}
    from ${sql.raw(event.changed)}
    where user_id not like ${likePatternOf(IMPORT_USERS)}`
}
