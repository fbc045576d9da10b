// Secrets at rest: AES-256-GCM, each value bound to the place where it stands.
// A sealed value is 0x01 || kid length (1 byte) || kid || nonce (12) || ciphertext || tag (16).
// What does not open is an integrity failure and nothing else: no trial decryption, no fallback to plain text.
// Which keys there are is config's business; sealing anew under another one that of `key-rotation.ts`.

import { createCipheriv, createDecipheriv, createSecretKey, randomBytes } from 'node:crypto'
import { BrokerError } from './errors.ts'
import type { Config } from './config.ts'
import { HASH_BYTES, hkdfSha256, hmacSha256 } from './hmac.ts'
import type { SealContext, Sealer } from './ports.ts'

/** First byte of every sealed value. Another layout or algorithm gets another number. */
const FORMAT_VERSION = 0x01
/** The nonce length for which GCM is defined without an extra hash (NIST SP 800-38D section 8.2). */
const NONCE_BYTES = 12
/** The full tag. Node would accept shorter ones when reading, so both directions insist on it. */
const TAG_BYTES = 16
/** AES-256, and the output length of SHA-256. */
const KEY_BYTES = HASH_BYTES
/** The kid's length stands in one byte. */
const KEY_ID_BYTES_MAX = 255

interface SealedParts {
  keyId: string
  nonce: Buffer
  ciphertext: Buffer
  tag: Buffer
}

/**
 * Creates the sealer of one deployment. The first key seals, all of them open.
 *
 * Each row's life and column has its own key (HKDF-SHA-256, RFC 5869), which keeps the number of random
 * nonces under one key far below the 2^32 that NIST SP 800-38D section 8.3 allows. Derived keys are not
 * cached: deriving one costs some 3 µs, next to a database round trip.
 *
 * @throws TypeError on an empty or double key ring, a wrong key length or an empty deployment id
 */
export function createSealer(keys: Config['encryptionKeys'], deploymentId: string): Sealer {
  const primaryKeyId = keys[0]?.keyId
  if (primaryKeyId === undefined) throw new TypeError('A sealer needs at least one key.')
  if (deploymentId === '') throw new TypeError('A sealer needs the id of its deployment.')
  const ring = keyRing(keys)
  const prefix = sealedPrefix(primaryKeyId)

  function keyOf(keyId: string, context: SealContext): Uint8Array {
    const key = ring.get(keyId)
    if (key === undefined) {
      throw integrityFailure(
        context,
        `was sealed with ${nameOfKey(keyId)}, which is not among the encryption keys`,
      )
    }
    return key
  }

  return {
    primaryKeyId,

    seal(context, secret) {
      assertContext(context)
      assertSecret(secret)
      const key = createSecretKey(deriveKey(keyOf(primaryKeyId, context), context, 'seal'))
      const nonce = randomBytes(NONCE_BYTES)
      const cipher = createCipheriv('aes-256-gcm', key, nonce, { authTagLength: TAG_BYTES })
      cipher.setAAD(associatedData(primaryKeyId, deploymentId, context))
      const ciphertext = Buffer.concat([cipher.update(secret, 'utf8'), cipher.final()])
      return Buffer.concat([prefix, nonce, ciphertext, cipher.getAuthTag()])
    },

    open(context, sealed) {
      assertContext(context)
      const parts = readSealed(sealed)
      if (typeof parts === 'string') throw integrityFailure(context, parts)
      const key = createSecretKey(deriveKey(keyOf(parts.keyId, context), context, 'seal'))
      const decipher = createDecipheriv('aes-256-gcm', key, parts.nonce, {
        authTagLength: TAG_BYTES,
      })
      decipher.setAAD(associatedData(parts.keyId, deploymentId, context))
      decipher.setAuthTag(parts.tag)
      const beforeCheck = decipher.update(parts.ciphertext)
      try {
        // GCM gives the whole text before it has checked the tag: nothing of it leaves unless this returns.
        decipher.final()
      } catch {
        throw integrityFailure(context, 'was changed, or belongs to another place')
      }
      return beforeCheck.toString('utf8')
    },

    // Generation stays out of it: the ledger asks whether two attempts presented the same token.
    digest(context, secret) {
      assertContext(context)
      assertSecret(secret)
      const key = deriveKey(keyOf(primaryKeyId, context), context, 'digest')
      return hmacSha256(key, lengthPrefixed([deploymentId, context.row, secret]))
    },
  }
}

/** Keyed hashes of the audit chains. */
export interface ChainKeys {
  /** Id of the key that new rows are hashed with. */
  readonly primaryKeyId: string
  /** HMAC-SHA-256 of the text; undefined when the key is not among the encryption keys. */
  mac(keyId: string, text: string): Buffer | undefined
}

/**
 * Derives the keys of the audit chains, one from each encryption key and for this deployment alone (HKDF-SHA-256, RFC 5869).
 * Whoever has the database and not the keys can change no row so that its hash fits.
 *
 * @throws TypeError as `createSealer`
 */
