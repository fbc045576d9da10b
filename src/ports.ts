// The outside world as types. The core is written against these; adapters implement them and never call back.
// A function's first parameter is a `Pick` of `Ports`: the list of what it can reach.

import type {
  AttemptOutcome,
  Grant,
  GrantEvent,
  GrantState,
  RefreshCause,
  SealedAccessToken,
  ServableGrant,
  TokenOutcome,
  UserKey,
} from './grant.ts'
import type { ActorKind, AuditAction, AuditEvent, AuditOutcome, AuditRow } from './audit-event.ts'

export interface Clock {
  /** Wall clock of this process: for texts and cookies, never for what two replicas must agree on. */
  now(): Date
  /** Milliseconds that only ever grow; for deadlines. */
  monotonicMs(): number
  /** Resolves after the delay, or at once when the signal fires. Never rejects, never keeps the process alive. */
  sleep(delayMs: number, signal?: AbortSignal): Promise<void>
  /** From 0 to 1, for jitter alone; a simulation seeds it. */
  random(): number
}

/** The only fields a log line may carry. What is not listed here cannot be logged. */
export interface LogFields {
  requestId?: string
  method?: string
  /** The route's pattern, never the path as sent. */
  route?: string
  status?: number
  durationMs?: number
  user?: string
  caller?: string
  code?: string
  attemptId?: string
  /** Of a webhook's event. */
  eventId?: string
  generation?: number
  cause?: string
  outcome?: string
  reason?: string
  state?: string
  setting?: string
  keyId?: string
  /** Of an access token: tells which was handed out without saying it. */
  fingerprint?: string
  address?: string
  port?: number
  count?: number
  withinDays?: number
  bytes?: number
  path?: string
  signal?: string
  version?: string
  upstreamStatus?: number
  retryAfterSeconds?: number
  /** Reduced to its class, code and stack frames; its message is kept only for the broker's own errors. */
  error?: unknown
}

/** One event a line. The event's name is a constant in snake_case; it is never built from input. */
export interface Log {
  /** Whether lines of this level are written at all, for paths where making their fields costs too much. Absent: yes. */
  writes?(level: 'trace' | 'debug'): boolean
  trace(event: string, fields?: LogFields): void
  debug(event: string, fields?: LogFields): void
  info(event: string, fields?: LogFields): void
  warn(event: string, fields?: LogFields): void
  error(event: string, fields?: LogFields): void
}

// ── Sealing ──────────────────────────────────────────────────────────────────────────────────────

/** Where a sealed value stands. Every part is bound into it; an empty one is an error. */
export interface SealContext {
  table: 'grants' | 'login_transactions' | 'revocations' | 'pending_grants'
  column: string
  /** The row: user key, state hash, revocation id. */
  row: string
  /** Sets apart two lives of one row: the login id of a grant, the row again elsewhere. */
  salt: string
  generation: number
}

export interface Sealer {
  /** Id of the key that seals now. */
  readonly primaryKeyId: string
  seal(context: SealContext, secret: string): Buffer
  /** @throws BrokerError `integrity_failure` if the value is not this context's, was changed, or its key is missing. */
  open(context: SealContext, sealed: Buffer): string
  /** Keyed digest of a token for the ledger: equal tokens of one grant give equal digests, nothing else can be learnt. */
  digest(context: SealContext, secret: string): Buffer
}

// ── Grants ───────────────────────────────────────────────────────────────────────────────────────

/** Write-ahead intent: no attempt row, no call to the token endpoint. */
export interface ArmRequest {
  user: UserKey
  loginId: string
  generation: number
  attemptId: string
  tokenDigest: Buffer
  cause: RefreshCause
  replica: string
  boot: string
  leaseSeconds: number
}

/** A token set sealed for generation `generation`, on its way into the row. What the spool keeps. */
export interface Successor {
  user: UserKey
  loginId: string
  attemptId: string
  /** Generation that the successor becomes: that of the presented token plus one. */
  generation: number
  refreshTokenSealed: Buffer
  keyId: string
  accessToken: SealedAccessToken | null
  scope: string
  httpStatus: number
  durationMs: number
}

export type StoreResult =
  /** The row took it now. */
  | 'stored'
  /** The row has it already, or a later one of the same login. */
  | 'already_stored'
  /** The grant was closed, replaced by another login, or is gone: the token must be revoked. */
  | 'superseded'

