// Reads an answer of the token endpoint (RFC 6749 section 5) into the closed outcome. It is lenient on purpose: a 200
// has spent the presented token, so whatever else is odd in it, the successor must survive. Pure.

import { DEFAULT_ACCESS_TOKEN_LIFE_SECONDS, type TokenOutcome, type TokenSet } from './grant.ts'
import type { SendResult } from './send-once.ts'

/** A day: no access token of Pagero lives longer; a larger figure is a mistake of the server. */
const ACCESS_TOKEN_LIFE_SECONDS_MAX = 86_400
/** Longest back-off that an answer may ask for; more would only delay the recovery. */
const RETRY_AFTER_SECONDS_MAX = 900

const CLIENT_ERRORS = new Set(['invalid_client', 'unauthorized_client'])

/** Turns what came of a token request into its outcome. */
export function readTokenAnswer(sent: SendResult): TokenOutcome {
  if (sent.kind === 'not_sent') {
    return { kind: 'not_processed', reason: sent.reason, unreachable: true }
  }
  if (sent.kind === 'unknown') {
    // The head said 200 and the token came through whole before the connection broke: that is a success.
    if (sent.status !== undefined && isSuccess(sent.status)) {
      const tokens = readTokens(sent.partialBody)
      if (tokens?.refreshToken !== undefined) {
        return { kind: 'granted', tokens, httpStatus: sent.status }
      }
    }
    return {
      kind: 'in_doubt',
      reason: sent.reason,
      ...(sent.status === undefined ? {} : { httpStatus: sent.status }),
    }
  }
  const { status: httpStatus, body, headers } = sent
  if (isSuccess(httpStatus)) {
    const tokens = readTokens(body)
    if (tokens !== undefined) return { kind: 'granted', tokens, httpStatus }
    return { kind: 'in_doubt', reason: 'unreadable', httpStatus }
  }
  const error = readError(body)
  if (httpStatus >= 400 && httpStatus < 500 && error === 'invalid_grant') {
    return { kind: 'refused', httpStatus }
  }
  if (error !== undefined && httpStatus < 500 && CLIENT_ERRORS.has(error)) {
    return { kind: 'rejected_client', httpStatus, error }
  }
  if (httpStatus === 401) return { kind: 'rejected_client', httpStatus, error: 'http_401' }
  if (httpStatus === 503 || (httpStatus >= 400 && httpStatus < 500)) {
    const retryAfterSeconds = readRetryAfter(headers['retry-after'], RETRY_AFTER_SECONDS_MAX)
    return {
      kind: 'not_processed',
      reason: error ?? `http_${httpStatus}`,
      httpStatus,
      // Told to everybody, or not by the token endpoint at all, whose refusals say why (RFC 6749 section 5.2).
      unreachable: httpStatus === 503 || httpStatus === 429 || error === undefined,
      ...(retryAfterSeconds === undefined ? {} : { retryAfterSeconds }),
    }
  }
  // 500, 502, 504, a redirect, anything unheard of: it may have been carried out.
  return { kind: 'in_doubt', reason: `http_${httpStatus}`, httpStatus }
}

function isSuccess(status: number): boolean {
  return status >= 200 && status < 300
}

/** Returns the tokens of a body, or undefined when it holds neither of the two, or may have lost the one that counts. */
function readTokens(body: string): TokenSet | undefined {
  const { members, isWhole } = readMembers(body)
  const accessToken = nonEmptyString(members['access_token'])
  const refreshToken = nonEmptyString(members['refresh_token'])
  if (accessToken === undefined && refreshToken === undefined) return undefined
  // Only a whole answer says by its absence that the presented one stays (RFC 6749 section 6). In a broken one it may have
  // been cut off, where the answer ended with its connection; and one that cannot be read is not absent.
  if (refreshToken === undefined && !(isWhole && isAbsent(members['refresh_token'])))
    return undefined
  return {
    accessToken,
    refreshToken,
    expiresInSeconds: readLifetime(members['expires_in']),
    scope: readScope(members['scope']),
    idToken: nonEmptyString(members['id_token']),
  }
}

function isAbsent(value: unknown): boolean {
  return value === undefined || value === null || value === ''
}

/** Members of a JSON object; of a broken or cut one, those string members that came through whole. */
function readMembers(body: string): { members: Record<string, unknown>; isWhole: boolean } {
  const text = withoutMark(body)
  try {
    const value: unknown = JSON.parse(text)
    const isObject = typeof value === 'object' && value !== null && !Array.isArray(value)
    return { members: isObject ? (value as Record<string, unknown>) : {}, isWhole: true }
  } catch {
    const members: Record<string, unknown> = {}
    for (const name of ['access_token', 'refresh_token', 'scope', 'id_token']) {
      const match = new RegExp(`"${name}"\\s*:\\s*("(?:[^"\\\\]|\\\\.)*")`).exec(text)
      if (match?.[1] !== undefined) members[name] = parseJsonString(match[1])
    }
    return { members, isWhole: false }
  }
}

function parseJsonString(quoted: string): unknown {
  try {
    return JSON.parse(quoted)
  } catch {
    return undefined
  }
}

/** Without the byte order mark, which JSON has not, and some servers send (RFC 8259 section 8.1). */
function withoutMark(body: string): string {
  return body.startsWith('\uFEFF') ? body.slice(1) : body
}

function readError(body: string): string | undefined {
  try {
    const value: unknown = JSON.parse(withoutMark(body))
    const error = (value as { error?: unknown } | null)?.error
    // RFC 6749 section 5.2 gives the alphabet; anything else is not an OAuth error.
    return typeof error === 'string' && /^[\x20-\x21\x23-\x5B\x5D-\x7E]{1,64}$/.test(error)
      ? error
      : undefined
  } catch {
    return undefined
  }
}

function readLifetime(value: unknown): number {
  // A text without a number becomes 0 or NaN.
  const seconds = typeof value === 'string' ? Number(value) : value
  if (typeof seconds !== 'number' || !Number.isFinite(seconds) || seconds <= 0) {
    return DEFAULT_ACCESS_TOKEN_LIFE_SECONDS
  }
  return Math.min(seconds, ACCESS_TOKEN_LIFE_SECONDS_MAX)
}

/** RFC 6749 section 3.3. Other characters are none, and some of them the database would not take. */
function readScope(value: unknown): string {
  return typeof value === 'string' && /^[\x20\x21\x23-\x5B\x5D-\x7E]*$/.test(value) ? value : ''
}

/** A lone surrogate cannot be sealed: what could not be kept must not keep the other token from being so. */
function nonEmptyString(value: unknown): string | undefined {
  return typeof value === 'string' && value !== '' && value.isWellFormed() ? value : undefined
}

/** Seconds only: a date would have to be trusted against a clock that is not ours (RFC 9110 section 10.2.3). */
export function readRetryAfter(
  value: string | string[] | undefined,
  secondsMax: number,
): number | undefined {
  if (typeof value !== 'string' || !/^\d{1,6}$/.test(value)) return undefined
  return Math.min(Number(value), secondsMax)
}
