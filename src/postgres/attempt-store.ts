// Reading the ledger of refresh attempts. It is written by the grant store, in the statements that arm and store.

import { sql } from 'kysely'
import type { AttemptStore } from '../grant-stores.ts'
import { type Database, throughDatabase } from './database.ts'

/** Makes the reader of the ledger. Its pages are keyset-paged by instant and id: rows that come later move nothing. */
export function createAttemptStore({ db }: Pick<Database, 'db'>): AttemptStore {
  return {
    list: (user, { after, limit }) =>
      throughDatabase(async () => {
        let attempts = db
          .selectFrom('refresh_attempts')
          .select([
            'attempt_id as attemptId',
            'generation',
            'cause',
            'replica',
            'armed_at as armedAt',
            'finished_at as finishedAt',
            'outcome',
            'http_status as httpStatus',
            'duration_ms as durationMs',
          ])
          .where('user_id', '=', user)
          .orderBy('armed_at', 'desc')
          .orderBy('attempt_id', 'desc')
          .limit(limit)
        if (after !== undefined) {
          const cursor = db
            .selectFrom('refresh_attempts')
            .where('attempt_id', '=', after)
            .where('user_id', '=', user)
          const known = await cursor.select('attempt_id').executeTakeFirst()
          if (known === undefined) return undefined
          // Compared in the database: its instants are finer than a Date.
          attempts = attempts.where(
            sql<boolean>`(armed_at, attempt_id) < (${cursor.select(['armed_at', 'attempt_id'])})`,
          )
        }
        return attempts.execute()
      }),
  }
}
