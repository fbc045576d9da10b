// Brings what the spool holds into the database: at start, and every half minute. An entry that the row has not got is
// applied, one that it has is kept for a while longer in case a failover takes the commit back, one that belongs to a
// closed or replaced grant is revoked at Pagero. An applied entry goes when its time is over, or a later one of its login is
// applied too, or others need its room. Nothing here presents a refresh token.

import { BrokerError } from './errors.ts'
import type { Ports } from './ports.ts'
import type { ReplicaStore, StoreResult, Successor, SuccessorId } from './grant-stores.ts'
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
/** How long an applied entry is kept when the spool is crowded: a failover takes back seconds. */
const CROWDED_RETENTION_SECONDS = 60

/** An entry that is applied. */
interface Applied extends SuccessorId {
  /** Monotonic; where the ledger does not tell when it was applied, its retention counts from here. */
  foundAtMs: number
}

/** Makes the one loop of a process over its own spool. */
export function createAntiEntropy(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'revocations' | 'spool'> & {
    replicas: Pick<ReplicaStore, 'now' | 'spoolDrained'>
  },
  settings: { antiEntropySeconds: number; spoolRetentionSeconds: number },
  identity: { replica: string; boot: string },
): AntiEntropy {
  const { clock, log, grants, spool } = ports
  /** Entries that were found applied, so that each pass need not read them from the disk again. */
  const applied = new Map<string, Applied>()
  const stopping = new AbortController()
  const firstPass = Promise.withResolvers<void>()
  let drained = false
  /** After the pass that ended last. */
  let pauseMs = RETRY_MS
  let loop: Promise<void> | undefined

  async function runOnce(): Promise<boolean> {
    // As of then it is known what is applied: a process may stand still before it acts on that.
    const askedAtMs = clock.monotonicMs()
    // Before the look: a word of this boot that the database hears late, after its death, says nothing of what the boots
    // after it have armed.
    const asOf = await ports.replicas.now()
    /** Seconds since each entry was applied, by the database's clock; of those that are. */
    const ageSeconds = await findAgeSeconds([...applied.values()])
    // What a failover has taken back is read again, like any other that is not applied.
    const { entries, isWhole } = await spool.list(ageSeconds)
    const unknown = entries.filter(({ attemptId }) => !ageSeconds.has(attemptId))
    for (const [attemptId, seconds] of await findAgeSeconds(unknown)) {
      ageSeconds.set(attemptId, seconds)
    }
    let isApplied = true
    for (const entry of unknown) {
      if (ageSeconds.has(entry.attemptId)) continue
      // What a failover took back has all its time before it again, whoever puts it back and whatever is heard of that.
      applied.delete(entry.attemptId)
      const result = await applyFromSpool(entry)
      if (result === 'failed') isApplied = false
      if (result === 'stored' || result === 'already_stored') ageSeconds.set(entry.attemptId, 0)
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
    noteApplied(entries, ageSeconds)
    await removeUnneeded(ageSeconds, askedAtMs)
    // What cannot be read will not be in a second either.
    if (isApplied) pauseMs = settings.antiEntropySeconds * 1000
    return complete
  }

  async function findAgeSeconds(entries: readonly SuccessorId[]): Promise<Map<string, number>> {
    const ageSeconds = new Map<string, number>()
    for (let from = 0; from < entries.length; from += CHUNK) {
      const stored = await grants.findStored(entries.slice(from, from + CHUNK))
      for (const [attemptId, secondsAgo] of stored) ageSeconds.set(attemptId, secondsAgo)
    }
    return ageSeconds
  }

  async function applyFromSpool({
    user,
    attemptId,
  }: SuccessorId): Promise<StoreResult | 'gone' | 'failed'> {
    try {
      const entry = await spool.read(attemptId)
      return entry === undefined ? 'gone' : await apply(entry)
    } catch (error) {
      log.warn('spool_entry_not_applied', { user, attemptId, error })
      return 'failed'
    }
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

  function noteApplied(
    entries: readonly SuccessorId[],
    ageSeconds: ReadonlyMap<string, number>,
  ): void {
    const foundAtMs = clock.monotonicMs()
    for (const entry of entries) {
      const { attemptId } = entry
      if (ageSeconds.has(attemptId) && !applied.has(attemptId)) {
        applied.set(attemptId, { ...entry, foundAtMs })
      }
    }
  }

  /**
   * Removes the applied entries whose time is over, and those that a later applied one of their login follows: the later
   * one takes the row on from wherever a failover puts it. A process that is killed again and again thus keeps one entry
   * of a login, not one of each of its refreshes. When the spool is crowded, the oldest go before their time.
   */
  async function removeUnneeded(
    ageSeconds: ReadonlyMap<string, number>,
    askedAtMs: number,
  ): Promise<void> {
    // Where it comes back, it has all its time before it.
    for (const attemptId of applied.keys()) if (!spool.has(attemptId)) applied.delete(attemptId)
    const newest = new Map<string, number>()
    for (const { loginId, attemptId, generation } of applied.values()) {
      if (!ageSeconds.has(attemptId)) continue
      newest.set(loginId, Math.max(generation, newest.get(loginId) ?? 0))
    }
    /** Undefined where it is not known to be applied. */
    const heldSecondsOf = ({ attemptId, foundAtMs }: Applied): number | undefined => {
      const secondsAgo = ageSeconds.get(attemptId)
      return secondsAgo === 0 ? Math.max(0, askedAtMs - foundAtMs) / 1000 : secondsAgo
    }
    for (const entry of applied.values()) {
      const heldSeconds = heldSecondsOf(entry)
      if (heldSeconds === undefined) continue
      const isFollowed = entry.generation < (newest.get(entry.loginId) ?? 0)
      if (!isFollowed && heldSeconds < settings.spoolRetentionSeconds) continue
      if (!(await remove(entry.attemptId))) return
    }
    const surplus = spool.surplus()
    if (surplus === 0) return
    const early = [...applied.values()]
      .map((entry) => ({ attemptId: entry.attemptId, heldSeconds: heldSecondsOf(entry) ?? 0 }))
      .filter(({ heldSeconds }) => heldSeconds >= CROWDED_RETENTION_SECONDS)
      .toSorted((a, b) => b.heldSeconds - a.heldSeconds)
      .slice(0, surplus)
    for (const { attemptId } of early) if (!(await remove(attemptId))) return
    if (early.length > 0) log.warn('spool_crowded', { count: early.length })
  }

  /** False when the disk takes no changes: what must be applied has been, and the next pass tries again. */
  async function remove(attemptId: string): Promise<boolean> {
    try {
      await spool.remove(attemptId)
      applied.delete(attemptId)
      return true
    } catch (error) {
      log.warn('spool_entry_not_removed', { attemptId, error })
      return false
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
