// One entry of the spool as text: a successor in JSON, sealed tokens in base64.
// Reading is strict: a file that was cut, edited or written by another version is no entry.

import { parseUserKey, type SealedAccessToken } from './grant.ts'
import type { Successor, SuccessorId } from './grant-stores.ts'

/** Layout of an entry. A file of another version is set aside for the version that can read it. */
const ENTRY_VERSION = 1

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/

/** True for a UUID in lower case, as `randomUUID` and PostgreSQL write it. */
export function isAttemptId(text: string): boolean {
  return UUID.test(text)
}

/** Returns which successor it is, and lets go of its tokens. */
export function successorIdOf({ user, loginId, attemptId, generation }: Successor): SuccessorId {
  return { user, loginId, attemptId, generation }
}

/**
 * Returns the text of an entry. Nothing in it is secret: tokens come sealed.
 *
 * @throws TypeError or RangeError when the text could not be read back
 */
export function entryText(successor: Successor): string {
  const { accessToken } = successor
  const text = JSON.stringify({
    version: ENTRY_VERSION,
    user: successor.user,
    loginId: successor.loginId,
    attemptId: successor.attemptId,
    generation: successor.generation,
    refreshTokenSealed: successor.refreshTokenSealed.toString('base64'),
    keyId: successor.keyId,
    accessToken: accessToken && {
      sealed: accessToken.sealed.toString('base64'),
      requestedAt: accessToken.requestedAt.toISOString(),
      expiresAt: accessToken.expiresAt.toISOString(),
      fingerprint: accessToken.fingerprint,
    },
    scope: successor.scope,
    httpStatus: successor.httpStatus,
    durationMs: successor.durationMs,
  })
  // What could not be read back must not be taken for stored.
  parseEntry(text)
  return text
}

const ENTRY_MEMBERS = [
  'version',
  'user',
  'loginId',
  'attemptId',
  'generation',
  'refreshTokenSealed',
  'keyId',
  'accessToken',
  'scope',
  'httpStatus',
  'durationMs',
]
const ACCESS_TOKEN_MEMBERS = ['sealed', 'requestedAt', 'expiresAt', 'fingerprint']

/**
 * Reads an entry strictly: exactly its members, each of its type.
 *
 * @throws TypeError or SyntaxError when the text is not an entry of this version
 */
export function parseEntry(text: string): Successor {
  const entry = membersOf(JSON.parse(text), ENTRY_MEMBERS)
  if (entry['version'] !== ENTRY_VERSION) throw unreadable('version')
  const user = parseUserKey(stringOf(entry, 'user'))
  if (user === undefined) throw unreadable('user')
  return {
    user,
    loginId: stringOf(entry, 'loginId', UUID),
    attemptId: stringOf(entry, 'attemptId', UUID),
    generation: numberOf(entry, 'generation', Number.isSafeInteger),
    refreshTokenSealed: bytesOf(entry, 'refreshTokenSealed'),
    keyId: stringOf(entry, 'keyId', /./s),
    accessToken: entry['accessToken'] === null ? null : accessTokenOf(entry['accessToken']),
    scope: stringOf(entry, 'scope'),
    httpStatus: numberOf(entry, 'httpStatus', Number.isSafeInteger),
    durationMs: numberOf(entry, 'durationMs', Number.isFinite),
  }
}

function accessTokenOf(value: unknown): SealedAccessToken {
  const accessToken = membersOf(value, ACCESS_TOKEN_MEMBERS)
  return {
    sealed: bytesOf(accessToken, 'sealed'),
    requestedAt: instantOf(accessToken, 'requestedAt'),
    expiresAt: instantOf(accessToken, 'expiresAt'),
    fingerprint: stringOf(accessToken, 'fingerprint', /^[A-Za-z0-9_-]{43}$/),
  }
}

type Members = Readonly<Record<string, unknown>>

function membersOf(value: unknown, names: readonly string[]): Members {
  if (typeof value !== 'object' || value === null) throw unreadable('object')
  const found = Object.keys(value)
  if (found.length !== names.length || !names.every((name) => Object.hasOwn(value, name))) {
    throw unreadable('list of members')
  }
  return value as Members
}

function stringOf(members: Members, name: string, pattern = /^/): string {
  const value = members[name]
  if (typeof value !== 'string' || !pattern.test(value)) throw unreadable(name)
  return value
}

function numberOf(members: Members, name: string, accepts: (value: number) => boolean): number {
  const value = members[name]
  if (typeof value !== 'number' || value < 0 || !accepts(value)) throw unreadable(name)
  return value
}

/** Node reads base64 around anything that is none; encoding it again tells. */
function bytesOf(members: Members, name: string): Buffer {
  const text = stringOf(members, name, /./)
  const bytes = Buffer.from(text, 'base64')
  if (bytes.toString('base64') !== text) throw unreadable(name)
  return bytes
}

function instantOf(members: Members, name: string): Date {
  const text = stringOf(members, name)
  const instant = new Date(text)
  if (Number.isNaN(instant.getTime()) || instant.toISOString() !== text) throw unreadable(name)
  return instant
}

function unreadable(part: string): TypeError {
  return new TypeError(`The spool entry has no readable ${part}.`)
}
