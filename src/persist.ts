// Writing what must not be lost: it is tried for as long as it takes.

import type { UserKey } from './grant.ts'
import type { Ports } from './ports.ts'

/** Pauses between the tries. */
const RETRY_FIRST_MS = 50
const RETRY_LONGEST_MS = 2_000

/** Does `write` until it succeeds, and tells of each failure in the log as `event`. */
export type Persist = <T>(event: string, user: UserKey, write: () => Promise<T>) => Promise<T>

/** Makes what writes until it is written, however long the database is away. */
export function createPersist({ clock, log }: Pick<Ports, 'clock' | 'log'>): Persist {
  return async (event, user, write) => {
    let pauseMs = RETRY_FIRST_MS
    for (;;) {
      try {
        return await write()
      } catch (error) {
        log.warn(event, { user, error })
        await clock.sleep(pauseMs * (0.75 + clock.random() / 2))
        pauseMs = Math.min(pauseMs * 2, RETRY_LONGEST_MS)
      }
    }
  }
}
