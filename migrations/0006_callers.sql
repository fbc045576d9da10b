-- When each credential of a calling service was used last, for the operator who wants to withdraw one.

create table credential_uses (
  kind text not null check (kind in ('api_key', 'jwt')),
  name text collate "C" not null check (name ~ '^[a-z0-9][a-z0-9._-]{0,63}$'),
  last_used_at timestamptz not null,
  primary key (kind, name)
);
comment on table credential_uses is 'Credentials of callers that have been accepted, a row each. One that CALLERS_FILE has no longer keeps its row: that it was used matters afterwards too.';
comment on column credential_uses.kind is 'api_key: one key. jwt: the JWTs of one caller.';
comment on column credential_uses.name is 'api_key: the id of the key, which is no secret. jwt: the name of the caller, for its tokens are not told apart.';
comment on column credential_uses.last_used_at is 'To the minute or so: each process writes it once a minute at most.';
