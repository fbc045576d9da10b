-- A PostgreSQL server that takes another's place may lack the last commits. Replicas tell it by its start, bring back
-- what they hold, and nobody presents a refresh token before all of them have.

alter table deployment
  add column server_started_at timestamptz,
  add column server_noticed_at timestamptz,
  add column server_left_at timestamptz;
comment on column deployment.server_started_at is 'Start of the PostgreSQL server that was seen last. Another one may have lost commits.';
comment on column deployment.server_noticed_at is 'When that server was first seen.';
comment on column deployment.server_left_at is 'Last heartbeat on the server before it: whoever lived then may hold what was lost.';

alter table replicas add column restored_on timestamptz;
comment on column replicas.restored_on is 'Start of the PostgreSQL server onto which this replica has last brought back what it holds. Null: of a release that does not know of it.';
