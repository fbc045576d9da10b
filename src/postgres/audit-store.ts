// The audit record in the database. Rows are added in batches and never changed; what they hang together by is computed
// in audit-chain.ts, and nothing here looks at it.

import { type Kysely, sql } from 'kysely'
import type { AuditRow } from '../audit-event.ts'
import type { AuditPlace, AuditSnapshot, AuditStore, ChainHead } from '../record-stores.ts'
import { type Database, type Tables, throughDatabase } from './database.ts'
import { prepare } from './prepared.ts'
import { createNow, now } from './time.ts'
import { likePatternOf } from './user-patterns.ts'

/** Makes the store of audit events. */
export function createAuditStore({ db }: Pick<Database, 'db'>): AuditStore {
  // As one JSON text: a parameter for each value of 200 rows would be 3,200 of them.
  const append = prepare<{ rows: string }>(
    db,
    'audit_append',
    (value) => sql`
      insert into audit_events (chain_id, sequence, at, replica, actor_kind, actor_name, action, user_id, outcome,
        request_id, fingerprint, count, details, key_id, previous_hash, hash)
      select chain_id, sequence, at, replica, actor_kind, actor_name, action, user_id, outcome,
        request_id, fingerprint, count, details, key_id, decode(previous_hash, 'hex'), decode(hash, 'hex')
      from json_to_recordset(${value('rows')}::json) as r (
        chain_id uuid, sequence bigint, at timestamptz, replica text, actor_kind text, actor_name text,
        action text, user_id text, outcome text, request_id text, fingerprint text, count integer,
        details jsonb, key_id text, previous_hash text, hash text)
      order by sequence
      on conflict (chain_id, sequence) do nothing`,
  )

  return {
    now: createNow(db),

    append: (rows) =>
      throughDatabase(async () => {
        await append({ rows: JSON.stringify(rows.map(recordOf)) })
      }),

    // The recursion makes one look-up in the primary key for each chain, however many rows there are.
    findHeads: (limit) =>
      throughDatabase(async () => {
        const { rows } = await sql<ChainHead>`
          with recursive ${CHAINS}
          select h.chain_id as "chainId", h.sequence, h.hash
          from chains c, lateral (
            select * from audit_events e where e.chain_id = c.chain_id order by e.sequence desc limit 1
          ) h
          order by h.at desc, h.chain_id limit ${limit}`.execute(db)
        return rows
      }),

    findDue: (days) =>
      throughDatabase(async () => {
        const { rows } = await sql<{ before: Date; chainIds: string[] }>`
          with recursive ${CHAINS}, bound as (
            select date_trunc('milliseconds', ${now}) - make_interval(days => ${days}) as before
          )
          select before, array(
            select c.chain_id::text from chains c, lateral (
              select at from audit_events e where e.chain_id = c.chain_id order by e.sequence limit 1
            ) f
            where f.at < before) as "chainIds"
          from bound`.execute(db)
        return rows[0] as { before: Date; chainIds: string[] }
      }),

    readChain: (chainId, sequence, limit) =>
      throughDatabase(() =>
        db
          .selectFrom('audit_events')
          .select(COLUMNS)
          .where('chain_id', '=', chainId)
          .where('sequence', '>=', sequence)
          .orderBy('sequence')
          .limit(limit)
          .execute(),
      ),

    // Two statements, because the trigger looks before the statement that it guards begins.
    expire: (chainId, sequence) =>
      throughDatabase(() =>
        db.transaction().execute(async (transaction) => {
          await sql`select set_config('pagero_broker.audit_retention', 'on', true)`.execute(
            transaction,
          )
          await transaction
            .deleteFrom('audit_events')
            .where('chain_id', '=', chainId)
            .where('sequence', '<', sequence)
            .execute()
        }),
      ),

    atOneMoment: (work) =>
      throughDatabase(() =>
        db
          .transaction()
          .setIsolationLevel('repeatable read')
          .setAccessMode('read only')
          .execute((transaction) => work(snapshotOf(transaction))),
      ),

    findUses: (fingerprints) =>
      throughDatabase(() =>
        db
          .selectFrom('audit_events')
          .select((fields) => [
            'actor_kind as actorKind',
            'actor_name as actorName',
            'action',
            'user_id as user',
            'outcome',
            fields.fn.min('at').as('firstAt'),
            fields.fn.max('at').as('lastAt'),
            fields.fn.sum<number>('count').as('count'),
          ])
          .where('fingerprint', 'in', fingerprints)
          .groupBy(['actor_kind', 'actor_name', 'action', 'user_id', 'outcome'])
          .orderBy('firstAt')
          .execute(),
      ),

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

/** The ids of all chains: one step in the primary key from each to the next. */
const CHAINS = sql`chains (chain_id) as (
  (select chain_id from audit_events order by chain_id limit 1)
  union all
  select (select e.chain_id from audit_events e where e.chain_id > c.chain_id order by e.chain_id limit 1)
  from chains c where c.chain_id is not null
)`

function snapshotOf(db: Kysely<Tables>): AuditSnapshot {
  const from = (after: AuditPlace | undefined, limit: number) => {
    const rows = db
      .selectFrom('audit_events')
      .select(COLUMNS)
      .orderBy('chain_id')
      .orderBy('sequence')
      .limit(limit)
    if (after === undefined) return rows
    return rows.where(
      sql<boolean>`(chain_id, sequence) > (${after.chainId}::uuid, ${after.sequence}::bigint)`,
    )
  }
  return {
    anchors: (after, limit) =>
      from(after, limit)
        // As the index has it.
        .where(sql<boolean>`action in ('heads_noted', 'events_expired')`)
        .execute(),
    rows: (after, limit) => from(after, limit).execute(),
    async liveChains() {
      const rows = await db
        .selectFrom('replicas')
        .select('boot')
        .where(sql<boolean>`seen_at > ${now} - interval '1 minute'`)
        .execute()
      return rows.map(({ boot }) => boot)
    },
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
