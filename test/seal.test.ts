// The sealer: what it sealed it opens, in the same place and nowhere else, and nothing that was changed.

import { randomBytes, randomInt } from 'node:crypto'
import * as fc from 'fast-check'
import t from 'tap'
import { createSealer, sealedKeyId } from '../src/seal.ts'
import type { SealContext } from '../src/ports.ts'

const DEPLOYMENT = '4f1d8a32-52a6-4a0e-8a5b-6a4b1f5f0d11'
const oldKey = { keyId: 'k1', key: randomBytes(32) }
const newKey = { keyId: 'k2', key: randomBytes(32) }
const sealer = createSealer([oldKey], DEPLOYMENT)

const place: SealContext = {
  table: 'grants',
  column: 'refresh_token',
  row: 'acme-alice',
  salt: '8c5fb1d6-0b7e-4a39-9a5c-3f9e0f4f8d10',
  generation: 7,
}
const SECRET = 'canary-refresh-token-0123456789'
const REFUSED = { name: 'BrokerError', code: 'integrity_failure' }

/** The value with one change at random: a bit flipped, bytes cut or added, two parts exchanged. */
function mutate(sealed: Buffer): Buffer {
  switch (randomInt(5)) {
    case 0: {
      const changed = Buffer.from(sealed)
      const at = randomInt(changed.length)
      changed[at] = changed[at]! ^ (1 << randomInt(8))
      return changed
    }
    case 1:
      return sealed.subarray(0, randomInt(sealed.length))
    case 2:
      return Buffer.concat([sealed, randomBytes(randomInt(1, 33))])
    case 3:
      return Buffer.concat([randomBytes(randomInt(1, 33)), sealed])
    default: {
      const at = randomInt(sealed.length)
      return Buffer.concat([sealed.subarray(0, at), sealed.subarray(at + 1)])
    }
  }
}

function opens(sealed: Buffer, context = place): boolean {
  try {
    sealer.open(context, sealed)
    return true
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'integrity_failure')
      return false
    throw error
  }
}

t.test('any secret comes back as it went in, and never lies in the value in clear', async (t) => {
  const text = fc.string({ unit: 'binary', minLength: 1, maxLength: 3000 })
  fc.assert(
    fc.property(text, (secret) => {
      const sealed = sealer.seal(place, secret)
      if (secret.length > 8) t.notOk(sealed.includes(secret))
      return sealer.open(place, sealed) === secret
    }),
    { numRuns: 500 },
  )
})

t.test('a value has the documented layout', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  t.equal(sealed[0], 0x01)
  t.equal(sealed[1], 2)
  t.equal(sealed.toString('latin1', 2, 4), 'k1')
  t.equal(sealed.length, 2 + 2 + 12 + SECRET.length + 16)
  t.equal(sealedKeyId(sealed), 'k1')
})

t.test('a value opens in no other place', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  const elsewhere: Record<string, SealContext> = {
    table: { ...place, table: 'revocations' },
    column: { ...place, column: 'access_token' },
    user: { ...place, row: 'acme-bob' },
    login: { ...place, salt: 'e2a1c0de-0000-4a39-9a5c-3f9e0f4f8d10' },
    'later generation': { ...place, generation: 8 },
    'earlier generation': { ...place, generation: 6 },
    'letters moved from row to salt': { ...place, row: 'acme-alic', salt: `e${place.salt}` },
    'letters moved from column to row': { ...place, column: 'refresh_toke', row: 'nacme-alice' },
  }
  for (const [what, context] of Object.entries(elsewhere)) {
    t.throws(() => sealer.open(context, sealed), REFUSED, what)
  }
  const otherDeployment = createSealer([oldKey], 'another-deployment')
  t.throws(() => otherDeployment.open(place, sealed), REFUSED, 'deployment')
  t.equal(sealer.open(place, sealed), SECRET, 'and it still opens in its own')
})

t.test('of 10,000 random mutations none is accepted', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  let accepted = 0
  for (let i = 0; i < 10_000; i += 1) if (opens(mutate(sealed))) accepted += 1
  t.equal(accepted, 0)
})

t.test('every single bit counts', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  let accepted = 0
  for (let bit = 0; bit < sealed.length * 8; bit += 1) {
    const changed = Buffer.from(sealed)
    changed[bit >> 3] = changed[bit >> 3]! ^ (1 << (bit & 7))
    if (opens(changed)) accepted += 1
  }
  t.equal(accepted, 0)
})

t.test('a tag cut to 4, 8, 12 or 15 bytes is refused', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  for (const tagBytes of [4, 8, 12, 15]) {
    t.notOk(opens(sealed.subarray(0, sealed.length - 16 + tagBytes)), `${tagBytes} bytes`)
  }
})

t.test('50,000 values of one place have 50,000 nonces', async (t) => {
  const nonces = new Set<string>()
  for (let i = 0; i < 50_000; i += 1) {
    nonces.add(sealer.seal(place, SECRET).toString('latin1', 4, 16))
  }
  t.equal(nonces.size, 50_000)
})

