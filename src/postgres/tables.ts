// The tables of migrations/*.sql as kysely reads them. What each column means is said there, in comments on
// table and column. Kept by hand; test/migrations.test.ts compares every column with the database.

import type { Generated } from 'kysely'

import type { ActorKind, AuditDetails, AuditOutcome } from '../audit-event.ts'
import type { AttemptOutcome, GrantEvent, GrantState, RefreshCause, UserKey } from '../grant.ts'
import type { Credential } from '../record-stores.ts'

interface DeploymentTable {
  one: Generated<boolean>
  deployment_id: Generated<string>
  created_at: Generated<Date>
  database_identity: string | null
  server_started_at: Date | null
  server_noticed_at: Date | null
  server_left_at: Date | null
}

interface GrantsTable {
  user_id: UserKey
  login_id: string
  state: Generated<GrantState>
  state_reason: string | null
  condemned_at: Date | null
  generation: number
  refresh_token_sealed: Buffer | null
  access_token_sealed: Buffer | null
  access_token_requested_at: Date | null
  access_token_expires_at: Date | null
  access_token_fingerprint: string | null
  scope: Generated<string>
  key_id: string | null
  pagero_issuer: string | null
  pagero_subject: string | null
  phase: Generated<'idle' | 'armed'>
  attempt_id: string | null
  owner: string | null
  owner_boot: string | null
  armed_at: Date | null
  lease_until: Date | null
  next_retry_at: Date | null
  failure_count: Generated<number>
  authenticated_at: Date
  rotated_at: Date
  last_used_at: Date | null
  rolling_expires_at: Date
  absolute_expires_at: Date
  expiry_warned_days: number | null
  decided_at: Date | null
}

interface RefreshAttemptsTable {
  attempt_id: string
  user_id: UserKey
  login_id: string
  generation: number
  token_digest: Buffer
  replica: string
  boot: string
  cause: RefreshCause
  armed_at: Date
  finished_at: Date | null
  outcome: AttemptOutcome | null
  http_status: number | null
  duration_ms: number | null
}

interface ReplicasTable {
  name: string
  boot: string
  booted_at: Generated<Date>
  seen_at: Generated<Date>
  steady_since: Generated<Date>
  spool_drained_at: Date | null
  restored_on: Date | null
  met_on: Date | null
  met_at: Date | null
}

interface RevocationsTable {
  revocation_id: string
  user_id: UserKey
  token_sealed: Buffer
  key_id: string
  created_at: Generated<Date>
  next_attempt_at: Generated<Date>
  failure_count: Generated<number>
}

interface ImportsTable {
  import_id: string
  user_id: UserKey
  token_digest: Buffer
  obtained_at: Date
  created_at: Generated<Date>
  finished_at: Date | null
  outcome: 'imported' | 'refused' | null
  abandoned_at: Date | null
}

interface LoginTransactionsTable {
  state_hash: Buffer
  browser_binding_hash: Buffer
  code_verifier_sealed: Buffer | null
  nonce_hash: Buffer | null
  return_to: string
  replaces_session_hash: Buffer | null
  created_at: Generated<Date>
  expires_at: Date
  user_id: UserKey | null
  confirm: boolean | null
  start_session: boolean | null
  allow_account_change: boolean | null
}

interface ConnectLinksTable {
  ticket_hash: Buffer
  user_id: UserKey
  return_to: string
  confirm: boolean
  start_session: boolean
  allow_account_change: boolean
  created_at: Generated<Date>
  expires_at: Date
  used_at: Date | null
}

interface PendingGrantsTable {
  confirmation_hash: Buffer
  user_id: UserKey
  refresh_token_sealed: Buffer | null
  access_token_sealed: Buffer | null
  access_token_requested_at: Date | null
  access_token_expires_at: Date | null
  scope: Generated<string>
  key_id: string | null
  pagero_issuer: string | null
  pagero_subject: string | null
  return_to: string
  start_session: boolean
  allow_account_change: boolean
  browser_binding_hash: Buffer
  replaces_session_hash: Buffer | null
  revocation_id: string | null
  revocation_token_sealed: Buffer | null
  created_at: Generated<Date>
  expires_at: Date
  confirmed_at: Date | null
}

interface SessionTicketsTable {
  ticket_hash: Buffer
  user_id: UserKey
  return_to: string
  browser_binding_hash: Buffer
  replaces_session_hash: Buffer | null
  expires_at: Date
}

interface SessionsTable {
  token_hash: Buffer
  user_id: UserKey
  created_at: Generated<Date>
  last_seen_at: Generated<Date>
  idle_expires_at: Date
  absolute_expires_at: Date
}

interface AuditEventsTable {
  chain_id: string
  sequence: number
  at: Date
  replica: string
  actor_kind: ActorKind
  actor_name: string | null
  action: string
  user_id: UserKey | null
  outcome: AuditOutcome
  request_id: string | null
  fingerprint: string | null
  count: Generated<number>
  details: Generated<AuditDetails>
  key_id: string
  previous_hash: Buffer
  hash: Buffer
}

interface OutboxTable {
  event_id: Generated<string>
  position: Generated<number>
  user_id: UserKey
  type: GrantEvent
  occurred_at: Generated<Date>
  grant_state: GrantState
  cause: string | null
  generation: number
  expires_at: Date
  within_days: number | null
  state: Generated<'pending' | 'dead'>
  next_attempt_at: Generated<Date>
  give_up_at: Generated<Date>
  attempt_count: Generated<number>
  last_attempt_at: Date | null
  last_failure: string | null
}

interface CredentialUsesTable {
  kind: Credential['kind']
  name: string
  last_used_at: Date
}

interface SchemaMigrationsTable {
  name: string
  applied_at: Generated<Date>
}

/** Every table of the schema, as kysely reads it. */
export interface Tables {
  deployment: DeploymentTable
  grants: GrantsTable
  refresh_attempts: RefreshAttemptsTable
  replicas: ReplicasTable
  revocations: RevocationsTable
  imports: ImportsTable
  login_transactions: LoginTransactionsTable
  connect_links: ConnectLinksTable
  pending_grants: PendingGrantsTable
  session_tickets: SessionTicketsTable
  sessions: SessionsTable
  audit_events: AuditEventsTable
  outbox: OutboxTable
  credential_uses: CredentialUsesTable
  schema_migrations: SchemaMigrationsTable
}
