// Debian's nginx with a configuration of the test's, or of a measurement, where it is installed.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Test } from 'tap'

export const NGINX = '/usr/sbin/nginx'
const START_LIMIT_MS = 20_000

export const hasNginx = existsSync(NGINX)

/** A configuration with these directives in its http context, all of whose own files are in `directory`. */
export function nginxConfiguration(directory: string, http: string): string {
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    (kind) => `${kind}_temp_path ${join(directory, kind)};`,
  )
  return [
    'daemon off;',
    'worker_processes 1;',
    `pid ${join(directory, 'nginx.pid')};`,
    `error_log ${join(directory, 'error.log')} info;`,
    'events { worker_connections 256; }',
    'http {',
    ...temporary,
    http,
    '}',
    '',
  ].join('\n')
}

/** Replaces each text of a configuration; one that is not there has moved on without its user. */
export function replaced(text: string, pairs: ReadonlyArray<readonly [string, string]>): string {
  let result = text
  for (const [one, other] of pairs) {
    if (!result.includes(one)) throw new Error(`The configuration has no ${one}`)
    result = result.replaceAll(one, other)
  }
  return result
}

export interface Nginx {
  /** Everything that it has written to its logs. */
  logs(): Promise<string>
}

/** Starts nginx with these directives in its http context; it ends with the test. `port` is one that it listens on. */
export async function startNginx(
  test: Test,
  options: { http: string; port: number },
): Promise<Nginx> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-nginx-'))
  const file = join(directory, 'nginx.conf')
  const errorLog = join(directory, 'error.log')
  await writeFile(file, nginxConfiguration(directory, options.http))
  let output = ''
  const child: ChildProcess = spawn(NGINX, ['-c', file, '-e', errorLog], {
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  child.stderr?.setEncoding('utf8').on('data', (text: string) => (output += text))
  const gone = once(child, 'exit')
  test.teardown(async () => {
    child.kill('SIGTERM')
    await gone
    await rm(directory, { recursive: true, force: true })
  })
  await untilListening(options.port, () => {
    if (child.exitCode !== null) throw new Error(`nginx does not start:\n${output}`)
  })
  return { logs: async () => output + (await readFile(errorLog, 'utf8').catch(() => '')) }
}

/** Waits until somebody listens on a port. `check` throws when nobody will any more. */
export async function untilListening(port: number, check: () => void): Promise<void> {
  const startedAtMs = performance.now()
  while (!(await listens(port))) {
    check()
    if (performance.now() - startedAtMs > START_LIMIT_MS) {
      throw new Error(`Nobody listens on port ${port}.`)
    }
    await delay(20)
  }
}

function listens(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}
