// What replicas know of each other: that one lives, that it has started anew, that its spool is empty.
// The rule of taking over another's refresh attempt reads these rows, in grant-store.ts.

import { sql } from 'kysely'
import type { Kysely } from 'kysely'

import type { ReplicaStore } from '../grant-stores.ts'
import { throughDatabase } from './database.ts'
import { createNow, now } from './time.ts'
import type { Tables } from './database.ts'

/** A server is told by its start: one that was promoted began at another instant than the one it follows. */
const server = sql`pg_postmaster_start_time()`

/** Makes the store of replicas for one process. Two processes must never run under one name at the same time. */
export function createReplicaStore(
  db: Kysely<Tables>,
  settings: { heartbeatStaleSeconds: number } = { heartbeatStaleSeconds: 20 },
): ReplicaStore {
  /** The server that this process has met last. One that knows nothing of the replica is owed what it holds. */
  let met: string | undefined

  /** Half of what makes others stale: whoever has been seen in this time knows that the others could have been. */
  const gapSecondsMax = settings.heartbeatStaleSeconds / 2

  /**
   * A boot that the row does not know begins with an undrained spool: what its predecessor left may still be in it.
   * And a statement of a process that has died may be carried out late: were it to say that this boot has drained its
   * spool, the one that lives now would look like one that is gone.
   */
  const announce = (
    replica: string,
    boot: string,
    { drainedAsOf, holds }: { drainedAsOf: Date | null; holds: boolean },
  ) =>
    throughDatabase(async () => {
      // What an earlier boot owes a new server, the present one owes: it has the same disk.
      const { rows } = await sql<{ server: string; is_owed: boolean | null }>`
        with noticed as (
          update deployment set
            server_started_at = ${server}, server_noticed_at = ${now},
            server_left_at = (select max(seen_at) from replicas)
          where server_started_at is distinct from ${server}
        )
        insert into replicas as r (name, boot, spool_drained_at, restored_on, met_on, met_at)
        values (
          ${replica}, ${boot}, ${drainedAsOf},
          coalesce(${met ?? null}::timestamptz, case when ${holds}::boolean then '-infinity'::timestamptz end, ${server}),
          ${server}, clock_timestamp())
        on conflict (name) do update set
          boot = excluded.boot,
          booted_at = case when r.boot = excluded.boot then r.booted_at else excluded.booted_at end,
          seen_at = clock_timestamp(),
          steady_since = case
            when r.boot = excluded.boot
              and r.seen_at > clock_timestamp() - make_interval(secs => ${gapSecondsMax})
            then r.steady_since else excluded.steady_since end,
          spool_drained_at = case when r.boot = excluded.boot
            then greatest(r.spool_drained_at, excluded.spool_drained_at)
            else excluded.spool_drained_at end,
          restored_on = coalesce(r.restored_on, excluded.restored_on),
          met_on = excluded.met_on,
          met_at = case when r.met_on = excluded.met_on then r.met_at else excluded.met_at end
        where r.boot = excluded.boot or excluded.spool_drained_at is null
        returning ${server}::text as server, r.restored_on <> ${server} as is_owed
      `.execute(db)
      const [row] = rows
      if (row === undefined) return undefined
      met = row.server
      return row.is_owed === true ? row.server : undefined
    })

  return {
    heartbeat: (replica, boot, holds = false) =>
      announce(replica, boot, { drainedAsOf: null, holds }),
    now: createNow(db),
    spoolDrained: async (replica, boot, asOf) =>
      void (await announce(replica, boot, { drainedAsOf: asOf, holds: false })),
    restored: (replica, boot, seen) =>
      throughDatabase(async () => {
        await sql`
          update replicas set restored_on = ${server}
          where name = ${replica} and boot = ${boot} and ${server}::text = ${seen}`.execute(db)
      }),
    sweep: () =>
      throughDatabase(async () => {
        const { numAffectedRows } = await sql`
          delete from replicas where seen_at < clock_timestamp() - interval '30 days'`.execute(db)
        return Number(numAffectedRows ?? 0n)
      }),
  }
}
