// Notes when a grant, or a credential, was used, for operators: to the minute, many in one statement, and never in the way
// of a request. What a crash or an absent database loses of it is noted at the next use.

import type { Ports } from './ports.ts'

/** A last use is noted at most this often by one process. */
const INTERVAL_MS = 60_000
/** Uses gather for this long before they are written. */
const GATHER_MS = 1_000
/** Rows in one statement, and so in a second: they are written anew, and tokens come first. */
const BATCH_MAX = 500
/** How many may wait for their turn: a minute's worth. Beyond that their use is noted another time. */
const WAITING_MAX = 30_000

/** When the use of something was noted last, kept with what else is known of it. */
export interface Noted {
  useNotedAtMs?: number
}

/** Makes the notes of a process, for `write` to write. The function it returns costs next to nothing and never throws. */
export function createLastUse<Used>(
  { clock, log }: Pick<Ports, 'clock' | 'log'>,
  write: (used: readonly Used[]) => Promise<void>,
): (used: Used, noted: Noted) => void {
  const waiting = new Set<Used>()
  let isWriting = false

  async function writeAll(): Promise<void> {
    isWriting = true
    while (waiting.size > 0) {
      await clock.sleep(GATHER_MS)
      const batch = [...waiting].slice(0, BATCH_MAX)
      for (const used of batch) waiting.delete(used)
      await write(batch).catch((error: unknown) =>
        log.debug('last_use_not_noted', { count: batch.length, error }),
      )
    }
    isWriting = false
  }

  return (used, noted) => {
    const nowMs = clock.monotonicMs()
    if (noted.useNotedAtMs !== undefined && nowMs - noted.useNotedAtMs < INTERVAL_MS) return
    if (waiting.size >= WAITING_MAX) return
    noted.useNotedAtMs = nowMs
    waiting.add(used)
    if (!isWriting) void writeAll()
  }
}
