-- Events of grants on their way to the webhook: written with the change that they tell of, gone when they are delivered.

create table outbox (
  event_id uuid primary key default gen_random_uuid(),
  position bigint generated always as identity unique,
  user_id text collate "C" not null,
  type text not null check (type in ('grant.connected', 'grant.reauthentication_required', 'grant.recovered', 'grant.expiring', 'grant.disconnected')),
  occurred_at timestamptz not null default clock_timestamp(),
  grant_state text not null,
  cause text,
  generation bigint not null,
  expires_at timestamptz not null,
  within_days integer,
  state text not null default 'pending' check (state in ('pending', 'dead')),
  next_attempt_at timestamptz not null default clock_timestamp(),
  give_up_at timestamptz not null default clock_timestamp() + interval '3 days',
  attempt_count integer not null default 0,
  last_attempt_at timestamptz,
  last_failure text
);
create index outbox_due on outbox (next_attempt_at) where state = 'pending';
create index outbox_of_user on outbox (user_id, position) where state = 'pending';
create index outbox_dead on outbox (give_up_at) where state = 'dead';
comment on column grants.state_reason is 'Why the grant is in this state: for a dead one its cause, from the ledger; recovered after a late success, or a login, has revived a dead one.';
comment on table outbox is 'Events of grants that the webhook has not confirmed yet. A row is written in the statement that changes the grant, and goes when it is delivered.';
comment on column outbox.event_id is 'Sent as webhook-id: the same at each attempt.';
comment on column outbox.position is 'Order of the events of one user: drawn while the row of the grant is locked.';
comment on column outbox.type is 'What happened to the grant.';
comment on column outbox.occurred_at is 'Sent with the event.';
comment on column outbox.grant_state is 'State of the grant after the change; cause, generation and expires_at are of that moment too.';
comment on column outbox.generation is 'Generation of the grant.';
comment on column outbox.cause is 'Why the grant is in that state, unless it is active.';
comment on column outbox.expires_at is 'The earlier of the two readings of the lifetime.';
comment on column outbox.within_days is 'Of grant.expiring: 90, 30 or 7.';
comment on column outbox.state is 'dead: given up, and in the way of no later event. An operator may have it delivered again.';
comment on column outbox.next_attempt_at is 'Not tried before this; pushed on while a replica delivers it.';
comment on column outbox.give_up_at is 'No attempt is made after this. A dead event is forgotten a month later.';
comment on column outbox.attempt_count is 'Counted before the request is sent.';
comment on column outbox.last_attempt_at is 'Null before the first attempt.';
comment on column outbox.last_failure is 'Status or reason of the last attempt, when it failed; null while one is being made.';
