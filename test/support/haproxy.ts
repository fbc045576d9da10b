// Debian's HAProxy with a configuration of the test's, where it is installed.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { untilListening } from './nginx.ts'

const HAPROXY = '/usr/sbin/haproxy'

export const hasHaproxy = existsSync(HAPROXY)

/** Starts HAProxy with this configuration; it ends with the test. `port` is one that it listens on. */
export async function startHaproxy(
  test: Test,
  options: { configuration: string; port: number },
): Promise<void> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-haproxy-'))
  const file = join(directory, 'haproxy.cfg')
  await writeFile(file, options.configuration)
  // In the foreground, and one process.
  const child = spawn(HAPROXY, ['-db', '-f', file], { stdio: ['ignore', 'ignore', 'pipe'] })
  let output = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (output += text))
  const gone = once(child, 'exit')
  test.teardown(async () => {
    child.kill('SIGTERM')
    await gone
    await rm(directory, { recursive: true, force: true })
  })
  await untilListening(options.port, () => {
    if (child.exitCode !== null) throw new Error(`HAProxy does not start:\n${output}`)
  })
}
