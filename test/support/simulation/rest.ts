// What must hold once nothing goes wrong any more and everything has come to rest: every grant outside the irreducible
// set is alive, every other is reported with its cause, and the ledger agrees with the authorization server.

import type { UserKey } from '../../../src/grant.ts'
import type { SimulatedServer } from './authorization-server.ts'
import type { GrantRow, SimulatedDatabase } from './database.ts'
import { secretOf } from './disk.ts'
import type { Witness } from './witness.ts'

/** From the lease, or the end of a back-off, to the report of a loss. */
const REPORT_MS = 30_000

/** Judges every grant of the run. */
export function judgeAtRest(
  witness: Witness,
  database: SimulatedDatabase,
  server: SimulatedServer,
): void {
  for (const user of database.grants.keys()) judgeGrant(witness, database, server, user)
  judgeOrphans(witness, database, server)
}

/**
 * What an owner that lives, or has come back, settles by itself: judged when nobody has asked for a while. `nowMs` is by
 * the clock of the database.
 */
export function judgeUnasked(
  witness: Witness,
  database: SimulatedDatabase,
  server: SimulatedServer,
  { nowMs, isRunning }: { nowMs: number; isRunning: (replica: string) => boolean },
): void {
  for (const row of database.grants.values()) {
    if (row.state !== 'active' || row.owner === null) continue
    const dueMs = Math.max(row.leaseUntil?.getTime() ?? 0, row.nextRetryAt?.getTime() ?? 0)
    if (nowMs - dueMs < REPORT_MS) continue
    // Armed by a late statement of a boot that has died: nothing was sent, and whoever asks next may take over.
    if (witness.armedByDead.has(row.attemptId ?? '')) continue
    if (row.phase === 'armed') {
      if (isRunning(row.owner)) {
        witness.violate('rest', `${row.owner} does not come back to the grant of ${row.user}`)
      }
      continue
    }
    const inDoubt = database.inDoubt(row)
    const settlers = [row.owner, ...inDoubt.map(({ replica }) => replica)]
    if (inDoubt.length > 0 && settlers.some(isRunning) && isLostUnseen(witness, server, row)) {
      witness.violate('report', `the loss of ${row.user} waits for somebody to ask`)
    }
  }
}

function isLostUnseen(witness: Witness, server: SimulatedServer, row: GrantRow): boolean {
  const family = witness.logins.get(row.user)?.family
  if (family === undefined || row.refreshTokenSealed === null) return false
  if (server.accepts(secretOf(row.refreshTokenSealed))) return false
  return witness.excuses.get(family)?.has('successor_lost') === true
}

function judgeGrant(
  witness: Witness,
  database: SimulatedDatabase,
  server: SimulatedServer,
  user: UserKey,
): void {
  const row = database.grants.get(user)
  const login = witness.logins.get(user)
  if (row === undefined || login === undefined || row.state === 'revoked') return
  if (row.refreshTokenSealed === null) {
    witness.violate('H4', `${user} has no refresh token any more`)
    return
  }
  const token = secretOf(row.refreshTokenSealed)
  const { family } = login
  if (server.accepts(token) && row.state === 'active') {
    if (row.phase === 'armed') witness.violate('rest', `the grant of ${user} is left armed`)
    judgeLedger(witness, database, user)
    return
  }
  const told = `${user} holds ${token}, ${row.state} (${row.stateReason}), family ${
    family.ended ?? `at ${family.current}`
  }`
  const refused = (witness.lies.get(token) ?? 0) + (witness.doubted.has(token) ? 1 : 0)
  if (server.accepts(token)) {
    // Two refusals without a reason, or one after an end that nobody knows: no client could tell.
    if (refused < 2) witness.violate('H4', `${told}: it would be accepted`)
    else witness.count('refused for no reason')
    return
  }
  const irreducible =
    witness.excuses.has(family) ||
    (family.ended === undefined && !witness.isHeld(`rt.${family.id}.${family.current}`))
  if (family.ended === 'user') {
    witness.count('revoked by the user')
  } else if (!irreducible) {
    witness.violate('H4', `${told}: lost outside the irreducible set`)
  } else {
    witness.count('lost')
    // Of a request that arrived late, after its client had recovered, the ledger knows nothing.
    const onlyStale = [...(witness.excuses.get(family) ?? [])].join() === 'stale_request'
    // And a refusal that came first, for no reason, is the likelier explanation of those that follow.
    const misled = onlyStale || witness.lies.has(token) || witness.failedOverAtMs() > -Infinity
    if (row.stateReason !== 'rotation_lost' && !misled) {
      witness.violate('report', `${told}: the cause should be rotation_lost`)
    }
  }
  if (row.state !== 'reauthentication_required') {
    witness.violate('report', `${told}: the loss is not reported`)
  }
}

/** H7: successes at the server, steps of the generation, and granted attempts in the ledger are the same number. */
function judgeLedger(witness: Witness, database: SimulatedDatabase, user: UserKey): void {
  const row = database.grants.get(user)
  const login = witness.logins.get(user)
  if (row === undefined || login === undefined) return
  const granted = [...database.attempts.values()].filter(
    (one) => one.loginId === login.loginId && one.outcome === 'granted',
  ).length
  const steps = row.generation - login.generation
  // The ledger of what a failover took is lost with it.
  const isForgetful = witness.failedOverAtMs() > -Infinity
  const consumed = login.family.current - 1
  if ((granted !== steps && !isForgetful) || consumed !== steps) {
    witness.violate(
      'H7',
      `${user}: ${consumed} tokens consumed, ${steps} generations, ${granted} granted attempts`,
    )
  }
}

/** Whatever was closed or replaced must be revoked at the server, late answers included. */
function judgeOrphans(
  witness: Witness,
  database: SimulatedDatabase,
  server: SimulatedServer,
): void {
  const inUse = new Set([...witness.logins.values()].map(({ family }) => family))
  for (const row of database.grants.values()) {
    const login = witness.logins.get(row.user)
    if (row.state === 'revoked' && login !== undefined) inUse.delete(login.family)
  }
  for (const family of server.families) {
    if (inUse.has(family) || family.ended !== undefined) continue
    const token = `rt.${family.id}.${family.current}`
    if (!witness.isHeld(token)) continue
    witness.violate('revocation', `family ${family.id} is out of use and ${token} still accepted`)
  }
}
