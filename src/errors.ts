// What a caller cannot go on from: one error class with a closed list of codes.
// The core throws these and knows no HTTP status; `http/problem.ts` turns a code into a problem document.

/** Every code a problem document of the broker can carry. The order is that of the documentation. */
export const PROBLEM_CODES = [
  'session_required',
  'csrf_refused',
  'login_transaction_invalid',
  'authorization_denied',
  'authorization_failed',
  'account_mismatch',
  'caller_unauthenticated',
  'caller_forbidden',
  'grant_not_found',
  'confirmation_pending',
  'reauthentication_required',
  'temporarily_unavailable',
  'client_rejected_by_pagero',
  'rate_limited',
  'request_invalid',
  'method_not_allowed',
  'not_found',
  'payload_too_large',
  'unsupported_media_type',
  'uri_too_long',
  'headers_too_large',
  'upstream_refused',
  'upstream_unreachable',
  'upstream_timeout',
  'loop_detected',
  'integrity_failure',
  'internal_error',
] as const

export type ProblemCode = (typeof PROBLEM_CODES)[number]

/** Members that a problem may carry besides its code and detail. Never a secret. */
export interface ProblemExtensions {
  /** When to try again, in seconds; also sent as `Retry-After`. */
  retryAfterSeconds?: number
  /** Why a grant died, from the ledger (`reauthentication_required`). */
  cause?: string
  /** Where a person can log in again. */
  reconnectUrl?: string
  /** The refresh attempt that the problem is about. */
  attemptId?: string
  /** Status that Pagero's API answered a forwarded call with (`upstream_refused`); told in Proxy-Status, not in the body. */
  receivedStatus?: number
  /** A credential was sent and is not good (`caller_unauthenticated`); told in WWW-Authenticate, not in the body. */
  credentialRefused?: true
  /** Where the application waits that has sent the person here: the page of the problem leads back. Not in a document. */
  returnTo?: string
  /** What is wrong with the request, one entry for each place (`request_invalid`). */
  errors?: ReadonlyArray<{ pointer: string; detail: string }>
}

/**
 * An outcome that the caller must be told of. `detail` is a sentence for a person and is sent to the
 * caller as it is, so it never holds a secret, a host name or a message from below.
 * `options.cause` is for the log alone.
 */
export class BrokerError extends Error {
  readonly code: ProblemCode
  readonly detail: string
  readonly extensions: ProblemExtensions
  /** What was to be written surely was not, and will not be. False: nobody knows. */
  readonly isUnwritten: boolean

  constructor(
    code: ProblemCode,
    detail: string,
    extensions: ProblemExtensions = {},
    options: { cause?: unknown; isUnwritten?: boolean } = {},
  ) {
    super(`${code}: ${detail}`, options)
    this.name = 'BrokerError'
    this.code = code
    this.detail = detail
    this.extensions = extensions
    this.isUnwritten = options.isUnwritten === true
  }
}

/** Tells whether what was to be written surely was not, and will not be. */
export function isUnwritten(error: unknown): boolean {
  return error instanceof BrokerError && error.isUnwritten
}

/**
 * The one answer for a user without a grant, and for a user that the caller may not see: word for word the same,
 * so that nobody learns from it which users there are.
 */
export function grantNotFound(): BrokerError {
  return new BrokerError('grant_not_found', 'There is no grant for this user.')
}

/** What is the matter passes by itself: `temporarily_unavailable`, with when to try again. */
export function unavailable(
  detail: string,
  retryAfterSeconds: number,
  extensions: { attemptId?: string } = {},
): BrokerError {
  return new BrokerError('temporarily_unavailable', detail, { retryAfterSeconds, ...extensions })
}

/** The code of what lies beneath an error, for an operator: a refused connection, a SQLSTATE; `no answer` where there is none. */
export function deepestCodeOf(error: unknown): string {
  let code = 'no answer'
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    // The broker's own code says what it means for a caller.
    if (cause instanceof BrokerError) continue
    if ('code' in cause && typeof cause.code === 'string') code = cause.code
  }
  return code
}
