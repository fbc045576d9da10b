// Who had a leaked access token, from the audit record. The token itself is looked at here and goes no further.

import { createHash } from 'node:crypto'
import { printable } from './log.ts'
import type { AuditStore, TokenUse } from './record-stores.ts'

/** What can be sent in a header; anything longer is no access token. */
const INPUT_LENGTH_MAX = 65_536

/**
 * Finds what is on record of an access token, given as it is or as its SHA-256 in hex or base64url.
 * @throws Error with a sentence that does not quote the input
 */
export async function findToken(
  auditEvents: Pick<AuditStore, 'findUses'>,
  input: string,
): Promise<TokenUse[]> {
  const text = input.trim().replace(/^Bearer +/i, '')
  if (text === '' || text.length > INPUT_LENGTH_MAX || !/^[\x21-\x7e]+$/.test(text)) {
    throw new Error('Give one access token, or its SHA-256 in hex or base64url, on standard input.')
  }
  return auditEvents.findUses(fingerprintsOf(text))
}

/** The fingerprints that it may stand for: a token may look like a hash. */
function fingerprintsOf(text: string): string[] {
  const fingerprints = [createHash('sha256').update(text).digest('base64url')]
  if (/^[0-9a-f]{64}$/i.test(text))
    fingerprints.push(Buffer.from(text, 'hex').toString('base64url'))
  if (/^[A-Za-z0-9_-]{43}=?$/.test(text)) fingerprints.push(text.slice(0, 43))
  return fingerprints
}

/** One line about a use, for a terminal. */
export function describeUse(use: TokenUse): string {
  const { actorKind, actorName, action, user, outcome, firstAt, lastAt, count } = use
  const actor = actorName === null ? actorKind : `${actorKind} ${printable(actorName)}`
  return [
    action,
    ...(outcome === 'succeeded' ? [] : [outcome]),
    actor,
    `user ${printable(user ?? '-')}`,
    `${count} times`,
    `${firstAt.toISOString()} to ${lastAt.toISOString()}`,
  ].join('\t')
}
