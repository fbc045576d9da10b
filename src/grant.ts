// What a grant is, and the pure rules of time and state. No clock, no store, no network: everything comes in as an argument.

import { hash } from 'node:crypto'
import type { SealContext } from './ports.ts'

/** The application's own key for a user. Compared byte for byte; see {@link parseUserKey}. */
export type UserKey = string & { readonly __brand: 'UserKey' }

/**
 * 1 to 255 characters that need no escaping in a path, a log line or a shell; and no dot segment, which every client that
 * resolves URLs takes out of a path, escaped or not.
 */
export const USER_KEY_PATTERN = '^(?!\\.{1,2}$)[A-Za-z0-9._~@:+-]{1,255}$'
const USER_KEY = new RegExp(USER_KEY_PATTERN)

/** Keys that begin so are made by a login and cannot be named by an application. */
export const PAGERO_USER_PREFIX = 'pagero:'

/** Returns the text as a user key, or undefined if it is none. */
export function parseUserKey(text: string): UserKey | undefined {
  return USER_KEY.test(text) ? (text as UserKey) : undefined
}

/** With the id of an import it is the key of the grant that proves it. No login makes such a key: base64url has no second `~`. */
export const IMPORT_USER_PREFIX = `${PAGERO_USER_PREFIX}~import~`

/** The user key of the grant that proves an import. */
export function importUserKey(importId: string): UserKey {
  return (IMPORT_USER_PREFIX + importId) as UserKey
}

/** Pattern of those keys; lists leave them out. */
export const IMPORT_USERS = `${IMPORT_USER_PREFIX}*`

export const GRANT_STATES = ['active', 'suspect', 'reauthentication_required', 'revoked'] as const
export type GrantState = (typeof GRANT_STATES)[number]

/** Why a grant died: told by the ledger, not guessed from an error text. */
export const DEATH_CAUSES = [
  'revoked_or_expired',
  'rotation_lost',
  'restored_database',
  'lifetime_over',
] as const
export type DeathCause = (typeof DEATH_CAUSES)[number]

/** State reason of a grant that a late success, or a login, has revived; until its next refresh. */
export const RECOVERED = 'recovered'

/** What may happen to a grant that an application wants to hear of. */
export const GRANT_EVENTS = [
  'grant.connected',
  'grant.reauthentication_required',
  'grant.recovered',
  'grant.expiring',
  'grant.disconnected',
] as const
export type GrantEvent = (typeof GRANT_EVENTS)[number]

/** Why a refresh was begun. */
export const REFRESH_CAUSES = [
  'expiry',
  'min_ttl',
  'rejected',
  'ahead',
  'keep_alive',
  'import',
  'recovery',
] as const
export type RefreshCause = (typeof REFRESH_CAUSES)[number]

/** What came of a refresh attempt, as the ledger keeps it. */
export const ATTEMPT_OUTCOMES = [
  'granted',
  'refused',
  'rejected_client',
  'not_processed',
  'in_doubt',
] as const
export type AttemptOutcome = (typeof ATTEMPT_OUTCOMES)[number]

/** One answer of the token endpoint, read leniently: whatever else was odd in it, these are what must not be lost. */
export interface TokenSet {
  accessToken: string | undefined
  /** Undefined means that the server sent none: the old one stays current (RFC 6749 section 6). */
  refreshToken: string | undefined
  /** Life of the access token in seconds, counted from before the request was sent. */
  expiresInSeconds: number
  scope: string
  idToken: string | undefined
}

/** What came of presenting a code or a refresh token. Each kind decides the grant's next state. */
export type TokenOutcome =
  /** Store it. */
  | { kind: 'granted'; tokens: TokenSet; httpStatus: number }
  /** `invalid_grant`: the code or refresh token is dead. */
  | { kind: 'refused'; httpStatus: number }
  /** `invalid_client` and kin: the operator's to mend, no grant is touched. */
  | { kind: 'rejected_client'; httpStatus: number; error: string }
  /** Surely not processed: never sent, or answered as not consumed. */
  | {
      kind: 'not_processed'
      reason: string
      httpStatus?: number
      retryAfterSeconds?: number
      /** The server could not be reached or did not answer sensibly; counts for the breaker. */
      unreachable: boolean
    }
  /** Sent, then no trustworthy answer: the token is spent, perhaps. */
  | { kind: 'in_doubt'; reason: string; httpStatus?: number }

