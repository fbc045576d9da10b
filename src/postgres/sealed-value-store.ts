// Sealed values wherever they stand, for whoever seals them anew. That they are still the ones that were read is decided by
// the statement that replaces them, by their hashes: each has a nonce of its own, so equal bytes are the same value.

import { hash } from 'node:crypto'
import { type Kysely, type RawBuilder, sql } from 'kysely'
import type { RowKey, SealedRow, SealedTable, SealedValueStore } from '../grant-stores.ts'
import { throughDatabase } from './database.ts'
import type { Tables } from './tables.ts'

interface TableOfValues {
  key: { column: string; type: 'text' | 'bytea' | 'uuid' }
  /** What the values are bound to, as the core names it. */
  place: Readonly<Record<string, string>>
  sealed: readonly string[]
  hasKeyId: boolean
}

const TABLES: Readonly<Record<SealedTable, TableOfValues>> = {
  grants: {
    key: { column: 'user_id', type: 'text' },
    place: { user: 'user_id', loginId: 'login_id', generation: 'generation' },
    sealed: ['refresh_token_sealed', 'access_token_sealed'],
    hasKeyId: true,
  },
  pending_grants: {
    key: { column: 'confirmation_hash', type: 'bytea' },
    place: {
      user: 'user_id',
      confirmationHash: 'confirmation_hash',
      revocationId: 'revocation_id',
    },
    sealed: ['refresh_token_sealed', 'access_token_sealed', 'revocation_token_sealed'],
    hasKeyId: true,
  },
  revocations: {
    key: { column: 'revocation_id', type: 'uuid' },
    place: { user: 'user_id', revocationId: 'revocation_id' },
    sealed: ['token_sealed'],
    hasKeyId: true,
  },
  login_transactions: {
    key: { column: 'state_hash', type: 'bytea' },
    place: { stateHash: 'state_hash' },
    sealed: ['code_verifier_sealed'],
    hasKeyId: false,
  },
}

type Row = Record<string, unknown>

/** Makes the store of sealed values. Every method may be called at once, beside everything else that writes the rows. */
export function createSealedValueStore(db: Kysely<Tables>): SealedValueStore {
  return {
    findSealedOtherwise: (table, prefix, { after, limit }) =>
      throughDatabase(async () => {
        const { key, place, sealed } = TABLES[table]
        const column = sql.ref(key.column)
        const isBehind =
          after === undefined ? sql`true` : sql`${column} > ${after}::${sql.raw(key.type)}`
        // Null is sealed by nobody.
        const isOtherwise = sealed.map(
          (name) => sql`substring(${sql.ref(name)} from 1 for ${prefix.length}) <> ${prefix}`,
        )
        const columns = [...new Set([...Object.values(place), ...sealed])].map((name) =>
          sql.ref(name),
        )
        // A row in many is found when most are done: looking at so many at a time keeps each statement short.
        const { rows } = await sql<Row>`
          with page as (
            select * from ${sql.table(table)} where ${isBehind} order by ${column} limit ${limit}
          ), last_of_page as (
            select ${column} as last_key from page order by ${column} desc limit 1
          )
          select last_key, ${column} as row_key, ${sql.join(columns)}
          from last_of_page left join page on ${sql.join(isOtherwise, sql` or `)}
          order by row_key`.execute(db)
        return {
          rows: rows.filter((row) => row['row_key'] !== null).map((row) => rowOf(table, row)),
          last: rows[0]?.['last_key'] as RowKey | undefined,
        }
      }),

    // In the order of the keys and past what is locked: nobody waits for these but for one statement.
    replaceSealed: (table, rows, keyId) =>
      throughDatabase(async () => {
        if (rows.length === 0) return 0
        const { key, sealed, hasKeyId } = TABLES[table]
        const column = sql.ref(`t.${key.column}`)
        const lists: RawBuilder<unknown>[] = [
          sql`${rows.map(({ row }) => row.key)}::${sql.raw(key.type)}[]`,
        ]
        const names = ['key']
        for (const [index, name] of sealed.entries()) {
          lists.push(sql`${rows.map(({ row }) => hashOf(row.sealed[name]))}::bytea[]`)
          lists.push(sql`${rows.map((anew) => anew.sealed[name] ?? null)}::bytea[]`)
          names.push(`before_${index}`, `anew_${index}`)
        }
        const isAsRead = sealed.map(
          (name, index) =>
            sql`sha256(${sql.ref(`t.${name}`)}) is not distinct from ${sql.ref(`given.before_${index}`)}`,
        )
        const changes = sealed.map(
          (name, index) => sql`${sql.ref(name)} = ${sql.ref(`given.anew_${index}`)}`,
        )
        if (hasKeyId) changes.push(sql`key_id = ${keyId}`)
        const { rows: replaced } = await sql`
          with given as (
            select * from unnest(${sql.join(lists)}) as given (${sql.join(names.map((name) => sql.ref(name)))})
          ), held as (
            select given.* from ${sql.table(table)} t join given on ${column} = given.key
            where ${sql.join(isAsRead, sql` and `)}
            order by ${column} for update of t skip locked
          )
          update ${sql.table(table)} t set ${sql.join(changes)}
          from held given where ${column} = given.key
          returning 1`.execute(db)
        return replaced.length
      }),
  }
}

function hashOf(value: Buffer | null | undefined): Buffer | null {
  return value ? hash('sha256', value, 'buffer') : null
}

function rowOf(table: SealedTable, row: Row): SealedRow {
  const { place, sealed } = TABLES[table]
  const parts = Object.entries(place).map(([name, column]) => [name, row[column]] as const)
  const values = sealed.map((name) => [name, row[name]] as const)
  return {
    table,
    key: row['row_key'],
    ...Object.fromEntries(parts),
    sealed: Object.fromEntries(values),
  } as SealedRow
}
