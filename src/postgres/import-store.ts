// Imports on their way to a user. Each method is one statement.

import { sql } from 'kysely'
import type { GrantImport, ImportStore } from '../ports.ts'
import { type Database, throughDatabase } from './database.ts'

/** Makes the store of imports. `refreshTokenLifetime` is an ISO 8601 duration. */
export function createImportStore(
  { db }: Pick<Database, 'db'>,
  { refreshTokenLifetime }: { refreshTokenLifetime: string },
): ImportStore {
  return {
    begin: (entry, grant) =>
      throughDatabase(async () => {
        const lifetime = sql`${refreshTokenLifetime}::interval`
        const { rows } = await sql<GrantImport>`
          with begun as (
            insert into imports (import_id, user_id, token_digest, obtained_at)
            values (${entry.importId}, ${entry.user}, ${entry.tokenDigest}, ${entry.obtainedAt})
            on conflict (token_digest) do nothing
            returning import_id, user_id, obtained_at, outcome
          ), proof as (
            insert into grants
              (user_id, login_id, generation, refresh_token_sealed, key_id, authenticated_at,
               rotated_at, rolling_expires_at, absolute_expires_at)
            select ${grant.user}, ${grant.loginId}::uuid, 1, ${grant.refreshTokenSealed}::bytea,
              ${grant.keyId}, obtained_at, obtained_at, obtained_at + ${lifetime},
              obtained_at + ${lifetime}
            from begun
          )
          select import_id as "importId", user_id as "user", obtained_at as "obtainedAt", outcome from begun
          union all
          select import_id, user_id, obtained_at, outcome from imports
          where token_digest = ${entry.tokenDigest}`.execute(db)
        const [begun] = rows
        if (begun === undefined) throw new Error('an import is neither new nor there')
        return begun
      }),

    findUnfinished: (limit) =>
      throughDatabase(async () => {
        const { rows } = await sql<GrantImport>`
          select import_id as "importId", user_id as "user", obtained_at as "obtainedAt", outcome
          from imports where finished_at is null order by created_at limit ${limit}`.execute(db)
        return rows
      }),

    refuse: (importId, grantUser) =>
      throughDatabase(async () => {
        await sql`
          with ended as (
            update imports set finished_at = clock_timestamp(), outcome = 'refused'
            where import_id = ${importId} and finished_at is null
          )
          delete from grants where user_id = ${grantUser}`.execute(db)
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          delete from imports
          where finished_at < clock_timestamp() - ${refreshTokenLifetime}::interval`.execute(db)
        return Number(numAffectedRows ?? 0n)
      }),
  }
}
