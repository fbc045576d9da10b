// The queue of refresh tokens that Pagero must still be told to forget. A row leaves it only when Pagero
// has confirmed; what a replica has taken comes back by itself if that replica dies.

import { sql } from 'kysely'
import type { Kysely } from 'kysely'

import type { Revocation, RevocationStore } from '../grant-stores.ts'
import { throughDatabase } from './database.ts'
import type { Tables } from './database.ts'
import { now, seconds } from './time.ts'

/** Makes the store of revocations. Every method may be called at once, on any number of replicas. */
export function createRevocationStore(db: Kysely<Tables>): RevocationStore {
  return {
    /** Adding one a second time, after an answer that was lost, changes nothing. */
    add: (revocation) =>
      throughDatabase(async () => {
        await db
          .insertInto('revocations')
          .values({
            revocation_id: revocation.revocationId,
            user_id: revocation.user,
            token_sealed: revocation.tokenSealed,
            key_id: revocation.keyId,
          })
          .onConflict((conflict) => conflict.column('revocation_id').doNothing())
          .execute()
      }),

    take: (limit, leaseSeconds) =>
      throughDatabase(async () => {
        const rows = await db
          .with('due', (cte) =>
            cte
              .selectFrom('revocations')
              .select('revocation_id')
              .where('next_attempt_at', '<=', now)
              .orderBy('next_attempt_at')
              .limit(limit)
              .forUpdate()
              .skipLocked(),
          )
          .updateTable('revocations')
          .from('due')
          .whereRef('revocations.revocation_id', '=', 'due.revocation_id')
          .set({ next_attempt_at: sql<Date>`${now} + ${seconds(leaseSeconds)}` })
          .returning([
            'revocations.revocation_id',
            'revocations.user_id',
            'revocations.token_sealed',
            'revocations.key_id',
            'revocations.failure_count',
          ])
          .execute()
        return rows.map((row): Revocation => ({
          revocationId: row.revocation_id,
          user: row.user_id,
          tokenSealed: row.token_sealed,
          keyId: row.key_id,
          failureCount: row.failure_count,
        }))
      }),

    done: (revocationId) =>
      throughDatabase(async () => {
        await db.deleteFrom('revocations').where('revocation_id', '=', revocationId).execute()
      }),

    retryLater: (revocationId, delaySeconds) =>
      throughDatabase(async () => {
        await db
          .updateTable('revocations')
          .set((row) => ({
            next_attempt_at: sql<Date>`${now} + ${seconds(delaySeconds)}`,
            failure_count: row('failure_count', '+', 1),
          }))
          .where('revocation_id', '=', revocationId)
          .execute()
      }),
  }
}
