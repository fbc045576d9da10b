// What the broker answers when it cannot do what was asked (RFC 9457), as a union told apart by `code`; and the errors of
// the client. Compare codes, never texts.

/** Every code of the broker. Those of browsers' routes are among them, for logs. */
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

interface ProblemMembers {
  /** Path of the page that explains the code, at the internal listener. */
  type: string
  title: string
  status: number
  /** For a person. */
  detail: string
  /** `urn:uuid:` of the request, to be found in the broker's log. */
  instance: string
  attempt_id?: string
}

/** The user must log in again; nothing else helps. */
export interface ReauthenticationRequired extends ProblemMembers {
  code: 'reauthentication_required'
  /** Why the grant died, as far as the broker knows. */
  cause?: string
  /** Where to send the user, if the grant began with a login. */
  reconnect_url?: string
}

/** Try again later; nothing is lost. */
export interface TryAgainLater extends ProblemMembers {
  code: 'temporarily_unavailable' | 'rate_limited' | 'client_rejected_by_pagero'
  /** Seconds. */
  retry_after?: number
}

/** Something is wrong with the request. */
export interface RequestInvalid extends ProblemMembers {
  code: 'request_invalid'
  errors?: Array<{ pointer: string; detail: string }>
}

/** The problems that say no more than their code. */
export interface PlainProblem extends ProblemMembers {
  code: Exclude<
    ProblemCode,
    ReauthenticationRequired['code'] | TryAgainLater['code'] | RequestInvalid['code']
  >
}

export type Problem = ReauthenticationRequired | TryAgainLater | RequestInvalid | PlainProblem

/** The member of the union that has this code. */
type ProblemWith<C extends ProblemCode, P = Problem> = P extends Problem
  ? C extends P['code']
    ? P & { code: C }
    : never
  : never

/** The broker has answered with a problem. `switch (error.problem.code)` narrows it. */
export class BrokerProblemError<P extends Problem = Problem> extends Error {
  readonly problem: P

  constructor(problem: P) {
    super(`${problem.code}: ${problem.detail}`)
    this.name = 'BrokerProblemError'
    this.problem = problem
  }
}

/** The broker has not answered in time, or something before it has answered in its place. */
export class BrokerUnreachableError extends Error {
  /** Status of an answer that was not the broker's. */
  readonly status: number | undefined

  constructor(message: string, options: { status?: number; cause?: unknown } = {}) {
    super(message, options.cause === undefined ? {} : { cause: options.cause })
    this.name = 'BrokerUnreachableError'
    this.status = options.status
  }
}

/** Tells whether an error is a problem of the broker with this code, and narrows it. */
export function isProblem<C extends ProblemCode>(
  error: unknown,
  code: C,
): error is BrokerProblemError<ProblemWith<C>> {
  return error instanceof BrokerProblemError && error.problem.code === code
}

const MEDIA_TYPE = /^application\/problem\+json(?:\s*;|$)/i

/** Reads an answer that is none of 2xx; undefined when it is no problem document with a known code. */
export async function readProblem(response: Response): Promise<Problem | undefined> {
  if (!MEDIA_TYPE.test(response.headers.get('content-type') ?? '')) return undefined
  const document = (await response.json().catch(() => undefined)) as Problem | undefined
  return PROBLEM_CODES.some((code) => code === document?.code) ? document : undefined
}
