// Login transactions: what a browser's login has to remember between the redirect and the callback.
// One is taken out once, by its own browser alone; that is decided by a single DELETE and nowhere else.

import { sql } from 'kysely'
import type { Kysely, RawBuilder, Selectable } from 'kysely'

import type { ConnectRequest, LoginTransaction, LoginTransactionStore } from '../login-stores.ts'
import { SWEEP_ROWS_MAX, throughDatabase } from './database.ts'
import type { Tables } from './database.ts'
import { now } from './time.ts'

/** Makes the store of login transactions. Every method may be called at once, on any number of replicas. */
export function createLoginTransactionStore(db: Kysely<Tables>): LoginTransactionStore {
  return {
    create: (transaction, { lifetimeSeconds, pendingMax }) =>
      throughDatabase(async () => {
        // Tabs that open in the same instant do not see each other here, and may leave a few more
        // than the cap until the next one.
        await sql`
          with dropped as (
            delete from login_transactions
            where state_hash in (${surplusLogins(transaction.browserBindingHash, pendingMax)})
          )
          insert into login_transactions
            (state_hash, browser_binding_hash, code_verifier_sealed, nonce_hash, return_to,
             replaces_session_hash, expires_at)
          values
            (${transaction.stateHash}, ${transaction.browserBindingHash},
             ${transaction.codeVerifierSealed}, ${transaction.nonceHash}, ${transaction.returnTo},
             ${transaction.replacesSessionHash},
             clock_timestamp() + make_interval(secs => ${lifetimeSeconds}))
        `.execute(db)
      }),

    consume: (stateHash, browserBindingHash) =>
      throughDatabase(async () => {
        const row = await db
          .deleteFrom('login_transactions')
          .where('state_hash', '=', stateHash)
          .where('browser_binding_hash', '=', browserBindingHash)
          .where('expires_at', '>', sql<Date>`clock_timestamp()`)
          .returningAll()
          .returning(now.as('returned_at'))
          .executeTakeFirst()
        return row === undefined
          ? undefined
          : { ...transactionOf(row), returnedAt: row.returned_at }
      }),

    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          with expired as (
            select state_hash from login_transactions where expires_at <= clock_timestamp()
            limit ${SWEEP_ROWS_MAX} for update skip locked
          )
          delete from login_transactions using expired
          where login_transactions.state_hash = expired.state_hash
        `.execute(db)
        return Number(numAffectedRows ?? 0)
      }),
  }
}

/** The logins of a browser that make room for one more: the oldest, beyond the cap less this one. */
export function surplusLogins(browserBindingHash: Buffer, pendingMax: number): RawBuilder<unknown> {
  return sql`
    select state_hash from login_transactions where browser_binding_hash = ${browserBindingHash}
    order by created_at desc, state_hash offset ${Math.max(0, pendingMax - 1)}`
}

function transactionOf(row: Selectable<Tables['login_transactions']>): LoginTransaction {
  return {
    stateHash: row.state_hash,
    browserBindingHash: row.browser_binding_hash,
    codeVerifierSealed: row.code_verifier_sealed,
    nonceHash: row.nonce_hash,
    returnTo: row.return_to,
    replacesSessionHash: row.replaces_session_hash,
    connect: connectRequestOf(row),
  }
}

function connectRequestOf(row: Selectable<Tables['login_transactions']>): ConnectRequest | null {
  if (row.user_id === null) return null
  return {
    user: row.user_id,
    // Nothing but false lets a grant in unconfirmed, or another account.
    confirm: row.confirm !== false,
    startSession: row.start_session === true,
    allowAccountChange: row.allow_account_change === true,
  }
}
