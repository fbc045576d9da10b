// Who logged in: the subject that a token set names, and the user key made of it. Pure but for hashing.

import { createHash } from 'node:crypto'
import { type UserKey, PAGERO_USER_PREFIX } from './grant.ts'

/** A Pagero account. The issuer is null when no token named one. */
export interface PageroAccount {
  issuer: string | null
  subject: string
}

/** Of tokens that do not say whose they are: a connect link needs no more. */
export const UNKNOWN_ACCOUNT = { issuer: null, subject: null } as const
export type UnknownAccount = typeof UNKNOWN_ACCOUNT

/** Longest user key, in characters; see `parseUserKey`. */
const USER_KEY_CHARACTERS_MAX = 255

/** A subject that a user key can carry as it is. A `~` in front marks the encoded ones, so it is encoded itself. */
const PLAIN_SUBJECT = /^(?!~)[A-Za-z0-9._~@:+-]+$/

/**
 * Returns the user key of a subject: `pagero:<sub>`; `pagero:~` and its base64url where it has other
 * characters than a key may have; `pagero:~` and the base64url of its SHA-256 where that is too long.
 *
 * Undefined for a subject that is empty, or that holds half a surrogate pair: encoding would replace
 * the half, and two subjects would share a key.
 */
export function userKeyOfSubject(subject: string): UserKey | undefined {
  if (subject === '' || !subject.isWellFormed()) return undefined
  const plain = `${PAGERO_USER_PREFIX}${subject}`
  if (PLAIN_SUBJECT.test(subject) && plain.length <= USER_KEY_CHARACTERS_MAX) {
    return plain as UserKey
  }
  const encoded = `${PAGERO_USER_PREFIX}~${Buffer.from(subject, 'utf8').toString('base64url')}`
  if (encoded.length <= USER_KEY_CHARACTERS_MAX) return encoded as UserKey
  const digest = createHash('sha256').update(subject, 'utf8').digest('base64url')
  return `${PAGERO_USER_PREFIX}~${digest}` as UserKey
}

/** Returns the account that the claims name in `claim`, or undefined where there is no text in it. */
export function accountOfClaims(
  claims: Readonly<Record<string, unknown>>,
  claim: string,
): PageroAccount | undefined {
  const subject = claims[claim]
  if (typeof subject !== 'string' || subject === '') return undefined
  const { iss } = claims
  return { issuer: typeof iss === 'string' && iss !== '' ? iss : null, subject }
}

/**
 * Returns the claims of an access token if it is a JWT, else undefined. No signature is checked: the
 * token came from the token endpoint itself over TLS (OpenID Connect Core section 3.1.3.7 point 6 says
 * the same of ID tokens).
 */
export function accessTokenClaims(
  accessToken: string,
): Readonly<Record<string, unknown>> | undefined {
  const parts = accessToken.split('.')
  if (parts.length !== 3) return undefined
  try {
    const claims: unknown = JSON.parse(Buffer.from(parts[1] ?? '', 'base64url').toString('utf8'))
    return typeof claims === 'object' && claims !== null && !Array.isArray(claims)
      ? (claims as Record<string, unknown>)
      : undefined
  } catch {
    return undefined
  }
}
