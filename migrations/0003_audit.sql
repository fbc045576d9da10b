-- What was done, by whom and for whom: append-only, each row linked to the one before it by a keyed hash.

create table audit_events (
  chain_id uuid not null,
  sequence bigint not null check (sequence >= 0),
  at timestamptz(3) not null,
  replica text not null,
  actor_kind text not null check (actor_kind in ('caller', 'session', 'operator', 'broker', 'anyone')),
  actor_name text,
  action text not null check (action ~ '^[a-z_]{3,40}$'),
  user_id text collate "C",
  outcome text not null check (outcome in ('succeeded', 'refused', 'failed')),
  request_id text,
  fingerprint text,
  count integer not null default 1 check (count > 0),
  details jsonb not null default '{}',
  key_id text not null,
  previous_hash bytea not null,
  hash bytea not null,
  primary key (chain_id, sequence)
);
create index audit_events_by_time on audit_events (at, chain_id, sequence);
create index audit_events_of_user on audit_events (user_id, at, chain_id, sequence) where user_id is not null;
create index audit_events_of_token on audit_events (fingerprint) where fingerprint is not null;
create index audit_events_anchors on audit_events (chain_id, sequence) where action in ('heads_noted', 'events_expired');
comment on table audit_events is 'Who did what, and who was given which access token. Rows are added, never changed; only retention takes them away, the oldest of each chain first.';
comment on column audit_events.chain_id is 'Boot of the process that wrote the row. Each boot writes a chain of its own, so that replicas need not agree.';
comment on column audit_events.sequence is 'Place in the chain, from 0, without gaps.';
comment on column audit_events.at is 'When it happened, by the database clock: the clock at the writing, less the time that the event had waited.';
comment on column audit_events.actor_kind is 'caller: a service, by its name in CALLERS_FILE. session: a browser, by its user. operator: a command. broker: the broker by itself. anyone: not authenticated.';
comment on column audit_events.actor_name is 'Name of the caller, or user of the session.';
comment on column audit_events.action is 'One of the closed list in src/audit-event.ts.';
comment on column audit_events.replica is 'Replica that wrote the row.';
comment on column audit_events.outcome is 'refused: by the broker''s rules. failed: for another reason.';
comment on column audit_events.user_id is 'Whose grant it concerns.';
comment on column audit_events.request_id is 'As in the log and in X-Request-Id. Null for a row that counts several.';
comment on column audit_events.fingerprint is 'base64url of SHA-256 of the access token that was used or given out; never the token.';
comment on column audit_events.count is 'How many times it happened: more than 1 where equal events came faster than rows are written.';
comment on column audit_events.details is 'Members of a closed list, none of them a secret.';
comment on column audit_events.key_id is 'Encryption key from which the key of the hash is derived.';
comment on column audit_events.previous_hash is 'hash of the row before; 32 zero bytes for the first.';
comment on column audit_events.hash is 'HMAC-SHA-256 over every other column: who can write to this table alone cannot make one.';

-- Against mistakes. Who owns the table can drop the trigger; the hashes tell of it.
create function refuse_audit_change() returns trigger language plpgsql as $$ begin
  if tg_op = 'DELETE' and current_setting('pagero_broker.audit_retention', true) = 'on' then
    return null;
  end if;
  raise exception 'audit_events is append-only' using errcode = 'insufficient_privilege';
end $$;
comment on function refuse_audit_change is 'Lets rows of audit_events go only in a transaction that says it is the retention.';
create trigger audit_events_are_kept before update or delete or truncate on audit_events
  for each statement execute function refuse_audit_change();
