// Browser sessions, by the hash of their token. A row is a live session until one of its two expiries;
// ending one deletes it, so an ended session is over on every replica with the statement that ends it.

import { sql } from 'kysely'
import type { Kysely } from 'kysely'

import type { UserKey } from '../grant.ts'
import type { Session, SessionStore } from '../login-stores.ts'
import { SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import type { Tables } from './database.ts'
import { prepare } from './prepared.ts'

/** Use of a session is written this often at most: a page that makes fifty calls costs one write. */
const SLIDE_INTERVAL_SECONDS_MAX = 30

/** Makes the store of sessions. Every method may be called at once, on any number of replicas. */
export function createSessionStore(db: Kysely<Tables>): SessionStore {
  const resolve = prepare<
    { tokenHash: Buffer; idleSeconds: number; slideIntervalSeconds: number },
    SessionRow
  >(
    db,
    'session',
    (value) => sql`
      with moment as materialized (select clock_timestamp() as now),
      live as (
        select s.* from sessions s, moment
        where s.token_hash = ${value('tokenHash')}
          and least(s.idle_expires_at, s.absolute_expires_at) > moment.now
      ),
      slid as (
        update sessions s set
          last_seen_at = moment.now,
          idle_expires_at = least(
            moment.now + make_interval(secs => ${value('idleSeconds')}), s.absolute_expires_at)
        from live, moment
        where s.token_hash = live.token_hash
          and s.last_seen_at <= moment.now - make_interval(secs => ${value('slideIntervalSeconds')})
        returning s.idle_expires_at
      )
      select live.user_id, live.created_at, live.absolute_expires_at,
        coalesce((select idle_expires_at from slid), live.idle_expires_at) as idle_expires_at,
        moment.now as read_at
      from live, moment`,
  )

  return {
    create: (tokenHash, user, lifetimes, { replaces, perUserMax }) =>
      throughDatabase(async () => {
        // Of the user's other sessions the newest live ones stay, up to the cap less this one.
        // Logins of one user in the same instant may leave a few more until the next one.
        const { rows } = await sql<SessionRow>`
          with moment as materialized (select clock_timestamp() as now),
          -- Locked, so that a disconnect comes before, and is seen, or after, and ends this session too.
          connected as (
            select 1 from grants where user_id = ${user} and state <> 'revoked' for share
          ),
          kept as (
            select s.token_hash from sessions s, moment
            where s.user_id = ${user} and s.token_hash is distinct from ${replaces}::bytea
              and least(s.idle_expires_at, s.absolute_expires_at) > moment.now
            order by s.created_at desc, s.token_hash
            limit ${Math.max(0, perUserMax - 1)}
          ),
          ended as (
            delete from sessions
            where exists (select 1 from connected)
              and (token_hash = ${replaces}::bytea
                or (user_id = ${user} and token_hash not in (select token_hash from kept)))
          )
          insert into sessions
            (token_hash, user_id, created_at, last_seen_at, idle_expires_at, absolute_expires_at)
          select ${tokenHash}, ${user}, now, now,
            now + make_interval(secs => ${Math.min(lifetimes.idleSeconds, lifetimes.absoluteSeconds)}),
            now + make_interval(secs => ${lifetimes.absoluteSeconds})
          from moment, connected
          returning user_id, created_at, idle_expires_at, absolute_expires_at, created_at as read_at
        `.execute(db)
        const [row] = rows
        return row === undefined ? undefined : sessionOf(row)
      }),

    resolve: (tokenHash, lifetimes) =>
      throughDatabase(async () => {
        // An idle life of a few seconds still slides: the interval is a quarter of it at most.
        const slideIntervalSeconds = Math.min(SLIDE_INTERVAL_SECONDS_MAX, lifetimes.idleSeconds / 4)
        const { idleSeconds } = lifetimes
        const [row] = await resolve({ tokenHash, idleSeconds, slideIntervalSeconds })
        return row === undefined ? undefined : sessionOf(row)
      }),

    end: (tokenHash) =>
      throughDatabase(async () => {
        const ended = await db
          .deleteFrom('sessions')
          .where('token_hash', '=', tokenHash)
          .returning('user_id')
          .executeTakeFirst()
        return ended?.user_id
      }),

    endAll: (user) =>
      throughDatabase(async () => {
        // And what would begin one: the ticket of a connection that has just been confirmed.
        const { rows } = await sql`
          with unused as (delete from session_tickets where user_id = ${user})
          delete from sessions where user_id = ${user} returning 1`.execute(db)
        return rows.length
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          with expired as (
            select token_hash from sessions
            where least(idle_expires_at, absolute_expires_at) <= clock_timestamp()
            limit ${SWEEP_ROWS_MAX} for update skip locked
          )
          delete from sessions using expired where sessions.token_hash = expired.token_hash
        `.execute(db)
        return Number(numAffectedRows ?? 0)
      }),
  }
}

interface SessionRow {
  user_id: UserKey
  created_at: Date
  idle_expires_at: Date
  absolute_expires_at: Date
  read_at: Date
}

function sessionOf(row: SessionRow): Session {
  return {
    user: row.user_id,
    createdAt: row.created_at,
    idleExpiresAt: row.idle_expires_at,
    absoluteExpiresAt: row.absolute_expires_at,
    lifeLeftMs:
      Math.min(row.idle_expires_at.getTime(), row.absolute_expires_at.getTime()) -
      row.read_at.getTime(),
  }
}
