// pgbench with the two statements of a refresh, arm and store, as the broker sends them: they are caught on their way
// to the server, so that they cannot differ. Where pgbench is missing, a loop in Node sends them.

import { execFile } from 'node:child_process'
import { randomBytes, randomUUID } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { promisify } from 'node:util'
import { Kysely, PostgresDialect } from 'kysely'
import { Pool } from 'pg'
import type { UserKey } from '../../src/grant.ts'
import type { Database, Tables } from '../../src/postgres/database.ts'
import { createGrantStore } from '../../src/postgres/grant-store.ts'
import { createReplicaStore } from '../../src/postgres/replica-store.ts'
import { TOKEN_CHARACTERS } from './grants.ts'
import { has, placed } from './processes.ts'

const CLIENTS = 10
const LOGIN_ID = randomUUID()
const SEALED_REFRESH = randomBytes(100)

export const refreshPeer = has('pgbench') ? 'pgbench' : 'a loop in Node (pgbench is not installed)'

/** Adds the rows that `measureTwoStatements` spends: for each client as many as it refreshes in all rounds. */
export async function addPgbenchRows({ pool }: Database, perClient: number): Promise<void> {
  await pool.query(
    `insert into grants (user_id, login_id, generation, refresh_token_sealed,
      authenticated_at, rotated_at, rolling_expires_at, absolute_expires_at)
    select 'pgbench-' || c || '-' || i, $1, 1, $2, now(), now(), now() + interval '3 years',
      now() + interval '3 years'
    from generate_series(0, ${CLIENTS - 1}) c, generate_series(0, $3::int) i`,
    [LOGIN_ID, SEALED_REFRESH, perClient],
  )
}

interface Statement {
  sql: string
  parameters: readonly unknown[]
}

/** Stand in for what differs from one refresh to the next. */
const USER = 'pgbench-user' as UserKey
const ATTEMPT_ID = '00000000-0000-0000-0000-000000000000'

/** The two statements, as the store of grants makes them. */
async function catchStatements(url: string): Promise<Statement[]> {
  const caught: Statement[] = []
  const db = new Kysely<Tables>({
    dialect: new PostgresDialect({ pool: new Pool({ connectionString: url, max: 1 }) }),
    log: ({ query: { sql, parameters } }) => void caught.push({ sql, parameters }),
  })
  // Nobody arms on a database server that no heartbeat has met.
  await createReplicaStore(db).heartbeat('bench', randomUUID())
  caught.length = 0
  const grants = createGrantStore(
    { db },
    {
      refreshTokenLifetime: 'P3Y',
      heartbeatStaleSeconds: 20,
      zombieWaitSeconds: 600,
      databaseSettleSeconds: 15,
    },
  )
  const place = { user: USER, loginId: LOGIN_ID, attemptId: ATTEMPT_ID }
  await grants.arm({
    ...place,
    generation: 1,
    tokenDigest: randomBytes(32),
    cause: 'expiry',
    replica: 'bench',
    boot: randomUUID(),
    leaseSeconds: 60,
  })
  await grants.store({
    ...place,
    generation: 2,
    refreshTokenSealed: SEALED_REFRESH,
    keyId: 'bench',
    accessToken: {
      sealed: randomBytes(TOKEN_CHARACTERS + 32),
      requestedAt: new Date(),
      expiresAt: new Date(Date.now() + 600_000),
      fingerprint: 'f'.repeat(43),
    },
    scope: '',
    httpStatus: 200,
    durationMs: 1,
  })
  await db.destroy()
  return caught
}

/**
 * Refreshes `count` rows of each client, from the row `first` on, with durable commits as the server is set.
 * Returns refreshes a second.
 */
export async function measureTwoStatements(
  url: string,
  script: string,
  { first, count }: { first: number; count: number },
): Promise<number> {
  const statements = await catchStatements(url)
  if (!has('pgbench')) return measureInNode(url, statements, { first, count })
  const lines = statements.map((statement) => inPgbench(statement))
  await writeFile(script, ['\\set i :i + 1', ...lines].join('\n'))
  const [program, ...parameters] = placed('measured', [
    'pgbench',
    '--no-vacuum',
    '--protocol=prepared',
    `--client=${CLIENTS}`,
    `--transactions=${count}`,
    `--define=i=${first - 1}`,
    `--file=${script}`,
    url,
  ])
  const { stdout } = await promisify(execFile)(program, parameters)
  const rate = /tps = ([\d.]+) \(without/.exec(stdout)?.[1]
  if (rate === undefined) throw new Error(`pgbench said:\n${stdout}`)
  return Number(rate)
}

/** The statement with its parameters as literals, and with pgbench's variables where they differ. */
function inPgbench({ sql, parameters }: Statement): string {
  const literals = parameters.map((value) => {
    if (value === USER) return `('pgbench-' || :client_id::text || '-' || :i::text)`
    if (value === ATTEMPT_ID)
      return `lpad(to_hex(:client_id::bigint * 1000000 + :i), 32, '0')::uuid`
    if (value === null) return 'null'
    if (typeof value === 'number') return String(value)
    if (Buffer.isBuffer(value)) return `'\\x${value.toString('hex')}'::bytea`
    if (value instanceof Date) return `'${value.toISOString()}'::timestamptz`
    if (typeof value === 'string') return `'${value.replaceAll("'", "''")}'`
    throw new TypeError('A parameter is of a kind that has no literal here.')
  })
  const text = sql.replaceAll(/\$(\d+)/g, (_, place: string) => literals[Number(place) - 1] ?? '')
  return `${text.replaceAll(/\s+/g, ' ')};`
}

async function measureInNode(
  url: string,
  statements: readonly Statement[],
  { first, count }: { first: number; count: number },
): Promise<number> {
  const pool = new Pool({ connectionString: url, max: CLIENTS })
  const startedMs = performance.now()
  const refreshAll = async (client: number) => {
    for (let i = first; i < first + count; i += 1) {
      const attemptId = randomUUID()
      for (const [index, { sql, parameters }] of statements.entries()) {
        const values = parameters.map((value) => {
          if (value === USER) return `pgbench-${client}-${i}`
          return value === ATTEMPT_ID ? attemptId : value
        })
        await pool.query({ name: `statement-${index}`, text: sql, values })
      }
    }
  }
  await Promise.all(Array.from({ length: CLIENTS }, (_, client) => refreshAll(client)))
  const seconds = (performance.now() - startedMs) / 1000
  await pool.end()
  return (CLIENTS * count) / seconds
}