t.test('an unknown format byte is refused, and its key id is not read', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  sealed[0] = 0x02
  t.throws(() => sealer.open(place, sealed), {
    ...REFUSED,
    detail: /grants\.refresh_token.*format/,
  })
  t.equal(sealedKeyId(sealed), undefined)
})

t.test('a value too short to be one is refused at every length', async (t) => {
  const shortest = sealer.seal(place, 'x')
  t.ok(opens(shortest))
  for (let length = 0; length < shortest.length; length += 1) {
    t.notOk(opens(shortest.subarray(0, length)), `${length} bytes`)
  }
  t.equal(sealedKeyId(Buffer.alloc(0)), undefined)
  t.equal(sealedKeyId(Buffer.of(1, 0, ...randomBytes(40))), undefined, 'no key id')
  t.equal(sealedKeyId(Buffer.of(1, 255, ...randomBytes(40))), undefined, 'key id past the end')
})

t.test('a missing key is named, bytes that are no key id are not', async (t) => {
  const sealed = createSealer([newKey], DEPLOYMENT).seal(place, SECRET)
  t.throws(() => sealer.open(place, sealed), { ...REFUSED, detail: /the key "k2", which is not/ })
  sealed[2] = 0x0a
  t.throws(() => sealer.open(place, sealed), { ...REFUSED, detail: /a key of unreadable id/ })
})

t.test('a refusal says where, and nothing of the value', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  const failure = t.throws(() => sealer.open({ ...place, row: 'acme-bob' }, sealed), {
    ...REFUSED,
    detail: /^The value stored in grants\.refresh_token /,
  }) as Error
  t.notMatch(failure.message, SECRET)
  t.equal(failure.cause, undefined)
})

t.test('the first key seals and every key opens', async (t) => {
  const before = sealer.seal(place, SECRET)
  const rotated = createSealer([newKey, oldKey], DEPLOYMENT)
  t.equal(rotated.primaryKeyId, 'k2')
  t.equal(rotated.open(place, before), SECRET)
  const after = rotated.seal(place, SECRET)
  t.equal(sealedKeyId(after), 'k2')
  t.equal(createSealer([newKey], DEPLOYMENT).open(place, after), SECRET)
})

t.test('a value does not open under another key id with the same bytes', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  sealed[3] = '2'.charCodeAt(0)
  const renamed = createSealer([{ keyId: 'k2', key: oldKey.key }], DEPLOYMENT)
  t.throws(() => renamed.open(place, sealed), REFUSED)
})

t.test(
  'an empty part, a bad generation, an empty or broken secret is a defect, not a value',
  async (t) => {
    for (const part of ['table', 'column', 'row', 'salt'] as const) {
      const context = { ...place, [part]: '' } as SealContext
      t.throws(() => sealer.seal(context, SECRET), TypeError, part)
      t.throws(() => sealer.open(context, sealer.seal(place, SECRET)), TypeError, part)
      t.throws(() => sealer.digest(context, SECRET), TypeError, part)
    }
    for (const generation of [-1, 1.5, NaN, 2 ** 53]) {
      t.throws(() => sealer.seal({ ...place, generation }, SECRET), TypeError, String(generation))
    }
    t.throws(() => sealer.seal({ ...place, row: '\ud800' }, SECRET), TypeError)
    t.throws(() => sealer.seal(place, ''), TypeError)
    t.throws(() => sealer.seal(place, 'half a pair \ud800'), TypeError)
    t.throws(() => sealer.digest(place, ''), TypeError)
  },
)

t.test('a key ring that could not seal is refused', async (t) => {
  t.throws(() => createSealer([], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([oldKey], ''), TypeError)
  t.throws(() => createSealer([{ keyId: '', key: randomBytes(32) }], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([{ keyId: 'k'.repeat(256), key: randomBytes(32) }], 'd'), TypeError)
  t.throws(() => createSealer([{ keyId: 'k', key: randomBytes(31) }], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([oldKey, { ...newKey, keyId: 'k1' }], DEPLOYMENT), TypeError)
})

t.test(
  'a digest tells equal tokens of one grant, over generations, and nothing else',
  async (t) => {
    const digest = sealer.digest(place, SECRET)
    t.equal(digest.length, 32)
    t.ok(digest.equals(sealer.digest({ ...place, generation: 8 }, SECRET)), 'the same token')
    const others: Record<string, Buffer> = {
      'another token': sealer.digest(place, `${SECRET}.`),
      'another user': sealer.digest({ ...place, row: 'acme-bob' }, SECRET),
      'another login': sealer.digest({ ...place, salt: 'another' }, SECRET),
      'another column': sealer.digest({ ...place, column: 'access_token' }, SECRET),
      'another deployment': createSealer([oldKey], 'another').digest(place, SECRET),
      'another key': createSealer([newKey], DEPLOYMENT).digest(place, SECRET),
    }
    for (const [what, other] of Object.entries(others)) t.notOk(digest.equals(other), what)
  },
)
