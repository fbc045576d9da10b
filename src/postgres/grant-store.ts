// Grants and their ledger. Whatever a method writes is one statement, or one short transaction, so that it needs no session
// and leaves nothing half-written. What two replicas must agree on is decided by the database's clock inside that statement.

import { type RawBuilder, sql } from 'kysely'
import { RECOVERED, type UserKey } from '../grant.ts'
import type { ArmRequest, Evidence, GrantStore, Successor } from '../grant-stores.ts'
import { type Database, throughDatabase } from './database.ts'
import { createGrantPlacing } from './grant-placing.ts'
import {
  GRANT_COLUMNS,
  type GrantRow,
  grantOf,
  type ServableRow,
  servableGrantOf,
} from './grant-rows.ts'
import { createGrantUpkeep } from './grant-upkeep.ts'
import { EVENT_COLUMNS, writeEvents } from './outbox-events.ts'
import { prepare } from './prepared.ts'
import { epochMsOf, lifetimeFrom, now, seconds } from './time.ts'

/**
 * A replica that has met a new server is waited for as long as three replicas take to be called gone, one after the other:
 * a pass over a spool takes seconds, and a refresh begins two minutes before its token ends.
 */
const RESTORE_STALE_TIMES = 3

export interface GrantStoreSettings {
  /** ISO 8601, in calendar units: P3Y. */
  refreshTokenLifetime: string
  /** Events of grants are written to the outbox; unset, they are not. */
  events?: boolean
  /** A replica that has not been seen for this long is taken to be gone. */
  heartbeatStaleSeconds: number
  /** How long a process that neither came back nor drained its spool may still hold an answer. */
  zombieWaitSeconds: number
  /** After a start of the database, take-overs wait this long for owners to come back. */
  databaseSettleSeconds: number
}

/** The process that asks, as values of a statement. */
interface Identity {
  replica: RawBuilder<string>
  boot: RawBuilder<string>
}

/** A successor as it is written into its row. */
type StoredValues = Omit<Successor, 'accessToken'> & {
  accessTokenSealed: Buffer | null
  accessTokenRequestedAt: Date | null
  accessTokenExpiresAt: Date | null
  accessTokenFingerprint: string | null
}

