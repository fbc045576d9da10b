// Reporter for tap: one line for each test file that passed, everything that failed with its diagnostics,
// what was skipped, and as the last line `N passed, N failed[, N skipped]`.
// `npx tap --reporter=tap` prints every assert.

import { Transform } from 'node:stream'

const OK = /^ *ok /
const NOT_OK = /^not ok /
const SKIPPED = /^ +ok .*# (SKIP|TODO)/i

export default class Reporter extends Transform {
  #unfinished = ''
  /** Lines that nobody has judged yet: what passed is dropped, what failed is shown with its file. */
  #held = []
  #failedFiles = 0
  #inDiagnostics = false
  #totals = ''

  _transform(chunk, _encoding, done) {
    const lines = (this.#unfinished + chunk).split('\n')
    this.#unfinished = lines.pop() ?? ''
    for (const line of lines) this.#read(line)
    done()
  }

  _flush(done) {
    this.#read(this.#unfinished)
    this.#showHeld()
    const count = (name) => Number(this.#totals.match(`${name}: (\\d+)`)?.[1] ?? 0)
    // tap counts asserts; a file that was killed or timed out may have none that failed.
    const failed = Math.max(count('fail'), this.#failedFiles)
    const skipped = count('skip') + count('todo')
    const tail = skipped > 0 ? `, ${skipped} skipped` : ''
    this.push(`\n${count('pass')} passed, ${failed} failed${tail}\n`)
    done()
  }

  #read(line) {
    if (line.trim() === '') return
    const depth = depthOf(line)
    if (depth === 0) this.#inDiagnostics = false
    if (line.startsWith('# { total:')) this.#totals = line
    if (SKIPPED.test(line)) this.#show(`# skipped: ${line.trim()}`)
    if (OK.test(line)) this.#dropPassed(depth)
    else if (this.#inDiagnostics) this.#show(line)
    else this.#held.push(line)
    if (depth > 0) return

    if (NOT_OK.test(line)) {
      this.#failedFiles += 1
      this.#inDiagnostics = true
    }
    if (OK.test(line)) this.#held.push(line)
    // A heading waits for the verdict on what stands below it.
    if (!line.startsWith('# Subtest')) this.#showHeld()
  }

  /** Drops the heading that this depth's verdict belongs to, if it has one, and all that stands below it. */
  #dropPassed(depth) {
    const start = this.#held.findLastIndex((line) => depthOf(line) <= depth)
    const line = this.#held[start]
    if (line === undefined || depthOf(line) < depth) return
    if (line.trimStart().startsWith('# Subtest')) this.#held.length = start
  }

  #showHeld() {
    for (const line of this.#held) this.#show(line)
    this.#held = []
  }

  #show(line) {
    this.push(`${line}\n`)
  }
}

function depthOf(line) {
  return line.length - line.trimStart().length
}
