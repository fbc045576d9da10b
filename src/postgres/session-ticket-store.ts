// Session tickets: a browser whose connection was confirmed begins its session with one, once. That is decided by a
// single DELETE and nowhere else.

import { type Kysely, sql } from 'kysely'
import type { UserKey } from '../grant.ts'
import type { SessionTicketStore } from '../login-stores.ts'
import { SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import type { Tables } from './tables.ts'
import { now, seconds } from './time.ts'

/** Makes the store of session tickets. Every method may be called at once, on any number of replicas. */
export function createSessionTicketStore(db: Kysely<Tables>): SessionTicketStore {
  return {
    create: (ticketHash, confirmationHash, lifetimeSeconds) =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          insert into session_tickets
            (ticket_hash, user_id, return_to, browser_binding_hash, replaces_session_hash, expires_at)
          select ${ticketHash}::bytea, user_id, return_to, browser_binding_hash,
            replaces_session_hash, ${now} + ${seconds(lifetimeSeconds)}
          from pending_grants
          where confirmation_hash = ${confirmationHash} and confirmed_at is not null`.execute(db)
        return Number(numAffectedRows ?? 0) > 0
      }),

    consume: (ticketHash, browserBindingHash) =>
      throughDatabase(async () => {
        const { rows } = await sql<{
          user: UserKey
          returnTo: string
          replacesSessionHash: Buffer | null
        }>`
          delete from session_tickets s
          where ticket_hash = ${ticketHash} and browser_binding_hash = ${browserBindingHash}
            and expires_at > ${now}
            and exists (
              select 1 from grants g where g.user_id = s.user_id and g.state <> 'revoked')
          returning user_id as "user", return_to as "returnTo",
            replaces_session_hash as "replacesSessionHash"`.execute(db)
        return rows[0]
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          with expired as (
            select ticket_hash from session_tickets where expires_at <= ${now}
            limit ${SWEEP_ROWS_MAX} for update skip locked
          )
          delete from session_tickets using expired
          where session_tickets.ticket_hash = expired.ticket_hash`.execute(db)
        return Number(numAffectedRows ?? 0)
      }),
  }
}
