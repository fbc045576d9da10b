// Whether the audit record is whole: every row as it was written, in its place, and none missing at an end. It reads the
// record as of one moment, a page at a time; what it keeps in memory is a few numbers for each chain.

import type { AuditRow } from './audit-event.ts'
import { hashOf, NO_HASH } from './audit-chain.ts'
import { printable } from './log.ts'
import type { AuditPlace, AuditSnapshot, AuditStore } from './record-stores.ts'
import type { ChainKeys } from './seal.ts'

export interface AuditVerdict {
  events: number
  chains: number
  /** What is wrong, the first of each chain, as a sentence. None: the record is unbroken. */
  faults: string[]
  /** What is worth knowing and no fault, as a sentence. */
  remarks: string[]
}

/** Rows that are read at a time: about a megabyte. */
const PAGE_ROWS = 1_000

/** What the other chains say of one. */
interface Anchor {
  /** The last row of it that somebody has seen. */
  noted?: { sequence: number; hash: string; at: Date }
  /** Retention took what comes before. */
  keptFrom: number
}

interface Anchors {
  of: Map<string, Anchor>
  /** Retention took what is older. */
  before: Date
  remarks: string[]
}

/**
 * Checks every row of the record.
 *
 * Without the key that a row was hashed with it cannot be checked, which is a fault. What nobody has noted yet cannot be
 * missed: rows that were cut off the end of a chain whose process is gone, since another process last noted it.
 */
export function verifyAudit(auditEvents: AuditStore, keys: ChainKeys): Promise<AuditVerdict> {
  return auditEvents.atOneMoment(async (snapshot) => {
    const anchors = await readAnchors(snapshot, keys)
    const live = new Set(await snapshot.liveChains())
    const verdict: AuditVerdict = { events: 0, chains: 0, faults: [], remarks: anchors.remarks }
    let chain: Chain | undefined
    const end = () => {
      if (chain === undefined) return
      const fault = chain.fault ?? faultAtEnd(chain, anchors.of.get(chain.id))
      if (fault !== undefined) verdict.faults.push(`chain ${chain.id}: ${fault}`)
      else if (!chain.isClosed && !live.has(chain.id)) verdict.remarks.push(openEnd(chain))
      anchors.of.delete(chain.id)
    }
    for await (const row of pages((after) => snapshot.rows(after, PAGE_ROWS))) {
      verdict.events += 1
      if (chain?.id !== row.chainId) {
        end()
        chain = { id: row.chainId, replica: row.replica, isClosed: false }
        verdict.chains += 1
      }
      chain.fault ??= faultOf(row, chain.last, keys, anchors.of.get(row.chainId))
      chain.last = row
      chain.isClosed = row.action === 'chain_closed'
    }
    end()
    for (const [id, { noted, keptFrom }] of anchors.of) {
      if (noted === undefined || noted.sequence < keptFrom || noted.at < anchors.before) continue
      verdict.faults.push(
        `chain ${id}: it is missing; it had rows up to ${noted.sequence} or later`,
      )
    }
    if (verdict.events === 0) {
      verdict.faults.push(
        'There is no event at all: the broker has never run, or all was taken away.',
      )
    }
    return verdict
  })
}

interface Chain {
  id: string
  replica: string
  last?: AuditRow
  isClosed: boolean
  fault?: string | undefined
}

async function readAnchors(snapshot: AuditSnapshot, keys: ChainKeys): Promise<Anchors> {
  const anchors: Anchors = { of: new Map(), before: new Date(0), remarks: [] }
  const of = (id: string): Anchor => {
    let anchor = anchors.of.get(id)
    if (anchor === undefined) anchors.of.set(id, (anchor = { keptFrom: 0 }))
    return anchor
  }
  for await (const row of pages((after) => snapshot.anchors(after, PAGE_ROWS))) {
    // One that was changed says nothing, and is told of with its own chain.
    if (hashOf(keys, row)?.equals(row.hash) !== true) continue
    const { heads = [], chain, sequence = 0, before, reason } = row.details
    for (const head of heads) {
      const [id = '', place = '', hash = ''] = head.split(':')
      const anchor = of(id)
      if (Number(place) >= (anchor.noted?.sequence ?? 0)) {
        anchor.noted = { sequence: Number(place), hash, at: row.at }
      }
    }
    if (row.action !== 'events_expired' || chain === undefined) continue
    const anchor = of(chain)
    anchor.keptFrom = Math.max(anchor.keptFrom, sequence)
    if (before !== undefined && new Date(before) > anchors.before) anchors.before = new Date(before)
    if (reason !== undefined) {
      anchors.remarks.push(`chain ${chain}: retention took rows before ${sequence}, ${reason}`)
    }
  }
  return anchors
}

async function* pages(
  read: (after: AuditPlace | undefined) => Promise<AuditRow[]>,
): AsyncGenerator<AuditRow> {
  let after: AuditRow | undefined
  for (;;) {
    const rows = await read(after)
    yield* rows
    if (rows.length < PAGE_ROWS) return
    after = rows.at(-1)
  }
}

/** What is wrong with a row, or with how it follows the one before it. */
function faultOf(
  row: AuditRow,
  last: AuditRow | undefined,
  keys: ChainKeys,
  anchor: Anchor | undefined,
): string | undefined {
  const { sequence, at } = row
  const expected =
    last === undefined ? Math.min(sequence, anchor?.keptFrom ?? 0) : last.sequence + 1
  if (sequence !== expected) {
    const missing =
      sequence - 1 === expected ? `row ${expected} is` : `rows ${expected} to ${sequence - 1} are`
    return `${missing} missing, before ${at.toISOString()}`
  }
  const hash = hashOf(keys, row)
  if (hash === undefined) {
    return `row ${sequence} cannot be checked without the encryption key "${printable(row.keyId)}": put it back into ENCRYPTION_KEYS, behind the others`
  }
  if (!hash.equals(row.hash)) return `row ${sequence} was changed, inserted or moved here`
  const previousHash = last?.hash ?? (sequence === 0 ? NO_HASH : row.previousHash)
  if (!row.previousHash.equals(previousHash))
    return `row ${sequence} does not continue the row before it`
  if (anchor?.noted?.sequence === sequence && anchor.noted.hash !== row.hash.toString('hex')) {
    return `row ${sequence} is not the one that others have noted`
  }
  return undefined
}

function faultAtEnd({ last }: Chain, anchor: Anchor | undefined): string | undefined {
  const noted = anchor?.noted?.sequence ?? -1
  if (last === undefined || noted <= last.sequence) return undefined
  return `its end is missing: rows ${last.sequence + 1} to ${noted}, or more`
}

function openEnd({ id, replica, last }: Chain): string {
  const where = last === undefined ? '' : ` ${last.sequence}, ${last.at.toISOString()}`
  return `chain ${id} of ${printable(replica)} ends openly with row${where}: its process was killed. No row before this one is missing; one behind it would only be missed if another process had noted it.`
}
