// Seals anew, with the first of the encryption keys, whatever in the database another one has sealed, so that the others can
// be taken out. It runs beside the replicas: a value is replaced only where it still stands as it was read, what is in it
// stays the same, and Pagero is not called. Whoever is killed in the middle leaves rows that are sealed whole, and begins anew.

import { BrokerError } from './errors.ts'
import { grantSealContext, type UserKey } from './grant.ts'
import type {
  ResealedRow,
  RowKey,
  SealedRow,
  SealedTable,
  SealedValueStore,
} from './grant-stores.ts'
import { codeVerifierSealContext } from './login.ts'
import { pendingSealContext } from './pending-grant.ts'
import type { Clock, SealContext, Sealer } from './ports.ts'
import { revocationSealContext } from './revocation.ts'
import { sealedKeyId, sealedPrefix } from './seal.ts'

/** Every table with a sealed column. */
export const SEALED_TABLES: readonly SealedTable[] = [
  'grants',
  'pending_grants',
  'revocations',
  'login_transactions',
]

/** Rows that a statement looks at, and locks for some milliseconds. */
const BATCH = 200
/**
 * What is written behind a pass, or written or locked while it comes by, is left to the next one. The last one must find
 * nothing.
 */
const PASSES_MAX = 30
const PAUSE_MS = 500

/** Unreadable rows that are told of; they have one reason mostly. */
const TOLD_MAX = 20

/** A row that stays as it is. */
export interface UnreadableRow {
  /** Undefined for a login that is under way: it is nobody's yet. */
  user: UserKey | undefined
  /** Which value does not open, and why. */
  detail: string
}

export interface KeyRotation {
  /** Rows sealed anew, by table. */
  counts: Record<SealedTable, number>
  /** Rows with a value that does not open, because its key is missing or it was changed: how many need which key. */
  unreadableCounts: Record<string, number>
  /** The first of them. */
  unreadable: UnreadableRow[]
  /** Rows that the last pass still found: they are locked, or somebody seals with another key. */
  leftCount: number
}

/**
 * Seals everything in the database with the first key. Any number of these, and of replicas, may run at once; they come to
 * an end when all have the same first key.
 *
 * @throws BrokerError `temporarily_unavailable` when the database is away; what has been sealed by then stays so
 */
export async function rotateKeys(ports: {
  clock: Pick<Clock, 'sleep'>
  sealer: Sealer
  sealedValues: SealedValueStore
}): Promise<KeyRotation> {
  const rotation: KeyRotation = {
    counts: { grants: 0, pending_grants: 0, revocations: 0, login_transactions: 0 },
    ...{ unreadableCounts: {}, unreadable: [], leftCount: 0 },
  }
  for (let pass = 1; pass <= PASSES_MAX; pass += 1) {
    Object.assign(rotation, { unreadableCounts: {}, unreadable: [], leftCount: 0 })
    const before = sum(rotation.counts)
    for (const table of SEALED_TABLES) await rotateTable(ports, table, rotation)
    if (rotation.leftCount === 0) break
    // Those that it found and could not write are in the hands of somebody for a while.
    if (sum(rotation.counts) - before < rotation.leftCount) await ports.clock.sleep(PAUSE_MS)
  }
  return rotation
}

function sum(counts: Readonly<Record<string, number>>): number {
  return Object.values(counts).reduce((total, count) => total + count, 0)
}

/** Goes through the table once, and adds to `rotation` what it has found and done. */
async function rotateTable(
  { sealer, sealedValues }: { sealer: Sealer; sealedValues: SealedValueStore },
  table: SealedTable,
  rotation: KeyRotation,
): Promise<void> {
  const prefix = sealedPrefix(sealer.primaryKeyId)
  let after: RowKey | undefined
  for (;;) {
    const page = { after, limit: BATCH }
    const { rows, last } = await sealedValues.findSealedOtherwise(table, prefix, page)
    if (last === undefined) return
    after = last
    const readable: ResealedRow[] = []
    for (const row of rows) {
      try {
        readable.push({ row, sealed: sealAnew(sealer, row) })
      } catch (error) {
        if (!(error instanceof BrokerError && error.code === 'integrity_failure')) throw error
        noteUnreadable(rotation, row, error)
      }
    }
    rotation.leftCount += readable.length
    rotation.counts[table] += await sealedValues.replaceSealed(table, readable, sealer.primaryKeyId)
  }
}

function noteUnreadable(
  { unreadable, unreadableCounts }: KeyRotation,
  row: SealedRow,
  { detail }: BrokerError,
): void {
  const values = Object.values(row.sealed).filter((value) => value !== null)
  for (const keyId of new Set(
    values.map((value) => sealedKeyId(value) ?? 'a key that is not told'),
  )) {
    unreadableCounts[keyId] = (unreadableCounts[keyId] ?? 0) + 1
  }
  if (unreadable.length === TOLD_MAX) return
  unreadable.push({ user: 'user' in row ? row.user : undefined, detail })
}

/** All values of a row, or none: its column `key_id` names one key. */
function sealAnew(sealer: Sealer, row: SealedRow): SealedRow['sealed'] {
  return Object.fromEntries(
    Object.entries(row.sealed).map(([column, value]) => {
      if (value === null) return [column, null]
      const context = contextOf(row, column)
      return [column, sealer.seal(context, sealer.open(context, value))]
    }),
  )
}

function contextOf(row: SealedRow, column: string): SealContext {
  switch (row.table) {
    case 'grants':
      return grantSealContext(column as 'refresh_token_sealed' | 'access_token_sealed', row)
    case 'pending_grants':
      // Sealed for the row that it becomes in the other table.
      return column === 'revocation_token_sealed'
        ? revocationSealContext(row.revocationId)
        : pendingSealContext(column as 'refresh_token_sealed' | 'access_token_sealed', row)
    case 'revocations':
      return revocationSealContext(row.revocationId)
    case 'login_transactions':
      return codeVerifierSealContext(row.stateHash)
  }
}
