// One PostgreSQL server for a run of the tests, one database for a test: a clone of the migrated template.
// Under tap the server is started by before.ts and stopped by after.ts; a test file that is run alone
// (`node test/x.test.ts`) starts one for itself. Data is kept under the system's folder for temporary files.

import { randomBytes } from 'node:crypto'
import { readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'

import { Client, DatabaseError } from 'pg'
import t from 'tap'
import type { Test } from 'tap'

import { openDatabase } from '../../src/postgres/database.ts'
import type { Database } from '../../src/postgres/database.ts'
import { startEmbeddedPostgres } from '../../src/postgres/embedded.ts'
import type { EmbeddedPostgres } from '../../src/postgres/embedded.ts'
import { migrate } from '../../src/postgres/migrate.ts'
import { Secret } from '../../src/secret.ts'
import { silentLog } from './silent-log.ts'

const FOLDER_PREFIX = 'pagero-token-broker-test-'
const TEMPLATE = 'broker_template'

export { silentLog }

/**
 * Clones the migrated template for this test. The pool is closed and the database dropped at the
 * test's teardown, whoever is still connected.
 */
export async function createTestDatabase(test: Test): Promise<{ url: string; database: Database }> {
  const server = await serverUrl()
  const name = `test_${randomBytes(8).toString('hex')}`
  await cloneTemplate(server, name)
  const url = urlOf(server, name)
  const database = openDatabase(
    { url: new Secret(url), poolMax: 8, applicationName: 'broker test' },
    silentLog,
  )
  test.teardown(async () => {
    await database.close()
    await query(server, `drop database ${name} with (force)`)
  })
  return { url, database }
}

/** Makes an empty database for this test, without the schema; dropped at its teardown. */
export async function createEmptyDatabase(test: Test): Promise<{ url: string }> {
  const server = await serverUrl()
  const name = `test_${randomBytes(8).toString('hex')}`
  await query(server, `create database ${name}`)
  test.teardown(() => query(server, `drop database ${name} with (force)`))
  return { url: urlOf(server, name) }
}

async function cloneTemplate(server: string, name: string): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await query(server, `create database ${name} template ${TEMPLATE}`)
    } catch (error) {
      // object_in_use: another test is cloning at this moment.
      if (!(error instanceof DatabaseError) || error.code !== '55006' || attempt === 100)
        throw error
      await delay(20)
    }
  }
}

async function query(url: string, statement: string): Promise<void> {
  const client = new Client({ connectionString: url })
  client.on('error', () => {})
  await client.connect()
  try {
    await client.query(statement)
  } finally {
    await client.end()
  }
}

function urlOf(server: string, name: string): string {
  const url = new URL(server)
  url.pathname = `/${name}`
  return url.href
}

// ── The server of a run ──────────────────────────────────────────────────────────────────────────

/** Folder of the run that the process belongs to: tap's id, which hooks and test files have as their parent. */
function folderOf(runId: number): string {
  return join(tmpdir(), `${FOLDER_PREFIX}${runId}`)
}

/** Starts the server of a run with its template, and writes down where it is. */
export async function startServer(
  runId: number,
): Promise<{ url: string; server: EmbeddedPostgres }> {
  await removeLeftovers()
  const directory = folderOf(runId)
  const server = await startEmbeddedPostgres({ directory, durable: false })
  await query(server.url, `create database ${TEMPLATE}`)
  const template = openDatabase(
    { url: new Secret(urlOf(server.url, TEMPLATE)), poolMax: 1, applicationName: 'broker test' },
    silentLog,
  )
  await migrate(template)
  await template.close()
  await writeFile(join(directory, 'url'), server.url, { mode: 0o600 })
  return { url: server.url, server }
}

/** Stops the server of a run, whoever started it, and removes its data. */
export async function removeServer(runId: number): Promise<void> {
  const directory = folderOf(runId)
  const server = await startEmbeddedPostgres({ directory, durable: false })
  await server.stop()
  await rm(directory, { recursive: true, force: true })
}

/** A run that was killed leaves its server behind; the next run ends it. */
async function removeLeftovers(): Promise<void> {
  for (const name of await readdir(tmpdir())) {
    const runId = name.startsWith(FOLDER_PREFIX) ? Number(name.slice(FOLDER_PREFIX.length)) : NaN
    // A folder that another run removes at the same time is no concern of this one.
    if (Number.isInteger(runId) && !isAlive(runId)) await removeServer(runId).catch(() => {})
  }
}

function isAlive(processId: number): boolean {
  try {
    process.kill(processId, 0)
    return true
  } catch {
    return false
  }
}

let ownServer: Promise<string> | undefined

async function serverUrl(): Promise<string> {
  const known = await readFile(join(folderOf(process.ppid), 'url'), 'utf8').catch(() => undefined)
  return known ?? (ownServer ??= startOwnServer())
}

async function startOwnServer(): Promise<string> {
  const { url } = await startServer(process.pid)
  t.teardown(() => removeServer(process.pid))
  return url
}
