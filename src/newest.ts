// What this process got for its users, for as long as the spool keeps it. By it a row is known that has lost a commit, as
// a failover may do, and a database server that took another's place is given what is in no spool.

import type { Grant, UserKey } from './grant.ts'
import type { Clock } from './ports.ts'
import type { Successor } from './grant-stores.ts'

export interface Newest {
  /** Takes note of what was got for a user, before it is stored, and of its being in the spool once it is. */
  note(successor: Successor, isSpooled: boolean): void
  /** Tells whether the row is of before what was got for it: its token is spent. */
  isBehind(grant: Pick<Grant, 'user' | 'loginId' | 'generation'>): boolean
  /** Those that could not be spooled. */
  unspooled(): Successor[]
}

/** Remembers the newest of each user for `retentionSeconds`. */
export function createNewest(clock: Pick<Clock, 'monotonicMs'>, retentionSeconds: number): Newest {
  /** Oldest first. */
  const known = new Map<
    UserKey,
    { loginId: string; generation: number; untilMs: number; unspooled: Successor | undefined }
  >()
  return {
    note(successor, isSpooled) {
      const { user, loginId, generation } = successor
      const nowMs = clock.monotonicMs()
      for (const [past, { untilMs }] of known) {
        if (untilMs >= nowMs) break
        known.delete(past)
      }
      // Put in anew, so that the order stays.
      known.delete(user)
      known.set(user, {
        loginId,
        generation,
        untilMs: nowMs + retentionSeconds * 1000,
        unspooled: isSpooled ? undefined : successor,
      })
    },
    isBehind({ user, loginId, generation }) {
      const last = known.get(user)
      if (last?.loginId !== loginId || last.generation <= generation) return false
      return last.untilMs >= clock.monotonicMs()
    },
    unspooled: () =>
      [...known.values()].flatMap(({ unspooled }) => (unspooled === undefined ? [] : [unspooled])),
  }
}