/** A grant that a login brought, sealed for `generation`. */
export interface NewGrant {
  user: UserKey
  loginId: string
  /** Generation of the row that this replaces, or 0 when there must be none. */
  replaces: number
  refreshTokenSealed: Buffer
  keyId: string
  accessToken: Omit<SealedAccessToken, 'requestedAt' | 'expiresAt'> | null
  /** How long ago the token request was sent, and how long the access token lives from there, in seconds. */
  requestedSecondsAgo: number
  expiresInSeconds: number
  scope: string
  pageroIssuer: string | null
  pageroSubject: string | null
  /** When the user logged in; undefined is now. */
  authenticatedAt?: Date
  /** The proven import that this grant is moved from; it is ended in the same transaction. */
  movedFrom?: {
    importId: string
    /** The import's, as it was read: another one in the meantime, and nothing is placed. */
    outcome: GrantImport['outcome']
    user: UserKey
    generation: number
  }
  /** The pending grant that this one was; it is marked as confirmed in the same transaction, and kept for so long. */
  confirmedFrom?: { confirmationHash: Buffer; keptSeconds: number }
  /** The refresh token that this replaces, to be revoked at Pagero; written in the same transaction. */
  revocation: NewRevocation | undefined
}

/** Forensics of a refusal: why a refresh token may be dead, as far as the ledger can tell. */
export interface Evidence {
  /**
   * An earlier attempt presented this very token and its end is unknown; or one of its predecessors was presented once
   * more after it had been spent, and may have come to the server after the rotation that brought this one.
   */
  unknownBefore: boolean
  /** Refusals of this token so far, the newest included. */
  refusals: number
  /** A process that has neither restarted nor drained its spool may hold the answer to an earlier attempt. */
  successorMayComeBack: boolean
  /** The ledger has seen a later generation of this login than the row holds: the row was restored. */
  laterGeneration: boolean
  /** Either reading of the three years is over, or within a day of it. */
  lifetimeOver: boolean
}

export interface GrantStore {
  find(user: UserKey): Promise<Grant | undefined>
  /** Those of the users that have a grant, in one statement, and of each what serving its token needs. */
  findMany(users: readonly UserKey[]): Promise<ServableGrant[]>
  /** Returns the database's instant of arming, or undefined when the row is not ours to arm. One autocommit statement. */
  arm(request: ArmRequest): Promise<{ armedAt: Date } | undefined>
  /**
   * Arms the row again for an attempt that is under way, if a failover has taken its arming back. Never over an attempt
   * that was armed since the server changed. False while the row has lost more than that: whoever has its present token
   * in the spool is still to bring it back.
   */
  rearm(request: ArmRequest, armedAt: Date): Promise<boolean>
  /** Closes an attempt that brought no successor and lets the row be armed again after the back-off. */
  disarm(end: {
    user: UserKey
    attemptId: string
    outcome: Exclude<AttemptOutcome, 'granted'>
    httpStatus: number | null
    durationMs: number
    retryInSeconds: number
    /** An attempt in doubt leaves the row armed: only the take-over rule frees it. */
    stayArmed: boolean
    /** The failure is the grant's own, and makes its back-off grow. */
    counts: boolean
  }): Promise<void>
  /**
   * Compare-and-set on login and generation alone, never on owner, attempt or lease: a later generation of the same
   * login takes the place of any earlier one, also where a failover has taken commits back.
   */
  store(successor: Successor): Promise<StoreResult>
  /**
   * Those of the successors that {@link store} would call `already_stored`, by the ids of their attempts, with the seconds since
   * the ledger took each in; 0 where it does not tell. One statement, which a server that cannot be written refuses.
   */
  findStored(successors: readonly Successor[]): Promise<ReadonlyMap<string, number>>
  /** Ends the ledger entry of a superseded successor, once its revocation is queued. */
  finishSuperseded(successor: Successor): Promise<void>
  /** Puts a grant in place of the row at `replaces`; false when that has moved on, or what it is taken from. */
  connect(grant: NewGrant): Promise<boolean>
  /** Closes the grant at `generation`, ends its sessions, queues the revocation; false when the row has moved on. */
  close(user: UserKey, generation: number, revocation: NewRevocation | undefined): Promise<boolean>
  /**
   * Gives a verdict on the grant at `generation`: unless that is `active`, no token of it is presented any more.
   * Nothing is deleted. False when the row has moved on, the verdict was given before, or `whileUnknown` is asked for
   * and the ledger has come to know how the earlier attempts ended.
   */
  condemn(
    user: UserKey,
    generation: number,
    verdict: {
      state: Exclude<GrantState, 'revoked'>
      reason: string | null
      whileUnknown?: boolean
    },
  ): Promise<boolean>
  /** What the ledger knows of the presentations of one generation. */
  evidence(user: UserKey, loginId: string, generation: number): Promise<Evidence>
  /** Seconds since the last forced refresh of this user was armed; undefined when there was none. */
  lastForcedSecondsAgo(user: UserKey): Promise<number | undefined>
  /** Notes that the grants were used, in one statement that waits for no other. */
  touch(users: readonly UserKey[]): Promise<void>
  /**
   * Grants that this replica has armed, or that wait for a word of it, or whose token it has presented last or in doubt
   * since it was stored, in the order of their keys from behind `after`: unless their attempts are under way, nobody knows
   * whether their tokens are spent.
   */
  findUndecided(page: {
    replica: string
    after: UserKey | undefined
    limit: number
  }): Promise<Grant[]>
  /** Grants that were not rotated for half their lifetime and are not being refreshed, in the order of their keys. */
  findKeepAliveDue(page: { after: UserKey | undefined; limit: number }): Promise<Grant[]>
  /**
   * So many of the grants whose earlier expiry has come within 90, 30 or 7 days and that have not been told of yet; each
   * is told of once.
   */
  takeExpiryWarnings(limit: number): Promise<ExpiryWarning[]>
  /**
   * Drops what nobody will ask for again, some of it at a time: the ciphertext of grants that died a month ago, ledger
   * entries older than a quarter. Returns how many there were.
   */
  sweep(): Promise<number>
  /** A page of grants in the order of their user keys. `mayList` patterns use `*` for any run of characters. */
  list(filter: GrantFilter): Promise<Grant[]>
}

