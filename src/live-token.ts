// An access token in clear, with the life that is left of it, and who may not have one: the part of a grant that is
// served. Nothing here spends or stores.

import { BrokerError, grantNotFound } from './errors.ts'
import {
  accessTokenLifeSeconds,
  accessTokenSecondsLeft,
  fingerprintOf,
  grantSealContext,
  type ServableGrant,
} from './grant.ts'
import type { Sealer } from './ports.ts'

/** An access token that may be handed out, with its life on this process's monotonic clock. */
export interface LiveToken {
  loginId: string
  generation: number
  accessToken: string
  fingerprint: string
  scope: string
  /** Its whole life. */
  lifeSeconds: number
  /** `clock.monotonicMs()` at which it runs out; never later than it really does. */
  expiresAtMs: number
  /** The same by the database clock, since 1970. A number, because many tokens are kept. */
  expiresAtEpochMs: number
}

/** Opens the stored access token, or returns undefined when it has none that lives. `readAtMs` is from before the read. */
export function openLiveToken(
  sealer: Sealer,
  grant: ServableGrant,
  readAtMs: number,
): LiveToken | undefined {
  const { accessToken } = grant
  const secondsLeft = accessTokenSecondsLeft(grant)
  if (accessToken === null || secondsLeft <= 0) return undefined
  const opened = sealer.open(grantSealContext('access_token_sealed', grant), accessToken.sealed)
  const fingerprint = fingerprintOf(opened)
  // The column is in clear, and what is kept and recorded by it must be of this token.
  if (fingerprint !== accessToken.fingerprint) {
    throw new BrokerError(
      'integrity_failure',
      'The value stored in grants.access_token_fingerprint is not of the access token beside it.',
    )
  }
  return {
    loginId: grant.loginId,
    generation: grant.generation,
    accessToken: opened,
    fingerprint,
    scope: grant.scope,
    expiresAtEpochMs: accessToken.expiresAt.getTime(),
    lifeSeconds: accessTokenLifeSeconds(grant),
    expiresAtMs: readAtMs + secondsLeft * 1000,
  }
}

/** The problem of a grant that only a new login can revive. */
export function reauthenticationRequired(cause: string): BrokerError {
  return new BrokerError(
    'reauthentication_required',
    'Pagero refuses the refresh token of this user for good. The user must log in again.',
    { cause },
  )
}

/** @throws BrokerError when no token of the grant may be served or presented any more */
export function refuseDead(grant: Pick<ServableGrant, 'state' | 'stateReason'>): void {
  switch (grant.state) {
    case 'revoked':
      throw grantNotFound()
    case 'reauthentication_required':
      throw reauthenticationRequired(grant.stateReason ?? 'revoked_or_expired')
    case 'active':
    case 'suspect':
  }
}
