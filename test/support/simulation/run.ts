// Command line of the simulation: `npm run simulate -- --seed 7` replays one run with its trace,
// `npm run simulate -- --seeds 100000 [--from 1]` runs many and prints the trace of the first that breaks a rule.

import { parseArgs } from 'node:util'
import { simulate } from './simulate.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string' },
    seeds: { type: 'string', default: '10000' },
    from: { type: 'string', default: '1' },
    keep: { type: 'boolean', default: false },
  },
})

if (values.seed === undefined) await runMany(Number(values.from), Number(values.seeds))
else await replay(Number(values.seed))

async function replay(seed: number): Promise<void> {
  const run = await simulate(seed, { trace: (line) => console.log(line) })
  console.log(`seed ${seed}: ${JSON.stringify(run.profile)}`)
  console.log(run.violations.length === 0 ? 'No rule is broken.' : run.violations.join('\n'))
  process.exitCode = run.violations.length === 0 ? 0 : 1
}

async function runMany(from: number, seeds: number): Promise<void> {
  const totals = new Map<string, number>()
  const broken = new Map<string, number[]>()
  const startedAtMs = performance.now()
  let events = 0
  for (let seed = from; seed < from + seeds; seed += 1) {
    const run = await simulate(seed)
    events += run.events
    for (const [name, number] of run.counts) totals.set(name, (totals.get(name) ?? 0) + number)
    if (run.violations.length === 0) continue
    const [rule = ''] = (run.violations[0] ?? '').split(':')
    broken.set(rule, [...(broken.get(rule) ?? []), seed])
    if (values.keep) continue
    await replay(seed)
    return
  }
  const seconds = (performance.now() - startedAtMs) / 1000
  console.log(`${seeds} runs, ${events} events, ${seconds.toFixed(1)} s`)
  for (const [name, number] of [...totals].toSorted((a, b) => b[1] - a[1])) {
    console.log(`${String(number).padStart(10)} ${name}`)
  }
  for (const [rule, those] of broken) {
    console.log(
      `BROKEN ${rule}: ${those.length} of ${seeds}, such as ${those.slice(0, 8).join(' ')}`,
    )
  }
  process.exitCode = broken.size === 0 ? 0 : 1
}
