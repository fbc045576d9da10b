// What follows from an outcome: how long a grant rests, and what a dead one died of. Pure rules of time and evidence.

import type { RefreshSettings } from './config.ts'
import type { DeathCause, Grant, TokenOutcome } from './grant.ts'
import type { Evidence } from './ports.ts'

/** The back-off of one grant grows to 15 minutes. */
const BACKOFF_SECONDS_MAX = 900

/** Seconds until a grant may be armed again after an attempt that brought no verdict. */
export function retryDelaySeconds(
  grant: Pick<Grant, 'failureCount'>,
  outcome: Extract<TokenOutcome, { kind: 'rejected_client' | 'not_processed' | 'in_doubt' }>,
  settings: Pick<
    RefreshSettings,
    'retryBackoffSeconds' | 'breakerProbeSeconds' | 'unknownSettleSeconds'
  >,
): number {
  const grown = Math.min(
    settings.retryBackoffSeconds * 2 ** Math.min(grant.failureCount, 20),
    BACKOFF_SECONDS_MAX,
  )
  switch (outcome.kind) {
    case 'rejected_client':
      // The breaker holds everybody back; no grant needs a back-off of its own.
      return Math.min(settings.retryBackoffSeconds, settings.breakerProbeSeconds)
    case 'not_processed':
      if (outcome.unreachable && outcome.retryAfterSeconds === undefined) {
        return Math.min(grown, settings.breakerProbeSeconds)
      }
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
