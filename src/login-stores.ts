// What the core needs of the database for people: logins under way, connect links, pending grants, browser sessions.

import type { UserKey } from './grant.ts'
import type { NewRevocation } from './grant-stores.ts'

// ── Logins ───────────────────────────────────────────────────────────────────────────────────────

export interface LoginTransaction {
  stateHash: Buffer
  browserBindingHash: Buffer
  codeVerifierSealed: Buffer | null
  nonceHash: Buffer | null
  returnTo: string
  /** Session whose cookie came with the request that began the login; it ends when the login succeeds. */
  replacesSessionHash: Buffer | null
  /** What the connect link asked for that began it; null for a plain login. */
  connect: ConnectRequest | null
}

/** A login that its browser has come back from. */
export interface ReturnedLogin extends LoginTransaction {
  /** When it came back, by the database's clock. */
  returnedAt: Date
}

/** What every login has of its own, whatever began it. */
export type StartedLogin = Omit<LoginTransaction, 'returnTo' | 'connect'>

export interface LoginLimits {
  lifetimeSeconds: number
  /** Of one browser; the oldest beyond it is dropped. */
  pendingMax: number
}

export interface LoginTransactionStore {
  /** Stores a plain login; those of connect links are stored by opening one. */
  create(login: StartedLogin & { returnTo: string }, limits: LoginLimits): Promise<void>
  /** Takes the transaction out, once: one DELETE … RETURNING that matches state and browser and has not expired. */
  consume(stateHash: Buffer, browserBindingHash: Buffer): Promise<ReturnedLogin | undefined>
  sweep(): Promise<number>
}

// ── Connect links: an application's user and a Pagero account ────────────────────────────────────

/** What an application wants of the browser that it sends to Pagero. */
export interface ConnectRequest {
  user: UserKey
  /** The grant waits until the application has confirmed whose browser came back. */
  confirm: boolean
  startSession: boolean
  allowAccountChange: boolean
}

export interface ConnectLinkStore {
  /** Stores a link that may be opened once within `ttlSeconds`. */
  create(
    link: ConnectRequest & { ticketHash: Buffer; returnTo: string },
    ttlSeconds: number,
  ): Promise<{ expiresAt: Date }>
  /** Uses the link up and stores the login that it begins, in one statement; undefined when it is none to be opened. */
  open(
    ticketHash: Buffer,
    login: StartedLogin,
    limits: LoginLimits,
  ): Promise<{ user: UserKey } | undefined>
  /** Why a link does nothing, for a day after its expiry. */
  find(ticketHash: Buffer): Promise<{ returnTo: string; isUsed: boolean } | undefined>
  sweep(): Promise<number>
}

/** What a connect link brought, sealed, on its way into the table of those that wait. */
export interface NewPendingGrant {
  confirmationHash: Buffer
  user: UserKey
  refreshTokenSealed: Buffer
  accessTokenSealed: Buffer | null
  /** As in {@link NewGrant}. */
  requestedSecondsAgo: number
  expiresInSeconds: number
  scope: string
  keyId: string
  pageroIssuer: string | null
  pageroSubject: string | null
  returnTo: string
  startSession: boolean
  allowAccountChange: boolean
  browserBindingHash: Buffer
  replacesSessionHash: Buffer | null
  /** What it becomes when nobody confirms it. */
  revocation: NewRevocation
}

export interface PendingGrant {
  confirmationHash: Buffer
  user: UserKey
  /** Null once it is confirmed. */
  refreshTokenSealed: Buffer | null
  accessToken: { sealed: Buffer; requestedAt: Date; expiresAt: Date } | null
  scope: string
  keyId: string | null
  pageroIssuer: string | null
  pageroSubject: string | null
  startSession: boolean
  allowAccountChange: boolean
  /** When its user came back from Pagero. */
  createdAt: Date
  expiresAt: Date
  confirmedAt: Date | null
  readAt: Date
}

/** Whichever way one ends without being confirmed, the same statement queues its refresh token for revocation. */
export interface PendingGrantStore {
  /** Stores it in place of the one that waits for this user. Storing one a second time changes nothing. */
  place(pending: NewPendingGrant, lifetimeSeconds: number): Promise<void>
  /** The one of this confirmation, waiting or confirmed lately. */
  find(confirmationHash: Buffer): Promise<PendingGrant | undefined>
  /** The one that waits for this user. */
  findWaiting(user: UserKey): Promise<PendingGrant | undefined>
  /** Drops those of the user, or the one of this confirmation; tells whether one was waiting. */
  drop(user: UserKey, confirmationHash?: Buffer): Promise<boolean>
  /** Drops those whose time is over. */
  sweep(): Promise<number>
}

// ── Sessions ─────────────────────────────────────────────────────────────────────────────────────

export interface Session {
  user: UserKey
  createdAt: Date
  idleExpiresAt: Date
  absoluteExpiresAt: Date
  /** What was left to the earlier of the two, by the database's clock, when it was read. */
  lifeLeftMs: number
}

export interface SessionLifetimes {
  idleSeconds: number
  absoluteSeconds: number
}

export interface SessionStore {
  /** Begins a session; undefined, with nothing begun, when the user has no grant or has closed it. */
  create(
    tokenHash: Buffer,
    user: UserKey,
    lifetimes: SessionLifetimes,
    options: { replaces: Buffer | null; perUserMax: number },
  ): Promise<Session | undefined>
  /** Returns the live session and slides its idle expiry (written at most every 30 s); undefined when ended or expired. */
  resolve(tokenHash: Buffer, lifetimes: SessionLifetimes): Promise<Session | undefined>
  /** Returns whose session it was; undefined when there was none. */
  end(tokenHash: Buffer): Promise<UserKey | undefined>
  endAll(user: UserKey): Promise<number>
  sweep(): Promise<number>
}

export interface SessionTicketStore {
  /** Stores a ticket for the browser that brought a grant which is confirmed; false when that is known no more. */
  create(ticketHash: Buffer, confirmationHash: Buffer, lifetimeSeconds: number): Promise<boolean>
  /** Takes it out, once: one DELETE … RETURNING that matches ticket and browser, while the user has a grant. */
  consume(
    ticketHash: Buffer,
    browserBindingHash: Buffer,
  ): Promise<{ user: UserKey; returnTo: string; replacesSessionHash: Buffer | null } | undefined>
  sweep(): Promise<number>
}
