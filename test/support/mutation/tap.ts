// What the tests of a mutant are given in tap's place. Tap's own start costs more than most of these tests, and a mutant
// has died with the first assertion that fails: so nothing here reports, and everything throws.

import { AssertionError } from 'node:assert'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'

type Body = (t: StandIn) => unknown
type StandIn = ReturnType<typeof standIn>

const queue: Array<{ name: string; body: Body }> = []

/** Runs all tests in their order, up to the first that fails. */
export async function runTests(): Promise<void> {
  for (const { name, body } of queue) await run(name, body)
}

async function run(name: string, body: Body): Promise<void> {
  const t = standIn(name)
  try {
    await body(t)
  } finally {
    for (const end of t.ends.toReversed()) await end()
  }
}

function standIn(name: string) {
  const ends: Array<() => unknown> = []
  const check = (holds: boolean, what: string, message = '') => {
    if (!holds) throw new AssertionError({ message: `${name}: ${what} ${message}` })
  }
  const throws = (action: () => unknown, expected?: unknown, message?: string) => {
    try {
      action()
    } catch (error) {
      check(isAsExpected(error, expected), `throws something else: ${String(error)}`, message)
      return error
    }
    return check(false, 'does not throw', message)
  }
  const settle = async (work: Promise<unknown> | (() => Promise<unknown>)) =>
    typeof work === 'function' ? work() : work
  return {
    ends,
    test: run,
    teardown: (end: () => unknown) => void ends.push(end),
    setTimeout() {},
    end() {},
    pass() {},
    fail: (message?: string) => check(false, 'fails', message),
    ok: (value: unknown, message?: string) => check(Boolean(value), 'is not so', message),
    notOk: (value: unknown, message?: string) => check(!value, 'is so', message),
    equal: (found: unknown, wanted: unknown, message?: string) =>
      check(Object.is(found, wanted), `${String(found)} is not ${String(wanted)}`, message),
    not: (found: unknown, unwanted: unknown, message?: string) =>
      check(!Object.is(found, unwanted), `is ${String(unwanted)}`, message),
    strictSame: (found: unknown, wanted: unknown, message?: string) =>
      check(isDeepStrictEqual(found, wanted), 'is not the same', message),
    notSame: (found: unknown, wanted: unknown, message?: string) =>
      check(!isDeepStrictEqual(found, wanted), 'is the same', message),
    match: (found: unknown, pattern: unknown, message?: string) =>
      check(isMatch(found, pattern), 'does not match', message),
    notMatch: (found: unknown, pattern: unknown, message?: string) =>
      check(!isMatch(found, pattern), 'matches', message),
    throws,
    doesNotThrow: (action: () => unknown) => void action(),
    async rejects(work: Parameters<typeof settle>[0], expected?: unknown, message?: string) {
      const end = await settle(work).then(
        () => 'resolves',
        (error: unknown) => ({ error }),
      )
      if (typeof end === 'string') check(false, end, message)
      else check(isAsExpected(end.error, expected), `rejects: ${String(end.error)}`, message)
    },
    resolves: async (work: Parameters<typeof settle>[0]) => void (await settle(work)),
    testdir(files: Record<string, string> = {}) {
      const directory = mkdtempSync(join(tmpdir(), 'mutant-'))
      ends.push(() => rmSync(directory, { recursive: true, force: true }))
      for (const [file, text] of Object.entries(files)) writeFileSync(join(directory, file), text)
      return directory
    },
  }
}

function isAsExpected(error: unknown, expected: unknown): boolean {
  if (typeof expected === 'function') return error instanceof expected
  if (expected instanceof RegExp) return expected.test((error as Error).message)
  return expected === undefined || isMatch(error, expected)
}

/** As tap has it: texts hold a part, patterns fit, objects and lists have at least what the pattern names. */
function isMatch(found: unknown, pattern: unknown): boolean {
  if (pattern instanceof RegExp) return pattern.test(String(found))
  if (typeof pattern === 'string') return typeof found === 'string' && found.includes(pattern)
  if (typeof pattern !== 'object' || pattern === null) return Object.is(found, pattern)
  if (pattern instanceof Date || Buffer.isBuffer(pattern)) return isDeepStrictEqual(found, pattern)
  if (typeof found !== 'object' || found === null) return false
  return Object.entries(pattern).every(([key, value]) =>
    isMatch((found as Record<string, unknown>)[key], value),
  )
}

export default {
  ...standIn('root'),
  test(name: string, ...rest: [Body] | [options: { skip?: string | false }, Body]) {
    const body = rest.at(-1) as Body
    queue.push({ name, body })
  },
}
