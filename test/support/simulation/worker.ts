// Runs seeds in a thread of its own: under tap every promise is followed by hooks, which makes a run eight times slower.

import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { simulate, type SimulationOptions } from './simulate.ts'

export interface SeedsReport {
  /** How often what happened, over all runs. */
  totals: Map<string, number>
  /** The first run that broke a rule. */
  broken: { seed: number; violations: readonly string[]; trace: string[] } | undefined
}

type Options = Omit<SimulationOptions, 'trace'>

/** Of a trace, the last lines tell the most. */
const TRACE_LINES_MAX = 150

/** Runs the seeds one after the other, up to the first that breaks a rule. */
export async function runSeeds(
  seeds: readonly number[],
  options: Options = {},
): Promise<SeedsReport> {
  const worker = new Worker(new URL(import.meta.url), { workerData: { seeds, options } })
  return new Promise((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
}

async function work(seeds: readonly number[], options: Options): Promise<SeedsReport> {
  const totals = new Map<string, number>()
  for (const seed of seeds) {
    const run = await simulate(seed, options)
    for (const [name, count] of run.counts) totals.set(name, (totals.get(name) ?? 0) + count)
    if (run.violations.length === 0) continue
    const trace: string[] = []
    await simulate(seed, { ...options, trace: (line) => trace.push(line) })
    const { violations } = run
    return { totals, broken: { seed, violations, trace: trace.slice(-TRACE_LINES_MAX) } }
  }
  return { totals, broken: undefined }
}

if (!isMainThread && parentPort !== null) {
  const { seeds, options } = workerData as { seeds: readonly number[]; options: Options }
  parentPort.postMessage(await work(seeds, options))
}
