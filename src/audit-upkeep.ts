// What keeps the audit record provable and bounded: each replica notes where the chains end, so that rows cut off an end
// are missed, and takes away what is older than the retention, a prefix of each chain, with a note of it on record.

import type { AuditRow } from './audit-event.ts'
import type { AuditRecord } from './audit.ts'
import { hashOf, NO_HASH } from './audit-chain.ts'
import type { Ports } from './ports.ts'
import type { ChainKeys } from './seal.ts'

/** Chains whose end is noted at a time, about 110 bytes each: far more than there are replicas. */
const HEADS_MAX = 100
/** Rows that are read and checked at a time: five milliseconds of the process. */
const CHECK_ROWS = 500
/** Rows of a chain that go in one statement. */
const EXPIRE_ROWS_MAX = 10_000

/** Puts the ends of the chains that were written to last on record. */
export async function noteHeads({
  audit,
  auditEvents,
}: Pick<Ports, 'audit' | 'auditEvents'>): Promise<void> {
  const heads = await auditEvents.findHeads(HEADS_MAX)
  if (heads.length === 0) return
  audit.record({
    action: 'heads_noted',
    actor: 'broker',
    details: {
      heads: heads.map(
        ({ chainId, sequence, hash }) => `${chainId}:${sequence}:${hash.toString('hex')}`,
      ),
    },
  })
}

/**
 * Takes away rows that are older than `days`, until none is left that may go; returns how many went.
 *
 * Only rows whose hash fits go: who gives a row an earlier date does not have it swept away. What retention is about to
 * take is on record before it goes. Any number of replicas may do this at once.
 */
export async function expireEvents(
  { audit, auditEvents, log }: Pick<Ports, 'auditEvents' | 'log'> & { audit: AuditRecord },
  keys: ChainKeys,
  days: number,
  stopping?: AbortSignal,
): Promise<number> {
  let expired = 0
  for (;;) {
    if (stopping?.aborted === true) return expired
    const { before, chainIds } = await auditEvents.findDue(days)
    const cuts: Prefix[] = []
    for (const chainId of chainIds) {
      const prefix = await checkedPrefix(auditEvents, keys, chainId, before)
      if (prefix.fault !== undefined) {
        log.error('audit_row_kept', { reason: prefix.fault })
        audit.record({
          action: 'integrity_failure',
          actor: 'broker',
          outcome: 'failed',
          details: { chain: chainId, sequence: prefix.end, reason: prefix.fault },
        })
      }
      if (prefix.end > prefix.start) cuts.push(prefix)
    }
    if (cuts.length === 0) return expired
    for (const { chainId, end, isUnchecked } of cuts) {
      audit.record({
        action: 'events_expired',
        actor: 'broker',
        details: {
          chain: chainId,
          sequence: end,
          before: before.toISOString(),
          ...(isUnchecked ? { reason: 'not checked: their encryption key is not there' } : {}),
        },
      })
    }
    if (!(await audit.flush())) return expired
    for (const { chainId, start, end } of cuts) {
      await auditEvents.expire(chainId, end)
      expired += end - start
    }
  }
}

interface Prefix {
  chainId: string
  /** Sequence of the first row, and of the first one that is kept. */
  start: number
  end: number
  /** The key that the rows were hashed with is not among the encryption keys. */
  isUnchecked: boolean
  fault?: string
}

/** The rows at the beginning of a chain that are due and as they were written. */
async function checkedPrefix(
  auditEvents: Ports['auditEvents'],
  keys: ChainKeys,
  chainId: string,
  before: Date,
): Promise<Prefix> {
  const prefix: Prefix = { chainId, start: 0, end: 0, isUnchecked: false }
  let last: AuditRow | undefined
  for (let read = 0; read < EXPIRE_ROWS_MAX; read += CHECK_ROWS) {
    const rows = await auditEvents.readChain(chainId, prefix.end, CHECK_ROWS)
    for (const row of rows) {
      if (last === undefined) prefix.start = prefix.end = row.sequence
      if (row.at >= before) return prefix
      const hash = hashOf(keys, row)
      if (hash === undefined) prefix.isUnchecked = true
      else if (!hash.equals(row.hash) || !follows(last, row)) {
        return { ...prefix, fault: 'a row that is due was changed, or rows before it are missing' }
      }
      last = row
      prefix.end = row.sequence + 1
    }
    if (rows.length < CHECK_ROWS) break
  }
  return prefix
}

/** Whether the row is the next one of its chain; of the first one that is there only the beginning of a chain can be checked. */
function follows(last: AuditRow | undefined, row: AuditRow): boolean {
  if (last === undefined) return row.sequence > 0 || row.previousHash.equals(NO_HASH)
  return row.sequence === last.sequence + 1 && row.previousHash.equals(last.hash)
}