export function createChainKeys(keys: Config['encryptionKeys'], deploymentId: string): ChainKeys {
  const primaryKeyId = keys[0]?.keyId
  if (primaryKeyId === undefined) throw new TypeError('A chain needs at least one key.')
  const derived = new Map<string, Uint8Array>()
  for (const [keyId, key] of keyRing(keys)) {
    derived.set(keyId, hkdfSha256(key, deploymentId, 'pagero-broker/v1/audit'))
  }
  return {
    primaryKeyId,
    mac(keyId, text) {
      const key = derived.get(keyId)
      return key && hmacSha256(key, Buffer.from(text, 'utf8'))
    },
  }
}

/** Returns the id of the key that sealed the value, or undefined when it is no sealed value. Opens nothing. */
export function sealedKeyId(sealed: Buffer): string | undefined {
  const parts = readSealed(sealed)
  return typeof parts === 'string' ? undefined : parts.keyId
}

/** Returns what every value begins with that this key seals, in the present format. */
export function sealedPrefix(keyId: string): Buffer {
  const kid = Buffer.from(keyId, 'utf8')
  return Buffer.concat([Buffer.of(FORMAT_VERSION, kid.length), kid])
}

function keyRing(keys: Config['encryptionKeys']): ReadonlyMap<string, Uint8Array> {
  const ring = new Map<string, Uint8Array>()
  for (const { keyId, key } of keys) {
    const keyIdBytes = Buffer.byteLength(keyId, 'utf8')
    if (keyIdBytes === 0 || keyIdBytes > KEY_ID_BYTES_MAX) {
      throw new TypeError(`A key id has 1 to ${KEY_ID_BYTES_MAX} bytes.`)
    }
    if (key.byteLength !== KEY_BYTES) throw new TypeError(`A key has ${KEY_BYTES} bytes.`)
    if (ring.has(keyId)) throw new TypeError(`Two keys have the id ${keyId}.`)
    ring.set(keyId, Uint8Array.from(key))
  }
  return ring
}

/** Takes a sealed value apart, or says what is wrong with it. */
function readSealed(sealed: Buffer): SealedParts | string {
  const keyIdBytes = sealed[1]
  if (keyIdBytes === undefined) return 'is too short to be a sealed one'
  if (sealed[0] !== FORMAT_VERSION) return 'is in a format that this version does not know'
  const nonceFrom = 2 + keyIdBytes
  const ciphertextFrom = nonceFrom + NONCE_BYTES
  const tagFrom = sealed.length - TAG_BYTES
  // An empty secret is never sealed, so there is at least one byte between nonce and tag.
  if (keyIdBytes === 0 || tagFrom <= ciphertextFrom) return 'is too short to be a sealed one'
  return {
    keyId: sealed.toString('utf8', 2, nonceFrom),
    nonce: sealed.subarray(nonceFrom, ciphertextFrom),
    ciphertext: sealed.subarray(ciphertextFrom, tagFrom),
    tag: sealed.subarray(tagFrom),
  }
}

function deriveKey(key: Uint8Array, context: SealContext, purpose: 'seal' | 'digest'): Buffer {
  const prefix = purpose === 'seal' ? 'pagero-broker/v1/' : 'pagero-broker/v1/digest/'
  return hkdfSha256(key, context.salt, `${prefix}${context.table}.${context.column}`)
}

/** All that a value is bound to, in an order that never changes within a format version. */
function associatedData(keyId: string, deploymentId: string, context: SealContext): Buffer {
  return lengthPrefixed([
    String(FORMAT_VERSION),
    keyId,
    deploymentId,
    context.table,
    context.column,
    context.row,
    context.salt,
    String(context.generation),
  ])
}

/** Each part behind its length, so that no two lists of parts give the same bytes. */
function lengthPrefixed(parts: readonly string[]): Buffer {
  const lengthBytes = parts.reduce((sum, part) => sum + 4 + Buffer.byteLength(part, 'utf8'), 0)
  // Written to the last byte below.
  const bytes = Buffer.allocUnsafe(lengthBytes)
  let at = 0
  for (const part of parts) {
    const partBytes = bytes.write(part, at + 4, 'utf8')
    bytes.writeUInt32BE(partBytes, at)
    at += 4 + partBytes
  }
  return bytes
}

/** A context with an empty part would seal values that fit more than one place: a defect of the caller. */
function assertContext(context: SealContext): void {
  const { table, column, row, salt, generation } = context
  for (const part of [table, column, row, salt]) {
    if (part === '') throw new TypeError('Every part of a seal context must be given.')
    if (!part.isWellFormed()) throw new TypeError('A part of a seal context is not valid Unicode.')
  }
  if (!Number.isSafeInteger(generation) || generation < 0) {
    throw new TypeError('The generation of a seal context is a whole number, zero or more.')
  }
}

/** Sealing half a surrogate pair would give back another text than went in; that token would be lost. */
function assertSecret(secret: string): void {
  if (secret === '') throw new TypeError('An empty secret is never sealed.')
  if (!secret.isWellFormed()) throw new TypeError('The secret is not valid Unicode.')
}

function integrityFailure(context: SealContext, what: string): BrokerError {
  return new BrokerError(
    'integrity_failure',
    `The value stored in ${context.table}.${context.column} ${what}.`,
  )
}

/** A kid comes from storage here, so it may hold anything at all; the configured ones pass unchanged. */
function nameOfKey(keyId: string): string {
  return /^[A-Za-z0-9_-]{1,32}$/.test(keyId) ? `the key "${keyId}"` : 'a key of unreadable id'
}
