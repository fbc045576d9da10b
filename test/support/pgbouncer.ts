// PgBouncer in transaction mode before a test's PostgreSQL, where it is installed: no session outlives a transaction.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { Client } from 'pg'
import type { Test } from 'tap'
import { freePorts } from './free-ports.ts'

const PROGRAM = '/usr/sbin/pgbouncer'
/** It will not run as root; this user exists everywhere. */
const UNPRIVILEGED = 'nobody'
const START_LIMIT_MS = 10_000

export const hasPgBouncer = existsSync(PROGRAM)

export interface PgBouncer {
  url: string
  /** Ends it and all its connections at once, and starts it again on the same port. */
  restart(): Promise<void>
}

/** Starts PgBouncer before the server of a database URL; it ends with the test. It follows no prepared statements. */
export async function startPgBouncer(test: Test, url: string): Promise<PgBouncer> {
  const target = new URL(url)
  const name = target.pathname.slice(1)
  const [port = 0] = await freePorts(1)
  const directory = await mkdtemp(join(tmpdir(), 'broker-pgbouncer-'))
  const settings = join(directory, 'pgbouncer.ini')
  const login = `user=${target.username} password=${decodeURIComponent(target.password)}`
  await writeFile(
    settings,
    [
      '[databases]',
      `${name} = host=127.0.0.1 port=${target.port} dbname=${name} ${login}`,
      '[pgbouncer]',
      'listen_addr = 127.0.0.1',
      `listen_port = ${port}`,
      'unix_socket_dir =',
      'auth_type = any',
      'pool_mode = transaction',
      'default_pool_size = 5',
      // Before 1.21 it does not know of them, nor of the setting.
      ...(versionOf(PROGRAM) < 1.021 ? [] : ['max_prepared_statements = 0']),
      '',
    ].join('\n'),
  )
  await chmod(directory, 0o755)
  const isRoot = process.getuid?.() === 0
  let child: ChildProcess | undefined
  const through = new URL(url)
  through.port = String(port)

  async function start(): Promise<void> {
    const user = isRoot ? ['-u', UNPRIVILEGED] : []
    child = spawn(PROGRAM, ['-q', ...user, settings], { stdio: 'ignore' })
    const startedAtMs = performance.now()
    while (!(await answers(through.href))) {
      if (performance.now() - startedAtMs > START_LIMIT_MS) throw new Error('PgBouncer is silent.')
      await delay(50)
    }
  }

  async function stop(): Promise<void> {
    if (child === undefined) return
    const gone = once(child, 'close')
    child.kill('SIGKILL')
    await gone
  }

  await start()
  test.teardown(async () => {
    await stop()
    await rm(directory, { recursive: true, force: true })
  })
  return {
    url: through.href,
    async restart() {
      await stop()
      await start()
    },
  }
}

async function answers(url: string): Promise<boolean> {
  const client = new Client({ connectionString: url, connectionTimeoutMillis: 1_000 })
  client.on('error', () => {})
  try {
    await client.connect()
    await client.query('select 1')
    return true
  } catch {
    return false
  } finally {
    await client.end().catch(() => {})
  }
}

/** As a number in which 1.21 is more than 1.9. */
function versionOf(program: string): number {
  const [, major, minor] =
    /(\d+)\.(\d+)/.exec(execFileSync(program, ['--version'], { encoding: 'utf8' })) ?? []
  return Number(major) + Number(minor) / 1000
}
