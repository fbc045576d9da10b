// What a spool knows of its files without reading them.

import t from 'tap'
import { createHoldings } from '../src/spool-holdings.ts'

t.test('entries stand in the file that they were added to last', (t) => {
  const held = createHoldings()
  t.strictSame(held.add('one', ['a', 'b']), [])
  t.strictSame(held.add('one', ['a']), [], 'the same file again empties none')
  t.equal(held.size(), 2)
  t.strictSame(held.add('two', ['a']), [], 'something is left in the first')
  t.strictSame([held.fileOf('a'), held.fileOf('b'), held.fileOf('c')], ['two', 'one', undefined])
  t.strictSame(held.add('two', ['b']), ['one'])
  t.strictSame(held.files(), ['two'])
  t.end()
})

t.test('of a file that was not read only the name is known', (t) => {
  const held = createHoldings()
  t.equal(held.isEmpty(), true)
  held.addUnread('one')
  t.strictSame([held.isEmpty(), held.isKnown('one'), held.isKnown('two')], [false, false, false])
  t.equal(held.holdsOnly('one', new Set()), false)
  t.equal(held.isLastOf('one'), true)
  held.add('one', ['a'])
  t.equal(held.isKnown('one'), true)
  held.removeFile('one')
  t.strictSame([held.isEmpty(), held.has('a'), held.files()], [true, false, []])
  t.end()
})

t.test('what is no longer found in a file is forgotten', (t) => {
  const held = createHoldings()
  held.add('one', ['a', 'b'])
  t.equal(held.keepOnly('one', new Set(['b'])), true)
  t.strictSame([held.has('a'), held.has('b'), held.size()], [false, true, 1])
  t.equal(held.keepOnly('one', new Set()), false)
  t.equal(held.has('b'), false)
  t.equal(held.keepOnly('two', new Set()), false)
  t.end()
})

t.test('a file that holds something else goes with no entry', (t) => {
  const held = createHoldings()
  held.add('one', ['a'])
  const known = new Set(['a'])
  t.strictSame([held.isLastOf('one'), held.holdsOnly('one', known)], [true, true])
  held.mark('one', true)
  t.strictSame([held.isLastOf('one'), held.holdsOnly('one', known)], [false, false])
  held.mark('one', false)
  t.equal(held.isLastOf('one'), true)
  held.mark('one', true)
  held.remove('a')
  t.strictSame(held.files(), ['one'])
  held.removeFile('one')
  held.add('one', ['b'])
  t.equal(held.isLastOf('one'), true, 'another file of that name is another')
  t.end()
})

t.test('a file holds nothing but these when it holds some of them', (t) => {
  const held = createHoldings()
  held.add('one', ['a', 'b'])
  t.equal(held.holdsOnly('one', new Set(['a', 'b', 'c'])), true)
  t.equal(held.holdsOnly('one', new Set(['a'])), false)
  t.equal(held.holdsOnly('two', new Set(['a'])), false)
  held.remove('b')
  t.equal(held.holdsOnly('one', new Set(['a'])), true)
  t.equal(held.isLastOf('one'), true)
  t.end()
})
