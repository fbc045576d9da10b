// Reads of many grants that come together are answered by one query. While queries run, further reads gather for the
// next one, so that the database sees batches under load and single reads otherwise.

import type { ServableGrant, UserKey } from './grant.ts'
import type { Clock } from './ports.ts'
import type { GrantStore } from './grant-stores.ts'

/** A grant as read, with the monotonic instant before the read: never later than what it says. */
export interface GrantReading {
  grant: ServableGrant | undefined
  readAtMs: number
}

/** Users in one query; more wait for the next. */
const BATCH_MAX = 500
/** Queries at once. One in flight while the next one gathers keeps both sides busy; more only makes batches small. */
const CONCURRENT_QUERIES_MAX = 2

interface Waiter {
  resolve: (reading: GrantReading) => void
  reject: (error: unknown) => void
}

interface Batch {
  waiters: Map<UserKey, Waiter[]>
  begin: () => void
}

/** Makes the reader of a process. The function it returns may be called any number of times at once. */
export function createGrantReader(ports: {
  clock: Pick<Clock, 'monotonicMs'>
  grants: Pick<GrantStore, 'findMany'>
}): (user: UserKey) => Promise<GrantReading> {
  /**
   * The batches to come, the next one first, each a map of its own: in one that is filled and emptied all the time each table
   * that V8 lets go of points to its successor, so that all that ever waited grows old with the first of them.
   */
  const batches: Batch[] = []
  let running = 0
  let scheduled = false

  function schedule(): void {
    if (scheduled || running >= CONCURRENT_QUERIES_MAX || batches.length === 0) return
    scheduled = true
    setImmediate(() => {
      scheduled = false
      const batch = batches.shift()
      if (batch === undefined) return
      running += 1
      batch.begin()
      schedule()
    })
  }

  function enqueue(user: UserKey, waiter: Waiter): void {
    const last = batches.at(-1)?.waiters
    const others = last?.get(user)
    if (others !== undefined) others.push(waiter)
    else if (last !== undefined && last.size < BATCH_MAX) last.set(user, [waiter])
    else open(new Map([[user, [waiter]]]))
  }

  /** Its query belongs to what the first of them belongs to, whoever has it read: a promise goes on where it was waited for. */
  function open(waiters: Batch['waiters']): void {
    const { promise, resolve: begin } = Promise.withResolvers<void>()
    batches.push({ waiters, begin })
    void promise.then(() => read(waiters))
  }

  async function read(batch: Batch['waiters']): Promise<void> {
    const readAtMs = ports.clock.monotonicMs()
    try {
      for (const grant of await ports.grants.findMany([...batch.keys()])) {
        const waiters = batch.get(grant.user) ?? []
        batch.delete(grant.user)
        for (const { resolve } of waiters) resolve({ grant, readAtMs })
      }
      for (const waiters of batch.values()) {
        for (const { resolve } of waiters) resolve({ grant: undefined, readAtMs })
      }
    } catch (error) {
      for (const waiters of batch.values()) for (const { reject } of waiters) reject(error)
    } finally {
      running -= 1
      schedule()
    }
  }

  return (user) =>
    new Promise((resolve, reject) => {
      enqueue(user, { resolve, reject })
      schedule()
    })
}
