// What an audit event is: the closed lists of actions and details, and which events may be added up.
// Every part is safe to store in clear. A new action is a line here; the table takes any.

import type { UserKey } from './grant.ts'

/** Everything that is recorded, with how equal events that come faster than rows are written are kept apart. */
export const AUDIT_ACTIONS = {
  // Access tokens leaving the broker: each one counts.
  /** An access token was given to a caller, or to a gateway for one. */
  token_handed_out: 'counted by token',
  /** A call went to Pagero's API with the user's token. */
  call_proxied: 'counted by token',
  /** A GET whose token Pagero had refused went once more, with another one. */
  call_repeated: 'counted by token',

  // Refusals: anybody can make as many as he likes, so they are counted, and their rows are few.
  caller_unauthenticated: 'counted as a refusal',
  caller_forbidden: 'counted as a refusal',
  user_not_visible: 'counted as a refusal',
  csrf_refused: 'counted as a refusal',
  rate_limited: 'counted as a refusal',
  login_refused: 'counted as a refusal',
  confirmation_refused: 'counted as a refusal',

  // Users and their grants.
  login_completed: 'single',
  logged_out: 'single',
  sessions_ended: 'single',
  grant_disconnected: 'single',
  grant_imported: 'single',
  import_refused: 'single',
  grant_condemned: 'single',
  connect_link_made: 'single',
  connect_link_used: 'single',
  grant_confirmed: 'single',
  integrity_failure: 'counted as a refusal',

  // The broker and its operators.
  broker_started: 'single',
  broker_stopped: 'single',
  database_accepted: 'single',
  database_not_accepted: 'single',
  encryption_key_unusable: 'single',
  keys_rotated: 'single',
  callers_loaded: 'single',
  callers_refused: 'single',
  caller_key_added: 'single',
  caller_key_removed: 'single',
  breaker_opened: 'single',
  breaker_closed: 'single',
  webhook_dead: 'single',

  // The record itself.
  /** First row of every chain. */
  chain_opened: 'single',
  /** Last row of a chain whose process ended in order. */
  chain_closed: 'single',
  /** Where the chains ended at that moment: rows cut off an end later are missed. */
  heads_noted: 'single',
  /** Retention took the rows of a chain that come before `details.sequence`. */
  events_expired: 'single',
  /** `count` events could not be kept. */
  events_dropped: 'single',
} as const satisfies Record<string, 'single' | 'counted by token' | 'counted as a refusal'>

export type AuditAction = keyof typeof AUDIT_ACTIONS

export type ActorKind = 'caller' | 'session' | 'operator' | 'broker' | 'anyone'

export type AuditOutcome = 'succeeded' | 'refused' | 'failed'

/** Members that `details` may have. None is ever a secret, and none is a text that somebody else chose. */
export interface AuditDetails {
  /** Why, in a code or a sentence of the broker's own. */
  reason?: string
  /** Of a grant's death: its cause, from the ledger. */
  cause?: string
  method?: string
  address?: string
  generation?: number
  attemptId?: string
  apiKeyId?: string
  keyId?: string
  keyIds?: readonly string[]
  version?: string
  /** Settings that security rests on, the values of closed lists, and whether the others are set. */
  settings?: readonly string[]
  /** Of another event of this kind: the webhook, the link, the import. */
  id?: string
  chain?: string
  sequence?: number
  /** Of retention: rows are kept from this instant on. */
  before?: string
  /** `chain:sequence:hash`, the hash in hex. */
  heads?: readonly string[]
}

export interface AuditEvent {
  action: AuditAction
  actor: ActorKind
  /** Name of the caller, or the user of the session. */
  name?: string
  user?: UserKey
  /** `succeeded` unless it says otherwise. */
  outcome?: AuditOutcome
  requestId?: string
  fingerprint?: string
  details?: AuditDetails
}

/** An event as the record keeps it. */
export interface AuditRow {
  chainId: string
  sequence: number
  at: Date
  replica: string
  actorKind: ActorKind
  actorName: string | null
  action: string
  user: UserKey | null
  outcome: AuditOutcome
  requestId: string | null
  fingerprint: string | null
  count: number
  details: AuditDetails
  keyId: string
  previousHash: Buffer
  hash: Buffer
}
