// The connection pool, and what a database error means.
// Every store goes through `throughDatabase`, so that the core only ever hears `temporarily_unavailable`.
// Nothing here or beside it relies on the state of a connection: PgBouncer in transaction mode serves.

import { Kysely, PostgresDialect } from 'kysely'
import type { PostgresPool, PostgresPoolClient } from 'kysely'
import { DatabaseError, Pool, types } from 'pg'
import type { CustomTypesConfig, PoolClient, QueryConfig, QueryResult } from 'pg'

import { BrokerError } from '../errors.ts'
import type { Log } from '../ports.ts'
import type { Secret } from '../secret.ts'
import { preparedNameOf, refusesPrepared } from './prepared.ts'
import type { Tables } from './tables.ts'

export type { Tables } from './tables.ts'

// ── Pool ─────────────────────────────────────────────────────────────────────────────────────────

export interface Database {
  db: Kysely<Tables>
  /** What is asked of it directly, and not through `db`, has no limit in time. */
  pool: Pool
  /** Ends the pool after the statements in flight. May be called more than once. */
  close(): Promise<void>
}

/** The longest a request waits for a connection before it is told `temporarily_unavailable`. */
const CONNECTION_TIMEOUT_MS = 3_000

/** Any statement on a request's way touches a few rows by key: one that takes this long is lost. */
const STATEMENT_LIMIT_MS = 10_000

/** Half an hour: after a failover behind a load balancer no connection stays with the old server for longer. */
const CONNECTION_LIFETIME_SECONDS = 1_800

/**
 * Opens a pool of at most `poolMax` connections; the first one is made by the first statement.
 *
 * `bigint` is read as a number, on this pool alone; one beyond 2^53 is an error, never rounded.
 */
export function openDatabase(
  settings: { url: Secret; poolMax: number; applicationName: string },
  log: Log,
): Database {
  const pool = new Pool({
    connectionString: settings.url.reveal(),
    application_name: settings.applicationName,
    max: settings.poolMax,
    connectionTimeoutMillis: CONNECTION_TIMEOUT_MS,
    idleTimeoutMillis: 30_000,
    maxLifetimeSeconds: CONNECTION_LIFETIME_SECONDS,
    keepAlive: true,
    keepAliveInitialDelayMillis: 10_000,
    // statement_timeout, lock_timeout and idle_in_transaction_session_timeout stay unset: they would be
    // startup parameters, and PgBouncer refuses a connection that sends them. The limit is kept on
    // this side instead, in `ask`. Every statement is its own transaction, so none can sit idle holding a lock.
    types: { getTypeParser: typeParser },
  })
  // A backend lost while idle is reported to the pool, one lost in mid-statement to the client.
  // An 'error' event without a listener would end the process.
  pool.on('error', (error) => log.warn('database_connection_lost', { error }))
  pool.on('connect', (client) => {
    client.on('error', (error) => log.debug('database_client_error', { error }))
  })
  let closing: Promise<void> | undefined
  return {
    db: queriesOver(pool, { limitMs: STATEMENT_LIMIT_MS, log }),
    pool,
    close: () => (closing ??= pool.end()),
  }
}

/** Reads int8 as a number and leaves every other type to pg. */
const typeParser: CustomTypesConfig['getTypeParser'] = (typeId, format) =>
  typeId === types.builtins.INT8 && format !== 'binary'
    ? parseSafeInteger
    : (types.getTypeParser(typeId, format) as unknown)

function parseSafeInteger(text: string): number {
  const value = Number(text)
  if (!Number.isSafeInteger(value)) throw new RangeError('a bigint is beyond the safe integers')
  return value
}

/** Rows that one sweep deletes at most, so that a backlog never makes a long statement. */
export const SWEEP_ROWS_MAX = 1_000

interface QueryParts {
  /** The longest that a statement may take; without it, as long as it takes. */
  limitMs?: number
  log?: Pick<Log, 'info'>
}

