// Grants and their ledger. Whatever a method writes is one statement, so that it is one transaction, needs no session
// and leaves nothing half-written. What two replicas must agree on is decided by the database's clock inside that statement.

import { type Selectable, sql } from 'kysely'
import { type Grant, IMPORT_USERS, type SealedAccessToken, type ServableGrant } from '../grant.ts'
import type { Evidence, ExpiryWarning, GrantStore, NewGrant } from '../ports.ts'
import { type Database, SWEEP_ROWS_MAX, type Tables, throughDatabase } from './database.ts'

export interface GrantStoreSettings {
  /** ISO 8601, in calendar units: P3Y. */
  refreshTokenLifetime: string
  /** A replica that has not been seen for this long is taken to be gone. */
  heartbeatStaleSeconds: number
  /** How long a process that neither came back nor drained its spool may still hold an answer. */
  zombieWaitSeconds: number
  /** After a start of the database, take-overs wait this long for owners to come back. */
  databaseSettleSeconds: number
}

/** Makes the store of grants. All of its methods may be called at once, by any number of replicas. */
export function createGrantStore(
  { db }: Pick<Database, 'db'>,
  settings: GrantStoreSettings,
): GrantStore {
  /** Calendar-exact: an interval of years added in UTC, whatever time zone the session has. */
  const lifetimeFrom = (instant: ReturnType<typeof sql>) =>
    sql`((${instant}) at time zone 'UTC' + ${settings.refreshTokenLifetime}::interval) at time zone 'UTC'`
  const now = sql`clock_timestamp()`
  const seconds = (value: number) => sql`make_interval(secs => ${value})`

  /** Not seen for too long; or back as another boot, which for a while may still bring the answer from its spool. */
  const ownerIsGone = sql`not exists (
    select 1 from replicas r
    where r.name = g.owner and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds)}
      and (r.boot = g.owner_boot or g.armed_at > ${now} - ${seconds(settings.zombieWaitSeconds)}))`

  /** After an outage all heartbeats are old, those of the living too: they are given time to be seen again. */
  const isSteady = (replica: string, boot: string) => sql`exists (
    select 1 from replicas r
    where r.name = ${replica} and r.boot = ${boot}
      and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds / 2)}
      and r.steady_since < ${now} - ${seconds(settings.databaseSettleSeconds)})`

  /** Who may arm a row that is armed already: nobody while its owner may still hold the successor. */
  const takeOverAllowed = (replica: string, boot: string) => sql`(
    (g.owner = ${replica} and g.owner_boot = ${boot} and (g.lease_until < ${now} or exists (
      select 1 from refresh_attempts a
      where a.attempt_id = g.attempt_id and a.outcome in ('in_doubt', 'refused'))))
    or (pg_postmaster_start_time() < ${now} - ${seconds(settings.databaseSettleSeconds)} and (
      exists (
        select 1 from replicas r
        where r.name = g.owner and r.boot <> g.owner_boot and r.spool_drained_at is not null)
      or (g.lease_until < ${now} and ${ownerIsGone} and ${isSteady(replica, boot)})))
  )`

  return {
    find: (user) =>
      throughDatabase(async () => {
        const { rows } = await sql<GrantRow>`
          select g.*, ${now} as read_at from grants g where g.user_id = ${user}`.execute(db)
        const [row] = rows
        return row === undefined ? undefined : grantOf(row)
      }),

    findMany: (users) =>
      throughDatabase(async () => {
        // Column by column: what is not read need not be written as text here and parsed there. No named statement,
        // which PgBouncer may not know: a batch is parsed once for all of its users.
        const { rows } = await sql<ServableRow>`
          select user_id, login_id, state, state_reason, generation, access_token_sealed,
            access_token_requested_at, access_token_expires_at, access_token_fingerprint, scope,
            ${now} as read_at
          from grants where user_id = any(${users})`.execute(db)
        return rows.map(servableGrantOf)
      }),

    arm: (request) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ armed_at: Date }>`
          with armed as (
            update grants g set
              phase = 'armed', attempt_id = ${request.attemptId}, owner = ${request.replica},
              owner_boot = ${request.boot}, armed_at = ${now},
              lease_until = ${now} + ${seconds(request.leaseSeconds)}
            where g.user_id = ${request.user} and g.login_id = ${request.loginId}
              and g.generation = ${request.generation} and g.state = 'active'
              and (g.next_retry_at is null or g.next_retry_at <= ${now})
              and (g.phase = 'idle' or ${takeOverAllowed(request.replica, request.boot)})
            returning g.armed_at
          ), entry as (
            insert into refresh_attempts
              (attempt_id, user_id, login_id, generation, token_digest, replica, boot, cause, armed_at)
            select ${request.attemptId}::uuid, ${request.user}, ${request.loginId}::uuid,
              ${request.generation}::bigint, ${request.tokenDigest}::bytea, ${request.replica},
              ${request.boot}::uuid, ${request.cause}, armed_at
            from armed
          )
          select armed_at from armed`.execute(db)
        const [row] = rows
        return row === undefined ? undefined : { armedAt: row.armed_at }
      }),

    disarm: (end) =>
      throughDatabase(async () => {
        await sql`
          with entry as (
            update refresh_attempts set
              finished_at = ${now}, outcome = ${end.outcome}, http_status = ${end.httpStatus},
              duration_ms = ${Math.round(end.durationMs)}
            where attempt_id = ${end.attemptId} and outcome is null
          )
          update grants set
            phase = ${end.stayArmed ? 'armed' : 'idle'},
            next_retry_at = ${now} + ${seconds(end.retryInSeconds)},
            failure_count = failure_count + 1
          where user_id = ${end.user} and attempt_id = ${end.attemptId} and phase = 'armed'`.execute(
          db,
        )
      }),

    store: (successor) =>
      throughDatabase(async () => {
        const access = successor.accessToken
        const { rows } = await sql`
          with stored as (
            update grants set
              generation = ${successor.generation},
              refresh_token_sealed = ${successor.refreshTokenSealed}, key_id = ${successor.keyId},
              access_token_sealed = ${access?.sealed ?? null},
              access_token_requested_at = ${access?.requestedAt ?? null},
              access_token_expires_at = ${access?.expiresAt ?? null},
              access_token_fingerprint = ${access?.fingerprint ?? null},
              scope = ${successor.scope}, state = 'active', state_reason = null,
              condemned_at = null, phase = 'idle',
              next_retry_at = null, failure_count = 0, rotated_at = ${now},
              rolling_expires_at = ${lifetimeFrom(now)}
            where user_id = ${successor.user} and login_id = ${successor.loginId}
              and generation < ${successor.generation} and state <> 'revoked'
            returning 1
          ), entry as (
            update refresh_attempts set
              finished_at = ${now}, outcome = 'granted', http_status = ${successor.httpStatus},
              duration_ms = ${Math.round(successor.durationMs)}
            where attempt_id = ${successor.attemptId} and outcome is distinct from 'granted'
              and exists (select 1 from stored)
          )
          select 1 from stored`.execute(db)
        if (rows.length > 0) return 'stored'
        // In a statement of its own, which sees what the first one may have waited for: the same successor, stored
        // from the spool at the same moment.
        const applied = await sql`
          select 1 from grants
          where user_id = ${successor.user} and login_id = ${successor.loginId}
            and generation >= ${successor.generation} and state <> 'revoked'
          union all
          select 1 from refresh_attempts
          where attempt_id = ${successor.attemptId} and outcome = 'granted'`.execute(db)
        return applied.rows.length > 0 ? 'already_stored' : 'superseded'
      }),

    finishSuperseded: (successor) =>
      throughDatabase(async () => {
        await sql`
          update refresh_attempts set
            finished_at = ${now}, outcome = 'granted', http_status = ${successor.httpStatus},
            duration_ms = ${Math.round(successor.durationMs)}
          where attempt_id = ${successor.attemptId}`.execute(db)
      }),

    connect: (grant) =>
      throughDatabase(async () => {
        const access = grant.accessToken
        const requestedAt = sql`${now} - ${seconds(grant.requestedSecondsAgo)}`
        const expiresAt = sql`${requestedAt} + ${seconds(grant.expiresInSeconds)}`
        const authenticatedAt = sql`coalesce(${grant.authenticatedAt ?? null}::timestamptz, ${now})`
        const moved = grant.movedFrom
        const { rows } = await sql`
          with source as (${moved === undefined ? sql`select 1` : lockProven(moved)}),
          placed as (
            insert into grants as g (
              user_id, login_id, generation, refresh_token_sealed, key_id, access_token_sealed,
              access_token_requested_at, access_token_expires_at, access_token_fingerprint, scope,
              pagero_issuer, pagero_subject, authenticated_at, rotated_at, rolling_expires_at,
              absolute_expires_at)
            select
              ${grant.user}, ${grant.loginId}::uuid, ${grant.replaces + 1}::bigint,
              ${grant.refreshTokenSealed}::bytea, ${grant.keyId}, ${access?.sealed ?? null}::bytea,
              ${access === null ? sql`null::timestamptz` : requestedAt},
              ${access === null ? sql`null::timestamptz` : expiresAt},
              ${access?.fingerprint ?? null}, ${grant.scope}, ${grant.pageroIssuer},
              ${grant.pageroSubject}, ${authenticatedAt}, ${now}, ${lifetimeFrom(now)},
              ${lifetimeFrom(authenticatedAt)}
            from source
            on conflict (user_id) do update set
              login_id = excluded.login_id, generation = excluded.generation, state = 'active',
              state_reason = null, condemned_at = null,
              refresh_token_sealed = excluded.refresh_token_sealed,
              key_id = excluded.key_id, access_token_sealed = excluded.access_token_sealed,
              access_token_requested_at = excluded.access_token_requested_at,
              access_token_expires_at = excluded.access_token_expires_at,
              access_token_fingerprint = excluded.access_token_fingerprint, scope = excluded.scope,
              pagero_issuer = excluded.pagero_issuer, pagero_subject = excluded.pagero_subject,
              phase = 'idle', attempt_id = null, owner = null, owner_boot = null, armed_at = null,
              lease_until = null, next_retry_at = null, failure_count = 0,
              authenticated_at = excluded.authenticated_at, rotated_at = excluded.rotated_at,
              rolling_expires_at = excluded.rolling_expires_at,
              absolute_expires_at = excluded.absolute_expires_at, expiry_warned_days = null
            where g.generation = ${grant.replaces}
            returning 1
          ), queued as (${queueRevocation(grant.revocation)}),
          ended as (${moved === undefined ? sql`select 1` : endImport(moved)}),
          removed as (${moved === undefined ? sql`select 1` : removeProven(moved)})
          select 1 from placed`.execute(db)
        return rows.length > 0
      }),

    close: (user, generation, revocation) =>
      throughDatabase(async () => {
        const { rows } = await sql`
          with placed as (
            update grants set
              state = 'revoked', state_reason = 'disconnected', refresh_token_sealed = null,
              key_id = null, access_token_sealed = null, access_token_requested_at = null,
              access_token_expires_at = null, access_token_fingerprint = null, phase = 'idle',
              next_retry_at = null
            where user_id = ${user} and generation = ${generation} and state <> 'revoked'
            returning 1
          ), ended as (
            delete from sessions where user_id = ${user} and exists (select 1 from placed)
          ), queued as (${queueRevocation(revocation)})
          select 1 from placed`.execute(db)
        return rows.length > 0
      }),

    condemn: (user, generation, verdict) =>
      throughDatabase(async () => {
        const { rows } = await sql`
          update grants set
            state = ${verdict.state}, state_reason = ${verdict.reason},
            condemned_at = case when ${verdict.state} <> 'active' then ${now} end, phase = 'idle'
          where user_id = ${user} and generation = ${generation} and state in ('active', 'suspect')
          returning 1`.execute(db)
        return rows.length > 0
      }),

    evidence: (user, loginId, generation) =>
      throughDatabase(async () => {
        const { rows } = await sql<Evidence>`
          select
            exists (
              select 1 from refresh_attempts a
              where a.user_id = ${user} and a.login_id = ${loginId} and a.generation = ${generation}
                and (a.outcome = 'in_doubt' or a.outcome is null)
                and a.armed_at < (
                  select min(f.finished_at) from refresh_attempts f
                  where f.user_id = ${user} and f.login_id = ${loginId}
                    and f.generation = ${generation} and f.outcome = 'refused')
            ) or exists (
              select 1 from refresh_attempts s
              join refresh_attempts f using (user_id, login_id, generation)
              where s.user_id = ${user} and s.login_id = ${loginId}
                and s.generation = ${generation} - 1
                and s.outcome = 'granted' and f.armed_at > s.armed_at
                and (f.outcome is null or f.outcome in ('in_doubt', 'refused'))
            ) as "unknownBefore",
            (
              select count(*)::int from refresh_attempts a
              where a.user_id = ${user} and a.login_id = ${loginId} and a.generation = ${generation}
                and a.outcome = 'refused'
            ) as refusals,
            exists (
              select 1 from refresh_attempts a
              left join replicas r on r.name = a.replica
              where a.user_id = ${user} and a.login_id = ${loginId} and a.generation = ${generation}
                and a.outcome is null
                and a.armed_at > ${now} - ${seconds(settings.zombieWaitSeconds)}
                and (r.name is null or r.boot = a.boot or r.spool_drained_at is null)
            ) as "successorMayComeBack",
            exists (
              select 1 from refresh_attempts a
              where a.user_id = ${user} and a.login_id = ${loginId}
                and (a.generation > ${generation}
                  or (a.generation = ${generation} and a.outcome = 'granted'))
            ) as "laterGeneration",
            least(g.rolling_expires_at, g.absolute_expires_at) < ${now} + interval '1 day'
              as "lifetimeOver"
          from grants g where g.user_id = ${user}`.execute(db)
        return (
          rows[0] ?? {
            unknownBefore: false,
            refusals: 0,
            successorMayComeBack: false,
            laterGeneration: false,
            lifetimeOver: false,
          }
        )
      }),

    lastForcedSecondsAgo: (user) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ seconds_ago: number | null }>`
          select extract(epoch from ${now} - max(armed_at))::float8 as seconds_ago
          from refresh_attempts where user_id = ${user} and cause = 'rejected'`.execute(db)
        return rows[0]?.seconds_ago ?? undefined
      }),

    touch: (users) =>
      throughDatabase(async () => {
        // In the order of the keys and past what is locked: no two of these, and no refresh, wait for each other.
        await sql`
          update grants set last_used_at = ${now}
          where user_id in (
            select user_id from grants where user_id = any(${users})
            order by user_id for update skip locked)`.execute(db)
      }),

    findKeepAliveDue: (limit) =>
      throughDatabase(async () => {
        // Spread over a thirty-sixth of the lifetime (a month of three years), so that grants of one day do not
        // come due on one day; the hash makes a grant's place in it the same on every replica.
        const { rows } = await sql<GrantRow>`
          select g.*, ${now} as read_at from grants g
          where g.state = 'active' and g.phase = 'idle'
            and (g.next_retry_at is null or g.next_retry_at <= ${now})
            and g.rotated_at < ${now} - ${settings.refreshTokenLifetime}::interval / 2
            and ${now} > g.rotated_at + (g.rolling_expires_at - g.rotated_at)
              * (0.5 + (abs(hashtext(g.user_id)::bigint) % 1000) / 36000.0)
          limit ${limit}`.execute(db)
        return rows.map(grantOf)
      }),

    takeExpiryWarnings: () =>
      throughDatabase(async () => {
        const { rows } = await sql<ExpiryWarning>`
          with near as (
            select user_id,
              case
                when least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '7 days' then 7
                when least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '30 days' then 30
                else 90
              end as within_days
            from grants
            where state = 'active'
              and least(rolling_expires_at, absolute_expires_at) <= ${now} + interval '90 days'
          )
          update grants g set expiry_warned_days = near.within_days
          from near
          where g.user_id = near.user_id
            and (g.expiry_warned_days is null or g.expiry_warned_days > near.within_days)
          returning g.user_id as "user", near.within_days as "withinDays"`.execute(db)
        return rows
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { rows } = await sql<{ count: number }>`
          with dead as (
            select user_id from grants
            where state = 'reauthentication_required' and refresh_token_sealed is not null
              and condemned_at < ${now} - interval '30 days'
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), emptied as (
            update grants set
              refresh_token_sealed = null, key_id = null, access_token_sealed = null,
              access_token_requested_at = null, access_token_expires_at = null,
              access_token_fingerprint = null
            where user_id in (select user_id from dead)
            returning 1
          ), old as (
            select attempt_id from refresh_attempts
            where armed_at < ${now} - interval '90 days' and outcome is not null
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), forgotten as (
            delete from refresh_attempts where attempt_id in (select attempt_id from old)
            returning 1
          )
          select greatest(
            (select count(*) from emptied), (select count(*) from forgotten))::int as count`.execute(
          db,
        )
        return rows[0]?.count ?? 0
      }),

    list: (filter) =>
      throughDatabase(async () => {
        const patterns = filter.users.map(likePatternOf)
        const { rows } = await sql<GrantRow>`
          select g.*, ${now} as read_at from grants g
          where g.user_id > ${filter.after ?? ''}
            and g.user_id like any(${patterns}) and g.user_id not like ${likePatternOf(IMPORT_USERS)}
            and (${filter.state ?? null}::text is null or g.state = ${filter.state ?? null})
            and (${filter.expiresWithin ?? null}::interval is null
              or least(g.rolling_expires_at, g.absolute_expires_at)
                <= ${now} + ${filter.expiresWithin ?? null}::interval)
          order by g.user_id limit ${filter.limit}`.execute(db)
        return rows.map(grantOf)
      }),
  }
}

