// Programs that are measured, each in a process of its own and on the CPU that it is given, so that what loads a
// server never takes its time.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { closeSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const START_LIMIT_MS = 60_000
const STOP_LIMIT_MS = 15_000
/** Characters of a failed program's output: what went wrong first stands first. */
const OUTPUT_SHOWN_MAX = 2_000

/** What is measured has one CPU to itself; load generators, PostgreSQL and stand-ins share the other. */
export type Place = 'measured' | 'around'
const CPU_OF: Readonly<Record<Place, string>> = { measured: '0', around: '1' }

/** Whether processes can be bound to CPUs here. */
export const canPin = has('taskset') && availableParallelism() > 1

/** Tells whether the program is installed. */
export function has(program: string): boolean {
  try {
    execFileSync('which', [program], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

/** The command line that runs a program in its place. */
export function placed(place: Place, command: readonly string[]): [string, ...string[]] {
  const [program = '', ...rest] = canPin ? ['taskset', '-c', CPU_OF[place], ...command] : command
  return [program, ...rest]
}

/** Binds a process that runs already, and whatever it starts from now on. */
export function pin(place: Place, processId: number): void {
  if (canPin) execFileSync('taskset', ['-a', '-p', '-c', CPU_OF[place], String(processId)])
}

export interface Program {
  child: ChildProcess
  stop(): Promise<void>
}

/**
 * Starts a TypeScript file of this repository, or another program. Its output goes to a file, as a container's does; resolves when `ready`
 * says so.
 */
export async function startProgram(options: {
  place: Place
  /** Undefined: Node. */
  program?: string
  parameters: readonly string[]
  env: Readonly<Record<string, string>>
  outputFile: string
  ready: () => Promise<boolean>
}): Promise<Program> {
  const output = openSync(options.outputFile, 'w')
  const [program, ...parameters] = placed(options.place, [
    options.program ?? process.execPath,
    ...options.parameters,
  ])
  const child = spawn(program, parameters, {
    cwd: ROOT,
    env: { PATH: process.env['PATH'] ?? '', ...options.env },
    stdio: ['ignore', output, output],
  })
  closeSync(output)
  const exited = new Promise((resolve) => child.once('exit', resolve))
  const stop = async () => {
    child.kill('SIGTERM')
    const kill = setTimeout(() => child.kill('SIGKILL'), STOP_LIMIT_MS)
    await exited
    clearTimeout(kill)
  }
  const giveUpAtMs = Date.now() + START_LIMIT_MS
  while (!(await options.ready())) {
    if (child.exitCode !== null || Date.now() > giveUpAtMs) {
      await stop()
      throw new Error(
        `${options.parameters.join(' ')} did not start:\n${readFileSync(options.outputFile, 'utf8').slice(0, OUTPUT_SHOWN_MAX)}`,
      )
    }
    await delay(50)
  }
  return { child, stop }
}

/** A test of `startProgram` that is met when the URL answers with 200. */
export function answers(url: string): () => Promise<boolean> {
  return async () => {
    try {
      const response = await fetch(url)
      await response.arrayBuffer()
      return response.status === 200
    } catch {
      return false
    }
  }
}

/** CPU time that the process and its workers have used, all threads, in microseconds; to 10 ms. */
export function cpuUs(child: ChildProcess): number {
  let ticks = 0
  for (const processId of withWorkers(child)) {
    // Fields 14 and 15 of proc(5), in ticks of 10 ms; the name in field 2 may hold spaces.
    const stat = readFileSync(join('/proc', processId, 'stat'), 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    ticks += Number(fields[11]) + Number(fields[12])
  }
  return ticks * 10_000
}

/** Memory that the process holds, in MiB. */
export function residentMiB(child: ChildProcess): number {
  return statusMiB(String(child.pid), 'VmRSS')
}

/** The most memory that the process and its workers have held since {@link forgetPeak}, in MiB. */
export function peakMiB(child: ChildProcess): number {
  return withWorkers(child).reduce((sum, processId) => sum + statusMiB(processId, 'VmHWM'), 0)
}

/** Begins to look for the peak of memory anew. */
export function forgetPeak(child: ChildProcess): void {
  for (const processId of withWorkers(child)) {
    writeFileSync(join('/proc', processId, 'clear_refs'), '5')
  }
}

/** nginx's master has workers; of others it is the process alone. */
function withWorkers({ pid }: ChildProcess): string[] {
  const own = String(pid)
  const children = readFileSync(join('/proc', own, 'task', own, 'children'), 'utf8')
  return [own, ...children.split(' ').filter((text) => text !== '')]
}

function statusMiB(processId: string, field: 'VmRSS' | 'VmHWM'): number {
  const status = readFileSync(join('/proc', processId, 'status'), 'utf8')
  return Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(status)?.[1]) / 1024
}
