// What a death, or a failover of the database, may leave behind: rows that this replica has armed, that wait for a word
// of it, or whose token it has presented in doubt. Nobody else comes for them by a timer of its own, and a user who is
// not asked for must learn of a loss too. Nothing here presents a refresh token; refresh.ts does, by the take-over rule.

import type { UserKey } from './grant.ts'
import type { Ports } from './ports.ts'
import type { Refresher } from './refresh.ts'

/** Read at a time. */
const PAGE_GRANTS = 100
/** Between one grant and the next: what is left behind must not come upon the server as a herd. */
const PACE_MS = 100
/** Pause after a page that could not be read. */
const RETRY_MS = 1_000

export interface Recovery {
  /** Goes through what was left behind, once, after any run that is under way. Nobody waits for it. */
  run(): void
  /** Resolves when no run is under way any more. */
  stop(): Promise<void>
}

/** Makes the one recovery of a process. Before it runs, the spool must have been gone through: that settles most rows. */
export function createRecovery(
  ports: Pick<Ports, 'clock' | 'log' | 'grants'>,
  refresher: Pick<Refresher, 'recover'>,
  identity: { replica: string },
): Recovery {
  const { clock, log, grants } = ports
  const stopping = new AbortController()
  const { signal } = stopping
  let running = Promise.resolve()

  async function goThrough(): Promise<void> {
    const { replica } = identity
    let after: UserKey | undefined
    let isLast = false
    while (!isLast && !signal.aborted) {
      try {
        const page = await grants.findUndecided({ replica, after, limit: PAGE_GRANTS })
        for (const grant of page) {
          if (signal.aborted) return
          log.info('attempt_left_behind', { user: grant.user, generation: grant.generation })
          refresher.recover(grant)
          after = grant.user
          await clock.sleep(PACE_MS, signal)
        }
        isLast = page.length < PAGE_GRANTS
      } catch (error) {
        log.warn('recovery_failed', { error })
        await clock.sleep(RETRY_MS, signal)
      }
    }
  }

  return {
    run() {
      running = running.then(goThrough)
    },
    async stop() {
      stopping.abort()
      await running
    },
  }
}
