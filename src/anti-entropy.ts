// Brings what the spool holds into the database: at start, and every half minute. An entry that the row has not got is
// applied, one that it has is kept for a while longer in case a failover takes the commit back, one that belongs to a
// closed or replaced grant is revoked at Pagero. An applied entry goes when its time is over, or a later one of its login is
// applied too. Nothing here presents a refresh token.

import { BrokerError } from './errors.ts'
import type { Ports } from './ports.ts'
import type { ReplicaStore, StoreResult, Successor } from './grant-stores.ts'
import { revokeSuperseded } from './revocation.ts'

export interface AntiEntropy {
  /** Goes through the spool once. Resolves with true when nothing in it is left to apply. */
  runOnce(): Promise<boolean>
  /** True once a first pass has applied everything. */
  drained(): boolean
  /** Resolves when that has come to pass. */
  untilDrained: Promise<void>
  start(): void
  /** Resolves when a pass in progress has ended. */
  stop(): Promise<void>
}

/** Pause after a pass that the database kept from ending. */
const RETRY_MS = 1_000
/** Entries that one statement asks about. */
const CHUNK = 500

/** Makes the one loop of a process over its own spool. */
export function createAntiEntropy(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'revocations' | 'spool'> & {
    replicas: Pick<ReplicaStore, 'now' | 'spoolDrained'>
  },
  settings: { antiEntropySeconds: number; spoolRetentionSeconds: number },
  identity: { replica: string; boot: string },
): AntiEntropy {
  const { clock, log, grants, spool } = ports
  /** When this process first found an entry applied; where the ledger does not tell, its retention counts from there. */
  const appliedAtMs = new Map<string, number>()
  const stopping = new AbortController()
  const firstPass = Promise.withResolvers<void>()
  let drained = false
  /** After the pass that ended last. */
  let pauseMs = RETRY_MS
  let loop: Promise<void> | undefined

  async function runOnce(): Promise<boolean> {
    // Before the look: a word of this boot that the database hears late, after its death, says nothing of what the boots
    // after it have armed.
    const asOf = await ports.replicas.now()
    const { entries, isWhole } = await spool.list()
    /** Seconds since an entry was applied, by the database's clock. */
    const applied = new Map<string, number>()
    let isApplied = true
    for (let from = 0; from < entries.length; from += CHUNK) {
      const chunk = entries.slice(from, from + CHUNK)
      const stored = await grants.findStored(chunk)
      for (const entry of chunk) {
        const secondsAgo = stored.get(entry.attemptId)
        if (secondsAgo !== undefined) {
          applied.set(entry.attemptId, secondsAgo)
          continue
        }
        try {
          const result = await apply(entry)
          // What a failover took back is put back with all its time before it.
          if (result === 'stored') appliedAtMs.set(entry.attemptId, clock.monotonicMs())
          if (result !== 'superseded') applied.set(entry.attemptId, 0)
        } catch (error) {
          isApplied = false
          log.warn('spool_entry_not_applied', {
            user: entry.user,
            attemptId: entry.attemptId,
            error,
          })
        }
      }
    }
    // What could not be read may hold a successor: nobody may take that for applied.
    const complete = isApplied && isWhole
    // Again with each pass: a late heartbeat of the boot before may have undone it.
    if (complete) await ports.replicas.spoolDrained(identity.replica, identity.boot, asOf)
    if (complete && !drained) {
      drained = true
      firstPass.resolve()
      log.info('spool_drained', { count: entries.length })
    }
    await removeUnneeded(entries, applied)
    // What cannot be read will not be in a second either.
    if (isApplied) pauseMs = settings.antiEntropySeconds * 1000
    return complete
  }

  /** Brings one entry to the row; when no grant takes it any more, the spool lets go of it. */
  async function apply(entry: Successor): Promise<StoreResult> {
    const { user, attemptId, generation } = entry
    const result = await grants.store(entry)
    if (result === 'superseded') {
      await revokeOrKeep(entry)
    } else if (result === 'stored') {
      log.warn('spool_entry_applied', { user, attemptId, generation })
    }
    return result
  }

  /** No grant depends on an entry that is superseded: one that does not open waits for its key, and holds up nobody. */
  async function revokeOrKeep(entry: Successor): Promise<void> {
    try {
      await revokeSuperseded(ports, entry)
    } catch (error) {
      if (!(error instanceof BrokerError && error.code === 'integrity_failure')) throw error
      const { user, attemptId } = entry
      log.error('late_answer_unreadable', { user, attemptId, error })
    }
  }

  /**
   * Removes the applied entries whose time is over, and those that a later applied one of their login follows: the later
   * one takes the row on from wherever a failover puts it. A process that is killed again and again thus keeps one entry
   * of a login, not one of each of its refreshes.
   */
  async function removeUnneeded(
    entries: readonly Successor[],
    applied: ReadonlyMap<string, number>,
  ): Promise<void> {
    const nowMs = clock.monotonicMs()
    const newest = new Map<string, number>()
    for (const { loginId, attemptId, generation } of entries) {
      if (!applied.has(attemptId)) continue
      newest.set(loginId, Math.max(generation, newest.get(loginId) ?? 0))
    }
    for (const { loginId, attemptId, generation } of entries) {
      const secondsAgo = applied.get(attemptId)
      if (secondsAgo === undefined) continue
      const sinceMs = appliedAtMs.get(attemptId) ?? nowMs
      appliedAtMs.set(attemptId, sinceMs)
      const ageSeconds = secondsAgo > 0 ? secondsAgo : (nowMs - sinceMs) / 1000
      const isFollowed = generation < (newest.get(loginId) ?? 0)
      if (!isFollowed && ageSeconds < settings.spoolRetentionSeconds) continue
      try {
        await spool.remove(attemptId)
      } catch (error) {
        // The disk takes no changes; what must be applied has been, and the next pass tries again.
        log.warn('spool_entry_not_removed', { attemptId, error })
        break
      }
    }
    const present = new Set(entries.map(({ attemptId }) => attemptId))
    for (const attemptId of appliedAtMs.keys()) {
      if (!present.has(attemptId)) appliedAtMs.delete(attemptId)
    }
  }

  async function run(): Promise<void> {
    while (!stopping.signal.aborted) {
      pauseMs = RETRY_MS
      try {
        await runOnce()
      } catch (error) {
        log.warn('spool_pass_failed', { error })
      }
      await clock.sleep(pauseMs, stopping.signal)
    }
  }

  return {
    runOnce,
    drained: () => drained,
    untilDrained: firstPass.promise,
    start() {
      loop ??= run()
    },
    async stop() {
      stopping.abort()
      await loop
    },
  }
}
