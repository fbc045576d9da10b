// What Stryker is given: how the tests of a mutant are run, and what is not worth a mutant.

import { pathToFileURL } from 'node:url'
import { Worker } from 'node:worker_threads'
import { INSTRUMENTER_CONSTANTS } from '@stryker-mutator/api/core'
import type { Ignorer } from '@stryker-mutator/api/ignore'
import { declareValuePlugin, PluginKind } from '@stryker-mutator/api/plugin'
import {
  DryRunStatus,
  MutantRunStatus,
  type TestRunner,
  TestStatus,
} from '@stryker-mutator/api/test-runner'

const ACTIVE_MUTANT = INSTRUMENTER_CONSTANTS.ACTIVE_MUTANT_ENV_VARIABLE

// ── Running the tests of a mutant ────────────────────────────────────────────────────────────────

/** What became of the tests: undefined when none has failed. */
type Failure = string | undefined

/**
 * Runs the tests in a thread of their own, in which the mutant is on from the first line. That takes 0.1 s, where a
 * process with tap takes half a second.
 */
async function runTests(mutantId?: string): Promise<Failure> {
  const tests = (process.env['MUTATION_TESTS'] ?? '').split(',')
  const worker = new Worker(new URL('thread.ts', import.meta.url), {
    workerData: tests.map((test) => pathToFileURL(test).href),
    env: mutantId === undefined ? process.env : { ...process.env, [ACTIVE_MUTANT]: mutantId },
    stdout: true,
    stderr: true,
  })
  try {
    return await new Promise<Failure>((resolve) => {
      worker.once('message', () => resolve(undefined))
      worker.once('error', (error) => resolve(String(error)))
      worker.once('exit', (code) => resolve(`ended with ${code}`))
    })
  } finally {
    await worker.terminate()
  }
}

const threads: TestRunner = {
  capabilities: () => ({ reloadEnvironment: true }),
  async dryRun() {
    const startedAtMs = performance.now()
    const failure = await runTests()
    if (failure !== undefined) return { status: DryRunStatus.Error, errorMessage: failure }
    const timeSpentMs = performance.now() - startedAtMs
    const all = { id: 'all', name: 'all tests', status: TestStatus.Success as const, timeSpentMs }
    return { status: DryRunStatus.Complete, tests: [all] }
  },
  async mutantRun({ activeMutant }) {
    const failure = await runTests(activeMutant.id)
    if (failure === undefined) return { status: MutantRunStatus.Survived, nrOfTests: 1 }
    const killed = { killedBy: ['all'], failureMessage: failure, nrOfTests: 1 }
    return { status: MutantRunStatus.Killed, ...killed }
  },
}

// ── What is left alone: calls of the log, and sentences for people ───────────────────────────────

/** As much as is asked of a node of Stryker's syntax tree. */
interface Node {
  type: string
  name?: string
  value?: unknown
  callee?: Node
  expression?: Node
  object?: Node
  property?: Node
  quasis?: Array<{ value: { raw: string } }>
}

const LEVELS = new Set(['trace', 'debug', 'info', 'warn', 'error'])

function isLogCall({ type, callee, expression }: Node): boolean {
  if (type === 'ExpressionStatement' && expression !== undefined) return isLogCall(expression)
  if (type !== 'CallExpression' || callee?.type !== 'MemberExpression') return false
  const { object, property } = callee
  const isLog = object?.name === 'log' || object?.property?.name === 'log'
  return isLog && LEVELS.has(property?.name ?? '')
}

/** A constant of the program has no space in it, a sentence has. */
function isSentence({ type, value, quasis }: Node): boolean {
  if (type === 'StringLiteral') return typeof value === 'string' && value.includes(' ')
  return type === 'TemplateLiteral' && quasis?.some((one) => one.value.raw.includes(' ')) === true
}

const texts: Ignorer = {
  shouldIgnore(path) {
    const { node } = path as { node: Node }
    if (isLogCall(node)) return 'a call of the log'
    return isSentence(node) ? 'a sentence for people' : undefined
  },
}

export const strykerPlugins = [
  declareValuePlugin(PluginKind.TestRunner, 'threads', threads),
  declareValuePlugin(PluginKind.Ignore, 'texts', texts),
]