export interface ExpiryWarning {
  user: UserKey
  /** 90, 30 or 7. */
  withinDays: number
}

export interface GrantFilter {
  state: GrantState | undefined
  /** ISO 8601 duration: the earlier expiry lies within it from now, or is past. */
  expiresWithin: string | undefined
  /** User patterns of which one must match; `*` stands for any run of characters. */
  users: readonly string[]
  /** Only keys after this one. */
  after: UserKey | undefined
  limit: number
}

// ── Imports: refresh tokens taken over from other systems ────────────────────────────────────────

export interface GrantImport {
  importId: string
  user: UserKey
  obtainedAt: Date
  /** When it was asked for. */
  createdAt: Date
  outcome: 'imported' | 'refused' | null
  /** The user was disconnected while it was under way. */
  isAbandoned: boolean
}

export interface ImportStore {
  /**
   * Writes the import and the grant that proves it, or returns the import that has this token already. `grant` is
   * named after the import.
   */
  begin(
    entry: { importId: string; user: UserKey; tokenDigest: Buffer; obtainedAt: Date },
    grant: { user: UserKey; loginId: string; refreshTokenSealed: Buffer; keyId: string },
  ): Promise<GrantImport>
  /**
   * Those that have no end yet, and those that were refused and that a late success has proven all the same, in the order of
   * their ids.
   */
  findUnfinished(page: { after: string | undefined; limit: number }): Promise<GrantImport[]>
  /**
   * Marks what is under way for the user as not wanted any more, and what was refused and may still be proven. Returns false
   * when nothing was under way.
   */
  abandon(user: UserKey): Promise<boolean>
  /** Ends an import that Pagero refused, or that was overtaken. The grant that was to prove it stays for a month: a late success is told by it. */
  refuse(importId: string): Promise<void>
  /** Forgets those that ended longer ago than any refresh token lives: the same token may be given again until then. */
  sweep(): Promise<number>
}

/** One line of the ledger: a refresh token was presented, or is being presented. */
export interface Attempt {
  attemptId: string
  /** Generation of the token that was presented. */
  generation: number
  cause: RefreshCause
  replica: string
  armedAt: Date
  /** Null while the attempt runs, or when its process died in it; so is the outcome. */
  finishedAt: Date | null
  outcome: AttemptOutcome | null
  httpStatus: number | null
  durationMs: number | null
}

export interface AttemptStore {
  /** Reads the ledger of a user, newest first, from behind the attempt `after`; undefined when that one is not this user's. */
  list(
    user: UserKey,
    page: { after: string | undefined; limit: number },
  ): Promise<Attempt[] | undefined>
}

// ── Revocations: refresh tokens that Pagero must still be told to forget ─────────────────────────

export interface NewRevocation {
  revocationId: string
  user: UserKey
  tokenSealed: Buffer
  keyId: string
}

