// Imports on their way to a user. Each method is one statement.

import { sql } from 'kysely'
import { IMPORT_USER_PREFIX, IMPORT_USERS } from '../grant.ts'
import type { GrantImport, ImportStore } from '../grant-stores.ts'
import { type Database, SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import { likePatternOf } from './user-patterns.ts'

/** The import that a grant of {@link IMPORT_USERS} proves. */
const importIdOfUser = sql`substr(grants.user_id, ${sql.lit(IMPORT_USER_PREFIX.length + 1)})::uuid`

const IMPORT_COLUMNS = sql`
  import_id as "importId", user_id as "user", obtained_at as "obtainedAt", created_at as "createdAt", outcome,
  abandoned_at is not null as "isAbandoned"`

const BEGIN_TRIES_MAX = 3

/** Makes the store of imports. `refreshTokenLifetime` is an ISO 8601 duration. */
export function createImportStore(
  { db }: Pick<Database, 'db'>,
  { refreshTokenLifetime }: { refreshTokenLifetime: string },
): ImportStore {
  return {
    begin: (entry, grant) =>
      throughDatabase(async () => {
        const lifetime = sql`${refreshTokenLifetime}::interval`
        const statement = sql<GrantImport>`
          with begun as (
            insert into imports (import_id, user_id, token_digest, obtained_at)
            values (${entry.importId}, ${entry.user}, ${entry.tokenDigest}, ${entry.obtainedAt})
            on conflict (token_digest) do nothing
            returning *
          ), proof as (
            insert into grants
              (user_id, login_id, generation, refresh_token_sealed, key_id, authenticated_at,
               rotated_at, rolling_expires_at, absolute_expires_at)
            select ${grant.user}, ${grant.loginId}::uuid, 1, ${grant.refreshTokenSealed}::bytea,
              ${grant.keyId}, obtained_at, obtained_at, obtained_at + ${lifetime},
              obtained_at + ${lifetime}
            from begun
          )
          select ${IMPORT_COLUMNS} from begun
          union all
          select ${IMPORT_COLUMNS} from imports where token_digest = ${entry.tokenDigest}`
        for (let tries = 1; tries <= BEGIN_TRIES_MAX; tries += 1) {
          const { rows } = await statement.execute(db)
          const [begun] = rows
          if (begun !== undefined) return begun
          // Another one with this token was committed while this one waited for it, and is seen the next time.
        }
        throw new Error('an import is neither new nor there')
      }),

    findUnfinished: ({ after, limit }) =>
      throughDatabase(async () => {
        // Apart, because an index has the first ones, and of the others there are hardly ever any.
        const { rows } = await sql<GrantImport>`
          with unfinished as (
            select * from imports where finished_at is null
            union all
            select * from imports where outcome = 'refused' and import_id in (
              select ${importIdOfUser} from grants
              where user_id like ${likePatternOf(IMPORT_USERS)} and state = 'active')
          )
          select ${IMPORT_COLUMNS} from unfinished where ${after ?? null}::uuid is null or import_id > ${after ?? null}::uuid
          order by import_id limit ${limit}`.execute(db)
        return rows
      }),

    abandon: (user) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ importId: string; wasUnderWay: boolean }>`
          update imports set abandoned_at = coalesce(abandoned_at, clock_timestamp())
          where user_id = ${user} and outcome is distinct from 'imported'
          returning import_id as "importId", outcome is null as "wasUnderWay"`.execute(db)
        return rows.flatMap(({ importId, wasUnderWay }) => (wasUnderWay ? [importId] : []))
      }),

    refuse: (importId) =>
      throughDatabase(async () => {
        await sql`
          update imports set finished_at = clock_timestamp(), outcome = 'refused'
          where import_id = ${importId} and finished_at is null`.execute(db)
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { rows } = await sql<{ count: number }>`
          with old as (
            select import_id from imports
            -- After what was to prove it, in any case.
            where finished_at < clock_timestamp()
              - greatest(${refreshTokenLifetime}::interval, interval '60 days')
            limit ${SWEEP_ROWS_MAX}
          ), forgotten as (
            delete from imports where import_id in (select import_id from old) returning 1
          ), unproven as (
            -- The grants of refused imports, when no success is to be expected any more.
            select user_id from grants
            where user_id like ${likePatternOf(IMPORT_USERS)} and state <> 'active' and exists (
              select 1 from imports i
              where i.import_id = ${importIdOfUser}
                and i.outcome = 'refused' and i.finished_at < clock_timestamp() - interval '30 days')
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), removed as (
            delete from grants where user_id in (select user_id from unproven) returning 1
          )
          select greatest((select count(*) from forgotten), (select count(*) from removed))::int
            as count`.execute(db)
        return rows[0]?.count ?? 0
      }),
  }
}
