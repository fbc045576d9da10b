// The schema as the migrations leave it, and what running them promises.

import { readdir, readFile } from 'node:fs/promises'

import type { Selectable } from 'kysely'
import { sql } from 'kysely'
import t from 'tap'
import type { Test } from 'tap'

import { openDatabase } from '../src/postgres/database.ts'
import type { Database } from '../src/postgres/database.ts'
import { migrate, readSchemaState } from '../src/postgres/migrate.ts'
import type { Tables } from '../src/postgres/tables.ts'
import { Secret } from '../src/secret.ts'
import { createEmptyDatabase, createTestDatabase, silentLog } from './support/database.ts'

/** What information_schema may call a column of this TypeScript type. */
type SqlType<T> = null extends T
  ? `${BaseSqlType<NonNullable<T>>} null`
  : BaseSqlType<NonNullable<T>>
type BaseSqlType<T> = T extends string
  ? 'text' | 'uuid'
  : T extends number
    ? 'bigint' | 'integer'
    : T extends Date
      ? 'timestamp with time zone'
      : T extends boolean
        ? 'boolean'
        : T extends Buffer
          ? 'bytea'
          : 'jsonb'
type Described = {
  [Table in keyof Tables]: {
    [Column in keyof Selectable<Tables[Table]>]: SqlType<Selectable<Tables[Table]>[Column]>
  }
}

const INSTANT = 'timestamp with time zone'
const INSTANT_OR_NULL = 'timestamp with time zone null'

