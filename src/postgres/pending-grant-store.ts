// Grants that wait for the application's confirmation. One that ends in any other way leaves its revocation behind, in
// the statement that ends it; being confirmed is the business of `grant-placing.ts`.

import { type Kysely, type RawBuilder, type Selectable, sql } from 'kysely'
import type { PendingGrant, PendingGrantStore } from '../login-stores.ts'
import { isUniqueViolation, SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import type { Tables } from './tables.ts'
import { now, seconds } from './time.ts'

/** Connections of one user that come back in the same instant; each round one of them gets through. */
const PLACE_TRIES_MAX = 20

/** Makes the store of pending grants. Every method may be called at once, on any number of replicas. */
export function createPendingGrantStore(db: Kysely<Tables>): PendingGrantStore {
  return {
    place: (pending, lifetimeSeconds) =>
      throughDatabase(async () => {
        const isSealed = pending.accessTokenSealed !== null
        const requestedAt = sql`${now} - ${seconds(pending.requestedSecondsAgo)}`
        const expiresAt = sql`${requestedAt} + ${seconds(pending.expiresInSeconds)}`
        // Counting makes the deletion come first: both rows at once would be two that wait.
        const place = sql`
          with ${dropped(sql`
            user_id = ${pending.user} and confirmed_at is null
            and confirmation_hash <> ${pending.confirmationHash}`)},
          room as (select count(*) from dropped)
          insert into pending_grants
            (confirmation_hash, user_id, refresh_token_sealed, access_token_sealed,
             access_token_requested_at, access_token_expires_at, scope, key_id, pagero_issuer,
             pagero_subject, return_to, start_session, allow_account_change, browser_binding_hash,
             replaces_session_hash, revocation_id, revocation_token_sealed, expires_at)
          select ${pending.confirmationHash}::bytea, ${pending.user},
            ${pending.refreshTokenSealed}::bytea, ${pending.accessTokenSealed}::bytea,
            ${isSealed ? requestedAt : sql`null::timestamptz`},
            ${isSealed ? expiresAt : sql`null::timestamptz`}, ${pending.scope}, ${pending.keyId},
            ${pending.pageroIssuer}, ${pending.pageroSubject}, ${pending.returnTo},
            ${pending.startSession}::boolean, ${pending.allowAccountChange}::boolean,
            ${pending.browserBindingHash}::bytea, ${pending.replacesSessionHash}::bytea,
            ${pending.revocation.revocationId}::uuid, ${pending.revocation.tokenSealed}::bytea,
            ${now} + ${seconds(lifetimeSeconds)}
          from room
          on conflict (confirmation_hash) do nothing`
        for (let tries = 1; ; tries += 1) {
          try {
            await place.execute(db)
            return
          } catch (error) {
            // Another one of this user was stored at the same moment, unseen by this statement: the next one sees it.
            if (!isUniqueViolation(error) || tries === PLACE_TRIES_MAX) throw error
          }
        }
      }),

    find: (confirmationHash) =>
      throughDatabase(async () => {
        const { rows } = await sql<PendingGrantRow>`
          select *, ${now} as read_at from pending_grants
          where confirmation_hash = ${confirmationHash} and expires_at > ${now}`.execute(db)
        return rows[0] && pendingGrantOf(rows[0])
      }),

    findWaiting: (user) =>
      throughDatabase(async () => {
        const { rows } = await sql<PendingGrantRow>`
          select *, ${now} as read_at from pending_grants
          where user_id = ${user} and confirmed_at is null and expires_at > ${now}`.execute(db)
        return rows[0] && pendingGrantOf(rows[0])
      }),

    drop: (user, confirmationHash) =>
      throughDatabase(async () => {
        const which =
          confirmationHash === undefined
            ? sql`true`
            : sql`confirmation_hash = ${confirmationHash} and confirmed_at is null`
        const { rows } = await sql`
          with ${dropped(sql`user_id = ${user} and ${which}`)}
          select 1 from dropped where refresh_token_sealed is not null and expires_at > ${now}`.execute(
          db,
        )
        return rows.length > 0
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { rows } = await sql`
          with expired as (
            select confirmation_hash from pending_grants where expires_at <= ${now}
            limit ${SWEEP_ROWS_MAX} for update skip locked
          ), ${dropped(sql`confirmation_hash in (select confirmation_hash from expired)`)}
          select 1 from dropped`.execute(db)
        return rows.length
      }),
  }
}

/** Deletes the rows of which `condition` holds, and queues the refresh tokens of those that were never confirmed. */
function dropped(condition: RawBuilder<unknown>): RawBuilder<unknown> {
  return sql`
    dropped as (delete from pending_grants where ${condition} returning *),
    queued as (
      insert into revocations (revocation_id, user_id, token_sealed, key_id)
      select revocation_id, user_id, revocation_token_sealed, key_id from dropped
      where revocation_id is not null
      -- Placed again after a lost answer, it may have been dropped before.
      on conflict (revocation_id) do nothing)`
}

type PendingGrantRow = Selectable<Tables['pending_grants']> & { read_at: Date }

function pendingGrantOf(row: PendingGrantRow): PendingGrant {
  return {
    confirmationHash: row.confirmation_hash,
    user: row.user_id,
    refreshTokenSealed: row.refresh_token_sealed,
    accessToken: accessTokenOf(row),
    scope: row.scope,
    keyId: row.key_id,
    pageroIssuer: row.pagero_issuer,
    pageroSubject: row.pagero_subject,
    startSession: row.start_session,
    allowAccountChange: row.allow_account_change,
    createdAt: row.created_at,
    expiresAt: row.expires_at,
    confirmedAt: row.confirmed_at,
    readAt: row.read_at,
  }
}

function accessTokenOf(row: PendingGrantRow): PendingGrant['accessToken'] {
  const sealed = row.access_token_sealed
  const requestedAt = row.access_token_requested_at
  const expiresAt = row.access_token_expires_at
  return sealed === null || requestedAt === null || expiresAt === null
    ? null
    : { sealed, requestedAt, expiresAt }
}
