// Notes when a grant was used, for operators: to the minute, many grants in one statement, and never in the way of a
// request. What a crash or an absent database loses of it is noted at the next use.

import type { UserKey } from './grant.ts'
import type { Ports } from './ports.ts'

/** A grant's last use is noted at most this often by one process. */
const INTERVAL_MS = 60_000
/** Uses gather for this long before they are written. */
const GATHER_MS = 1_000
/** Grants in one statement, and so in a second: their rows are written anew, and tokens come first. */
const BATCH_MAX = 500
/** Grants that may wait for their turn: a minute's worth. Beyond that their use is noted another time. */
const WAITING_MAX = 30_000

/** When the use of a grant was noted last, kept with what else is known of it. */
export interface Noted {
  useNotedAtMs?: number
}

/** Makes the notes of a process. The function it returns costs next to nothing and never throws. */
export function createLastUse(
  ports: Pick<Ports, 'clock' | 'log' | 'grants'>,
): (user: UserKey, noted: Noted) => void {
  const { clock, log, grants } = ports
  const waiting = new Set<UserKey>()
  let isWriting = false

  async function writeAll(): Promise<void> {
    isWriting = true
    while (waiting.size > 0) {
      await clock.sleep(GATHER_MS)
      const users = [...waiting].slice(0, BATCH_MAX)
      for (const user of users) waiting.delete(user)
      await grants
        .touch(users)
        .catch((error: unknown) => log.debug('grant_touch_failed', { count: users.length, error }))
    }
    isWriting = false
  }

  return (user, noted) => {
    const nowMs = clock.monotonicMs()
    if (noted.useNotedAtMs !== undefined && nowMs - noted.useNotedAtMs < INTERVAL_MS) return
    if (waiting.size >= WAITING_MAX) return
    noted.useNotedAtMs = nowMs
    waiting.add(user)
    if (!isWriting) void writeAll()
  }
}
