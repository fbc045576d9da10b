// How rows of the audit record hang together: each carries a keyed hash of itself and of the hash before it.
// Pure: rows in, hashes and verdicts out.

import type { AuditDetails, AuditRow } from './audit-event.ts'
import type { ChainKeys } from './seal.ts'

/** Before the first row of a chain there is nothing. */
export const NO_HASH: Buffer = Buffer.alloc(32)

/** First part of what is hashed. Another encoding gets another number. */
const ENCODING = 'pagero-broker audit 1'

/** Returns the hash that the row must have; undefined when its key is not among the encryption keys. */
export function hashOf(keys: ChainKeys, row: Omit<AuditRow, 'hash'>): Buffer | undefined {
  return keys.mac(row.keyId, encodingOf(row))
}

/**
 * Every column in a fixed order, as a JSON array: no two rows give the same text. The details are sorted, because the
 * database keeps their members in an order of its own.
 */
function encodingOf(row: Omit<AuditRow, 'hash'>): string {
  return JSON.stringify([
    ENCODING,
    row.keyId,
    row.chainId,
    row.sequence,
    row.at.toISOString(),
    row.replica,
    row.actorKind,
    row.actorName,
    row.action,
    row.user,
    row.outcome,
    row.requestId,
    row.fingerprint,
    row.count,
    sortedEntries(row.details),
    row.previousHash.toString('hex'),
  ])
}

function sortedEntries(details: AuditDetails): Array<[string, unknown]> {
  return Object.entries(details).toSorted(([a], [b]) => (a < b ? -1 : 1))
}
