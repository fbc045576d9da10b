// Rows of grants as the core's records.

import { type Selectable, sql } from 'kysely'
import type { Grant, ServableGrant } from '../grant.ts'
import type { Tables } from './tables.ts'

const COLUMNS = [
  'user_id',
  'login_id',
  'generation',
  'state',
  'state_reason',
  'refresh_token_sealed',
  'key_id',
  'access_token_sealed',
  'access_token_requested_at',
  'access_token_expires_at',
  'access_token_fingerprint',
  'scope',
  'pagero_issuer',
  'pagero_subject',
  'phase',
  'attempt_id',
  'owner',
  'owner_boot',
  'lease_until',
  'next_retry_at',
  'failure_count',
  'authenticated_at',
  'rotated_at',
  'last_used_at',
  'rolling_expires_at',
  'absolute_expires_at',
  'decided_at',
] as const satisfies ReadonlyArray<keyof Tables['grants']>

/** The columns of a {@link Grant}, by name: a statement that is prepared must return the same after a migration. */
export const GRANT_COLUMNS = sql.raw(COLUMNS.join(', '))

export type GrantRow = Pick<Selectable<Tables['grants']>, (typeof COLUMNS)[number]> & {
  read_at: Date
}

/** The columns of a {@link ServableGrant}, its instants in milliseconds since 1970. */
export type ServableRow = Pick<
  GrantRow,
  | 'user_id'
  | 'login_id'
  | 'state'
  | 'state_reason'
  | 'generation'
  | 'access_token_sealed'
  | 'access_token_fingerprint'
  | 'scope'
> & {
  access_token_requested_at_ms: number | null
  access_token_expires_at_ms: number | null
  read_at_ms: number
}

export function servableGrantOf(row: ServableRow): ServableGrant {
  return servableGrantAt(row, {
    requestedAt: dateOf(row.access_token_requested_at_ms),
    expiresAt: dateOf(row.access_token_expires_at_ms),
    readAt: new Date(row.read_at_ms),
  })
}

function dateOf(epochMs: number | null): Date | null {
  return epochMs === null ? null : new Date(epochMs)
}

function servableGrantAt(
  row: Omit<ServableRow, `${string}_ms`>,
  instants: { requestedAt: Date | null; expiresAt: Date | null; readAt: Date },
): ServableGrant {
  const { access_token_sealed: sealed, access_token_fingerprint: fingerprint } = row
  const { requestedAt, expiresAt, readAt } = instants
  return {
    user: row.user_id,
    loginId: row.login_id,
    state: row.state,
    stateReason: row.state_reason,
    generation: row.generation,
    accessToken:
      sealed === null || requestedAt === null || expiresAt === null || fingerprint === null
        ? null
        : { sealed, requestedAt, expiresAt, fingerprint },
    scope: row.scope,
    readAt,
  }
}

export function grantOf(row: GrantRow): Grant {
  const instants = {
    requestedAt: row.access_token_requested_at,
    expiresAt: row.access_token_expires_at,
    readAt: row.read_at,
  }
  return {
    ...servableGrantAt(row, instants),
    refreshTokenSealed: row.refresh_token_sealed,
    keyId: row.key_id,
    pageroIssuer: row.pagero_issuer,
    pageroSubject: row.pagero_subject,
    phase: row.phase,
    attemptId: row.attempt_id,
    owner: row.owner,
    ownerBoot: row.owner_boot,
    leaseUntil: row.lease_until,
    nextRetryAt: row.next_retry_at,
    failureCount: row.failure_count,
    authenticatedAt: row.authenticated_at,
    rotatedAt: row.rotated_at,
    lastUsedAt: row.last_used_at,
    rollingExpiresAt: row.rolling_expires_at,
    absoluteExpiresAt: row.absolute_expires_at,
    decidedAt: row.decided_at,
  }
}
