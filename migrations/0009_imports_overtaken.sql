-- An import may wait for Pagero for hours. Who has logged in meanwhile keeps that grant, and who was disconnected stays so.
-- One that the release before begins while both run knows of no grant that it may replace, and takes the place of none.
alter table imports
  add column found_login_id uuid,
  add column abandoned_at timestamptz;
comment on column imports.found_login_id is 'Login whose grant the user had when the import was begun: the only living one that it may replace.';
comment on column imports.abandoned_at is 'When the user was disconnected while the import was under way. Its token is revoked.';
update imports i set found_login_id = g.login_id
from grants g
where g.user_id = i.user_id and i.finished_at is null;
