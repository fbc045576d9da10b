// A PostgreSQL server of one test file alone, durable as in production, for what a shared one cannot bear: to be
// stopped without warning, to be made read-only. Its port changes with each start; a fault proxy is aimed anew.

import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { Client } from 'pg'
import type { Test } from 'tap'
import { openDatabase } from '../../src/postgres/database.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/postgres/embedded.ts'
import { migrate } from '../../src/postgres/migrate.ts'
import { Secret } from '../../src/secret.ts'
import { until } from './fleet.ts'
import { silentLog } from './silent-log.ts'

export interface OwnPostgres {
  /** Superuser's URL of the migrated database, at the present port. */
  url(): string
  port(): number
  /** Ends the server at once, as `pg_ctl stop -m immediate` does: no checkpoint, no goodbye. */
  stopImmediately(): Promise<void>
  /** Starts it again on the same data. */
  start(): Promise<void>
  remove(): Promise<void>
}

/** Starts a server with a migrated database; removed with the test, if one is given. */
export async function startOwnPostgres(test?: Test): Promise<OwnPostgres> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-own-postgres-'))
  let server: EmbeddedPostgres = await startEmbeddedPostgres({ directory, durable: true })
  const database = openDatabase(
    { url: new Secret(server.url), poolMax: 1, applicationName: 'broker test' },
    silentLog,
  )
  await migrate(database)
  // Where root starts it, the data is kept elsewhere, by another user.
  const { rows } = await database.pool.query<{ place: string }>(
    "select current_setting('data_directory') as place",
  )
  const place = dirname(rows[0]?.place ?? join(directory, 'cluster'))
  await database.close()

  async function processId(): Promise<number> {
    const client = new Client({ connectionString: server.url })
    await client.connect()
    const answer = await client.query<{ file: string }>(
      "select pg_read_file('postmaster.pid') as file",
    )
    await client.end()
    return Number(answer.rows[0]?.file.split('\n')[0])
  }

  const own: OwnPostgres = {
    url: () => server.url,
    port: () => Number(new URL(server.url).port),
    async stopImmediately() {
      const id = await processId()
      // The signal of an immediate stop.
      process.kill(id, 'SIGQUIT')
      await until(async () => !(await isRunning(id)), 20_000, 'the end of the server')
    },
    async start() {
      server = await startEmbeddedPostgres({ directory, durable: true })
    },
    async remove() {
      await server.stop()
      await rm(place, { recursive: true, force: true })
      await rm(directory, { recursive: true, force: true })
    },
  }
  test?.teardown(() => own.remove())
  return own
}

/** A process that nobody has waited for is gone too. */
async function isRunning(id: number): Promise<boolean> {
  const state = await readFile(`/proc/${id}/stat`, 'utf8').catch(() => '')
  if (state !== '') return !/^\d+ \(.*\) Z /.test(state)
  try {
    process.kill(id, 0)
    return process.platform !== 'linux'
  } catch {
    return false
  }
}
