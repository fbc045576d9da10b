// The sealer, exactly: what it sealed it opens, in the same place and nowhere else, and nothing that was changed. What
// takes many values to see is in seal-properties.test.ts.

import { randomBytes } from 'node:crypto'
import t from 'tap'
import type { BrokerError } from '../src/errors.ts'
import { createChainKeys, createSealer, sealedKeyId } from '../src/seal.ts'
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

/** Written once by this format; whatever is stored so must open for ever. */
const LONG_AGO = {
  key: { keyId: 'k1', key: Buffer.from(Array.from({ length: 32 }, (_, index) => index)) },
  secret: 'a token of long ago',
  sealed: 'AQJrMZlu1n1lwW0KMS1qHtljFd8G1C7BHbQMjnNaNIZHCGpbaOTvI1vY2AGLD+jQ2WLE',
  digest: '+yHwjQCMlGIMvoKlx2AihpcH8yv2fl+w8vLa9c6FFaI=',
  mac: 'mWX4trKp1obeYfHEWji2gFvsjaVoCAX4OANDM+BZOoQ=',
}

t.test('what was sealed, digested and chained long ago is still the same', async (t) => {
  const { key, secret, sealed, digest, mac } = LONG_AGO
  const then = createSealer([key], DEPLOYMENT)
  t.equal(then.open(place, Buffer.from(sealed, 'base64')), secret)
  t.equal(then.digest(place, secret).toString('base64'), digest)
  t.equal(createChainKeys([key], DEPLOYMENT).mac('k1', 'a row')?.toString('base64'), mac)
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
    const open = () => sealer.open(place, shortest.subarray(0, length))
    t.throws(open, { ...REFUSED, detail: /too short/ }, `${length} bytes`)
  }
  t.equal(sealedKeyId(Buffer.alloc(0)), undefined)
  t.equal(sealedKeyId(Buffer.of(1, 0, ...randomBytes(40))), undefined, 'no key id')
  t.equal(sealedKeyId(Buffer.of(1, 255, ...randomBytes(40))), undefined, 'key id past the end')
})

t.test('a missing key is named, bytes that are no key id are not', async (t) => {
  const sealed = createSealer([newKey], DEPLOYMENT).seal(place, SECRET)
  t.throws(() => sealer.open(place, sealed), { ...REFUSED, detail: /the key "k2", which is not/ })
  for (const byte of [0x0a, 0x22, 0xff]) {
    sealed[2] = byte
    t.throws(() => sealer.open(place, sealed), { ...REFUSED, detail: /a key of unreadable id/ })
  }
  const named = (keyId: string) => createSealer([{ ...newKey, keyId }], DEPLOYMENT)
  const detailOf = (keyId: string) => {
    const open = () => sealer.open(place, named(keyId).seal(place, SECRET))
    return (t.throws(open, REFUSED) as BrokerError).detail
  }
  t.match(detailOf('aZ09_-'), 'the key "aZ09_-"')
  t.match(detailOf('k'.repeat(32)), `the key "${'k'.repeat(32)}"`)
  for (const keyId of ['k'.repeat(33), 'k2\n', '<k2', 'k2>', 'ä']) {
    t.match(detailOf(keyId), 'a key of unreadable id', keyId)
  }
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
    t.equal(
      sealer.open({ ...place, generation: 0 }, sealer.seal({ ...place, generation: 0 }, 'x')),
      'x',
    )
    for (const generation of [-1, 1.5, NaN, 2 ** 53]) {
      t.throws(() => sealer.seal({ ...place, generation }, SECRET), TypeError, String(generation))
    }
    for (const part of ['column', 'row', 'salt'] as const) {
      t.throws(() => sealer.seal({ ...place, [part]: '\ud800' }, SECRET), TypeError, part)
    }
    t.throws(() => sealer.seal(place, ''), TypeError)
    t.throws(() => sealer.seal(place, 'half a pair \ud800'), TypeError)
    t.throws(() => sealer.digest(place, ''), TypeError)
    t.throws(() => sealer.digest(place, '\ud800'), TypeError)
  },
)

t.test('a key ring that could not seal is refused', async (t) => {
  const none = { name: 'TypeError', message: /needs at least one key/ }
  t.throws(() => createSealer([], DEPLOYMENT), none)
  t.throws(() => createSealer([oldKey], ''), TypeError)
  t.throws(() => createSealer([{ keyId: '', key: randomBytes(32) }], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([{ keyId: 'k'.repeat(256), key: randomBytes(32) }], 'd'), TypeError)
  t.throws(() => createSealer([{ keyId: 'k', key: randomBytes(31) }], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([{ keyId: 'k', key: randomBytes(33) }], DEPLOYMENT), TypeError)
  t.throws(() => createSealer([oldKey, { ...newKey, keyId: 'k1' }], DEPLOYMENT), TypeError)
  t.throws(() => createChainKeys([], DEPLOYMENT), none)
  t.throws(() => createChainKeys([oldKey, oldKey], DEPLOYMENT), TypeError)
})

t.test('a key id may have 255 bytes, not characters', async (t) => {
  const keyId = `${'ä'.repeat(127)}k`
  const longest = createSealer([{ keyId, key: oldKey.key }], DEPLOYMENT)
  const sealed = longest.seal(place, SECRET)
  t.equal(sealed[1], 255)
  t.equal(sealedKeyId(sealed), keyId)
  t.equal(longest.open(place, sealed), SECRET)
  t.throws(() => createSealer([{ keyId: 'ä'.repeat(128), key: oldKey.key }], 'd'), TypeError)
})

t.test('a chain is hashed with each key of the ring, for this deployment alone', async (t) => {
  const chains = createChainKeys([newKey, oldKey], DEPLOYMENT)
  t.equal(chains.primaryKeyId, 'k2')
  const mac = chains.mac('k1', 'a row ä')
  t.equal(mac?.length, 32)
  t.strictSame(mac, createChainKeys([oldKey], DEPLOYMENT).mac('k1', 'a row ä'))
  t.notSame(mac, chains.mac('k2', 'a row ä'))
  t.notSame(mac, chains.mac('k1', 'a row'))
  t.notSame(mac, createChainKeys([oldKey], 'another').mac('k1', 'a row ä'))
  t.equal(chains.mac('k3', 'a row ä'), undefined)
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
