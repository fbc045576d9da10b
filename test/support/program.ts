// A program of this repository run as a process of its own, as an operator runs it: with an environment that is only
// what the test gives it, in a process group that a Ctrl-C reaches as a whole.

import { type ChildProcess, spawn } from 'node:child_process'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'

/** Folder that programs are started in, and that relative paths in their output start from. */
export const ROOT = fileURLToPath(new URL('../../', import.meta.url))

/** How long a stopped program may take before the teardown kills it. */
const STOP_LIMIT_MS = 20_000
const POLL_MS = 20

export interface Program {
  /** Everything written to standard output and standard error so far. */
  output(): string
  /** Resolves with how long it took until the output matched, counted from the start of the program. */
  said(pattern: RegExp, limitMs: number): Promise<{ match: RegExpExecArray; tookMs: number }>
  /** Sends a signal to the process group, as a terminal does. */
  signal(name: 'SIGINT' | 'SIGTERM' | 'SIGKILL'): void
  /** The exit code, or the signal that ended it. */
  exited: Promise<number | NodeJS.Signals | null>
}

/** Starts `node` with these arguments; the program is stopped at teardown if it still runs. */
export function startProgram(
  test: Test,
  parameters: readonly string[],
  env: Readonly<Record<string, string>>,
): Program {
  const startedAtMs = performance.now()
  const child = spawn(process.execPath, parameters, {
    cwd: ROOT,
    env: { PATH: process.env['PATH'] ?? '', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  })
  let output = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
  }
  let hasExited = false
  const exited = new Promise<number | NodeJS.Signals | null>((resolve, reject) => {
    child.once('error', reject)
    // Not `exit`: the last lines may still be on their way.
    child.once('close', (code, signal) => {
      hasExited = true
      resolve(code ?? signal)
    })
  })

  const signal = (name: NodeJS.Signals) => {
    if (!hasExited) signalGroup(child, name)
  }
  test.teardown(async () => {
    signal('SIGTERM')
    const kill = setTimeout(() => signal('SIGKILL'), STOP_LIMIT_MS)
    await exited
    clearTimeout(kill)
  })

  return {
    output: () => output,
    async said(pattern, limitMs) {
      for (;;) {
        const match = pattern.exec(output)
        const tookMs = performance.now() - startedAtMs
        if (match !== null) return { match, tookMs }
        if (hasExited || tookMs > limitMs) {
          throw new Error(
            `Not said ${hasExited ? 'before the exit' : 'in time'}: ${pattern}\n${output}`,
          )
        }
        await delay(POLL_MS)
      }
    },
    signal,
    exited,
  }
}

function signalGroup({ pid }: ChildProcess, name: NodeJS.Signals): void {
  if (pid !== undefined) process.kill(-pid, name)
}
