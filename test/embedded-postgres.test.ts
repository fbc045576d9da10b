// The development server: its data outlives a stop, and it outlives whoever was killed.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { Client } from 'pg'
import t from 'tap'
import type { Test } from 'tap'

import type { LogFields } from '../src/ports.ts'
import { startEmbeddedPostgres } from '../src/postgres/embedded.ts'
import { silentLog } from './support/database.ts'

const MODULE = new URL('../src/postgres/embedded.ts', import.meta.url).href

t.test('a second start keeps the data, and the password is for its owner alone', async (t) => {
  const directory = await makeDirectory(t)
  const first = await startEmbeddedPostgres({ directory, durable: false })
  await query(first.url, 'create table kept (n integer)')
  await first.stop()
  await first.stop()
  await t.rejects(query(first.url, 'select 1'), { code: 'ECONNREFUSED' })

  const second = await startEmbeddedPostgres({ directory, durable: true })
  t.teardown(() => second.stop())
  t.strictSame(await query(second.url, 'select * from kept'), [])
  t.equal((await query(second.url, 'show fsync'))[0]?.fsync, 'on')
  t.equal((await stat(join(directory, 'password'))).mode & 0o777, 0o600)
  await t.rejects(query(second.url.replace(/:[^:@]+@/, ':wrong@'), 'select 1'), { code: '28P01' })
})

t.test('two starts at once give one server, and only its starter stops it', async (t) => {
  const directory = await makeDirectory(t)
  const child = await startInChild(directory, t)
  const own = await startEmbeddedPostgres({ directory, durable: false })
  t.equal(own.url, child.url)
  await own.stop()
  t.strictSame(await query(child.url, 'select 1 as alive'), [{ alive: 1 }])

  // A Ctrl-C reaches every process of the terminal's group, a kill -9 leaves nobody to tidy up.
  child.signalGroup('SIGINT')
  child.signalGroup('SIGKILL')
  await child.exited
  t.strictSame(await query(child.url, 'select 1 as alive'), [{ alive: 1 }])

  const heir = await startEmbeddedPostgres({ directory, durable: false })
  t.equal(heir.url, child.url)
  await heir.stop()
  await t.rejects(query(child.url, 'select 1'), { code: 'ECONNREFUSED' })
})

t.test('a server that was killed comes back with its data', async (t) => {
  const directory = await makeDirectory(t)
  const first = await startEmbeddedPostgres({ directory, durable: true })
  await query(first.url, 'create table kept (n integer)')
  const pidFile = await readFile(join(directory, 'cluster', 'postmaster.pid'), 'utf8')
  process.kill(Number(pidFile.split('\n')[0]), 'SIGKILL')

  const second = await startEmbeddedPostgres({ directory, durable: true })
  t.strictSame(await query(second.url, 'select * from kept'), [])
  await second.stop()
})

t.test(
  'root may keep the folder where nobody else can reach it',
  { skip: process.getuid?.() === 0 ? false : 'needs root' },
  async (t) => {
    const closed = await makeDirectory(t)
    await mkdir(closed, { mode: 0o700 })
    const directory = join(closed, 'data', 'postgres')
    let place: string | undefined
    const log = {
      ...silentLog,
      info: (_event: string, fields?: LogFields) => (place = fields?.path),
    }
    const server = await startEmbeddedPostgres({ directory, durable: false, log })
    t.strictSame(await query(server.url, 'select 1 as alive'), [{ alive: 1 }])
    await server.stop()
    t.match(place, /^\/var\/tmp\/pagero-token-broker\/data-/)
    if (place !== undefined) await rm(place, { recursive: true })
  },
)

/** A folder's name for this test; the folder is removed at its teardown. */
async function makeDirectory(test: Test): Promise<string> {
  const parent = await mkdtemp(join(tmpdir(), 'broker-embedded-'))
  // The server's account must be able to enter it.
  const directory = `${parent}-open`
  test.teardown(async () => {
    await rm(parent, { recursive: true, force: true })
    await rm(directory, { recursive: true, force: true })
  })
  return directory
}

/** Starts a server from a process group of its own, as a terminal would. */
async function startInChild(directory: string, test: Test) {
  const script = `
    const { startEmbeddedPostgres } = await import(${JSON.stringify(MODULE)})
    const { url } = await startEmbeddedPostgres({ directory: ${JSON.stringify(directory)}, durable: false })
    console.log(url)
    process.on('SIGINT', () => {})
    setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['--input-type=module', '--eval', script], {
    detached: true,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  test.teardown(() => child.kill('SIGKILL'))
  const exited = once(child, 'exit')
  const [output] = (await once(child.stdout, 'data')) as [Buffer]
  const signalGroup = (signal: NodeJS.Signals) => {
    if (child.pid !== undefined) process.kill(-child.pid, signal)
  }
  return { url: output.toString().trim(), exited, signalGroup }
}

async function query(url: string, statement: string): Promise<Array<Record<string, unknown>>> {
  const client = new Client({ connectionString: url, connectionTimeoutMillis: 2_000 })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query<Record<string, unknown>>(statement)).rows
  } finally {
    await client.end()
  }
}
