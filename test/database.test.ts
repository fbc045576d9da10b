// The pool: what it makes of values, of lost connections and of an absent server.

import { createServer } from 'node:net'
import type { AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'

import { sql } from 'kysely'
import type { Pool } from 'pg'
import t from 'tap'
import type { Test } from 'tap'

import { BrokerError, isUnwritten } from '../src/errors.ts'
import type { UserKey } from '../src/grant.ts'
import {
  isDatabaseUnavailable,
  isUniqueViolation,
  openDatabase,
  queriesOver,
  throughDatabase,
} from '../src/postgres/database.ts'
import type { Database } from '../src/postgres/database.ts'
import { createGrantStore } from '../src/postgres/grant-store.ts'
import { Secret } from '../src/secret.ts'
import { createTestDatabase, silentLog } from './support/database.ts'
import { keepingLog } from './support/keeping-log.ts'

t.test('bigint is read as a number, and refused beyond what a number can hold', async (t) => {
  const { database } = await createTestDatabase(t)
  const read = (text: string) =>
    sql<{ n: number }>`select ${sql.lit(text)}::bigint as n`.execute(database.db)
  t.strictSame((await read('9007199254740991')).rows, [{ n: 9007199254740991 }])
  t.strictSame((await read('-9007199254740991')).rows, [{ n: -9007199254740991 }])
  await t.rejects(read('9007199254740992'), RangeError)
  t.strictSame((await read('1')).rows, [{ n: 1 }], 'the connection is still of use')
})

t.test('a statement that is to be prepared is parsed once for a connection', async (t) => {
  const { url } = await createTestDatabase(t)
  const { database, grants, log } = await openOne(t, url)
  for (let i = 0; i < 10; i += 1) t.equal(await grants.find(NOBODY), undefined)
  const { rows } = await database.pool.query(
    `select generic_plans + custom_plans as runs, generic_plans > 0 as planned_once
     from pg_prepared_statements`,
  )
  t.strictSame(rows, [{ runs: 10, planned_once: true }])
  t.strictSame(log.events, [])
})

t.test('what is refused for having been prepared is sent as any other from then on', async (t) => {
  for (const [what, disturb] of [
    ['it was prepared on another connection', (pool: Pool) => pool.query('deallocate all')],
    [
      'somebody else has prepared it on this one',
      async (pool: Pool, name: string) => {
        // The driver takes it for one that is still to be prepared.
        const client = await pool.connect()
        ;(client as unknown as Prepares).connection.parsedStatements = {}
        client.release()
        t.match(name, /^broker_/)
      },
    ],
    [
      'what it returns has changed',
      (pool: Pool) => pool.query('alter table grants alter column scope type varchar'),
    ],
  ] as const) {
    const { url } = await createTestDatabase(t)
    const { database, grants, log } = await openOne(t, url)
    await grants.find(NOBODY)
    const { rows } = await database.pool.query('select name from pg_prepared_statements')
    await disturb(database.pool, String(rows[0]?.name))
    t.equal(await grants.find(NOBODY), undefined, what)
    t.match(log.events, [{ level: 'info', event: 'prepared_statements_off' }])
    log.events.length = 0
    await grants.findMany([NOBODY])
    t.strictSame(log.events, [], 'and it is told once')
    const after = await database.pool.query('select count(*)::int as n from pg_prepared_statements')
    t.ok(after.rows[0]?.n <= 1, 'nothing more is prepared')
  }
})

t.test(
  'backends that are killed in mid-statement, in mid-transaction and while idle',
  async (t) => {
    const { database } = await createTestDatabase(t)
    const { db } = database
    const killOthers = sql<{ killed: number }>`
    select count(pg_terminate_backend(pid)) as killed from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()`

    const inStatement = throughDatabase(() => sql`select pg_sleep(20)`.execute(db))
    const inTransaction = throughDatabase(() =>
      db.transaction().execute(async (transaction) => {
        await sql`select 1`.execute(transaction)
        await sql`select pg_sleep(20)`.execute(transaction)
      }),
    )
    const outcomes = Promise.allSettled([inStatement, inTransaction])
    await waitUntil(async () => {
      const { rows } = await sql<{ n: number }>`
      select count(*) as n from pg_stat_activity
      where datname = current_database() and query like '%pg_sleep(20)%' and state = 'active'
        and pid <> pg_backend_pid()`.execute(db)
      return rows[0]?.n === 2
    })
    t.strictSame((await killOthers.execute(db)).rows, [{ killed: 2 }])
    for (const outcome of await outcomes) {
      t.match(outcome, {
        status: 'rejected',
        reason: { code: 'temporarily_unavailable', isUnwritten: false },
      })
    }

    // One kills itself while another lies idle in the pool.
    await Promise.all([
      sql`select pg_sleep(0.05)`.execute(db),
      sql`select pg_sleep(0.05)`.execute(db),
    ])
    await killOthers.execute(db)
    await waitUntil(async () => database.pool.totalCount === 1)
    t.strictSame((await sql`select 1 as alive`.execute(db)).rows, [{ alive: 1 }])
  },
)

t.test(
  'a server that is not there is temporarily unavailable, and says when to try again',
  async (t) => {
    const port = await closedPort()
    const database = open(t, `postgres://nobody:secret-password@127.0.0.1:${port}/none`)
    const error = await outcomeOf(database)
    t.match(error, { code: 'temporarily_unavailable', extensions: { retryAfterSeconds: 2 } })
    t.equal(isUnwritten(error), true, 'nothing was sent')
    t.ok(error.cause instanceof Error)
    t.notMatch(`${error.message} ${error.detail}`, /secret-password|127\.0\.0\.1/)
  },
)

t.test(
  'a server that accepts and says nothing is given up, though the driver has no code for it',
  async (t) => {
    const server = createServer((socket) => socket.on('error', () => {}).resume())
    await new Promise<void>((done) => server.listen(0, '127.0.0.1', done))
    t.teardown(() => new Promise((done) => server.close(done)))
    const { port } = server.address() as AddressInfo
    const database = open(t, `postgres://nobody@127.0.0.1:${port}/none`)
    const startedAt = performance.now()
    t.match(await outcomeOf(database), { code: 'temporarily_unavailable' })
    t.ok(performance.now() - startedAt < 5_000, 'within the connection timeout')
  },
)

t.test('a pool without a free connection is temporarily unavailable', async (t) => {
  const { url } = await createTestDatabase(t)
  const database = open(t, url, 1)
  const held = await database.pool.connect()
  t.match(await outcomeOf(database), { code: 'temporarily_unavailable', isUnwritten: true })
  held.release()
  await database.db.selectFrom('grants').selectAll().execute()
})

t.test(
  'a statement beyond its limit is given up, and its connection with it; its end comes to nobody',
  async (t) => {
    const { database } = await createTestDatabase(t)
    const db = queriesOver(database.pool, { limitMs: 300 })
    const backend = async () => {
      const { rows } = await sql<{ id: number }>`select pg_backend_pid() as id`.execute(db)
      return rows[0]?.id
    }
    const first = await backend()
    t.equal(await backend(), first, 'otherwise it is used again')
    const givenUp = throughDatabase(() => sql`select pg_sleep(1)`.execute(db))
    await t.rejects(givenUp, { code: 'temporarily_unavailable', isUnwritten: false })
    t.equal(database.pool.totalCount, 0, 'closed')
    t.not(await backend(), first)
    // It ends while another connection serves.
    await sql`select pg_sleep(0.2)`.execute(db)
    const [late, next] = await Promise.allSettled([
      throughDatabase(() => sql`select pg_sleep(1)`.execute(db)),
      throughDatabase(backend),
    ])
    t.match([late.status, next.status], ['rejected', 'fulfilled'])
    await delay(1_000)
    t.type(await backend(), 'number')
  },
)

t.test(
  'a transaction whose statement took too long is given up without another wait',
  async (t) => {
    const { database } = await createTestDatabase(t)
    const limitMs = 1_000
    const db = queriesOver(database.pool, { limitMs })
    let startedMs = Infinity
    const givenUp = throughDatabase(() =>
      db.transaction().execute(async (transaction) => {
        await sql`create table half_done ()`.execute(transaction)
        startedMs = performance.now()
        await sql`select pg_sleep(3)`.execute(transaction)
      }),
    )
    await t.rejects(givenUp, { code: 'temporarily_unavailable', isUnwritten: false })
    const tookMs = performance.now() - startedMs
    t.ok(tookMs >= limitMs - 1 && tookMs < 1.9 * limitMs, `${Math.round(tookMs)} ms`)
    t.equal(database.pool.totalCount, 0, 'its connection is closed')
    const { rows } = await sql`select to_regclass('half_done') as found`.execute(db)
    t.same(rows, [{ found: null }])
  },
)

t.test('a connection that was demoted to read-only is not used again', async (t) => {
  const { url } = await createTestDatabase(t)
  const database = open(t, url, 1)
  await sql`set default_transaction_read_only = on`.execute(database.db)
  const write = () =>
    throughDatabase(() =>
      database.db
        .insertInto('replicas')
        .values({ name: 'a', boot: '00000000-0000-4000-8000-000000000000' })
        .execute(),
    )
  await t.rejects(write(), { code: 'temporarily_unavailable', isUnwritten: true })
  await t.resolves(write())
})

t.test('a mistake of ours is no outage', async (t) => {
  const { database } = await createTestDatabase(t)
  const { db } = database
  await t.rejects(
    throughDatabase(() => sql`select * from not_a_table`.execute(db)),
    { code: '42P01' },
  )
  const twice = () => sql`insert into deployment default values`.execute(db)
  const violation = await twice().catch((error: unknown) => error)
  t.ok(isUniqueViolation(violation))
  t.notOk(isDatabaseUnavailable(violation))
  t.notOk(isUniqueViolation(new Error('23505')))
  t.notOk(isDatabaseUnavailable(new Error('timeout exceeded when trying to connect')))
})

t.test('every SQLSTATE of an outage is told as one', async (t) => {
  const { database } = await createTestDatabase(t)
  const states = [
    ...['08006', '08P01', '25006', '40001', '40P01', '53100', '53200', '53300', '55P03'],
    ...['57014', '57P01', '57P03'],
  ]
  const undone = new Set(['25006', '40001', '40P01', '53300', '55P03', '57014'])
  for (const state of states) {
    const raised = sql`do ${sql.lit(`begin raise exception using errcode = '${state}'; end`)}`
    const error = await raised.execute(database.db).catch((caught: unknown) => caught)
    t.match(error, { code: state })
    t.ok(isDatabaseUnavailable(error), state)
    const told = await throughDatabase(() => Promise.reject(error)).catch((caught) => caught)
    t.equal(isUnwritten(told), undone.has(state), state)
  }
})

t.test('nothing that PgBouncer would refuse is sent when connecting', async (t) => {
  const { database } = await createTestDatabase(t)
  const client = await database.pool.connect()
  const { rows } = await client.query(
    `select name from pg_settings where source = 'client' order by name`,
  )
  client.release()
  // These are among the parameters that PgBouncer tracks itself.
  t.strictSame(rows, [{ name: 'application_name' }, { name: 'client_encoding' }])
})

t.test('a pool may be closed twice, and before it was ever used', async (t) => {
  const database = openDatabase(
    { url: new Secret('postgres://127.0.0.1:1/none'), poolMax: 1, applicationName: 'test' },
    silentLog,
  )
  await database.close()
  await t.resolves(database.close())
})

function open(test: Test, url: string, poolMax = 2): Database {
  const database = openDatabase(
    { url: new Secret(url), poolMax, applicationName: 'test' },
    silentLog,
  )
  test.teardown(() => database.close())
  return database
}

/** What the core hears of a statement that cannot be served. */
async function outcomeOf(database: Database): Promise<BrokerError> {
  try {
    await throughDatabase(() => sql`select 1`.execute(database.db))
  } catch (error) {
    if (error instanceof BrokerError) return error
    throw error
  }
  throw new Error('the statement was served')
}

async function closedPort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done))
  const { port } = server.address() as AddressInfo
  await new Promise((done) => server.close(done))
  return port
}

async function waitUntil(condition: () => Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise((done) => setTimeout(done, 10))
}

const NOBODY = 'nobody' as UserKey
const SETTINGS = {
  refreshTokenLifetime: 'P3Y',
  heartbeatStaleSeconds: 20,
  zombieWaitSeconds: 600,
  databaseSettleSeconds: 15,
}

/** Where the driver keeps what it has prepared on a connection. */
interface Prepares {
  connection: { parsedStatements: Record<string, string> }
}

/** A database on one connection, and the store of grants over it. */
async function openOne(t: Test, url: string) {
  const log = keepingLog()
  const database = openDatabase({ url: new Secret(url), poolMax: 1, applicationName: 'test' }, log)
  t.teardown(() => database.close())
  return { database, grants: createGrantStore(database, SETTINGS), log }
}