/** The compiler holds this against the table types, the test against the database: so the two agree. */
const COLUMNS: Described = {
  deployment: {
    one: 'boolean',
    deployment_id: 'uuid',
    created_at: INSTANT,
    database_identity: 'text null',
    server_started_at: INSTANT_OR_NULL,
    server_noticed_at: INSTANT_OR_NULL,
    server_left_at: INSTANT_OR_NULL,
  },
  imports: {
    import_id: 'uuid',
    user_id: 'text',
    token_digest: 'bytea',
    obtained_at: INSTANT,
    created_at: INSTANT,
    finished_at: INSTANT_OR_NULL,
    outcome: 'text null',
    abandoned_at: INSTANT_OR_NULL,
  },
  grants: {
    user_id: 'text',
    login_id: 'uuid',
    state: 'text',
    state_reason: 'text null',
    condemned_at: INSTANT_OR_NULL,
    generation: 'bigint',
    refresh_token_sealed: 'bytea null',
    access_token_sealed: 'bytea null',
    access_token_requested_at: INSTANT_OR_NULL,
    access_token_expires_at: INSTANT_OR_NULL,
    access_token_fingerprint: 'text null',
    scope: 'text',
    key_id: 'text null',
    pagero_issuer: 'text null',
    pagero_subject: 'text null',
    phase: 'text',
    attempt_id: 'uuid null',
    owner: 'text null',
    owner_boot: 'uuid null',
    armed_at: INSTANT_OR_NULL,
    lease_until: INSTANT_OR_NULL,
    next_retry_at: INSTANT_OR_NULL,
    failure_count: 'integer',
    authenticated_at: INSTANT,
    rotated_at: INSTANT,
    last_used_at: INSTANT_OR_NULL,
    rolling_expires_at: INSTANT,
    absolute_expires_at: INSTANT,
    expiry_warned_days: 'integer null',
    decided_at: INSTANT_OR_NULL,
  },
  refresh_attempts: {
    attempt_id: 'uuid',
    user_id: 'text',
    login_id: 'uuid',
    generation: 'bigint',
    token_digest: 'bytea',
    replica: 'text',
    boot: 'uuid',
    cause: 'text',
    armed_at: INSTANT,
    finished_at: INSTANT_OR_NULL,
    outcome: 'text null',
    http_status: 'integer null',
    duration_ms: 'integer null',
  },
  credential_uses: { kind: 'text', name: 'text', last_used_at: INSTANT },
  replicas: {
    name: 'text',
    boot: 'uuid',
    booted_at: INSTANT,
    seen_at: INSTANT,
    steady_since: INSTANT,
    spool_drained_at: INSTANT_OR_NULL,
    restored_on: INSTANT_OR_NULL,
    met_on: INSTANT_OR_NULL,
    met_at: INSTANT_OR_NULL,
  },
  revocations: {
    revocation_id: 'uuid',
    user_id: 'text',
    token_sealed: 'bytea',
    key_id: 'text',
    created_at: INSTANT,
    next_attempt_at: INSTANT,
    failure_count: 'integer',
  },
  login_transactions: {
    state_hash: 'bytea',
    browser_binding_hash: 'bytea',
    code_verifier_sealed: 'bytea null',
    nonce_hash: 'bytea null',
    return_to: 'text',
    replaces_session_hash: 'bytea null',
    created_at: INSTANT,
    expires_at: INSTANT,
    user_id: 'text null',
    confirm: 'boolean null',
    start_session: 'boolean null',
    allow_account_change: 'boolean null',
  },
  connect_links: {
    ticket_hash: 'bytea',
    user_id: 'text',
    return_to: 'text',
    confirm: 'boolean',
    start_session: 'boolean',
    allow_account_change: 'boolean',
    created_at: INSTANT,
    expires_at: INSTANT,
    used_at: INSTANT_OR_NULL,
  },
  pending_grants: {
    confirmation_hash: 'bytea',
    user_id: 'text',
    refresh_token_sealed: 'bytea null',
    access_token_sealed: 'bytea null',
    access_token_requested_at: INSTANT_OR_NULL,
    access_token_expires_at: INSTANT_OR_NULL,
    scope: 'text',
    key_id: 'text null',
    pagero_issuer: 'text null',
    pagero_subject: 'text null',
    return_to: 'text',
    start_session: 'boolean',
    allow_account_change: 'boolean',
    browser_binding_hash: 'bytea',
    replaces_session_hash: 'bytea null',
    revocation_id: 'uuid null',
    revocation_token_sealed: 'bytea null',
    created_at: INSTANT,
    expires_at: INSTANT,
    confirmed_at: INSTANT_OR_NULL,
  },
  session_tickets: {
    ticket_hash: 'bytea',
    user_id: 'text',
    return_to: 'text',
    browser_binding_hash: 'bytea',
    replaces_session_hash: 'bytea null',
    expires_at: INSTANT,
  },
  sessions: {
    token_hash: 'bytea',
    user_id: 'text',
    created_at: INSTANT,
    last_seen_at: INSTANT,
    idle_expires_at: INSTANT,
    absolute_expires_at: INSTANT,
  },
  audit_events: {
    chain_id: 'uuid',
    sequence: 'bigint',
    at: INSTANT,
    replica: 'text',
    actor_kind: 'text',
    actor_name: 'text null',
    action: 'text',
    user_id: 'text null',
    outcome: 'text',
    request_id: 'text null',
    fingerprint: 'text null',
    count: 'integer',
    details: 'jsonb',
    key_id: 'text',
    previous_hash: 'bytea',
    hash: 'bytea',
  },
  outbox: {
    event_id: 'uuid',
    position: 'bigint',
    user_id: 'text',
    type: 'text',
    occurred_at: INSTANT,
    grant_state: 'text',
    cause: 'text null',
    generation: 'bigint',
    expires_at: INSTANT,
    within_days: 'integer null',
    state: 'text',
    next_attempt_at: INSTANT,
    give_up_at: INSTANT,
    attempt_count: 'integer',
    last_attempt_at: INSTANT_OR_NULL,
    last_failure: 'text null',
  },
  schema_migrations: { name: 'text', applied_at: INSTANT },
}

t.test('the table types name every column of the database, with its type', async (t) => {
  const { database } = await createTestDatabase(t)
  const { rows } = await sql<{ table: string; column: string; type: string }>`
    select table_name as table, column_name as column,
      data_type || case when is_nullable = 'YES' then ' null' else '' end as type
    from information_schema.columns where table_schema = 'public'
    order by table_name, ordinal_position
  `.execute(database.db)
  const found: Record<string, Record<string, string>> = {}
  for (const { table, column, type } of rows) (found[table] ??= {})[column] = type
  t.strictSame(found, COLUMNS)
})

