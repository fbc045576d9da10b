// Connect links, by the hash of their ticket. Opening one uses it up and stores the login that it begins, in one
// statement: a link begins one login at most, on whatever replica and however often it is opened.

import { type Kysely, sql } from 'kysely'
import type { UserKey } from '../grant.ts'
import type { ConnectLinkStore } from '../login-stores.ts'
import { SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import { surplusLogins } from './login-transaction-store.ts'
import type { Tables } from './tables.ts'
import { now, seconds } from './time.ts'

/** Makes the store of connect links. Every method may be called at once, on any number of replicas. */
export function createConnectLinkStore(db: Kysely<Tables>): ConnectLinkStore {
  return {
    create: (link, ttlSeconds) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ expiresAt: Date }>`
          insert into connect_links
            (ticket_hash, user_id, return_to, confirm, start_session, allow_account_change, expires_at)
          values
            (${link.ticketHash}, ${link.user}, ${link.returnTo}, ${link.confirm},
             ${link.startSession}, ${link.allowAccountChange}, ${now} + ${seconds(ttlSeconds)})
          returning expires_at as "expiresAt"`.execute(db)
        const [created] = rows
        if (created === undefined) throw new Error('an insert returned no row')
        return created
      }),

    open: (ticketHash, login, { lifetimeSeconds, pendingMax }) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ user: UserKey }>`
          with link as (
            update connect_links set used_at = ${now}
            where ticket_hash = ${ticketHash} and used_at is null and expires_at > ${now}
            returning user_id, return_to, confirm, start_session, allow_account_change
          ), dropped as (
            delete from login_transactions
            where state_hash in (${surplusLogins(login.browserBindingHash, pendingMax)})
              and exists (select 1 from link)
          )
          insert into login_transactions
            (state_hash, browser_binding_hash, code_verifier_sealed, nonce_hash,
             replaces_session_hash, expires_at, return_to, user_id, confirm, start_session,
             allow_account_change)
          select ${login.stateHash}::bytea, ${login.browserBindingHash}::bytea,
            ${login.codeVerifierSealed}::bytea, ${login.nonceHash}::bytea,
            ${login.replacesSessionHash}::bytea, ${now} + ${seconds(lifetimeSeconds)}, return_to,
            user_id, confirm, start_session, allow_account_change
          from link
          returning user_id as "user"`.execute(db)
        return rows[0]
      }),

    find: (ticketHash) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ returnTo: string; isUsed: boolean }>`
          select return_to as "returnTo", used_at is not null as "isUsed"
          from connect_links where ticket_hash = ${ticketHash}`.execute(db)
        return rows[0]
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          with expired as (
            select ticket_hash from connect_links where expires_at <= ${now} - interval '1 day'
            limit ${SWEEP_ROWS_MAX} for update skip locked
          )
          delete from connect_links using expired
          where connect_links.ticket_hash = expired.ticket_hash`.execute(db)
        return Number(numAffectedRows ?? 0)
      }),
  }
}
