// Instants and spans of time as SQL, by the database's clock: what two replicas must agree on.

import { type Kysely, type RawBuilder, sql } from 'kysely'
import { type Tables, throughDatabase } from './database.ts'
import { prepare } from './prepared.ts'

/** The instant at which the expression is evaluated, not that of the transaction's start. */
export const now = sql<Date>`clock_timestamp()`

/** Makes the question to the database for that instant. */
export function createNow(db: Kysely<Tables>): () => Promise<Date> {
  const read = prepare<object, { now: Date }>(db, 'now', () => sql`select ${now} as now`)
  return () =>
    throughDatabase(async () => {
      const [row] = await read({})
      return (row as { now: Date }).now
    })
}

/** The instant in milliseconds since 1970, with fractions; null of null. */
export function epochMsOf(instant: RawBuilder<unknown>): RawBuilder<number | null> {
  return sql<number | null>`(extract(epoch from ${instant}) * 1000)::float8`
}

/** A span of so many seconds; fractions count. */
export function seconds(value: number | RawBuilder<number>): RawBuilder<unknown> {
  return sql`make_interval(secs => ${value})`
}

/**
 * The instant and an ISO 8601 duration, calendar-exact: an interval of years added in UTC, whatever time zone the session
 * has.
 */
export function lifetimeFrom(instant: RawBuilder<unknown>, lifetime: string): RawBuilder<Date> {
  return sql<Date>`((${instant}) at time zone 'UTC' + ${lifetime}::interval) at time zone 'UTC'`
}