type Proven = NonNullable<NewGrant['movedFrom']>

/** Locks the grant that proved an import, so that it cannot rotate while it is moved. */
function lockProven({ user, generation }: Proven) {
  return sql`
    select 1 from grants
    where user_id = ${user} and generation = ${generation} and phase = 'idle' for update`
}

function endImport({ importId }: Proven) {
  return sql`
    update imports set finished_at = clock_timestamp(), outcome = 'imported'
    where import_id = ${importId} and exists (select 1 from placed)`
}

function removeProven({ user }: Proven) {
  return sql`delete from grants where user_id = ${user} and exists (select 1 from placed)`
}

/** Queues the revocation in the transaction that took the token out of use, and only if that happened. */
function queueRevocation(revocation: Parameters<GrantStore['close']>[2]) {
  return revocation === undefined
    ? sql`select 1`
    : sql`
        insert into revocations (revocation_id, user_id, token_sealed, key_id)
        select ${revocation.revocationId}::uuid, ${revocation.user}, ${revocation.tokenSealed}::bytea,
          ${revocation.keyId}
        from placed`
}

/** Turns a pattern with `*` into one of LIKE; user keys hold `_`, which means something there. */
function likePatternOf(pattern: string): string {
  return pattern.replaceAll(/[\\%_]/g, (character) => `\\${character}`).replaceAll('*', '%')
}

