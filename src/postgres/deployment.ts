// What concerns the database as a whole: which deployment it belongs to, and which keys its rows need.

import { sql } from 'kysely'
import type { UserKey } from '../grant.ts'
import { type Database, throughDatabase } from './database.ts'

/** Returns the id that is bound into every sealed value of this database. */
export function readDeploymentId({ db }: Pick<Database, 'db'>): Promise<string> {
  return throughDatabase(async () => {
    const { deployment_id: deploymentId } = await db
      .selectFrom('deployment')
      .select('deployment_id')
      .executeTakeFirstOrThrow()
    return deploymentId
  })
}

/**
 * Returns one grant for each key that grants are sealed with, to try the keys on. It reads the whole table: for the start, not
 * for each request.
 */
export function readSampleGrants({ db }: Pick<Database, 'db'>): Promise<SampleGrant[]> {
  return throughDatabase(async () => {
    const { rows } = await sql<SampleGrant>`
      select distinct on (key_id) key_id as "keyId", user_id as "user", login_id as "loginId",
        generation, refresh_token_sealed as "refreshTokenSealed"
      from grants where key_id is not null order by key_id, rotated_at desc`.execute(db)
    return rows
  })
}

/** The same of those that wait for confirmation. */
export function readSamplePendingGrants({
  db,
}: Pick<Database, 'db'>): Promise<SamplePendingGrant[]> {
  return throughDatabase(async () => {
    const { rows } = await sql<SamplePendingGrant>`
      select distinct on (key_id) key_id as "keyId", user_id as "user",
        confirmation_hash as "confirmationHash", refresh_token_sealed as "refreshTokenSealed"
      from pending_grants where key_id is not null order by key_id, created_at desc`.execute(db)
    return rows
  })
}

export interface SamplePendingGrant {
  keyId: string
  user: UserKey
  confirmationHash: Buffer
  refreshTokenSealed: Buffer
}

export interface SampleGrant {
  keyId: string
  user: UserKey
  loginId: string
  generation: number
  refreshTokenSealed: Buffer
}

/**
 * Says whether this is the database that the deployment has always worked in. The first broker to ask claims it. A
 * copy, or one restored from a dump, has another identity: its refresh tokens may be spent, or in use elsewhere.
 */
export function claimDatabase({ db }: Pick<Database, 'db'>): Promise<'ours' | 'another'> {
  return throughDatabase(async () => {
    const { rows } = await sql<{ ours: boolean }>`
      with claimed as (
        update deployment set database_identity = ${identity} where database_identity is null
        returning true as ours
      )
      select ours from claimed
      union all
      select database_identity = ${identity} from deployment where database_identity is not null`.execute(
      db,
    )
    // Two that claim at once: the one that comes second waits, changes nothing, and has seen no claim yet.
    return (rows[0]?.ours ?? true) ? 'ours' : 'another'
  })
}

/** Says what `claimDatabase` would, and claims nothing. */
export function readClaim({ db }: Pick<Database, 'db'>): Promise<'ours' | 'another' | 'unclaimed'> {
  return throughDatabase(async () => {
    const { rows } = await sql<{ ours: boolean | null }>`
      select database_identity = ${identity} as ours from deployment`.execute(db)
    const ours = rows[0]?.ours ?? null
    if (ours === null) return 'unclaimed'
    return ours ? 'ours' : 'another'
  })
}

export interface DatabaseServer {
  /** As PostgreSQL counts it: 170002. */
  version: number
  versionText: string
  /** A standby, or one that was told to be. */
  isReadOnly: boolean
  now: Date
}

/** Says what server it is, and what time it has. Needs no schema. */
export function readServer({ db }: Pick<Database, 'db'>): Promise<DatabaseServer> {
  return throughDatabase(async () => {
    const { rows } = await sql<DatabaseServer>`
      select current_setting('server_version_num')::int as version,
        current_setting('server_version') as "versionText",
        (pg_is_in_recovery() or current_setting('default_transaction_read_only')::boolean)
          as "isReadOnly",
        clock_timestamp() as now`.execute(db)
    const [server] = rows
    if (server === undefined) throw new Error('PostgreSQL did not say what it is.')
    return server
  })
}

/** Names those settings of the server, role or database under which a commit may be forgotten. */
export function findUnsafeSettings({ db }: Pick<Database, 'db'>): Promise<string[]> {
  return throughDatabase(async () => {
    const { rows } = await sql<{ name: string }>`
      select name from pg_settings
      where name in ('fsync', 'full_page_writes', 'synchronous_commit') and setting = 'off'
      order by name`.execute(db)
    return rows.map(({ name }) => name)
  })
}

/** Makes the database's present identity the deployment's: the operator's word that nothing else uses its tokens. */
export function acceptDatabase({ db }: Pick<Database, 'db'>): Promise<void> {
  return throughDatabase(async () => {
    await sql`update deployment set database_identity = ${identity}`.execute(db)
  })
}

/** Server and database: both change when a dump is restored, the database also beside its original. */
const identity = sql`(
  (select system_identifier from pg_control_system())::text || '/' ||
  (select oid from pg_database where datname = current_database())::text)`
