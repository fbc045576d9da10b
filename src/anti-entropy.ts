// Brings what the spool holds into the database: at start, and every half minute. An entry that the row has not got is
// applied, one that it has is kept for a while longer in case a failover takes the commit back, one that belongs to a
// closed or replaced grant is revoked at Pagero. Nothing here presents a refresh token.

import type { Ports, ReplicaStore, Successor } from './ports.ts'
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

/** Makes the one loop of a process over its own spool. */
export function createAntiEntropy(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'revocations' | 'spool'> & {
    replicas: Pick<ReplicaStore, 'spoolDrained'>
  },
  settings: { antiEntropySeconds: number; spoolRetentionSeconds: number },
  identity: { replica: string; boot: string },
): AntiEntropy {
  const { clock, log, grants, spool } = ports
  /** When this process first found an entry applied; its retention counts from there. */
  const appliedAtMs = new Map<string, number>()
  const stopping = new AbortController()
  const firstPass = Promise.withResolvers<void>()
  let drained = false
  let loop: Promise<void> | undefined

  async function runOnce(): Promise<boolean> {
    const entries = await spool.list()
    let complete = true
    for (const entry of entries) {
      try {
        await apply(entry)
      } catch (error) {
        complete = false
        log.warn('spool_entry_not_applied', {
          user: entry.user,
          attemptId: entry.attemptId,
          error,
        })
      }
    }
    const present = new Set(entries.map(({ attemptId }) => attemptId))
    for (const attemptId of appliedAtMs.keys()) {
      if (!present.has(attemptId)) appliedAtMs.delete(attemptId)
    }
    // Again with each pass: a late heartbeat of the boot before may have undone it.
    if (complete) await ports.replicas.spoolDrained(identity.replica, identity.boot)
    if (complete && !drained) {
      drained = true
      firstPass.resolve()
      log.info('spool_drained', { count: entries.length })
    }
    return complete
  }

  async function apply(entry: Successor): Promise<void> {
    const { user, attemptId, generation } = entry
    const result = await grants.store(entry)
    if (result === 'superseded') {
      await revokeSuperseded(ports, entry)
      return
    }
    if (result === 'stored') log.warn('spool_entry_applied', { user, attemptId, generation })
    const nowMs = clock.monotonicMs()
    const sinceMs = appliedAtMs.get(attemptId) ?? nowMs
    appliedAtMs.set(attemptId, sinceMs)
    if (nowMs - sinceMs >= settings.spoolRetentionSeconds * 1000) await spool.remove(attemptId)
  }

  async function run(): Promise<void> {
    while (!stopping.signal.aborted) {
      let complete = false
      try {
        complete = await runOnce()
      } catch (error) {
        log.warn('spool_pass_failed', { error })
      }
      await clock.sleep(complete ? settings.antiEntropySeconds * 1000 : RETRY_MS, stopping.signal)
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
