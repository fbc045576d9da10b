// A database that the broker may begin on: open, with the schema that it knows, and the keys to what is in it.

import type { Config } from './config.ts'
import { grantSealContext } from './grant.ts'
import { pendingSealContext } from './pending-grant.ts'
import type { Log, Ports } from './ports.ts'
import { type Database, openDatabase } from './postgres/database.ts'
import { readSampleGrants, readSamplePendingGrants } from './postgres/deployment.ts'
import { startEmbeddedPostgres } from './postgres/embedded.ts'
import { migrate, readSchemaState } from './postgres/migrate.ts'
import { Secret } from './secret.ts'

/** Connections to PostgreSQL. No request holds one while Pagero is called, so a few go a long way. */
const POOL_MAX = 10
/** Where the embedded PostgreSQL keeps its files when DATABASE_URL is not set. */
const EMBEDDED_DIRECTORY = './data/postgres'

/**
 * Opens the database, starts the embedded one if none is configured, and brings or checks the schema. What is to be closed
 * again is pushed on `closing`.
 * @throws Error with a sentence for the operator when the schema does not fit
 */
export async function openReadyDatabase(
  config: Config,
  log: Log,
  closing: Array<() => Promise<unknown>>,
): Promise<Database> {
  let url = config.databaseUrl
  if (url === undefined) {
    const embedded = await startEmbeddedPostgres({
      directory: EMBEDDED_DIRECTORY,
      durable: true,
      log,
    })
    closing.push(() => embedded.stop())
    url = new Secret(embedded.url)
  }
  const database = openDatabase(
    { url, poolMax: POOL_MAX, applicationName: `broker ${config.replicaName}`.slice(0, 63) },
    log,
  )
  closing.push(() => database.close())
  if (config.migrateAtStart) {
    const { applied } = await migrate(database)
    for (const version of applied) log.info('migration_applied', { version })
    return database
  }
  const state = await readSchemaState(database)
  if (state !== 'current') {
    throw new Error(
      state === 'newer'
        ? 'The database has a newer schema than this version of the broker knows. Start the newer version.'
        : 'The database lacks migrations and MIGRATE_AT_START is false. Run: broker migrate',
    )
  }
  return database
}

/**
 * Tries every key that stored grants need, and returns what is wrong, if anything is. No grant is touched by a key that is
 * missing or wrong; it waits for its key.
 */
export async function findUnusableKeys(
  database: Database,
  { sealer, log }: Pick<Ports, 'sealer' | 'log'>,
): Promise<string | undefined> {
  const samples = [
    ...(await readSampleGrants(database)).map((grant) => ({
      ...grant,
      context: grantSealContext('refresh_token_sealed', grant),
    })),
    ...(await readSamplePendingGrants(database)).map((pending) => ({
      ...pending,
      context: pendingSealContext('refresh_token_sealed', pending),
    })),
  ]
  let unusable: string | undefined
  for (const { keyId, context, refreshTokenSealed } of samples) {
    try {
      sealer.open(context, refreshTokenSealed)
    } catch (error) {
      log.error('encryption_key_unusable', { keyId, setting: 'ENCRYPTION_KEYS', error })
      unusable = 'a key that stored grants are sealed with is missing or wrong'
    }
  }
  return unusable
}
