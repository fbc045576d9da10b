// Databases with as many grants as a measure wants. Users that are asked for have tokens really sealed; the rows around
// them have no access token, because a million of those take longer to make than all that is measured.

import { randomBytes, randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fingerprintOf, grantSealContext, type UserKey } from '../../src/grant.ts'
import { hashOpaqueToken } from '../../src/opaque-token.ts'
import type { Log } from '../../src/ports.ts'
import { type Database, openDatabase } from '../../src/postgres/database.ts'
import { readDeploymentId } from '../../src/postgres/deployment.ts'
import { startEmbeddedPostgres } from '../../src/postgres/embedded.ts'
import { migrate } from '../../src/postgres/migrate.ts'
import { createSessionStore } from '../../src/postgres/session-store.ts'
import { createSealer } from '../../src/seal.ts'
import { Secret } from '../../src/secret.ts'

/** Characters of an access token, as of a JWT with a handful of claims. */
export const TOKEN_CHARACTERS = 900
/** As of Pagero's example, about. */
const REFRESH_CHARACTERS = 60
const REFRESH_SEALED_BYTES = 100
const ROWS_AT_ONCE = 2_000
/** So many that no statement comes near the pool's limit of 10 s. */
const FILLER_AT_ONCE = 50_000

const silentLog: Log = { trace() {}, debug() {}, info() {}, warn() {}, error() {} }

/** The key that every database of a run is sealed with. */
export const encryptionKey = { keyId: 'bench', key: randomBytes(32) }

/** Starts a PostgreSQL that keeps what it commits, for as long as the measure takes. Returns its URL. */
export async function startPostgres(
  directory: string,
  stops: Array<() => Promise<unknown>>,
): Promise<string> {
  const postgres = await startEmbeddedPostgres({
    directory: join(directory, 'postgres'),
    durable: true,
  })
  stops.push(() => postgres.stop())
  return postgres.url
}

/** Creates a database with the broker's schema in the server, and lets `fill` fill it. */
export async function createDatabase(
  server: string,
  name: string,
  fill: (database: Database) => Promise<void>,
): Promise<string> {
  const url = new URL(server)
  await using(server, (database) => database.pool.query(`create database ${name}`))
  url.pathname = `/${name}`
  await using(url.href, async (database) => {
    await migrate(database)
    await fill(database)
    await database.pool.query('vacuum analyze grants')
    await database.pool.query('checkpoint')
  })
  return url.href
}

/** Lends a connection for as long as `work` takes. */
export async function using<T>(url: string, work: (database: Database) => Promise<T>): Promise<T> {
  const database = openDatabase(
    { url: new Secret(url), poolMax: 1, applicationName: 'bench' },
    silentLog,
  )
  try {
    return await work(database)
  } finally {
    await database.close()
  }
}

function userOf(number: number): UserKey {
  return `user-${String(number).padStart(7, '0')}` as UserKey
}

/** Adds users 0 to `count` - 1: with an access token that lives for an hour, or with one that must be refreshed first. */
export async function addUsers(
  database: Database,
  count: number,
  kind: 'fresh' | 'expired',
): Promise<void> {
  const sealer = createSealer([encryptionKey], await readDeploymentId(database))
  for (let from = 0; from < count; from += ROWS_AT_ONCE) {
    const places = Array.from({ length: Math.min(ROWS_AT_ONCE, count - from) }, (_, index) => ({
      user: userOf(from + index),
      loginId: randomUUID(),
      generation: 1,
    }))
    const tokens = places.map(() =>
      randomBytes(TOKEN_CHARACTERS).toString('base64url').slice(0, TOKEN_CHARACTERS),
    )
    const sealAll = (column: 'access_token_sealed' | 'refresh_token_sealed', length: number) =>
      places.map((place, index) =>
        sealer.seal(grantSealContext(column, place), tokens[index]?.slice(0, length) ?? ''),
      )
    const isFresh = kind === 'fresh'
    await database.pool.query(
      `insert into grants (user_id, login_id, generation, refresh_token_sealed, key_id,
        access_token_sealed, access_token_requested_at, access_token_expires_at,
        access_token_fingerprint, authenticated_at, rotated_at, rolling_expires_at, absolute_expires_at)
      select user_id, login_id, 1, refresh_token, 'bench', access_token,
        case when access_token is not null then now() end,
        case when access_token is not null then now() + interval '1 hour' end,
        fingerprint, now(), now(), now() + interval '3 years', now() + interval '3 years'
      from unnest($1::text[], $2::uuid[], $3::bytea[], $4::bytea[], $5::text[])
        as t (user_id, login_id, refresh_token, access_token, fingerprint)`,
      [
        places.map(({ user }) => user),
        places.map(({ loginId }) => loginId),
        sealAll('refresh_token_sealed', REFRESH_CHARACTERS),
        isFresh ? sealAll('access_token_sealed', TOKEN_CHARACTERS) : places.map(() => null),
        tokens.map((token) => (isFresh ? fingerprintOf(token) : null)),
      ],
    )
  }
}

/** What the cookie of a user's session holds: as many characters as the broker's own have, the user's seven digits last. */
export function sessionTokenOf(digits: string): string {
  return `${'s'.repeat(36)}${digits}`
}

/** Begins a session for each of users 0 to `count` - 1. */
export async function addSessions({ db }: Database, count: number): Promise<void> {
  const sessions = createSessionStore(db)
  for (let number = 0; number < count; number += 1) {
    const user = userOf(number)
    await sessions.create(
      hashOpaqueToken(sessionTokenOf(user.slice(-7))),
      user,
      { idleSeconds: 3_600, absoluteSeconds: 43_200 },
      { replaces: null, perUserMax: 1 },
    )
  }
}

/** Adds rows that nobody asks for and no key opens, evenly between those of the first `users` users. */
export async function addFiller({ pool }: Database, count: number, users: number): Promise<void> {
  for (let from = 0; from < count; from += FILLER_AT_ONCE) {
    await pool.query(
      `insert into grants (user_id, login_id, generation, refresh_token_sealed,
        authenticated_at, rotated_at, rolling_expires_at, absolute_expires_at)
      select 'user-' || lpad((i % $3)::text, 7, '0') || '~' || i, gen_random_uuid(), 1, $4,
        now(), now(), now() + interval '3 years', now() + interval '3 years'
      from generate_series($1::int, $2::int) i`,
      [from, Math.min(from + FILLER_AT_ONCE, count) - 1, users, randomBytes(REFRESH_SEALED_BYTES)],
    )
  }
}

/** Process id of the server, so that it can be bound to a CPU. */
export async function postmasterOf(url: string): Promise<number> {
  const { rows } = await using(url, ({ pool }) =>
    pool.query<{ data_directory: string }>('show data_directory'),
  )
  const text = await readFile(join(rows[0]?.data_directory ?? '', 'postmaster.pid'), 'utf8')
  return Number(text.split('\n')[0])
}