/** What the name alone says, in every table that has it. */
const PLAIN_NAMES: ReadonlySet<string> = new Set(
  `one name user_id login_id attempt_id revocation_id boot key_id created_at armed_at finished_at
   expires_at applied_at booted_at last_seen_at duration_ms failure_count return_to token_sealed`.split(
    /\s+/,
  ),
)

t.test('every table has a comment, and every column whose name does not say all', async (t) => {
  const { database } = await createTestDatabase(t)
  const { rows } = await sql<{ table: string; column: string | null }>`
    select c.relname as table, a.attname as column
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
      and col_description(c.oid, a.attnum) is null
    union all
    select relname, null from pg_class
    where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')
      and obj_description(oid, 'pg_class') is null
  `.execute(database.db)
  const silent = rows.filter(({ column }) => column === null || !PLAIN_NAMES.has(column))
  t.strictSame(silent, [])
})

t.test('no two files have one number, and none ends the transaction', async (t) => {
  const folder = new URL('../migrations/', import.meta.url)
  const files = (await readdir(folder)).filter((file) => file.endsWith('.sql')).toSorted()
  t.not(files.length, 0)
  t.equal(new Set(files.map((file) => file.slice(0, 4))).size, files.length)
  for (const file of files) {
    t.match(file, /^\d{4}_[a-z0-9_]+\.sql$/)
    const statements = await readFile(new URL(file, folder), 'utf8')
    t.notMatch(statements, /^\s*(begin|commit|rollback|vacuum)\b|\bconcurrently\b/im, file)
  }
})

t.test('five migrators at once leave one schema, and one of them made it', async (t) => {
  const { url } = await createEmptyDatabase(t)
  const databases = Array.from({ length: 5 }, () => open(t, url))
  const [first] = databases as [Database]
  t.equal(await readSchemaState(first), 'missing')

  const runs = await Promise.all(databases.map((database) => migrate(database)))
  t.equal(runs.filter(({ applied }) => applied.length > 0).length, 1)
  t.equal(await readSchemaState(first), 'current')
  t.equal((await first.db.selectFrom('deployment').selectAll().execute()).length, 1)
  t.strictSame(await migrate(first), { applied: [] })
})

t.test('no lock outlives a run, so a pooler may give the connection to anybody', async (t) => {
  const { database } = await createTestDatabase(t)
  await migrate(database)
  const { rows } = await sql`
    select 1 from pg_locks l join pg_database d on d.oid = l.database
    where l.locktype = 'advisory' and d.datname = current_database()
  `.execute(database.db)
  t.equal(rows.length, 0)
})

t.test('a schema that a newer release has migrated is refused with a sentence', async (t) => {
  const { database } = await createTestDatabase(t)
  await database.db.insertInto('schema_migrations').values({ name: '9999_from_later' }).execute()
  t.equal(await readSchemaState(database), 'newer')
  await t.rejects(migrate(database), {
    message: /newer schema than this release\. Start the release/,
  })
})

t.test('a run that fails leaves nothing behind', async (t) => {
  const { url } = await createEmptyDatabase(t)
  const database = open(t, url)
  await sql`create table sessions (in_the_way text)`.execute(database.db)
  await t.rejects(migrate(database), { code: '42P07' })
  const { rows } = await sql<{ name: string }>`
    select relname as name from pg_class
    where relnamespace = 'public'::regnamespace and relkind = 'r'
  `.execute(database.db)
  t.strictSame(rows, [{ name: 'sessions' }])
  t.equal(await readSchemaState(database), 'missing')
})

function open(test: Test, url: string): Database {
  const database = openDatabase(
    { url: new Secret(url), poolMax: 2, applicationName: 'migrations test' },
    silentLog,
  )
  test.teardown(() => database.close())
  return database
}
