// Records outside V8's heap: what goes in comes out, whatever becomes of its neighbours, and what is freed is gone.

import fc from 'fast-check'
import t, { type Test } from 'tap'
import { createSlabs, type Place } from '../src/slabs.ts'

const MIB = 2 ** 20

/** Tokens as they are met, and what nobody should send. */
const text = fc.oneof(
  fc.constant(''),
  fc.string({ unit: 'binary', maxLength: 300 }),
  fc.stringMatching(/^[A-Za-z0-9_-]{1,200}$/),
  fc.stringMatching(/^[A-Za-z0-9_-]{1,90}(\.[A-Za-z0-9_-]{1,90}){0,6}$/),
  fc.stringMatching(/^[A-Za-z0-9_.-]{60,140}$/),
  fc.stringMatching(/^[A-Za-z0-9+/=]{60,140}$/),
)
const number = fc.oneof(fc.double(), fc.constant(Number.NaN), fc.maxSafeInteger())

/** The memory of every slab that is made from now on. */
function slabsMade(t: Test): Buffer[] {
  const made: Buffer[] = []
  const { allocUnsafeSlow } = Buffer
  t.intercept(Buffer, 'allocUnsafeSlow', {
    value: (size: number) => {
      const bytes = allocUnsafeSlow(size)
      made.push(bytes)
      return bytes
    },
  })
  return made
}

t.test('a record comes back as it was put, whatever else comes and goes', (t) => {
  const step = fc.record({
    kind: fc.constantFrom('put', 'put', 'put', 'free', 'set'),
    which: fc.nat(),
    numbers: fc.tuple(number, number),
    texts: fc.tuple(text, text, text),
  })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
      const slabs = createSlabs({ numbers: 2, texts: 3 })
      const kept: Array<{ place: Place; numbers: number[]; texts: readonly string[] }> = []
      for (const { kind, which, numbers, texts } of steps) {
        const index = which % Math.max(1, kept.length)
        const one = kept[index]
        if (kind === 'put') kept.push({ place: slabs.put(numbers, texts), numbers, texts })
        else if (one === undefined) continue
        else if (kind === 'set') {
          one.numbers = [one.numbers[0] ?? 0, numbers[1]]
          slabs.setNumber(one.place, 1, numbers[1])
        } else {
          slabs.free(one.place)
          kept.splice(index, 1)
        }
        for (const { place, ...wanted } of kept) {
          const found = {
            numbers: wanted.numbers.map((_, at) => slabs.number(place, at)),
            texts: wanted.texts.map((_, at) => slabs.text(place, at)),
          }
          if (!isSame(found, wanted)) return false
        }
        if (new Set(kept.map(({ place }) => place)).size !== kept.length) return false
      }
      return true
    }),
    { numRuns: 300 },
  )
  t.end()
})

function isSame(
  one: { numbers: number[]; texts: readonly string[] },
  other: { numbers: number[]; texts: readonly string[] },
): boolean {
  return (
    one.numbers.every((value, at) => Object.is(value, other.numbers[at])) &&
    one.texts.every((value, at) => value === other.texts[at])
  )
}

t.test('texts of every length come back, packed or not', (t) => {
  const slabs = createSlabs({ numbers: 0, texts: 2 })
  const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'
  const lengths = [...Array.from({ length: 300 }, (_, length) => length), 4_096, 65_536]
  for (const length of lengths) {
    const packable = Array.from({ length }, (_, at) => alphabet[(at * 7 + length) % 64]).join('')
    const place = slabs.put([], [packable, `é${packable}`])
    t.equal(slabs.text(place, 0), packable)
    t.equal(slabs.text(place, 1), `é${packable}`)
  }
  t.end()
})

t.test('a record larger than a slab has one of its own, and gives it back', (t) => {
  const slabs = createSlabs({ numbers: 1, texts: 1 })
  const small = slabs.put([1], ['x'])
  const huge = 'ü'.repeat(2 * MIB)
  const [first, second] = [slabs.put([2], [huge]), slabs.put([3], [huge])]
  t.equal(slabs.text(first, 0), huge)
  t.equal(slabs.text(second, 0), huge)
  t.ok(slabs.sizeBytes() > 9 * MIB)
  slabs.free(first)
  slabs.free(second)
  t.ok(slabs.sizeBytes() < 6 * MIB)
  t.equal(slabs.number(small, 0), 1)
  t.end()
})

t.test('what is freed is overwritten, and its neighbours are not', (t) => {
  const made = slabsMade(t)
  const slabs = createSlabs({ numbers: 1, texts: 2 })
  const secrets = ['s3cret/one', 's3cret/two', 's3cret/three']
  const places = secrets.map((secret) => slabs.put([1], [secret, '']))
  const holds = (secret: string) => made.some((bytes) => bytes.includes(secret))
  t.ok(secrets.every(holds))
  slabs.free(places[1] as Place)
  t.strictSame(secrets.map(holds), [true, false, true])
  t.equal(slabs.text(places[2] as Place, 0), 's3cret/three')
  t.end()
})

t.test('room is used again, and slabs that are empty are given back', (t) => {
  const slabs = createSlabs({ numbers: 8, texts: 1 })
  const fill = (count: number, characters: number) =>
    Array.from({ length: count }, () => slabs.put(Array(8).fill(1), ['t'.repeat(characters)]))
  const places = fill(10_000, 500)
  const fullBytes = slabs.sizeBytes()
  for (let round = 0; round < 20; round += 1) {
    for (const [index, place] of places.entries()) {
      slabs.free(place)
      places[index] = slabs.put(Array(8).fill(round), ['t'.repeat(500)])
    }
  }
  t.equal(slabs.sizeBytes(), fullBytes, 'tokens that come in the place of others')
  for (const place of places) slabs.free(place)
  t.equal(slabs.sizeBytes(), MIB, 'one slab is kept')
  const others = fill(10_000, 700)
  t.ok(slabs.sizeBytes() < 1.5 * fullBytes, 'the places of others are not waited for')
  for (const place of others) slabs.free(place)
  t.equal(slabs.sizeBytes(), 2 * MIB)
  t.end()
})

t.test('a hundred thousand tokens of 900 characters fit into 85 MiB', (t) => {
  const slabs = createSlabs({ numbers: 8, texts: 4 })
  const jwt = `${'h'.repeat(100)}.${'p'.repeat(456)}.${'s'.repeat(342)}`
  const texts = ['0b5e7f1e-5d7f-4d9c-8a43-0a1c2f9d7b11', jwt, 'f'.repeat(43), '']
  for (let i = 0; i < 100_000; i += 1) slabs.put([1, 2, 3, 4, 5, 6, 7, 8], texts)
  t.ok(slabs.sizeBytes() < 85 * MIB, `${slabs.sizeBytes() / MIB} MiB`)
  t.end()
})

t.test('a place where there is no slab, and a record of another shape, are errors', (t) => {
  const slabs = createSlabs({ numbers: 1, texts: 1 })
  t.throws(() => slabs.text(0 as Place, 0), RangeError)
  t.throws(() => slabs.put([], ['x']), TypeError)
  t.throws(() => slabs.put([1], []), TypeError)
  t.end()
})
