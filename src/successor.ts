// From a token answer to what the spool and the row take: pure but for the sealing.

import { fingerprintOf, type Grant, grantSealContext, type TokenOutcome } from './grant.ts'
import type { LiveToken } from './live-token.ts'
import type { Sealer } from './ports.ts'
import type { Successor } from './grant-stores.ts'

/** What the successor needs to know of the attempt that brought it. */
export interface SpentAttempt {
  attemptId: string
  refreshToken: string
  /** By the database clock, before the request was sent: the access token's life is counted from here. */
  armedAt: Date
  /** The same, or earlier, on this process's monotonic clock. */
  armingAtMs: number
}

/**
 * Seals what a refresh brought for the generation after the presented one, and returns the access token to serve once
 * that is durable; undefined when the answer had none.
 */
export function sealSuccessor(
  sealer: Sealer,
  grant: Grant,
  attempt: SpentAttempt,
  { tokens, httpStatus }: Extract<TokenOutcome, { kind: 'granted' }>,
  durationMs: number,
): { successor: Successor; token: LiveToken | undefined } {
  const place = {
    user: grant.user,
    loginId: grant.loginId,
    generation: grant.generation + 1,
  }
  // RFC 6749 section 6: no refresh token in the answer means that the old one stays.
  const refreshToken = tokens.refreshToken ?? attempt.refreshToken
  const lifeMs = tokens.expiresInSeconds * 1000
  const token =
    tokens.accessToken === undefined
      ? undefined
      : {
          loginId: place.loginId,
          generation: place.generation,
          accessToken: tokens.accessToken,
          fingerprint: fingerprintOf(tokens.accessToken),
          scope: tokens.scope,
          lifeSeconds: tokens.expiresInSeconds,
          expiresAtMs: attempt.armingAtMs + lifeMs,
          expiresAtEpochMs: attempt.armedAt.getTime() + lifeMs,
        }
  const successor: Successor = {
    ...place,
    attemptId: attempt.attemptId,
    refreshTokenSealed: sealer.seal(grantSealContext('refresh_token_sealed', place), refreshToken),
    keyId: sealer.primaryKeyId,
    accessToken:
      token === undefined
        ? null
        : {
            sealed: sealer.seal(grantSealContext('access_token_sealed', place), token.accessToken),
            requestedAt: attempt.armedAt,
            expiresAt: new Date(token.expiresAtEpochMs),
            fingerprint: token.fingerprint,
          },
    scope: tokens.scope,
    httpStatus,
    durationMs,
  }
  return { successor, token }
}
