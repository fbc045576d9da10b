// Refreshes grants that nobody used for half their lifetime, once each and slowly. Nothing sooner: every refresh is a risk.

import { BrokerError } from './errors.ts'
import type { UserKey } from './grant.ts'
import type { Ports } from './ports.ts'
import type { Refresher } from './refresh.ts'

/** Grants of one round. With a round a minute: 14,400 a day at most, one at a time. */
const GRANTS_A_ROUND = 10
/** What ails one grant alone; anything else would ail the next one too. */
const OF_ONE_GRANT = new Set(['reauthentication_required', 'grant_not_found', 'integrity_failure'])

/**
 * Makes the round of keeping alive of a process: it refreshes a few grants that are due, one after the other, until the
 * signal fires, and returns how many were refreshed. The next round goes on after the last one that was tried, so that
 * those that cannot be refreshed keep no other from it. Safe on every replica; one round at a time.
 */
export function createKeepAlive(
  ports: Pick<Ports, 'log' | 'grants'>,
  refresher: Pick<Refresher, 'refresh'>,
): (stopping?: AbortSignal) => Promise<number> {
  let after: UserKey | undefined
  return async (stopping) => {
    let refreshed = 0
    const due = await ports.grants.findKeepAliveDue({ after, limit: GRANTS_A_ROUND })
    if (due.length === 0) after = undefined
    for (const grant of due) {
      if (stopping?.aborted === true) break
      after = grant.user
      try {
        await refresher.refresh(grant, 'keep_alive')
        refreshed += 1
      } catch (error) {
        const code = error instanceof BrokerError ? error.code : 'internal_error'
        ports.log.warn('keep_alive_failed', { user: grant.user, code })
        if (!OF_ONE_GRANT.has(code)) break
      }
    }
    return refreshed
  }
}
