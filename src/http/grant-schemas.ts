// A grant and its ledger as the API shows them: schemas, examples, and the bodies made from the records.

import Type from 'typebox'
import {
  ATTEMPT_OUTCOMES,
  type Grant,
  GRANT_STATES,
  grantExpiresAt,
  REFRESH_CAUSES,
} from '../grant.ts'
import type { Attempt } from '../grant-stores.ts'
import type { PendingGrant } from '../login-stores.ts'

const DateTime = (description: string) => Type.String({ format: 'date-time', description })
// One `type` of two names reads better in the document than a union of two schemas.
const OrNull = (type: 'string' | 'integer', description: string) =>
  Type.Unsafe<unknown>({ type: [type, 'null'], description })
const DateTimeOrNull = (description: string) =>
  Type.Unsafe<unknown>({ type: ['string', 'null'], format: 'date-time', description })

/** No state of a stored grant: there is none yet. */
const PENDING_STATE = 'pending_confirmation'

export const GrantSchema = Type.Object(
  {
    user: Type.String(),
    state: Type.Enum([...GRANT_STATES, PENDING_STATE], {
      type: 'string',
      description:
        '`active`: in use. `suspect`: refused by Pagero, being confirmed. `reauthentication_required`: the user must log in again. `revoked`: disconnected. `pending_confirmation`: nothing is in use, and what a connect link brought waits for the application; every expiry is then the moment at which it is given up, a quarter of an hour after the login.',
    }),
    cause: OrNull(
      'string',
      'Why the grant is in a state other than `active`, as far as the broker knows.',
    ),
    scope: Type.String({ description: 'As Pagero granted it; empty is normal there.' }),
    generation: Type.Integer({
      description: 'Grows by one with each renewal and each login; 0 while it waits.',
    }),
    key_id: OrNull('string', 'Id of the key that seals the refresh token.'),
    rolling_expires_at: DateTime('Three years from the last renewal.'),
    absolute_expires_at: DateTime('Three years from the last login.'),
    expires_at: DateTime('The earlier of the two: Pagero does not say which of them it goes by.'),
    authenticated_at: DateTime('Last login of the user.'),
    rotated_at: DateTime('Last renewal.'),
    last_used_at: DateTimeOrNull('Last use, to the minute.'),
    next_retry_at: DateTimeOrNull('After a failed renewal: not tried again before this.'),
    pagero: Type.Object({
      issuer: OrNull('string', 'Issuer of the Pagero account.'),
      subject: OrNull('string', 'Subject of the Pagero account.'),
    }),
  },
  { $id: 'Grant', description: 'What a user gave the broker at Pagero.' },
)

export const RefreshAttempt = Type.Object(
  {
    attempt_id: Type.String({ format: 'uuid' }),
    generation: Type.Integer({
      description: 'Generation of the refresh token that was presented.',
    }),
    cause: Type.Enum([...REFRESH_CAUSES], {
      type: 'string',
      description: 'What the renewal was begun for.',
    }),
    replica: Type.String({ description: 'Replica that made the attempt.' }),
    armed_at: DateTime('Written before Pagero was called.'),
    finished_at: DateTimeOrNull('Null while the attempt runs, or when its process died in it.'),
    outcome: Type.Unsafe<unknown>({
      type: ['string', 'null'],
      enum: [...ATTEMPT_OUTCOMES, null],
      description:
        '`granted`: a new token set. `refused`: the token is dead. `rejected_client`: client id or secret is wrong. `not_processed`: surely not used. `in_doubt`: sent, then no answer to trust.',
    }),
    http_status: OrNull('integer', 'Status of the answer, if there was one.'),
    duration_ms: OrNull('integer', 'From sending to the end of the answer.'),
  },
  { $id: 'RefreshAttempt', description: 'One presentation of a refresh token to Pagero.' },
)

export const RefreshAttemptList = Type.Object(
  {
    items: Type.Array(Type.Ref('RefreshAttempt')),
    next: OrNull('string', 'Cursor for `after`; null at the end.'),
  },
  { $id: 'RefreshAttemptList' },
)

export const EXAMPLE_GRANT = {
  user: 'alice',
  state: 'active',
  cause: null,
  scope: '',
  generation: 4711,
  key_id: 'k2026',
  rolling_expires_at: '2029-11-23T12:00:00.000Z',
  absolute_expires_at: '2029-03-02T08:15:00.000Z',
  expires_at: '2029-03-02T08:15:00.000Z',
  authenticated_at: '2026-03-02T08:15:00.000Z',
  rotated_at: '2026-11-23T12:00:00.000Z',
  last_used_at: '2026-11-23T12:04:00.000Z',
  next_retry_at: null,
  pagero: { issuer: 'https://sso.pageroonline.com', subject: '5d3c6b6e' },
}

export const EXAMPLE_ATTEMPTS = {
  items: [
    {
      attempt_id: '0b7c1a52-6f0e-4f86-9a3e-7d5a3b1c2d4e',
      generation: 4710,
      cause: 'ahead',
      replica: 'broker-1',
      armed_at: '2026-11-23T12:00:00.000Z',
      finished_at: '2026-11-23T12:00:00.240Z',
      outcome: 'granted',
      http_status: 200,
      duration_ms: 231,
    },
  ],
  next: null,
}

/** A grant as the API shows it. */
export function grantBody(grant: Grant) {
  return {
    user: grant.user,
    state: grant.state as Grant['state'] | typeof PENDING_STATE,
    cause: grant.state === 'active' ? null : grant.stateReason,
    scope: grant.scope,
    generation: grant.generation,
    key_id: grant.keyId,
    rolling_expires_at: grant.rollingExpiresAt.toISOString(),
    absolute_expires_at: grant.absoluteExpiresAt.toISOString(),
    expires_at: grantExpiresAt(grant).toISOString(),
    authenticated_at: grant.authenticatedAt.toISOString(),
    rotated_at: grant.rotatedAt.toISOString(),
    last_used_at: grant.lastUsedAt?.toISOString() ?? null,
    next_retry_at: grant.nextRetryAt?.toISOString() ?? null,
    pagero: { issuer: grant.pageroIssuer, subject: grant.pageroSubject },
  }
}

/** What waits for confirmation, as the API shows it: as a grant that is not there yet, and gives up at `expires_at`. */
export function pendingGrantBody(pending: PendingGrant): ReturnType<typeof grantBody> {
  const createdAt = pending.createdAt.toISOString()
  const expiresAt = pending.expiresAt.toISOString()
  return {
    user: pending.user,
    state: PENDING_STATE,
    cause: null,
    scope: pending.scope,
    generation: 0,
    key_id: pending.keyId,
    rolling_expires_at: expiresAt,
    absolute_expires_at: expiresAt,
    expires_at: expiresAt,
    authenticated_at: createdAt,
    rotated_at: createdAt,
    last_used_at: null,
    next_retry_at: null,
    pagero: { issuer: pending.pageroIssuer, subject: pending.pageroSubject },
  }
}

/** A line of the ledger as the API shows it. */
export function attemptBody(attempt: Attempt) {
  return {
    attempt_id: attempt.attemptId,
    generation: attempt.generation,
    cause: attempt.cause,
    replica: attempt.replica,
    armed_at: attempt.armedAt.toISOString(),
    finished_at: attempt.finishedAt?.toISOString() ?? null,
    outcome: attempt.outcome,
    http_status: attempt.httpStatus,
    duration_ms: attempt.durationMs,
  }
}
