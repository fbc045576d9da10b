// Mutation testing: each file of the engine is changed in one place at a time, and tests must notice. `npm run mutation`
// runs all of it, for most of an hour; `npm run mutation -- breaker seal:30-90,120-130` runs those files, or lines of them.
// test/mutation.md says what survives, and why.

import { rmSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { setPriority, tmpdir } from 'node:os'
import { join } from 'node:path'
import type { LogLevel, MutantResult } from '@stryker-mutator/api/core'
import { Stryker } from '@stryker-mutator/core'

const SIMULATION = 'test/support/mutation/simulation.ts'

/** Of each file the tests that must notice, the quick ones first. Each is a program that ends with 0 when all is well. */
const TESTS: Readonly<Record<string, readonly string[]>> = {
  hmac: ['test/hmac.test.ts'],
  seal: ['test/seal.test.ts'],
  'spool-entry': ['test/spool-entry.test.ts'],
  spool: ['test/spool.test.ts'],
  'spool-files': ['test/spool.test.ts'],
  'spool-holdings': ['test/spool-holdings.test.ts', 'test/spool.test.ts'],
  verdict: ['test/verdict.test.ts'],
  breaker: ['test/breaker.test.ts'],
  'token-answer': ['test/token-answer.test.ts'],
  slots: ['test/slots.test.ts'],
  queue: ['test/queue.test.ts'],
  newest: ['test/newest.test.ts'],
  successor: ['test/successor.test.ts'],
  'live-token': ['test/successor.test.ts'],
  'anti-entropy': ['test/anti-entropy.test.ts'],
  recovery: ['test/recovery.test.ts'],
  failover: ['test/recovery.test.ts'],
  revocation: ['test/revocation.test.ts'],
  'send-once': ['test/send-once.test.ts'],
  'keep-alive': ['test/keep-alive-round.test.ts'],
  refresh: ['test/refresher.test.ts', SIMULATION],
  arming: ['test/refresher.test.ts', SIMULATION],
  'under-way': ['test/refresher.test.ts', SIMULATION],
  'come-back': ['test/refresher.test.ts', SIMULATION],
  judge: ['test/refresher.test.ts', SIMULATION],
  persist: ['test/refresher.test.ts', SIMULATION],
  slabs: ['test/slabs.test.ts'],
}

/** What the README promises. */
const SCORE_MIN = 85
/** Lowest priority: it runs beside other work. */
const NICENESS = 19
/** Beyond this, and twice the time of the tests without a mutant, a mutant hangs. */
const HANGS_AFTER_MS = 15_000

setPriority(NICENESS)
// Threads are many and their files few: what was compiled once is not compiled again.
const compiled = await mkdtemp(join(tmpdir(), 'mutation-compiled-'))
process.env['NODE_COMPILE_CACHE'] = compiled
process.on('exit', () => rmSync(compiled, { recursive: true, force: true }))
const names = process.argv.slice(2)
const all: MutantResult[] = []
for (const name of names.length === 0 ? Object.keys(TESTS) : names)
  all.push(...(await mutate(name)))
console.log(scoreOf('all', all))
process.exitCode = percentOf(all) >= SCORE_MIN ? 0 : 1

/** Tries every mutant of one file and says which ones nobody noticed. */
async function mutate(asked: string): Promise<readonly MutantResult[]> {
  const [name = '', lines] = asked.split(':')
  const tests = TESTS[name]
  if (tests === undefined) throw new RangeError(`${name} is none of ${Object.keys(TESTS).join()}.`)
  process.env['MUTATION_TESTS'] = tests.join()
  const tempDirName = await mkdtemp(join(tmpdir(), 'mutation-'))
  try {
    const stryker = new Stryker({
      mutate: lines?.split(',').map((some) => `src/${name}.ts:${some}`) ?? [`src/${name}.ts`],
      testRunner: 'threads',
      coverageAnalysis: 'off',
      plugins: [new URL('plugins.ts', import.meta.url).href],
      ignorers: ['texts'],
      ignorePatterns: ['data', '.tap'],
      reporters: [],
      tempDirName,
      cleanTempDir: 'always',
      concurrency: 2,
      timeoutMS: HANGS_AFTER_MS,
      timeoutFactor: 2,
      // oxlint-disable-next-line typescript/no-unsafe-enum-assignment -- their enum is not there at run time
      logLevel: 'error' as LogLevel,
      // Node runs the sources as they are; TypeScript 7 has nothing that Stryker could read this file with.
      tsconfigFile: 'none',
      allowEmpty: false,
    })
    const results = await stryker.runMutationTest()
    const source = (await readFile(`src/${name}.ts`, 'utf8')).split('\n')
    console.log(scoreOf(name, results))
    for (const result of results) if (isMissed(result)) console.log(described(result, source))
    return results
  } finally {
    await rm(tempDirName, { recursive: true, force: true })
  }
}

function isMissed({ status }: MutantResult): boolean {
  return status === 'Survived' || status === 'NoCoverage'
}

function isNoticed({ status }: MutantResult): boolean {
  return status === 'Killed' || status === 'Timeout'
}

function percentOf(results: readonly MutantResult[]): number {
  const noticed = results.filter(isNoticed).length
  return (100 * noticed) / (noticed + results.filter(isMissed).length)
}

function scoreOf(name: string, results: readonly MutantResult[]): string {
  const count = (status: string) => results.filter((one) => one.status === status).length
  return (
    `${name.padEnd(14)} ${percentOf(results).toFixed(1).padStart(5)} %  ${count('Killed')} killed, ` +
    `${count('Timeout')} hung, ${results.filter(isMissed).length} survived, ${count('Ignored')} left alone`
  )
}

function described(
  { mutatorName, replacement, location: { start, end } }: MutantResult,
  source: readonly string[],
): string {
  const first = source[start.line - 1] ?? ''
  const original = first.slice(
    start.column - 1,
    start.line === end.line ? end.column - 1 : undefined,
  )
  const [become = ''] = (replacement ?? '').split('\n')
  return `  ${start.line}:${start.column}  ${mutatorName}  ${original}  ->  ${become}`
}
