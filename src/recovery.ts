// What an earlier boot of this replica left behind: rows that it armed, or that wait for a word of it. Nobody else comes
// for them by a timer of its own, and a user who is not asked for must learn of a loss too. Nothing here presents a
// refresh token; refresh.ts does, by the take-over rule.

import type { UserKey } from './grant.ts'
import type { Periodic } from './periodic.ts'
import type { Ports } from './ports.ts'
import type { Refresher } from './refresh.ts'

/** Read at a time. */
const PAGE_GRANTS = 100
/** Between one grant and the next: what a death has left must not come upon the server as a herd. */
const PACE_MS = 100
/** Pause after a page that could not be read. */
const RETRY_MS = 1_000

/** Goes through what was left behind, once, from when `drained` resolves: a successor in the spool settles a row. */
export function startRecovery(
  ports: Pick<Ports, 'clock' | 'log' | 'grants'>,
  refresher: Pick<Refresher, 'recover'>,
  identity: { replica: string; boot: string },
  drained: Promise<void>,
): Periodic {
  const { clock, log, grants } = ports
  const stopping = new AbortController()
  const { signal } = stopping

  async function run(): Promise<void> {
    let after: UserKey | undefined
    let count = 0
    while (!signal.aborted) {
      try {
        const page = await grants.findLeftBehind({ ...identity, after, limit: PAGE_GRANTS })
        for (const grant of page) {
          if (signal.aborted) return
          refresher.recover(grant)
          after = grant.user
          await clock.sleep(PACE_MS, signal)
        }
        count += page.length
        if (page.length < PAGE_GRANTS) break
      } catch (error) {
        log.warn('recovery_failed', { error })
        await clock.sleep(RETRY_MS, signal)
      }
    }
    if (count > 0) log.warn('attempts_left_behind', { count })
  }

  let running: Promise<void> | undefined
  void drained.then(() => (running = run()))
  return {
    async stop() {
      stopping.abort()
      await running
    },
  }
}
