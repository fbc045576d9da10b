// Putting a grant in place and taking it away: what changes besides the row changes in the same statement. The older
// refresh token is queued for revocation, sessions end, an import is over, a pending grant is confirmed.

import { sql } from 'kysely'
import { RECOVERED } from '../grant.ts'
import type { GrantStore, NewGrant } from '../grant-stores.ts'
import { type Database, throughDatabase } from './database.ts'
import { EVENT_COLUMNS, writeEvents } from './outbox-events.ts'
import { lifetimeFrom, now, seconds } from './time.ts'

/** The part of the store of grants that places and closes them. `refreshTokenLifetime` is an ISO 8601 duration. */
export function createGrantPlacing(
  { db }: Pick<Database, 'db'>,
  { refreshTokenLifetime, events = false }: { refreshTokenLifetime: string; events?: boolean },
): Pick<GrantStore, 'connect' | 'close'> {
  return {
    connect: (grant) =>
      throughDatabase(async () => {
        const access = grant.accessToken
        const requestedAt = sql`${now} - ${seconds(grant.requestedSecondsAgo)}`
        const expiresAt = sql`${requestedAt} + ${seconds(grant.expiresInSeconds)}`
        const authenticatedAt = sql`coalesce(${grant.authenticatedAt ?? null}::timestamptz, ${now})`
        const { rows } = await sql`
          with source as (${lockSource(grant)}),
          placed as (
            insert into grants as g (
              user_id, login_id, generation, refresh_token_sealed, key_id, access_token_sealed,
              access_token_requested_at, access_token_expires_at, access_token_fingerprint, scope,
              pagero_issuer, pagero_subject, authenticated_at, rotated_at, rolling_expires_at,
              absolute_expires_at, decided_at)
            select
              ${grant.user}, ${grant.loginId}::uuid, ${grant.replaces + 1}::bigint,
              ${grant.refreshTokenSealed}::bytea, ${grant.keyId}, ${access?.sealed ?? null}::bytea,
              ${access === null ? sql`null::timestamptz` : requestedAt},
              ${access === null ? sql`null::timestamptz` : expiresAt},
              ${access?.fingerprint ?? null}, ${grant.scope}, ${grant.pageroIssuer},
              ${grant.pageroSubject}, ${authenticatedAt}, ${now}, ${lifetimeFrom(now, refreshTokenLifetime)},
              ${lifetimeFrom(authenticatedAt, refreshTokenLifetime)}, source.decided_at
            from source
            on conflict (user_id) do update set
              login_id = excluded.login_id, generation = excluded.generation, state = 'active',
              state_reason = case when g.state = 'reauthentication_required' then ${RECOVERED} end,
              condemned_at = null,
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
              absolute_expires_at = excluded.absolute_expires_at, expiry_warned_days = null,
              decided_at = excluded.decided_at
            where g.generation = ${grant.replaces}
            returning ${EVENT_COLUMNS}
          ), told as (${writeEvents(events, {
            changed: 'placed',
            type: sql`case when state_reason = ${RECOVERED} then 'grant.recovered' else 'grant.connected' end`,
          })}), queued as (${queueRevocation(grant.revocation)}),
          ended as (${endSource(grant)}),
          removed as (${removeProven(grant)})
          select 1 from placed`.execute(db)
        return rows.length > 0
      }),

    close: (user, generation, revocation) =>
      throughDatabase(() =>
        db.transaction().execute(async (transaction) => {
          const { rows } = await sql`
          with placed as (
            update grants set
              state = 'revoked', state_reason = 'disconnected', refresh_token_sealed = null,
              key_id = null, access_token_sealed = null, access_token_requested_at = null,
              access_token_expires_at = null, access_token_fingerprint = null, phase = 'idle',
              next_retry_at = null, decided_at = ${now}
            where user_id = ${user} and generation = ${generation} and state <> 'revoked'
            returning ${EVENT_COLUMNS}
          ), told as (${writeEvents(events, { changed: 'placed', type: sql`'grant.disconnected'` })}), unused as (
            delete from session_tickets where user_id = ${user} and exists (select 1 from placed)
          ), queued as (${queueRevocation(revocation)})
          select 1 from placed`.execute(transaction)
          if (rows.length === 0) return false
          // In a statement of its own, which sees a session that was being stored while the first one waited for the row.
          await sql`delete from sessions where user_id = ${user}`.execute(transaction)
          return true
        }),
      ),
  }
}

/**
 * Locks what the grant is taken from, so that it cannot change meanwhile; no row means that it has changed already. Tells when
 * the grant was decided on.
 */
function lockSource({ user, movedFrom, confirmedFrom }: NewGrant) {
  if (movedFrom !== undefined) {
    return sql`
      select i.created_at as decided_at from grants g join imports i on i.import_id = ${movedFrom.importId}
      where g.user_id = ${movedFrom.user} and g.generation = ${movedFrom.generation}
        and g.phase = 'idle' and i.outcome is not distinct from ${movedFrom.outcome}
        and i.abandoned_at is null
      for update`
  }
  if (confirmedFrom !== undefined) {
    return sql`
      select ${now} as decided_at from pending_grants
      where confirmation_hash = ${confirmedFrom.confirmationHash} and user_id = ${user}
        and confirmed_at is null and expires_at > ${now}
      for update`
  }
  return sql`select ${now} as decided_at`
}

/** Ends what the grant was taken from, if it was placed. */
function endSource({ movedFrom, confirmedFrom }: NewGrant) {
  if (movedFrom !== undefined) {
    return sql`
      update imports set finished_at = ${now}, outcome = 'imported'
      where import_id = ${movedFrom.importId} and exists (select 1 from placed)`
  }
  if (confirmedFrom !== undefined) {
    return sql`
      update pending_grants set
        confirmed_at = ${now}, expires_at = ${now} + ${seconds(confirmedFrom.keptSeconds)},
        refresh_token_sealed = null, access_token_sealed = null, access_token_requested_at = null,
        access_token_expires_at = null, key_id = null, revocation_id = null,
        revocation_token_sealed = null
      where confirmation_hash = ${confirmedFrom.confirmationHash} and exists (select 1 from placed)`
  }
  return sql`select 1`
}

/** Removes the grant that proved an import. */
function removeProven({ movedFrom }: NewGrant) {
  return movedFrom === undefined
    ? sql`select 1`
    : sql`delete from grants where user_id = ${movedFrom.user} and exists (select 1 from placed)`
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
