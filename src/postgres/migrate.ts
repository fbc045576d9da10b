// Brings a database to the schema of this code: the numbered files of migrations/, all or none.
// Not kysely's Migrator: it locks with pg_advisory_lock, for the session, and behind PgBouncer in
// transaction mode such a lock stays with a server connection that nobody can find to unlock it.
// Here the lock is taken inside the transaction and ends with it.

import { readdir, readFile } from 'node:fs/promises'

import { sql } from 'kysely'
import type { Kysely, Transaction } from 'kysely'
import { DatabaseError, Pool } from 'pg'

import { queriesOver, throughDatabase } from './database.ts'
import type { Database, Tables } from './database.ts'

const FOLDER = new URL('../../migrations/', import.meta.url)

/** Any number that no other user of the database locks; this one spells "broker" in ASCII. */
const LOCK_KEY = 0x62_72_6f_6b_65_72

/**
 * `current`: every migration of this code is recorded. `missing`: some are not, or there is no schema.
 * `newer`: one is recorded that this code does not have.
 */
export type SchemaState = 'current' | 'missing' | 'newer'

/**
 * Runs the migrations that are not recorded yet, in one transaction, and returns their names.
 * Any number of replicas may call it at once: one does it, the others wait and find nothing to do.
 *
 * @throws Error when the schema is newer than this code, or a migration fails; nothing was changed then
 * @throws BrokerError `temporarily_unavailable`
 */
export async function migrate(database: Database): Promise<{ applied: string[] }> {
  // A connection of its own, without the limit that the broker's other statements have: rebuilding
  // a table, or waiting for the replica that does, takes as long as it takes.
  const pool = new Pool({ ...database.pool.options, max: 1 })
  // A lost connection also rejects the statement; the events alone would end the process.
  pool.on('error', () => {})
  pool.on('connect', (client) => client.on('error', () => {}))
  try {
    const db = queriesOver(pool)
    return await throughDatabase(() => db.transaction().execute(applyMissing))
  } finally {
    await pool.end()
  }
}

async function applyMissing(transaction: Transaction<Tables>): Promise<{ applied: string[] }> {
  await sql`select pg_advisory_xact_lock(${sql.lit(LOCK_KEY)})`.execute(transaction)
  await sql`
    create table if not exists schema_migrations (
      name text primary key,
      applied_at timestamptz not null default clock_timestamp()
    )`.execute(transaction)
  await sql`
    comment on table schema_migrations is 'The files of migrations/ that were run here.'
  `.execute(transaction)

  const names = await listMigrations()
  const recorded = await readRecorded(transaction)
  if (stateOf(names, recorded) === 'newer') {
    throw new Error(
      'The database has a newer schema than this release. Start the release that migrated it, or a later one.',
    )
  }
  const applied = names.filter((name) => !recorded.has(name))
  for (const name of applied) {
    const statements = await readFile(new URL(`${name}.sql`, FOLDER), 'utf8')
    await sql.raw(statements).execute(transaction)
    await transaction.insertInto('schema_migrations').values({ name }).execute()
  }
  return { applied }
}

/**
 * Tells how the schema of the database stands to this code's. Changes nothing.
 *
 * @throws BrokerError `temporarily_unavailable`
 */
export async function readSchemaState(database: Database): Promise<SchemaState> {
  const names = await listMigrations()
  return throughDatabase(async () => {
    try {
      return stateOf(names, await readRecorded(database.db))
    } catch (error) {
      if (error instanceof DatabaseError && error.code === UNDEFINED_TABLE) return 'missing'
      throw error
    }
  })
}

/** SQLSTATE undefined_table. */
const UNDEFINED_TABLE = '42P01'

function stateOf(names: readonly string[], recorded: ReadonlySet<string>): SchemaState {
  const known = new Set(names)
  if ([...recorded].some((name) => !known.has(name))) return 'newer'
  return names.every((name) => recorded.has(name)) ? 'current' : 'missing'
}

/** Names of the files without their ending, in the order in which they are run. */
async function listMigrations(): Promise<string[]> {
  const files = await readdir(FOLDER)
  return files
    .filter((file) => file.endsWith('.sql'))
    .map((file) => file.slice(0, -'.sql'.length))
    .toSorted()
}

async function readRecorded(db: Kysely<Tables>): Promise<Set<string>> {
  const rows = await db.selectFrom('schema_migrations').select('name').execute()
  return new Set(rows.map((row) => row.name))
}
