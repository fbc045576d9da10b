-- The broker's first schema: deployment, grants and their ledger, replicas, revocations, logins and sessions.
-- Forward only. A file that has been released is never edited; a change is a new file.

create table deployment (
  one boolean primary key default true check (one),
  deployment_id uuid not null default gen_random_uuid(),
  created_at timestamptz not null default clock_timestamp(),
  database_identity text
);
comment on table deployment is 'One row. Its id is bound into every sealed value, so that a value of another deployment does not open here.';
comment on column deployment.deployment_id is 'Made once, by this migration.';
comment on column deployment.database_identity is 'The server and database that this deployment works in. Another one means a copy or a restore: nothing is refreshed until an operator accepts it.';
insert into deployment default values;

create table grants (
  user_id text collate "C" primary key check (user_id ~ '^[A-Za-z0-9._~@:+-]{1,255}$'),
  login_id uuid not null,
  state text not null default 'active' check (state in ('active', 'suspect', 'reauthentication_required', 'revoked')),
  state_reason text,
  condemned_at timestamptz,
  generation bigint not null check (generation > 0),
  refresh_token_sealed bytea,
  access_token_sealed bytea,
  access_token_requested_at timestamptz,
  access_token_expires_at timestamptz,
  access_token_fingerprint text,
  scope text not null default '',
  key_id text,
  pagero_issuer text,
  pagero_subject text,
  phase text not null default 'idle' check (phase in ('idle', 'armed')),
  attempt_id uuid,
  owner text,
  owner_boot uuid,
  armed_at timestamptz,
  lease_until timestamptz,
  next_retry_at timestamptz,
  failure_count integer not null default 0,
  authenticated_at timestamptz not null,
  rotated_at timestamptz not null,
  last_used_at timestamptz,
  rolling_expires_at timestamptz not null,
  absolute_expires_at timestamptz not null,
  expiry_warned_days integer,
  check ((access_token_sealed is null) = (access_token_expires_at is null)),
  check (phase = 'idle' or attempt_id is not null)
);
create index grants_of_keep_alive on grants (rotated_at) where state = 'active';
comment on table grants is 'What each user gave the broker at Pagero: one row a user, one live refresh token a row.';
comment on column grants.user_id is 'The application''s key for the user, or pagero:<sub> after a plain login. Compared byte for byte.';
comment on column grants.login_id is 'Changes with each login, confirmation and import. A late answer of an earlier login is told by it.';
comment on column grants.state is 'active: in use. suspect: refused, but an answer may still be on its way. reauthentication_required: the user must log in again. revoked: closed by us.';
comment on column grants.state_reason is 'Why the grant is in this state: for a dead one its cause, from the ledger.';
comment on column grants.condemned_at is 'When the verdict on a refused token fell. A month later its ciphertext goes.';
comment on column grants.generation is 'Grows by one with each refresh token stored. The compare-and-set of every store is on it.';
comment on column grants.refresh_token_sealed is 'The one live refresh token, AES-256-GCM, bound to deployment, table, column, user, login and generation.';
comment on column grants.access_token_sealed is 'The newest access token, sealed likewise.';
comment on column grants.access_token_requested_at is 'Before the token request was sent; the token''s life is counted from here.';
comment on column grants.access_token_expires_at is 'access_token_requested_at plus expires_in.';
comment on column grants.access_token_fingerprint is 'base64url of SHA-256 of the access token.';
comment on column grants.scope is 'As the authorization server answered; empty is normal at Pagero.';
comment on column grants.key_id is 'Id of the key that sealed refresh_token_sealed.';
comment on column grants.pagero_issuer is 'Issuer of the Pagero account, when an ID token said so.';
comment on column grants.pagero_subject is 'Subject of the Pagero account that logged in.';
comment on column grants.phase is 'armed: an attempt may be presenting the refresh token right now.';
comment on column grants.attempt_id is 'The attempt that armed the row last.';
comment on column grants.owner is 'Replica that armed the row.';
comment on column grants.owner_boot is 'Boot of that replica; a newer one proves that the owner has restarted.';
comment on column grants.armed_at is 'When the row was armed, by the database clock.';
comment on column grants.lease_until is 'Before this nobody else may present the token.';
comment on column grants.next_retry_at is 'After a failed attempt: not armed again before this.';
comment on column grants.failure_count is 'Failed attempts in a row; sets the back-off; 0 after a success.';
comment on column grants.authenticated_at is 'Last interactive login.';
comment on column grants.rotated_at is 'When the current refresh token was stored.';
comment on column grants.last_used_at is 'Last hand-out or proxied call, to the minute.';
comment on column grants.rolling_expires_at is 'rotated_at plus REFRESH_TOKEN_LIFETIME, in calendar years.';
comment on column grants.expiry_warned_days is 'The last warning given that the earlier of the two comes near: 90, 30 or 7 days before. Null until the first, and again after a login.';
comment on column grants.absolute_expires_at is 'authenticated_at plus REFRESH_TOKEN_LIFETIME.';

