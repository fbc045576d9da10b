// What the core needs of the database to tell and to record: the outbox of the webhook, the audit record, uses of credentials.

import type { GrantEvent, GrantState, UserKey } from './grant.ts'
import type { ActorKind, AuditAction, AuditEvent, AuditOutcome, AuditRow } from './audit-event.ts'

// ── The outbox: events that the webhook must still be told of ────────────────────────────────────

/** An event of a grant, written with the change of it, and how far its delivery is. */
export interface WebhookDelivery {
  /** The same at each attempt: the receiver knows by it what it has heard before. */
  eventId: string
  /** Grows with the events of a user; those of one before another are delivered before it. */
  position: number
  user: UserKey
  type: GrantEvent
  occurredAt: Date
  grantState: GrantState
  cause: string | null
  generation: number
  expiresAt: Date
  /** Of `grant.expiring`. */
  withinDays: number | null
  /** Dead: given up, and in the way of nothing. */
  state: 'pending' | 'dead'
  nextAttemptAt: Date
  giveUpAt: Date
  attemptCount: number
  lastAttemptAt: Date | null
  /** Null before the first attempt and while one is being made. */
  lastFailure: string | null
}

export interface OutboxStore {
  /**
   * Takes up to `limit` due events, of each user none but the first, and hides them from others for `leaseSeconds`.
   * Each counts as an attempt.
   */
  take(limit: number, leaseSeconds: number): Promise<WebhookDelivery[]>
  /** Forgets one that the receiver has confirmed. */
  done(eventId: string): Promise<void>
  /** Tells whether there will be a next attempt, or the event is too old for one and dead now. */
  retryLater(eventId: string, failure: string, delaySeconds: number): Promise<'pending' | 'dead'>
  giveUp(eventId: string, failure: string): Promise<void>
  /** A page of events in the order of their positions. `users` are patterns of which one must match. */
  list(filter: {
    state: 'pending' | 'dead' | undefined
    user: UserKey | undefined
    users: readonly string[]
    /** Only positions after this one. */
    after: number | undefined
    limit: number
  }): Promise<WebhookDelivery[]>
  /** Makes an event due now that is dead or waits for its next attempt; undefined when there is none of these users. */
  deliverAgain(eventId: string, users: readonly string[]): Promise<WebhookDelivery | undefined>
  /** Gives up what is too old and forgets what was given up a month ago, some of it at a time; returns how much. */
  sweep(): Promise<number>
}

// ── Credentials of callers ───────────────────────────────────────────────────────────────────────

/** A credential that was accepted: an API key by its id, or the JWTs of a caller by its name. */
export interface Credential {
  kind: 'api_key' | 'jwt'
  name: string
}

export interface CredentialUseStore {
  /** Notes that the credentials are used now, in one statement. */
  note(credentials: readonly Credential[]): Promise<void>
  /** All that have ever been used, with when they were last. */
  list(): Promise<Array<Credential & { lastUsedAt: Date }>>
}

// ── Census ───────────────────────────────────────────────────────────────────────────────────────

/** How many there are of what, in the whole database. */
export interface Census {
  grants: Readonly<Record<GrantState, number>>
  /** Active grants whose refresh token ends within so many days, those of fewer days among them. */
  expiringWithinDays: ReadonlyMap<number, number>
  /** Events for the webhook that are yet to be delivered, and those that were given up. */
  webhooksPending: number
  webhooksDead: number
  /** Refresh tokens that are yet to be revoked at Pagero. */
  revocationsPending: number
}

// ── Audit ────────────────────────────────────────────────────────────────────────────────────────

export interface Audit {
  /**
   * Puts the event on record. Never throws and never waits: rows are written in batches, a quarter of a second later, and
   * once more for as long as PostgreSQL is away. A token handed out again within a second costs some 50 ns; the first time
   * some 6 µs, its row included.
   */
  record(event: AuditEvent): void
}

/** The last row that a chain has. */
export interface ChainHead {
  chainId: string
  sequence: number
  hash: Buffer
}

export interface AuditStore {
  /** The database's clock. */
  now(): Promise<Date>
  /** Adds the rows, in one statement. Those that are there already are left alone, so a batch may be given again. */
  append(rows: readonly AuditRow[]): Promise<void>
  /** The heads of the chains that were written to last, newest first. */
  findHeads(limit: number): Promise<ChainHead[]>
  /** A page of events, newest first. */
  list(filter: AuditFilter): Promise<AuditRow[]>
  /** The chains whose first row is older than so many days, and the instant from which rows are kept. */
  findDue(days: number): Promise<{ before: Date; chainIds: string[] }>
  /** The rows of a chain in their order, from `sequence` on. */
  readChain(chainId: string, sequence: number, limit: number): Promise<AuditRow[]>
  /** Takes away the rows of a chain that come before `sequence`. */
  expire(chainId: string, sequence: number): Promise<void>
  /** Reads the whole record as it is at one moment, whatever is written or expires meanwhile. */
  atOneMoment<T>(work: (snapshot: AuditSnapshot) => Promise<T>): Promise<T>
  /** What is on record of the access tokens with these fingerprints, added up, in the order of time. */
  findUses(fingerprints: readonly string[]): Promise<TokenUse[]>
}

/** A place in the record, in the order of chains and of their rows. */
export interface AuditPlace {
  chainId: string
  sequence: number
}

export interface AuditSnapshot {
  /** The rows from which one can tell what is missing: heads that were noted, and what retention took. */
  anchors(after: AuditPlace | undefined, limit: number): Promise<AuditRow[]>
  /** All rows, chain by chain. */
  rows(after: AuditPlace | undefined, limit: number): Promise<AuditRow[]>
  /** Chains of the processes that have been seen in the last minute. */
  liveChains(): Promise<string[]>
}

/** What one caller or session did with an access token. */
export interface TokenUse {
  actorKind: ActorKind
  actorName: string | null
  action: string
  user: UserKey | null
  outcome: AuditOutcome
  firstAt: Date
  lastAt: Date
  count: number
}

export interface AuditFilter {
  /** User patterns of which one must match; `*` alone also covers events that concern no user. */
  users: readonly string[]
  user: UserKey | undefined
  action: AuditAction | undefined
  /** Only events before this one. */
  after: { at: Date; chainId: string; sequence: number } | undefined
  limit: number
}