/** Returns the query builder over the pool. Ending it is the pool's business. */
export function queriesOver(pool: Pool, parts: QueryParts = {}): Kysely<Tables> {
  return new Kysely<Tables>({ dialect: new PostgresDialect({ pool: lendFrom(pool, parts) }) })
}

/**
 * Lends kysely the pool's connections, and closes one that has failed instead of taking it back:
 * after a timeout its answer may still come, and would hold up whoever borrows it next.
 */
function lendFrom(pool: Pool, { limitMs, log }: QueryParts): PostgresPool {
  let prepares = true
  /** One for each connection: kysely remembers all that it was ever lent. */
  const lent = new WeakMap<PoolClient, PostgresPoolClient>()

  async function send(client: PoolClient, text: string, values: unknown[]) {
    const name = prepares ? preparedNameOf(text) : undefined
    if (name === undefined) return ask(client, { text, values }, limitMs)
    try {
      return await ask(client, { name, text, values }, limitMs)
    } catch (error) {
      if (!refusesPrepared(error)) throw error
      if (prepares) log?.info('prepared_statements_off', { error })
      prepares = false
      return ask(client, { text, values }, limitMs)
    }
  }

  const connect = async (): Promise<PostgresPoolClient> => {
    const client = await pool.connect().catch((error: unknown) => {
      throw error instanceof DatabaseError
        ? error
        : new ConnectionFailure(error, { wasSent: false })
    })
    const known = lent.get(client)
    if (known !== undefined) return known
    const made = lend(client)
    lent.set(client, made)
    return made
  }

  function lend(client: PoolClient): PostgresPoolClient {
    let failed = false
    let lost: ConnectionFailure | undefined
    const query = async (text: string, parameters: readonly unknown[]) => {
      // The rollback that follows would wait as long again.
      if (lost !== undefined) throw lost
      try {
        return await send(client, text, [...parameters])
      } catch (error) {
        // A server that says it is going away closes the connection a moment after; one that says
        // it is read-only was demoted, and only a new connection finds the new primary.
        failed ||= !(error instanceof DatabaseError) || isDatabaseUnavailable(error)
        if (isProgrammerError(error) || error instanceof DatabaseError) throw error
        lost = new ConnectionFailure(error, { wasSent: true })
        throw lost
      }
    }
    return {
      // Kysely's type has a second signature, for cursors, which nobody uses here.
      query: query as unknown as PostgresPoolClient['query'],
      release: (discard) => client.release(failed || discard === true),
    }
  }
  return { connect, end: () => pool.end(), options: pool.options }
}

/**
 * Sends a statement. pg can do both itself, promise an answer and give up on it, but with either the statement and its
 * callback refer to each other, and V8 then keeps the rows of thousands of them until it goes through all memory: to do so
 * again and again was a third of what reading tokens cost.
 */
function ask(
  client: PoolClient,
  config: QueryConfig,
  limitMs: number | undefined,
): Promise<QueryResult> {
  return new Promise((resolve, reject) => {
    const timer =
      limitMs === undefined
        ? undefined
        : setTimeout(() => reject(new Error('the statement took too long')), limitMs)
    try {
      client.query(config, (error: Error | undefined, result: QueryResult) => {
        clearTimeout(timer)
        if (error) reject(error)
        else resolve(result)
      })
    } catch (error) {
      clearTimeout(timer)
      throw error
    }
  })
}

// ── Errors ───────────────────────────────────────────────────────────────────────────────────────

/**
 * A connection that could not be had, or was lost or given up under a statement.
 *
 * pg reports most of these as an `Error` with neither a class nor a code ("timeout exceeded when
 * trying to connect", "Connection terminated unexpectedly"). They are told by where they come out of the driver,
 * because their texts may change with any release.
 */
class ConnectionFailure extends Error {
  /** Whether a statement was on its way. */
  readonly wasSent: boolean

