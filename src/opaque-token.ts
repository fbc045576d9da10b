// Values that only their holder knows: state, nonce, PKCE verifier, login cookie, session token.
// 256 bits from the system's generator each; the database keeps their SHA-256 and never the value.

import { createHash, randomBytes } from 'node:crypto'

/** Twice the 128 bits that RFC 6749 section 10.10 asks for; the least that a PKCE verifier should have (RFC 7636 section 7.1). */
const TOKEN_BYTES = 32

/** 32 bytes in base64url without padding: 43 characters, the shortest verifier that RFC 7636 section 4.1 allows. */
const OPAQUE_TOKEN = /^[A-Za-z0-9_-]{43}$/

/** Returns a new value of 43 characters that need no escaping in a URL, a cookie or a header. */
export function newOpaqueToken(): string {
  return randomBytes(TOKEN_BYTES).toString('base64url')
}

/** Tells whether the text could be one of ours; what could not is never looked up. */
export function isOpaqueToken(text: string | undefined): text is string {
  return text !== undefined && OPAQUE_TOKEN.test(text)
}

/**
 * Returns the SHA-256 that stands for the value in the database.
 * Neither salted nor slow, because nobody guesses 256 random bits.
 */
export function hashOpaqueToken(token: string): Buffer {
  return createHash('sha256').update(token, 'utf8').digest()
}
