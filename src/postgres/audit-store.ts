// The audit record in the database. Rows are added in batches and never changed; what they hang together by is computed
// in audit-chain.ts, and nothing here looks at it.

import { sql } from 'kysely'
import type { AuditRow } from '../audit-event.ts'
import type { AuditStore, ChainHead } from '../ports.ts'
import { type Database, throughDatabase } from './database.ts'
import { now, seconds } from './time.ts'
import { likePatternOf } from './user-patterns.ts'

/** Makes the store of audit events. */
export function createAuditStore({ db }: Pick<Database, 'db'>): AuditStore {
  return {
    now: () =>
      throughDatabase(async () => {
        const { rows } = await sql<{ now: Date }>`select ${now} as now`.execute(db)
        return (rows[0] as { now: Date }).now
      }),

    // As one JSON text: a parameter for each value of 500 rows would be 8,000 of them.
    append: (rows) =>
      throughDatabase(async () => {
        await sql`
          insert into audit_events (chain_id, sequence, at, replica, actor_kind, actor_name, action, user_id, outcome,
            request_id, fingerprint, count, details, key_id, previous_hash, hash)
          select chain_id, sequence, at, replica, actor_kind, actor_name, action, user_id, outcome,
            request_id, fingerprint, count, details, key_id, decode(previous_hash, 'hex'), decode(hash, 'hex')
          from jsonb_to_recordset(${JSON.stringify(rows.map(recordOf))}::jsonb) as r (
            chain_id uuid, sequence bigint, at timestamptz, replica text, actor_kind text, actor_name text,
            action text, user_id text, outcome text, request_id text, fingerprint text, count integer,
            details jsonb, key_id text, previous_hash text, hash text)
          order by sequence
          on conflict (chain_id, sequence) do nothing`.execute(db)
      }),

    // One look-up in the primary key for each chain, however many rows there are.
    findHeads: (withinSeconds, limit) =>
      throughDatabase(async () => {
        const { rows } = await sql<ChainHead>`
          with recursive chains (chain_id) as (
            (select chain_id from audit_events order by chain_id limit 1)
            union all
            select (select e.chain_id from audit_events e where e.chain_id > c.chain_id
              order by e.chain_id limit 1)
            from chains c where c.chain_id is not null
          )
          select h.chain_id as "chainId", h.replica, h.sequence, h.hash, h.at,
            h.action = 'chain_closed' as "isClosed"
          from chains c, lateral (
            select * from audit_events e where e.chain_id = c.chain_id order by e.sequence desc limit 1
          ) h
          where h.at > ${now} - ${seconds(withinSeconds)}
          order by h.at desc, h.chain_id limit ${limit}`.execute(db)
        return rows
      }),

    list: ({ users, user, action, after, limit }) =>
      throughDatabase(async () => {
        let events = db
          .selectFrom('audit_events')
          .select(COLUMNS)
          .orderBy('at', 'desc')
          .orderBy('chain_id', 'desc')
          .orderBy('sequence', 'desc')
          .limit(limit)
        // Who may see every user also sees what concerns none of them.
        if (!users.includes('*')) {
          events = events.where(sql<boolean>`user_id like any(${users.map(likePatternOf)})`)
        }
        if (user !== undefined) events = events.where('user_id', '=', user)
        if (action !== undefined) events = events.where('action', '=', action)
        if (after !== undefined) {
          const { at, chainId, sequence } = after
          events = events.where(
            sql<boolean>`(at, chain_id, sequence) < (${at}, ${chainId}::uuid, ${sequence}::bigint)`,
          )
        }
        return events.execute()
      }),
  }
}

const COLUMNS = [
  'chain_id as chainId',
  'sequence',
  'at',
  'replica',
  'actor_kind as actorKind',
  'actor_name as actorName',
  'action',
  'user_id as user',
  'outcome',
  'request_id as requestId',
  'fingerprint',
  'count',
  'details',
  'key_id as keyId',
  'previous_hash as previousHash',
  'hash',
] as const

function recordOf(row: AuditRow) {
  return {
    chain_id: row.chainId,
    sequence: row.sequence,
    at: row.at,
    replica: row.replica,
    actor_kind: row.actorKind,
    actor_name: row.actorName,
    action: row.action,
    user_id: row.user,
    outcome: row.outcome,
    request_id: row.requestId,
    fingerprint: row.fingerprint,
    count: row.count,
    details: row.details,
    key_id: row.keyId,
    previous_hash: row.previousHash.toString('hex'),
    hash: row.hash.toString('hex'),
  }
}
