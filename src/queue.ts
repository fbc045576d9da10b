// Working on a queue that stands in the database: what is due is taken under a lease, a few at a time, and what a replica
// has taken comes back by itself if that replica dies. Any number of replicas may work on one queue.

import type { Clock, Log } from './ports.ts'

/** An hour: what waits for somebody to mend something is still looked after a few times a working day. */
export const BACKOFF_LAST_SECONDS = 3_600

/**
 * `firstSeconds`, doubling with each failure up to an hour, less up to half of it, so that what failed together does not
 * return together. `random` is from 0 to 1.
 */
export function backoffSeconds(firstSeconds: number, failureCount: number, random: number): number {
  const full = Math.min(firstSeconds * 2 ** failureCount, BACKOFF_LAST_SECONDS)
  return full * (1 - random / 2)
}

export interface QueueWorker {
  start(): void
  /** Takes nothing more, and resolves when what was taken has ended. */
  stop(): Promise<void>
  /** Looks at the queue at once instead of at the next poll. */
  kick(): void
  /** Works on what is due, a handful at most, and returns how many that were. */
  runOnce(): Promise<number>
}

/** Makes the loop that empties a queue. An error of `take` or `work` is logged as `event` and ends nothing. */
export function createQueueWorker<T>(
  ports: { clock: Clock; log: Log },
  queue: {
    /** Worked on at a time. */
    concurrency: number
    /** A queue that is empty, or in the hands of others, is looked at again after this. */
    pollMs: number
    event: string
    take(limit: number): Promise<T[]>
    work(item: T): Promise<void>
  },
): QueueWorker {
  const { clock, log } = ports
  const inWork = new Set<Promise<void>>()
  let running: Promise<void> | undefined
  let stopped = new AbortController()
  let wake = new AbortController()

  /** Begins on what is due, as far as there is room; each that ends makes the loop look again. */
  async function begin(): Promise<number> {
    const room = queue.concurrency - inWork.size
    if (room === 0) return 0
    const taken = await queue.take(room)
    for (const item of taken) {
      const work = queue
        .work(item)
        .catch((error: unknown) => log.warn(queue.event, { error }))
        .finally(() => {
          inWork.delete(work)
          wake.abort()
        })
      inWork.add(work)
    }
    return taken.length
  }

  async function run(stop: AbortSignal): Promise<void> {
    while (!stop.aborted) {
      // Renewed before the look: a kick during it is not lost.
      wake = new AbortController()
      const count = await begin().catch((error: unknown) => {
        log.warn(queue.event, { error })
        return 0
      })
      if (count === 0) await clock.sleep(queue.pollMs, AbortSignal.any([stop, wake.signal]))
    }
    await Promise.all(inWork)
  }

  return {
    start() {
      if (running !== undefined) return
      stopped = new AbortController()
      running = run(stopped.signal)
    },
    async stop() {
      stopped.abort()
      await running
      running = undefined
    },
    kick() {
      wake.abort()
    },
    async runOnce() {
      const taken = await queue.take(queue.concurrency)
      await Promise.all(taken.map(queue.work))
      return taken.length
    },
  }
}
