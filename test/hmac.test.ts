// HMAC and HKDF over the one-shot hash: the vectors of the RFCs, and the same as Node's own for keys and texts of any length.

import { createHmac, hkdfSync, randomBytes } from 'node:crypto'
import t from 'tap'
import { hkdfSha256, hmacSha256 } from '../src/hmac.ts'

const hex = (text: string) => Buffer.from(text, 'hex')

t.test('HMAC-SHA-256 gives what RFC 4231 says', async (t) => {
  const cases: Array<[key: Buffer, message: Buffer, mac: string]> = [
    [
      Buffer.alloc(20, 0x0b),
      Buffer.from('Hi There'),
      'b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7',
    ],
    [
      Buffer.from('Jefe'),
      Buffer.from('what do ya want for nothing?'),
      '5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843',
    ],
    [
      Buffer.alloc(20, 0xaa),
      Buffer.alloc(50, 0xdd),
      '773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe',
    ],
    [
      Buffer.alloc(131, 0xaa),
      Buffer.from('Test Using Larger Than Block-Size Key - Hash Key First'),
      '60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54',
    ],
  ]
  for (const [key, message, mac] of cases) t.equal(hmacSha256(key, message).toString('hex'), mac)
})

t.test('HKDF-SHA-256 gives what RFC 5869 says, of which it returns the first block', async (t) => {
  t.equal(
    hkdfSha256(hex('0b'.repeat(22)), '', '').toString('hex'),
    '8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d',
  )
})

t.test('both give what Node does, whatever the lengths', async (t) => {
  const lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1_000, 10_000]
  const mismatches: string[] = []
  for (const keyBytes of lengths) {
    for (const otherBytes of lengths) {
      const key = randomBytes(keyBytes)
      const message = randomBytes(otherBytes)
      const mac = createHmac('sha256', key).update(message).digest()
      if (!hmacSha256(key, message).equals(mac)) mismatches.push(`hmac ${keyBytes} ${otherBytes}`)
      // Characters of one, two, three and four bytes. Node takes an info of 1,024 bytes at most.
      const salt = 'sælt塩🧂'.repeat(otherBytes)
      const info = 'ïnfo情報ℹ'.slice(0, otherBytes)
      const derived = Buffer.from(hkdfSync('sha256', key, salt, info, 32))
      if (!hkdfSha256(key, salt, info).equals(derived)) {
        mismatches.push(`hkdf ${keyBytes} ${otherBytes}`)
      }
    }
  }
  t.strictSame(mismatches, [])
})

t.test('what it was given stays as it was', async (t) => {
  const key = Buffer.alloc(32, 7)
  const message = Buffer.alloc(100, 9)
  hmacSha256(key, message)
  t.ok(key.equals(Buffer.alloc(32, 7)))
  t.ok(message.equals(Buffer.alloc(100, 9)))
})