type GrantRow = Selectable<Tables['grants']> & { read_at: Date }

/** The columns of a {@link ServableGrant}. */
type ServableRow = Pick<
  GrantRow,
  | 'user_id'
  | 'login_id'
  | 'state'
  | 'state_reason'
  | 'generation'
  | 'access_token_sealed'
  | 'access_token_requested_at'
  | 'access_token_expires_at'
  | 'access_token_fingerprint'
  | 'scope'
  | 'read_at'
>

function servableGrantOf(row: ServableRow): ServableGrant {
  return {
    user: row.user_id,
    loginId: row.login_id,
    state: row.state,
    stateReason: row.state_reason,
    generation: row.generation,
    accessToken: accessTokenOf(row),
    scope: row.scope,
    readAt: row.read_at,
  }
}

function accessTokenOf(row: ServableRow): SealedAccessToken | null {
  const sealed = row.access_token_sealed
  const requestedAt = row.access_token_requested_at
  const expiresAt = row.access_token_expires_at
  const fingerprint = row.access_token_fingerprint
  return sealed === null || requestedAt === null || expiresAt === null || fingerprint === null
    ? null
    : { sealed, requestedAt, expiresAt, fingerprint }
}

function grantOf(row: GrantRow): Grant {
  return {
    ...servableGrantOf(row),
    refreshTokenSealed: row.refresh_token_sealed,
    keyId: row.key_id,
    pageroIssuer: row.pagero_issuer,
    pageroSubject: row.pagero_subject,
    phase: row.phase,
    attemptId: row.attempt_id,
    owner: row.owner,
    ownerBoot: row.owner_boot,
    leaseUntil: row.lease_until,
    nextRetryAt: row.next_retry_at,
    failureCount: row.failure_count,
    authenticatedAt: row.authenticated_at,
    rotatedAt: row.rotated_at,
    lastUsedAt: row.last_used_at,
    rollingExpiresAt: row.rolling_expires_at,
    absoluteExpiresAt: row.absolute_expires_at,
  }
}
