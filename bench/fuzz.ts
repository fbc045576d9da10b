// The long form of the fuzz: `npm run fuzz`, or `npm run fuzz -- --requests 50000 --seconds 60 --seed 7`. Ends with 1 when
// a request did what it must not, when the process died, or when its memory grew with their number.

import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { startOwnPostgres } from '../test/support/own-postgres.ts'
import { fuzz } from '../test/support/raw-fuzz.ts'
import { startRawBroker } from '../test/support/raw-broker.ts'

const { values } = parseArgs({
  options: {
    requests: { type: 'string', default: '1000000' },
    seconds: { type: 'string', default: '3600' },
    seed: { type: 'string', default: String(Date.now() % 2 ** 31) },
  },
})
/** Garbage waits to be collected, so memory goes up and down by this much. */
const GROWTH_MAX_MIB = 64

const stops: Array<() => unknown> = []
const postgres = await startOwnPostgres()
const broker = await startRawBroker(
  { teardown: (stop: () => unknown) => void stops.push(stop) },
  { databaseUrl: postgres.url(), env: { LOG_LEVEL: 'error' } },
)
const processId = broker.replica.processId()
const residentMiB = () =>
  Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${processId}/status`, 'utf8'))?.[1]) / 1024

const samples: Array<{ sent: number; mib: number }> = []
const figures = await fuzz(broker, {
  requests: Number(values.requests),
  seconds: Number(values.seconds),
  seed: Number(values.seed),
  onProgress: (sent) => samples.push({ sent, mib: residentMiB() }),
})
const alive = broker.replica.processId() === processId
// The first half warms code and pools up.
const warm = samples.slice(Math.floor(samples.length / 2))
const growthMiB = (warm.at(-1)?.mib ?? 0) - (warm[0]?.mib ?? 0)
const { faults, ...rest } = figures
process.stdout.write(
  `${JSON.stringify({ seed: Number(values.seed), ...rest, alive, growthMiB, residentMiB: warm.at(-1)?.mib })}\n`,
)
for (const fault of faults.slice(0, 20)) process.stdout.write(`${fault}\n`)
for (const stop of stops.toReversed()) await stop()
await postgres.remove()
if (faults.length > 0 || !alive || growthMiB > GROWTH_MAX_MIB) process.exitCode = 1
