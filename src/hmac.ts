// HMAC-SHA-256 (RFC 2104) and HKDF-SHA-256 (RFC 5869), written down over Node's one-shot hash. Node has both: to set them up
// takes it two to three times as long as to do this, and a key is derived for each value that is opened or sealed. Its hashes
// come as texts, so what is derived stands in memory until that is collected, as every token does that is served.

import { hash } from 'node:crypto'

/** Of SHA-256, and so of everything here. */
export const HASH_BYTES = 32
const BLOCK_BYTES = 64
const INNER_PAD = 0x36
const OUTER_PAD = 0x5c

/** Stands behind the info in the first block of output, and with one block in the only one (RFC 5869 section 2.3). */
const FIRST_BLOCK = '\u0001'

/** Returns HMAC-SHA-256 of the message (RFC 2104 section 2). */
export function hmacSha256(key: Uint8Array, message: Uint8Array): Buffer {
  const short = key.length > BLOCK_BYTES ? sha256(key) : key
  const inner = Buffer.allocUnsafe(BLOCK_BYTES + message.length).fill(INNER_PAD, 0, BLOCK_BYTES)
  const outer = Buffer.allocUnsafe(BLOCK_BYTES + HASH_BYTES).fill(OUTER_PAD, 0, BLOCK_BYTES)
  for (let index = 0; index < short.length; index += 1) {
    const byte = short[index] ?? 0
    inner[index] = byte ^ INNER_PAD
    outer[index] = byte ^ OUTER_PAD
  }
  inner.set(message, BLOCK_BYTES)
  outer.set(sha256(inner), BLOCK_BYTES)
  const mac = sha256(outer)
  // Keys have stood in both, and they lie where other buffers will.
  inner.fill(0)
  outer.fill(0)
  return mac
}

/**
 * Returns a key of 32 bytes, one block of output, from another one (RFC 5869 section 2). Texts are taken in UTF-8.
 * Whoever asks for keys of several kinds gives each its own `info`.
 */
export function hkdfSha256(key: Uint8Array, salt: string, info: string): Buffer {
  const pseudorandomKey = hmacSha256(Buffer.from(salt, 'utf8'), key)
  return hmacSha256(pseudorandomKey, Buffer.from(info + FIRST_BLOCK, 'utf8'))
}

/** Through a text of one character a byte: asked for bytes, Node takes three times as long. */
function sha256(data: Uint8Array): Buffer {
  return Buffer.from(hash('sha256', data, 'binary'), 'binary')
}
