// How many there are of what, for the metrics. It looks at every grant, so it is asked now and then.

import { type Kysely, sql } from 'kysely'
import type { Census } from '../record-stores.ts'
import { type Database, type Tables, throughDatabase } from './database.ts'
import { now } from './time.ts'

const STATEMENT_TIMEOUT = '9s'

interface CensusRow {
  active: number
  suspect: number
  reauthenticationRequired: number
  revoked: number
  within7: number
  within30: number
  within90: number
  webhooksPending: number
  webhooksDead: number
  revocationsPending: number
}

/** Makes what counts, by one statement. Errors as those of every store. */
export function createCensus({ db }: Pick<Database, 'db'>): () => Promise<Census> {
  const inState = (state: keyof Census['grants']) =>
    sql`count(*) filter (where state = ${sql.lit(state)})::integer`
  const endingWithin = (days: number) =>
    sql`count(*) filter (where state = 'active' and least(rolling_expires_at, absolute_expires_at)
      <= (select ${now}) + make_interval(days => ${sql.lit(days)}))::integer`
  const count = (transaction: Kysely<Tables>) =>
    sql<CensusRow>`
        select
          ${inState('active')} as active,
          ${inState('suspect')} as suspect,
          ${inState('reauthentication_required')} as "reauthenticationRequired",
          ${inState('revoked')} as revoked,
          ${endingWithin(7)} as within7,
          ${endingWithin(30)} as within30,
          ${endingWithin(90)} as within90,
          (select count(*)::integer from outbox where state = 'pending') as "webhooksPending",
          (select count(*)::integer from outbox where state = 'dead') as "webhooksDead",
          (select count(*)::integer from revocations) as "revocationsPending"
        from grants`.execute(transaction)

  return () =>
    throughDatabase(async () => {
      const { rows } = await db.transaction().execute(async (transaction) => {
        // As long as this side waits for a statement, but for a second: the server must not go on alone.
        await sql`select set_config('statement_timeout', ${STATEMENT_TIMEOUT}, true)`.execute(
          transaction,
        )
        return count(transaction)
      })
      const { active, suspect, reauthenticationRequired, revoked, ...others } = rows[0] as CensusRow
      const { within7, within30, within90, ...queues } = others
      return {
        grants: { active, suspect, reauthentication_required: reauthenticationRequired, revoked },
        expiringWithinDays: new Map([
          [7, within7],
          [30, within30],
          [90, within90],
        ]),
        ...queues,
      }
    })
}