create table refresh_attempts (
  attempt_id uuid primary key,
  user_id text collate "C" not null,
  login_id uuid not null,
  generation bigint not null,
  token_digest bytea not null,
  replica text not null,
  boot uuid not null,
  cause text not null check (cause in ('expiry', 'min_ttl', 'rejected', 'ahead', 'keep_alive', 'import', 'recovery')),
  armed_at timestamptz not null,
  finished_at timestamptz,
  outcome text check (outcome in ('granted', 'refused', 'rejected_client', 'not_processed', 'in_doubt')),
  http_status integer,
  duration_ms integer
);
create index refresh_attempts_of_user on refresh_attempts (user_id, armed_at desc);
create index refresh_attempts_by_age on refresh_attempts using brin (armed_at);
comment on table refresh_attempts is 'The ledger: one row for each presentation of a refresh token, written before the call.';
comment on column refresh_attempts.generation is 'Generation of the token that was presented.';
comment on column refresh_attempts.token_digest is 'Keyed HMAC of the presented token: tells whether two attempts presented the same one.';
comment on column refresh_attempts.replica is 'Replica that made the attempt, and its boot.';
comment on column refresh_attempts.cause is 'What the refresh was begun for.';
comment on column refresh_attempts.outcome is 'Null while it runs, or when the process died in it.';
comment on column refresh_attempts.http_status is 'Status of the token endpoint''s answer, if there was one.';

create table replicas (
  name text primary key,
  boot uuid not null,
  booted_at timestamptz not null default clock_timestamp(),
  seen_at timestamptz not null default clock_timestamp(),
  steady_since timestamptz not null default clock_timestamp(),
  spool_drained_at timestamptz
);
comment on table replicas is 'Every replica, by its stable name.';
comment on column replicas.boot is 'Made at each start of the process.';
comment on column replicas.seen_at is 'Last heartbeat.';
comment on column replicas.steady_since is 'Since when the heartbeats of this boot have come without a gap: from then on, the missing heartbeat of another says something.';
comment on column replicas.spool_drained_at is 'When this boot had applied everything its spool held. Null until then.';

create table revocations (
  revocation_id uuid primary key,
  user_id text collate "C" not null,
  token_sealed bytea not null,
  key_id text not null,
  created_at timestamptz not null default clock_timestamp(),
  next_attempt_at timestamptz not null default clock_timestamp(),
  failure_count integer not null default 0
);
create index revocations_due on revocations (next_attempt_at);
comment on table revocations is 'Refresh tokens that are out of use here and must still be revoked at Pagero. A row goes when Pagero has confirmed.';
comment on column revocations.next_attempt_at is 'Not tried before this; pushed on while a replica works on it.';

create table imports (
  import_id uuid primary key,
  user_id text collate "C" not null,
  token_digest bytea not null unique,
  obtained_at timestamptz not null,
  created_at timestamptz not null default clock_timestamp(),
  finished_at timestamptz,
  outcome text check (outcome in ('imported', 'refused'))
);
create index imports_unfinished on imports (created_at) where finished_at is null;
comment on table imports is 'Refresh tokens taken over from other systems. Each is first proven by one refresh as a grant of its own, named after the import, and then moved to its user in one statement.';
comment on column imports.import_id is 'Also names the grant that proves it: pagero:~import~ and this.';
comment on column imports.user_id is 'Whose grant it becomes.';
comment on column imports.token_digest is 'SHA-256 of the token as it was given: the same one given twice is one import.';
comment on column imports.obtained_at is 'When the other system got it; the absolute lifetime counts from here.';
comment on column imports.finished_at is 'Forgotten when no refresh token can be that old.';
comment on column imports.outcome is 'Null until Pagero has answered.';

create table login_transactions (
  state_hash bytea primary key,
  browser_binding_hash bytea not null,
  code_verifier_sealed bytea,
  nonce_hash bytea,
  return_to text not null,
  replaces_session_hash bytea,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null
);
create index login_transactions_of_browser on login_transactions (browser_binding_hash, created_at);
create index login_transactions_expired on login_transactions (expires_at);
comment on table login_transactions is 'Between the redirect to Pagero and the callback. Consumed by one DELETE … RETURNING.';
comment on column login_transactions.state_hash is 'SHA-256 of the state parameter.';
comment on column login_transactions.browser_binding_hash is 'SHA-256 of the login cookie: the transaction belongs to that browser.';
comment on column login_transactions.code_verifier_sealed is 'PKCE verifier, sealed; null while PKCE is off.';
comment on column login_transactions.nonce_hash is 'SHA-256 of the nonce that the ID token must carry.';
comment on column login_transactions.replaces_session_hash is 'Session that this login ends when it succeeds.';

create table sessions (
  token_hash bytea primary key,
  user_id text collate "C" not null,
  created_at timestamptz not null default clock_timestamp(),
  last_seen_at timestamptz not null default clock_timestamp(),
  idle_expires_at timestamptz not null,
  absolute_expires_at timestamptz not null
);
create index sessions_of_user on sessions (user_id, created_at);
create index sessions_expired on sessions (least(idle_expires_at, absolute_expires_at));
comment on table sessions is 'Browser sessions. A row is a live session; ending one deletes it.';
comment on column sessions.token_hash is 'SHA-256 of the cookie''s value; the value itself is stored nowhere.';
comment on column sessions.idle_expires_at is 'Moves on with use.';
comment on column sessions.absolute_expires_at is 'Never moves.';
