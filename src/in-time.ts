// Waiting with an end to it, for callers who should not wait as long as the work may take.

import type { Clock } from './ports.ts'

/** Given to a signal, because the error that it makes otherwise costs more than the rest of it. */
const DONE = 'done'

/** Resolves and rejects as the promise does, or resolves to undefined once `limitMs` are over; what it stands for goes on. */
export async function inTime<T>(
  clock: Pick<Clock, 'sleep'>,
  promise: Promise<T>,
  limitMs: number,
): Promise<T | undefined> {
  const done = new AbortController()
  const over = clock.sleep(limitMs, done.signal).then(() => undefined)
  try {
    return await Promise.race([promise, over])
  } finally {
    done.abort(DONE)
  }
}
