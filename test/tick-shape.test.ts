// That one kept tick object keeps all others cheap after garbage has been collected. When both processes are as fast one
// day, V8 has stopped to forget, and src/tick-shape.ts can go.

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import t from 'tap'

/** Prints nanoseconds of a tick, the best of many times: garbage is collected before ticks are frequent, as in a start. */
const MEASURE = `
  const pause = () => new Promise((resolve) => setTimeout(resolve, 2))
  const nothing = () => undefined
  for (let round = 0; round < 8; round += 1) {
    for (let i = 0; i < 300; i += 1) process.nextTick(nothing)
    await pause()
    gc()
    await pause()
    gc()
  }
  let best = Infinity
  for (let round = 0; round < 200; round += 1) {
    const startedNs = process.hrtime.bigint()
    for (let i = 0; i < 500; i += 1) process.nextTick(nothing)
    best = Math.min(best, Number(process.hrtime.bigint() - startedNs) / 500)
    await pause()
  }
  console.log(best)
`

async function tickNs(before: string): Promise<number> {
  const script = `${before}\n${MEASURE}`
  const { stdout } = await promisify(execFile)(process.execPath, [
    '--expose-gc',
    '--input-type=module',
    '--eval',
    script,
  ])
  return Number(stdout)
}

t.test('ticks stay cheap when garbage is collected', async (t) => {
  const file = new URL('../src/tick-shape.ts', import.meta.url).href
  const keptNs = await tickNs(`await import(${JSON.stringify(file)})`)
  const forgottenNs = await tickNs('')
  t.ok(keptNs > 0 && keptNs * 3 < forgottenNs, `${keptNs} ns, ${forgottenNs} ns without`)
})
