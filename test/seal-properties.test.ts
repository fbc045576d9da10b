// The sealer, over many values: any text, any change, any number of nonces.

import { randomBytes, randomInt } from 'node:crypto'
import * as fc from 'fast-check'
import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import type { SealContext } from '../src/ports.ts'
import { createSealer } from '../src/seal.ts'

const sealer = createSealer([{ keyId: 'k1', key: randomBytes(32) }], 'a deployment')
const place: SealContext = {
  table: 'grants',
  column: 'refresh_token',
  row: 'acme-alice',
  salt: '8c5fb1d6-0b7e-4a39-9a5c-3f9e0f4f8d10',
  generation: 7,
}
const SECRET = 'canary-refresh-token-0123456789'

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

t.test('of 10,000 random mutations none is accepted', async (t) => {
  const sealed = sealer.seal(place, SECRET)
  let accepted = 0
  for (let i = 0; i < 10_000; i += 1) {
    try {
      sealer.open(place, mutate(sealed))
      accepted += 1
    } catch (error) {
      if (!(error instanceof BrokerError) || error.code !== 'integrity_failure') throw error
    }
  }
  t.equal(accepted, 0)
})

t.test('50,000 values of one place have 50,000 nonces', async (t) => {
  const nonces = new Set<string>()
  for (let i = 0; i < 50_000; i += 1) {
    nonces.add(sealer.seal(place, SECRET).toString('latin1', 4, 16))
  }
  t.equal(nonces.size, 50_000)
})