export interface Revocation extends NewRevocation {
  failureCount: number
}

export interface RevocationStore {
  add(revocation: NewRevocation): Promise<void>
  /** Takes up to `limit` due ones and hides them from others for `leaseSeconds`. */
  take(limit: number, leaseSeconds: number): Promise<Revocation[]>
  /** Forgets one that Pagero has confirmed. */
  done(revocationId: string): Promise<void>
  retryLater(revocationId: string, delaySeconds: number): Promise<void>
}

// ── The outbox: events that the webhook must still be told of ───────────────────────────────────

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

// ── Logins and sessions ──────────────────────────────────────────────────────────────────────────

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

// ── Connect links: an application's user and a Pagero account ───────────────────────────────────

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

export interface ReplicaStore {
  /**
   * Says that this boot lives. Returns the database server onto which it has yet to bring back what it holds, because
   * that server has taken another's place; undefined when there is nothing to do.
   */
  heartbeat(replica: string, boot: string): Promise<string | undefined>
  /** Notes that this boot has brought back everything it holds onto `server`, as the heartbeat named it. */
  restored(replica: string, boot: string, server: string): Promise<void>
  /** The instant by the database's clock. */
  now(): Promise<Date>
  /**
   * Notes that this boot has applied everything its spool held when it looked, which was after `asOf`. What an earlier boot
   * of the replica had armed by then is over: its answer is in the database, or was never had.
   */
  spoolDrained(replica: string, boot: string, asOf: Date): Promise<void>
  /** Forgets replicas that have not been seen for a month. */
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

// ── The authorization server ─────────────────────────────────────────────────────────────────────

export interface AuthorizationRequest {
  state: string
  nonce: string | undefined
  codeChallenge: string | undefined
  prompt: 'login' | undefined
}

export interface AuthorizationServer {
  /** The URL that the browser is sent to. `redirect_uri` and scope are those configured, byte for byte. */
  authorizationUrl(request: AuthorizationRequest): string
  /**
   * Checks state and issuer of an authorization response (RFC 6749 section 4.1.2, RFC 9207) and returns what it brings.
   * @throws BrokerError `login_transaction_invalid` on a doubled or missing parameter, a wrong or missing issuer
   */
  readAuthorizationResponse(
    parameters: URLSearchParams,
    state: string,
  ): { code: string } | { error: string }
  /** Presents the code once. */
  exchangeCode(code: string, codeVerifier: string | undefined): Promise<TokenOutcome>
  /** Presents the refresh token once, on a fresh connection; `sendBeforeMs` is monotonic, later than that it is not sent. */
  refresh(
    refreshToken: string,
    limits: { sendBeforeMs: number; deadlineMs: number },
  ): Promise<TokenOutcome>
  /** True when Pagero confirmed; false means try again later. Never throws. */
  revoke(refreshToken: string): Promise<boolean>
  /**
   * Checks the claims of an ID token: `aud`, `exp`, `nonce` always, `iss` and the signature when configured.
   * Returns them, or a sentence that says what is wrong. `now` is by the database's clock: one replica whose own is wrong
   * would refuse every login.
   */
  readIdToken(
    idToken: string,
    expected: { nonceHash: Buffer | null; now: Date },
  ): Promise<{ claims: Readonly<Record<string, unknown>> } | { invalid: string }>
}

/** A durable place beside the database, for sealed answers on their way into it. */
export interface Spool {
  /** Durable when it resolves: file and directory are synced. */
  write(successor: Successor): Promise<void>
  remove(attemptId: string): Promise<void>
  /** What it holds, in the order of granting; not whole when something could not be read just now and stays where it is. */
  list(): Promise<{ entries: Successor[]; isWhole: boolean }>
  /** Tells whether there is room for more than what is in flight already. Costs nothing. */
  hasRoom(): boolean
  /** Throws when nothing could be written now, or there is no such room. */
  checkWritable(): Promise<void>
}

export interface Ports {
  clock: Clock
  log: Log
  audit: Audit
  auditEvents: AuditStore
  sealer: Sealer
  grants: GrantStore
  attempts: AttemptStore
  imports: ImportStore
  revocations: RevocationStore
  outbox: OutboxStore
  loginTransactions: LoginTransactionStore
  connectLinks: ConnectLinkStore
  pendingGrants: PendingGrantStore
  sessionTickets: SessionTicketStore
  sessions: SessionStore
  replicas: ReplicaStore
  credentialUses: CredentialUseStore
  authorizationServer: AuthorizationServer
  spool: Spool
}
