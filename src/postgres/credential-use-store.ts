// When callers' credentials were used last. Written in batches by last-use.ts, read by `broker callers list`.

import { type Kysely, sql } from 'kysely'
import type { CredentialUseStore } from '../record-stores.ts'
import { throughDatabase } from './database.ts'
import type { Tables } from './tables.ts'
import { now } from './time.ts'

/** Makes the store of the uses of credentials. */
export function createCredentialUseStore(db: Kysely<Tables>): CredentialUseStore {
  return {
    note: (credentials) =>
      throughDatabase(async () => {
        const kinds = credentials.map(({ kind }) => kind)
        const names = credentials.map(({ name }) => name)
        // In the order of the keys: no two of these wait for each other.
        await sql`
          insert into credential_uses as u (kind, name, last_used_at)
          select kind, name, ${now}
          from (select distinct kind, name from unnest(${kinds}::text[], ${names}::text[]) as t (kind, name)) as used
          order by kind, name
          on conflict (kind, name) do update set
            last_used_at = greatest(u.last_used_at, excluded.last_used_at)`.execute(db)
      }),

    list: () =>
      throughDatabase(async () => {
        const rows = await db.selectFrom('credential_uses').selectAll().execute()
        return rows.map(({ kind, name, last_used_at: lastUsedAt }) => ({ kind, name, lastUsedAt }))
      }),
  }
}