/** Makes the store of grants. All of its methods may be called at once, by any number of replicas. */
export function createGrantStore(
  database: Pick<Database, 'db'>,
  settings: GrantStoreSettings,
): GrantStore {
  const { db } = database
  const { events = false } = settings
  /** Not seen for too long; or back as another boot, which for a while may still bring the answer from its spool. */
  const ownerIsGone = sql`not exists (
    select 1 from replicas r
    where r.name = g.owner and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds)}
      and (r.boot = g.owner_boot or g.armed_at > ${now} - ${seconds(settings.zombieWaitSeconds)}))`

  /** After an outage all heartbeats are old, those of the living too: they are given time to be seen again. */
  const isSteady = ({ replica, boot }: Identity) => sql`exists (
    select 1 from replicas r
    where r.name = ${replica} and r.boot = ${boot}
      and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds / 2)}
      and r.steady_since < ${now} - ${seconds(settings.databaseSettleSeconds)})`

  /** Who may arm a row that is armed already: nobody while its owner may still hold the successor. */
  const takeOverAllowed = ({ replica, boot }: Identity) => sql`(
    (g.owner = ${replica} and g.owner_boot = ${boot} and (g.lease_until < ${now} or exists (
      select 1 from refresh_attempts a
      where a.attempt_id = g.attempt_id and a.outcome in ('in_doubt', 'refused'))))
    or (pg_postmaster_start_time() < ${now} - ${seconds(settings.databaseSettleSeconds)} and (
      exists (
        select 1 from replicas r
        where r.name = g.owner and r.boot <> g.owner_boot and r.spool_drained_at > g.armed_at)
      or (g.lease_until < ${now} and ${ownerIsGone} and ${isSteady({ replica, boot })})))
  )`

  /**
   * The row tells of its last attempt alone. One before it, with the same token, may have been taken over by an attempt that
   * was never sent, and its owner be back since: what it has in its spool is waited for as if nothing had come between. The
   * first bound is for the index: it cannot be sought by an instant that changes within the statement.
   */
  const nobodyElseMaySpeak = ({ boot }: Identity) => sql`not exists (
    select 1 from refresh_attempts a
    join replicas r on r.name = a.replica
    where a.user_id = g.user_id
      and a.armed_at > statement_timestamp() - ${seconds(settings.zombieWaitSeconds)}
      and a.armed_at > ${now} - ${seconds(settings.zombieWaitSeconds)}
      and a.login_id = g.login_id and a.generation = g.generation and a.outcome is null
      and a.attempt_id <> g.attempt_id and a.boot <> ${boot}
      and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds)}
      and (r.boot = a.boot or coalesce(r.spool_drained_at <= a.armed_at, true)))`

  /**
   * A server that has taken another's place may lack the last commits: the row a successor, or an attempt that is under
   * way. So nobody arms until all who may hold such a thing have brought it back, or are gone; nor before having brought
   * back its own, however late. First there is a time in which everybody who lives is seen: the heartbeat of one may be
   * among what is lost, and after an outage all are old. Whoever has been seen is waited for, as long as a pass over a spool
   * takes with ease: one that can never bring back what it holds must not keep the others until their tokens end,
   * however often it starts. Who lived and does not come is waited for until what he may have presented is over, as with
   * any attempt: he may have been cut off, and nobody else knows of it any more.
   */
  const nothingIsMissing = (
    { replica }: Identity,
    noticeSeconds: RawBuilder<number>,
  ) => sql`exists (
    select 1 from deployment d
    where d.server_started_at = pg_postmaster_start_time()
      and (d.server_left_at is null
        or d.server_noticed_at < ${now} - ${seconds(settings.heartbeatStaleSeconds / 2)})
      and exists (
        select 1 from replicas r
        where r.name = ${replica} and coalesce(r.restored_on = d.server_started_at, true))
      and not exists (
        select 1 from replicas r
        where r.restored_on <> d.server_started_at and case
          when r.met_on = d.server_started_at
          then r.met_at >= ${now} - ${seconds(RESTORE_STALE_TIMES * settings.heartbeatStaleSeconds)}
            and r.seen_at > ${now} - ${seconds(settings.heartbeatStaleSeconds)}
          else d.server_noticed_at >= ${now} - ${seconds(settings.zombieWaitSeconds)}
            and r.seen_at > ${seconds(-settings.heartbeatStaleSeconds)} + case
              when d.server_noticed_at
                > ${now} - ${seconds(noticeSeconds)}
              then d.server_left_at else ${now} end
        end))`

  /**
   * An earlier attempt with this very token has an unknown end. Or a token before it was presented once more after it
   * had been spent, and that may have come to the server after the rotation that brought this one.
   */
  const unknownBefore = (
    user: UserKey,
    loginId: string | RawBuilder<unknown>,
    generation: number,
  ) => sql`(
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
      join refresh_attempts last using (user_id, login_id)
      where s.user_id = ${user} and s.login_id = ${loginId} and s.generation < ${generation}
        and s.outcome = 'granted' and f.armed_at > s.armed_at
        and (f.outcome is null or f.outcome in ('in_doubt', 'refused'))
        and last.generation = ${generation} - 1 and last.outcome = 'granted'
        and coalesce(f.finished_at, f.armed_at + ${seconds(settings.zombieWaitSeconds)})
          >= last.armed_at
    ))`

  const find = prepare<{ user: UserKey }, GrantRow>(
    db,
    'find',
    (value) => sql`
      select ${GRANT_COLUMNS}, ${now} as read_at from grants where user_id = ${value('user')}`,
  )

  // Column by column: what is not read need not be written as text here and parsed there. Instants as numbers: to read three
  // of them as dates is a tenth of what is left behind of a row.
  const findMany = prepare<{ users: readonly UserKey[] }, ServableRow>(
    db,
    'find_many',
    (value) => sql`
      select user_id, login_id, state, state_reason, generation, access_token_sealed,
        ${epochMsOf(sql`access_token_requested_at`)} as access_token_requested_at_ms,
        ${epochMsOf(sql`access_token_expires_at`)} as access_token_expires_at_ms,
        access_token_fingerprint, scope, ${epochMsOf(now)} as read_at_ms
      from grants where user_id = any(${value('users')})`,
  )

  const arm = prepare<ArmRequest & { noticeSeconds: number }, { armed_at: Date }>(
    db,
    'arm',
    (value) => {
      const identity = { replica: value('replica'), boot: value('boot') }
      return sql`
        with armed as (
          update grants g set
            phase = 'armed', attempt_id = ${value('attemptId')}, owner = ${value('replica')},
            owner_boot = ${value('boot')}, armed_at = ${now},
            lease_until = ${now} + ${seconds(value('leaseSeconds'))}
          where g.user_id = ${value('user')} and g.login_id = ${value('loginId')}
            and g.generation = ${value('generation')} and g.state = 'active'
            and (g.next_retry_at is null or g.next_retry_at <= ${now})
            and (g.phase = 'idle' or ${takeOverAllowed(identity)})
            and ${nobodyElseMaySpeak(identity)}
            and ${nothingIsMissing(identity, value('noticeSeconds'))}
          returning g.armed_at
        ), entry as (
          insert into refresh_attempts
            (attempt_id, user_id, login_id, generation, token_digest, replica, boot, cause, armed_at)
          select ${value('attemptId')}::uuid, ${value('user')}, ${value('loginId')}::uuid,
            ${value('generation')}::bigint, ${value('tokenDigest')}::bytea, ${value('replica')},
            ${value('boot')}::uuid, ${value('cause')}, armed_at
          from armed
        )
        select armed_at from armed`
    },
  )

  const store = prepare<StoredValues>(
    db,
    'store',
    (value) => sql`
      with stored as (
        update grants set
          generation = ${value('generation')},
          refresh_token_sealed = ${value('refreshTokenSealed')}, key_id = ${value('keyId')},
          access_token_sealed = ${value('accessTokenSealed')},
          access_token_requested_at = ${value('accessTokenRequestedAt')},
          access_token_expires_at = ${value('accessTokenExpiresAt')},
          access_token_fingerprint = ${value('accessTokenFingerprint')},
          scope = ${value('scope')}, state = 'active',
          state_reason = case when state = 'reauthentication_required' then ${RECOVERED} end,
          condemned_at = null, phase = 'idle',
          next_retry_at = null, failure_count = 0, rotated_at = ${now},
          rolling_expires_at = ${lifetimeFrom(now, settings.refreshTokenLifetime)}
        where user_id = ${value('user')} and login_id = ${value('loginId')}
          and generation < ${value('generation')} and state <> 'revoked'
        returning ${EVENT_COLUMNS}
      ), recovered as (
        select * from stored where state_reason = ${RECOVERED}
      ), told as (${writeEvents(events, { changed: 'recovered', type: sql`'grant.recovered'` })}), entry as (
        update refresh_attempts set
          finished_at = ${now}, outcome = 'granted', http_status = ${value('httpStatus')},
          duration_ms = ${value('durationMs')}
        where attempt_id = ${value('attemptId')} and outcome is distinct from 'granted'
          and exists (select 1 from stored)
      )
      select 1 from stored`,
  )

  return {
    ...createGrantPlacing(database, settings),
    ...createGrantUpkeep(database, settings),

    find: (user) =>
      throughDatabase(async () => {
        const [row] = await find({ user })
        return row === undefined ? undefined : grantOf(row)
      }),

    findMany: (users) =>
      throughDatabase(async () => {
        const rows = await findMany({ users })
        return rows.map(servableGrantOf)
      }),

    arm: (request) =>
      throughDatabase(async () => {
        const noticeSeconds = Math.max(settings.heartbeatStaleSeconds, request.leaseSeconds)
        const [row] = await arm({ ...request, noticeSeconds })
        return row === undefined ? undefined : { armedAt: row.armed_at }
      }),

    rearm: (request, armedAt) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ is_behind: boolean }>`
          with armed as (
            update grants g set
              phase = 'armed', attempt_id = ${request.attemptId}, owner = ${request.replica},
              owner_boot = ${request.boot}, armed_at = ${now},
              lease_until = ${now} + ${seconds(request.leaseSeconds)}
            where g.user_id = ${request.user} and g.login_id = ${request.loginId}
              and g.generation = ${request.generation} and g.state = 'active'
              and g.attempt_id is distinct from ${request.attemptId}
              and (g.phase = 'idle' or g.armed_at < (select server_noticed_at from deployment))
            returning 1
          ), entry as (
            insert into refresh_attempts
              (attempt_id, user_id, login_id, generation, token_digest, replica, boot, cause, armed_at)
            select ${request.attemptId}::uuid, ${request.user}, ${request.loginId}::uuid,
              ${request.generation}::bigint, ${request.tokenDigest}::bytea, ${request.replica},
              ${request.boot}::uuid, ${request.cause}, ${armedAt}::timestamptz
            -- Also where another was told of first: whoever would arm next learns of both by the ledger.
            from grants
            where user_id = ${request.user} and login_id = ${request.loginId}
              and generation = ${request.generation} and state = 'active'
            on conflict do nothing
          )
          select exists (
            select 1 from grants
            where user_id = ${request.user} and login_id = ${request.loginId}
              and generation < ${request.generation} and state = 'active') as is_behind`.execute(db)
        return rows[0]?.is_behind !== true
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
            failure_count = failure_count + ${end.counts ? 1 : 0}
          where user_id = ${end.user} and attempt_id = ${end.attemptId} and phase = 'armed'`.execute(
          db,
        )
      }),

    store: (successor) =>
      throughDatabase(async () => {
        const { accessToken } = successor
        const rows = await store({
          ...successor,
          durationMs: Math.round(successor.durationMs),
          accessTokenSealed: accessToken?.sealed ?? null,
          accessTokenRequestedAt: accessToken?.requestedAt ?? null,
          accessTokenExpiresAt: accessToken?.expiresAt ?? null,
          accessTokenFingerprint: accessToken?.fingerprint ?? null,
        })
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

    findStored: (successors) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ attempt_id: string; seconds_ago: number | null }>`
          with writable as (
            -- Changes nothing, but is refused by a server that a failover has left behind: its word must not count.
            update deployment set server_started_at = server_started_at where false
          )
          select s.attempt_id, extract(epoch from ${now} - a.finished_at)::float8 as seconds_ago
          from unnest(
            ${successors.map(({ user }) => user)}::text[],
            ${successors.map(({ loginId }) => loginId)}::uuid[],
            ${successors.map(({ generation }) => generation)}::bigint[],
            ${successors.map(({ attemptId }) => attemptId)}::uuid[]
          ) as s (user_id, login_id, generation, attempt_id)
          left join grants g
            on g.user_id = s.user_id and g.login_id = s.login_id and g.state <> 'revoked'
          left join refresh_attempts a
            on a.attempt_id = s.attempt_id and a.outcome = 'granted'
          where coalesce(g.generation >= s.generation, a.attempt_id is not null)`.execute(db)
        return new Map(rows.map((row) => [row.attempt_id, row.seconds_ago ?? 0]))
      }),

    finishSuperseded: (successor) =>
      throughDatabase(async () => {
        await sql`
          update refresh_attempts set
            finished_at = ${now}, outcome = 'granted', http_status = ${successor.httpStatus},
            duration_ms = ${Math.round(successor.durationMs)}
          where attempt_id = ${successor.attemptId}`.execute(db)
      }),

    condemn: (user, generation, verdict) =>
      throughDatabase(async () => {
        const { rows } = await sql`
          with condemned as (
            update grants set
              state = ${verdict.state}, state_reason = ${verdict.reason},
              condemned_at = case when ${verdict.state} <> 'active' then ${now} end, phase = 'idle'
            where user_id = ${user} and generation = ${generation} and state in ('active', 'suspect')
              ${verdict.whileUnknown === true ? sql`and ${unknownBefore(user, sql`grants.login_id`, generation)}` : sql``}
            returning ${EVENT_COLUMNS}
          ), told as (${writeEvents(events && verdict.state === 'reauthentication_required', {
            changed: 'condemned',
            type: sql`'grant.reauthentication_required'`,
          })})
          select 1 from condemned`.execute(db)
        return rows.length > 0
      }),

    evidence: (user, loginId, generation) =>
      throughDatabase(async () => {
        const { rows } = await sql<Evidence>`
          select
            ${unknownBefore(user, loginId, generation)} as "unknownBefore",
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
                and (r.name is null or r.boot = a.boot
                  or coalesce(r.spool_drained_at <= a.armed_at, true))
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
  }
}