  constructor(cause: unknown, { wasSent }: { wasSent: boolean }) {
    super('the database connection failed', { cause })
    this.name = 'ConnectionFailure'
    this.wasSent = wasSent
  }
}

/** A value that could not be written or read: thrown by this process, whatever the connection. */
function isProgrammerError(error: unknown): boolean {
  return error instanceof TypeError || error instanceof RangeError || error instanceof SyntaxError
}

/** @see {@link https://www.postgresql.org/docs/current/errcodes-appendix.html PostgreSQL, Appendix A} */
const UNAVAILABLE_STATES: ReadonlySet<string> = new Set([
  '25006', // read_only_sql_transaction
  '25P03', // idle_in_transaction_session_timeout
  '40001', // serialization_failure: distributed databases answer so under load or failover
  '40P01', // deadlock_detected
  '55P03', // lock_not_available
  '57014', // query_canceled: a statement_timeout set for the role or by an administrator
  '57P01', // admin_shutdown
  '57P02', // crash_shutdown
  '57P03', // cannot_connect_now
  '57P05', // idle_session_timeout
])

/**
 * Those with which a server has refused a statement, or undone it. The others may also come of one that was carried out:
 * a server that shuts down while a commit waits for its standby has committed all the same, and one whose disk is full
 * (53100) may have written the commit before it stops.
 */
const UNDONE_STATES: ReadonlySet<string> = new Set([
  ...['25006', '40001', '40P01', '53300', '55P03', '57014'],
])

/** Classes 08, connection exception (PgBouncer's own errors too), and 53, insufficient resources. */
const UNAVAILABLE_CLASSES: ReadonlySet<string> = new Set(['08', '53'])

const UNAVAILABLE_ERRNOS: ReadonlySet<string> = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'EAI_AGAIN',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ENOTFOUND',
  'EPIPE',
  'ETIMEDOUT',
])

/** Tells whether the error says that the database cannot serve now, while the same statement may pass later. */
export function isDatabaseUnavailable(error: unknown): boolean {
  if (error instanceof ConnectionFailure) return true
  const code = codeOf(error)
  if (code === undefined) return false
  if (!(error instanceof DatabaseError)) return UNAVAILABLE_ERRNOS.has(code)
  return UNAVAILABLE_STATES.has(code) || UNAVAILABLE_CLASSES.has(code.slice(0, 2))
}

/** Tells of an error of an absent database whether the statement surely was not, and will not be, carried out. */
function isUndone(error: unknown): boolean {
  if (error instanceof ConnectionFailure) return !error.wasSent
  return error instanceof DatabaseError && UNDONE_STATES.has(error.code ?? '')
}

/** Tells whether the statement met a row that is already there (SQLSTATE 23505). */
export function isUniqueViolation(error: unknown): boolean {
  return error instanceof DatabaseError && error.code === '23505'
}

function codeOf(error: unknown): string | undefined {
  if (!(error instanceof Error) || !('code' in error)) return undefined
  return typeof error.code === 'string' ? error.code : undefined
}

/** A restart of PostgreSQL takes a second or two; a failover a little longer. */
const RETRY_AFTER_SECONDS = 2

/**
 * Runs database work and tells the core of an absent database in its own words.
 * Whether a statement that failed so was applied is not known, but where the error says that it was not.
 *
 * @throws BrokerError `temporarily_unavailable`, with the driver's error as its cause
 */
export async function throughDatabase<T>(work: () => Promise<T>): Promise<T> {
  try {
    return await work()
  } catch (error) {
    if (!isDatabaseUnavailable(error)) throw error
    throw new BrokerError(
      'temporarily_unavailable',
      'The database cannot be reached at the moment. Nothing is lost; try again shortly.',
      { retryAfterSeconds: RETRY_AFTER_SECONDS },
      { cause: error, isUnwritten: isUndone(error) },
    )
  }
}