/** An access token as it is stored. Instants are the database's. */
export interface SealedAccessToken {
  sealed: Buffer
  /** Before the request for it was sent: its life is counted from here. */
  requestedAt: Date
  expiresAt: Date
  /** base64url of SHA-256 of the token, 43 characters. */
  fingerprint: string
}

/** A grant as read from the store in one statement; `readAt` is the database clock of that statement. */
export interface Grant {
  user: UserKey
  /** Changes with each login, confirmation and import; tells a late answer of a replaced login. */
  loginId: string
  state: GrantState
  stateReason: string | null
  /** Grows by one with every refresh token stored, over logins too. */
  generation: number
  refreshTokenSealed: Buffer | null
  accessToken: SealedAccessToken | null
  scope: string
  keyId: string | null
  pageroIssuer: string | null
  pageroSubject: string | null
  phase: 'idle' | 'armed'
  attemptId: string | null
  owner: string | null
  ownerBoot: string | null
  leaseUntil: Date | null
  nextRetryAt: Date | null
  failureCount: number
  authenticatedAt: Date
  rotatedAt: Date
  lastUsedAt: Date | null
  rollingExpiresAt: Date
  absoluteExpiresAt: Date
  /** When the user last logged in or was disconnected, or the import was asked for that brought the grant; null: unknown. */
  decidedAt: Date | null
  readAt: Date
}

/** As much of a grant as serving its access token needs: this is read far more often than all the rest. */
export type ServableGrant = Pick<
  Grant,
  'user' | 'loginId' | 'state' | 'stateReason' | 'generation' | 'accessToken' | 'scope' | 'readAt'
>

/** What the sealed columns of a grant are bound to: user, login and generation. */
export function grantSealContext(
  column: 'refresh_token_sealed' | 'access_token_sealed',
  grant: { user: UserKey; loginId: string; generation: number },
): SealContext {
  return {
    table: 'grants',
    column,
    row: grant.user,
    salt: grant.loginId,
    generation: grant.generation,
  }
}

/** base64url of SHA-256 of an access token, 43 characters: anyone who holds the token can compute it. */
export function fingerprintOf(accessToken: string): string {
  return hash('sha256', accessToken, 'base64url')
}

/** When the grant runs out by the earlier of the two readings of "rolling lifetime of three years". */
export function grantExpiresAt(grant: Pick<Grant, 'rollingExpiresAt' | 'absoluteExpiresAt'>): Date {
  return grant.rollingExpiresAt < grant.absoluteExpiresAt
    ? grant.rollingExpiresAt
    : grant.absoluteExpiresAt
}

/** Life that Pagero documents for an access token, used when an answer does not say. */
export const DEFAULT_ACCESS_TOKEN_LIFE_SECONDS = 600

/** Whole life of the stored access token in seconds; Pagero's documented one when there is none. */
export function accessTokenLifeSeconds(grant: Pick<Grant, 'accessToken'>): number {
  const { accessToken } = grant
  if (accessToken === null) return DEFAULT_ACCESS_TOKEN_LIFE_SECONDS
  return (accessToken.expiresAt.getTime() - accessToken.requestedAt.getTime()) / 1000
}

/** Life that the stored access token has left, in seconds by the database clock; 0 when there is none. */
export function accessTokenSecondsLeft(grant: Pick<Grant, 'accessToken' | 'readAt'>): number {
  const { accessToken, readAt } = grant
  if (accessToken === null) return 0
  return Math.max(0, (accessToken.expiresAt.getTime() - readAt.getTime()) / 1000)
}

/** Seconds of back-off that are left, by the database clock; 0 or less when there is none. */
export function retryWaitSeconds(grant: Pick<Grant, 'nextRetryAt' | 'readAt'>): number {
  return ((grant.nextRetryAt?.getTime() ?? 0) - grant.readAt.getTime()) / 1000
}
