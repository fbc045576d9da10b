-- Connect links: an application connects its own user to a Pagero account, and confirms whose browser came back.

create table connect_links (
  ticket_hash bytea primary key,
  user_id text collate "C" not null,
  return_to text not null,
  confirm boolean not null,
  start_session boolean not null,
  allow_account_change boolean not null,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  used_at timestamptz
);
create index connect_links_expired on connect_links (expires_at);
comment on table connect_links is 'Links that send the browser of an application''s user to Pagero. A row stays a day beyond its expiry, so that whoever opens it late is told why it does nothing.';
comment on column connect_links.ticket_hash is 'SHA-256 of the ticket in the link; the ticket itself is stored nowhere.';
comment on column connect_links.user_id is 'Whose grant it will be. The application names it; no login can make such a key.';
comment on column connect_links.return_to is 'Where the browser goes after Pagero.';
comment on column connect_links.confirm is 'The grant waits until the application has confirmed whose browser came back.';
comment on column connect_links.start_session is 'A browser session of the user begins with the connection.';
comment on column connect_links.allow_account_change is 'Another Pagero account may take the place of the one that is connected.';
comment on column connect_links.used_at is 'When a browser opened it. It is opened once.';

alter table login_transactions
  add column user_id text collate "C",
  add column confirm boolean,
  add column start_session boolean,
  add column allow_account_change boolean;
comment on column login_transactions.user_id is 'The user of the connect link that began it; null for a plain login.';
comment on column login_transactions.confirm is 'As in connect_links, and so are the next two; null for a plain login.';
comment on column login_transactions.start_session is 'As in connect_links.';
comment on column login_transactions.allow_account_change is 'As in connect_links.';

create table pending_grants (
  confirmation_hash bytea primary key,
  user_id text collate "C" not null,
  refresh_token_sealed bytea,
  access_token_sealed bytea,
  access_token_requested_at timestamptz,
  access_token_expires_at timestamptz,
  scope text not null default '',
  key_id text,
  pagero_issuer text,
  pagero_subject text,
  return_to text not null,
  start_session boolean not null,
  allow_account_change boolean not null,
  browser_binding_hash bytea not null,
  replaces_session_hash bytea,
  revocation_id uuid,
  revocation_token_sealed bytea,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  confirmed_at timestamptz,
  check ((confirmed_at is null) = (refresh_token_sealed is not null)),
  check ((refresh_token_sealed is null) = (key_id is null)),
  check ((refresh_token_sealed is null) = (revocation_token_sealed is null)),
  check ((access_token_sealed is null) = (access_token_expires_at is null))
);
create unique index pending_grants_of_user on pending_grants (user_id) where confirmed_at is null;
create index pending_grants_expired on pending_grants (expires_at);
comment on table pending_grants is 'What a connect link brought, until the application confirms it: one a user. Nothing of it is served. Confirmed, the row loses its tokens and stays some minutes, so that a confirmation whose answer was lost can be repeated.';
comment on column pending_grants.confirmation_hash is 'SHA-256 of the confirmation that the browser brought to the application.';
comment on column pending_grants.refresh_token_sealed is 'Bound to deployment, table, column, user and confirmation. Not used while it waits.';
comment on column pending_grants.access_token_sealed is 'Sealed likewise.';
comment on column pending_grants.access_token_requested_at is 'As in grants.';
comment on column pending_grants.access_token_expires_at is 'As in grants. It may be past when the confirmation comes.';
comment on column pending_grants.scope is 'As in grants.';
comment on column pending_grants.key_id is 'Id of the key that sealed every sealed column of the row.';
comment on column pending_grants.pagero_issuer is 'Issuer of the Pagero account, where a token named it.';
comment on column pending_grants.pagero_subject is 'Its subject, likewise.';
comment on column pending_grants.start_session is 'As in connect_links.';
comment on column pending_grants.allow_account_change is 'As in connect_links.';
comment on column pending_grants.browser_binding_hash is 'SHA-256 of the login cookie: only that browser can begin the session.';
comment on column pending_grants.replaces_session_hash is 'Session that ends when the new one begins.';
comment on column pending_grants.revocation_id is 'Id of the row in revocations that it becomes when nobody confirms it.';
comment on column pending_grants.revocation_token_sealed is 'The refresh token once more, sealed for that row: the statement that drops this one queues the other, without a key.';
comment on column pending_grants.confirmed_at is 'Null while it waits.';

create table session_tickets (
  ticket_hash bytea primary key,
  user_id text collate "C" not null,
  return_to text not null,
  browser_binding_hash bytea not null,
  replaces_session_hash bytea,
  expires_at timestamptz not null
);
create index session_tickets_expired on session_tickets (expires_at);
comment on table session_tickets is 'Addresses at which a browser whose connection was confirmed begins its session. Consumed by one DELETE … RETURNING.';
comment on column session_tickets.ticket_hash is 'SHA-256 of the ticket in the address.';
comment on column session_tickets.browser_binding_hash is 'SHA-256 of the login cookie of the browser that connected.';
comment on column session_tickets.replaces_session_hash is 'Session that ends when this one begins.';
