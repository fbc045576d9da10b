// What follows from an outcome: how long a grant rests, and what a dead one died of. Pure rules of time and evidence.

import type { RefreshSettings } from './config.ts'
import type { DeathCause, Grant, TokenOutcome } from './grant.ts'
import type { Evidence } from './grant-stores.ts'

/** The back-off of one grant grows to 15 minutes. */
const BACKOFF_SECONDS_MAX = 900

/**
 * Seconds until a grant may be armed again after an attempt that brought no verdict. A failure that is `isOwn` makes the
 * pause grow; one that all share does not, so that everybody is back soon after the server is.
 */
export function retryDelaySeconds(
  grant: Pick<Grant, 'failureCount'>,
  outcome: Extract<TokenOutcome, { kind: 'rejected_client' | 'not_processed' | 'in_doubt' }>,
  settings: Pick<
    RefreshSettings,
    'retryBackoffSeconds' | 'breakerProbeSeconds' | 'unknownSettleSeconds'
  >,
  isOwn: boolean,
): number {
  const grown = Math.min(
    settings.retryBackoffSeconds * 2 ** Math.min(grant.failureCount, 20),
    isOwn ? BACKOFF_SECONDS_MAX : settings.breakerProbeSeconds,
  )
  switch (outcome.kind) {
    case 'rejected_client':
      // The breaker holds everybody back; no grant needs a back-off of its own.
      return Math.min(settings.retryBackoffSeconds, settings.breakerProbeSeconds)
    case 'not_processed':
      return Math.max(grown, outcome.retryAfterSeconds ?? 0)
    case 'in_doubt':
      return Math.max(grown, settings.unknownSettleSeconds)
  }
}

/** Whether a refusal is to be heard once more before it is believed: a replica of the server may lag behind. */
export function needsConfirming(evidence: Evidence): boolean {
  return !evidence.unknownBefore && evidence.refusals < 2
}

/** Tells from the ledger why a refresh token is dead. */
export function causeOfDeath(evidence: Evidence): DeathCause {
  if (evidence.laterGeneration) return 'restored_database'
  if (evidence.unknownBefore) return 'rotation_lost'
  if (evidence.lifetimeOver) return 'lifetime_over'
  return 'revoked_or_expired'
}
