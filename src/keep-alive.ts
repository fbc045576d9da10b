// Refreshes grants that nobody used for half their lifetime, once each and slowly. Nothing sooner: every refresh is a risk.

import { BrokerError } from './errors.ts'
import type { Ports } from './ports.ts'
import type { Refresher } from './refresh.ts'

/** Grants of one round. With a round a minute: 14,400 a day at most, one at a time. */
const GRANTS_A_ROUND = 10
/** What ails one grant alone; anything else would ail the next one too. */
const OF_ONE_GRANT = new Set(['reauthentication_required', 'grant_not_found', 'integrity_failure'])

/**
 * Refreshes a few grants that are due, one after the other, until the signal fires; returns how many were refreshed. Safe
 * on every replica.
 */
export async function keepAlive(
  ports: Pick<Ports, 'log' | 'grants'>,
  refresher: Refresher,
  stopping?: AbortSignal,
): Promise<number> {
  let refreshed = 0
  for (const grant of await ports.grants.findKeepAliveDue(GRANTS_A_ROUND)) {
    if (stopping?.aborted === true) break
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
