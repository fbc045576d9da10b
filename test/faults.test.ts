// The table of faults names tests that exist, and none of the requirements is missing from it.

import { readFileSync } from 'node:fs'
import t from 'tap'

const REQUIREMENTS = 44

interface Row {
  id: string
  file: string
  name: string
}

function readTable(): Row[] {
  const table = readFileSync(new URL('faults.md', import.meta.url), 'utf8')
  return table.split('\n').flatMap((line) => {
    const [, id = '', , file = '', name = ''] = line.split('|').map((cell) => cell.trim())
    return id.startsWith('RF-') ? [{ id, file, name }] : []
  })
}

t.test('every requirement of the refresh protocol has a row', (t) => {
  const ids = new Set(readTable().map(({ id }) => id))
  const all = Array.from({ length: REQUIREMENTS }, (_, i) => `RF-${String(i + 1).padStart(2, '0')}`)
  t.strictSame([...ids], all, 'all of them, in their order')
  t.end()
})

t.test('every row names a test that is there', (t) => {
  for (const { id, file, name } of readTable()) {
    const source = readFileSync(new URL(file, import.meta.url), 'utf8')
    t.ok(name.length > 0 && namesOf(source).some((one) => one.startsWith(name)), `${id}: ${name}`)
  }
  t.end()
})

/** First arguments of the calls of `t.test`. */
function namesOf(source: string): string[] {
  return [...source.matchAll(/\bt\.test\(\s*(['"`])(.+?)\1/gs)].map(([, , name = '']) => name)
}
