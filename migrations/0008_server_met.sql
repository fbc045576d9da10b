-- A replica that was away while the others waited comes back to a new server with what it holds: from then on it is
-- waited for like one that had been there, and no longer than those.
alter table replicas
  add column met_on timestamptz,
  add column met_at timestamptz;
comment on column replicas.met_on is 'Start of the PostgreSQL server that this replica has met last.';
comment on column replicas.met_at is 'When it met that server. Null: of a release that does not know of it.';
