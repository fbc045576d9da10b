// The outside world as types. The core is written against these; adapters implement them and never call back.
// A function's first parameter is a `Pick` of `Ports`: the list of what it can reach.

import type { TokenOutcome } from './grant.ts'
import type {
  Successor,
  SuccessorId,
  GrantStore,
  AttemptStore,
  ReplicaStore,
  RevocationStore,
  ImportStore,
} from './grant-stores.ts'
import type {
  LoginTransactionStore,
  ConnectLinkStore,
  PendingGrantStore,
  SessionStore,
  SessionTicketStore,
} from './login-stores.ts'
import type { OutboxStore, CredentialUseStore, Audit, AuditStore } from './record-stores.ts'

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

// ── The spool ────────────────────────────────────────────────────────────────────────────────────

/** A durable place beside the database, for sealed answers on their way into it. */
export interface Spool {
  /** Durable when it resolves: file and directory are synced. */
  write(successor: Successor): Promise<void>
  remove(attemptId: string): Promise<void>
  /**
   * What it holds, in the order of granting; not whole when something could not be read just now and stays where it is.
   * A file that holds nothing but what is `known` to the caller is not read, and what is in it not listed.
   */
  list(known?: {
    has(attemptId: string): boolean
  }): Promise<{ entries: SuccessorId[]; isWhole: boolean }>
  /** Tells whether an entry was listed or written last, and not removed since. Costs nothing. */
  has(attemptId: string): boolean
  /** Reads an entry; undefined when it is gone, or is no entry any more. Throws when it cannot be read just now. */
  read(attemptId: string): Promise<Successor | undefined>
  /** Tells whether there is no entry in it. Costs nothing. */
  isEmpty(): boolean
  /** Tells whether there is room for more than what is in flight already. Costs nothing. */
  hasRoom(): boolean
  /** Entries more than leave ample room; that many applied ones may go before their time. Costs nothing. */
  surplus(): number
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
