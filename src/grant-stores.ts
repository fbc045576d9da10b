// What the core needs of the database for grants: the rows, the ledger of attempts, the replicas, revocations and imports.

import type {
  AttemptOutcome,
  Grant,
  GrantState,
  RefreshCause,
  SealedAccessToken,
  ServableGrant,
  UserKey,
} from './grant.ts'

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

/** Which successor it is, without its tokens. */
export type SuccessorId = Pick<Successor, 'user' | 'loginId' | 'attemptId' | 'generation'>

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
  findStored(successors: readonly SuccessorId[]): Promise<ReadonlyMap<string, number>>
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

// ── The ledger ───────────────────────────────────────────────────────────────────────────────────

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

// ── Replicas ─────────────────────────────────────────────────────────────────────────────────────

export interface ReplicaStore {
  /**
   * Says that this boot lives. Returns the database server onto which it has yet to bring back what it holds, because
   * that server has taken another's place, or knows nothing of a replica that `holds` something in its spool; undefined when
   * there is nothing to do.
   */
  heartbeat(replica: string, boot: string, holds?: boolean): Promise<string | undefined>
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
   * Marks what is under way for the user as not wanted any more, and what was refused and may still be proven. Returns the ids
   * of those that have no end yet, each time until they are refused.
   */
  abandon(user: UserKey): Promise<string[]>
  /** Ends an import that Pagero refused, or that was overtaken. The grant that was to prove it stays for a month: a late success is told by it. */
  refuse(importId: string): Promise<void>
  /** Forgets those that ended longer ago than any refresh token lives: the same token may be given again until then. */
  sweep(): Promise<number>
}

// ── Sealed values, to be sealed anew ─────────────────────────────────────────────────────────────

/** What a row is found by: a user key, a hash, an id. */
export type RowKey = string | Buffer

/** Sealed values of one row, by column, and what they are bound to. */
export type SealedRow = { key: RowKey; sealed: Readonly<Record<string, Buffer | null>> } & (
  | { table: 'grants'; user: UserKey; loginId: string; generation: number }
  | { table: 'pending_grants'; user: UserKey; confirmationHash: Buffer; revocationId: string }
  | { table: 'revocations'; user: UserKey; revocationId: string }
  | { table: 'login_transactions'; stateHash: Buffer }
)
export type SealedTable = SealedRow['table']

/** A row as it was read, and its values as another key has sealed them. */
export interface ResealedRow {
  row: SealedRow
  sealed: SealedRow['sealed']
}

export interface SealedValueStore {
  /**
   * Looks at the next `limit` rows in the order of their keys. Returns those with a value that does not begin like this,
   * and the last key that was looked at; undefined at the end.
   */
  findSealedOtherwise(
    table: SealedTable,
    prefix: Buffer,
    page: { after: RowKey | undefined; limit: number },
  ): Promise<{ rows: SealedRow[]; last: RowKey | undefined }>
  /** Replaces the values of those rows that hold them still, and says which key has sealed them. Returns how many do. */
  replaceSealed(table: SealedTable, rows: readonly ResealedRow[], keyId: string): Promise<number>
}
