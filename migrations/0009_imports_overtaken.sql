-- An import may wait for Pagero for hours. What the user has decided meanwhile counts: who has logged in keeps that grant,
-- and who was disconnected stays so.
alter table grants add column decided_at timestamptz;
comment on column grants.decided_at is 'When it was last decided on the grant: a login, a confirmation, a disconnection; or when the import was asked for that brought it. A release that does not know of it leaves it as it was.';
alter table imports add column abandoned_at timestamptz;
comment on column imports.abandoned_at is 'When the user was disconnected while the import was under way. Its token is revoked with that, or by the next round where a process died meanwhile.';
comment on column imports.outcome is 'Null until Pagero has answered, or something that was decided later has overtaken the import: then it is refused.';
create index imports_of_user on imports (user_id) where outcome is distinct from 'imported';
