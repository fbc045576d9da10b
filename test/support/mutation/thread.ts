// One mutant's life: a thread with the program as it is when that mutant is on, and the tests that must notice. Whatever
// ends it before its word — an error of nobody, a loop that is empty while a test still waits — has noticed too.

import { registerHooks } from 'node:module'
import { parentPort, workerData } from 'node:worker_threads'

const standIn = new URL('tap.ts', import.meta.url).href

registerHooks({
  resolve: (specifier, context, nextResolve) =>
    specifier === 'tap'
      ? { url: standIn, format: 'module-typescript', shortCircuit: true }
      : nextResolve(specifier, context),
})

for (const test of workerData as readonly string[]) await import(test)
const { runTests } = (await import(standIn)) as typeof import('./tap.ts')
await runTests()
// A rejection that nobody has handled is told at the end of a turn.
await new Promise((resolve) => setImmediate(resolve))
parentPort?.postMessage('unnoticed')
