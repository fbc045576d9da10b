// A piece of work done again and again, never overlapping itself, until it is stopped.

import type { Clock, Log } from './ports.ts'

export interface Periodic {
  /** Resolves when the round in progress has ended. */
  stop(): Promise<void>
}

/**
 * Runs `work` at once and then every `intervalSeconds`. An error is logged as `event` and ends nothing; the next round
 * comes after `retrySeconds` then, if that is given.
 */
export function startPeriodic(
  ports: { clock: Clock; log: Log },
  periodic: {
    intervalSeconds: number
    retrySeconds?: number
    event: string
    /** The signal fires when it is to be stopped: work of many parts looks at it between two of them. */
    work: (stopping: AbortSignal) => Promise<unknown>
  },
): Periodic {
  const stopping = new AbortController()
  const run = async () => {
    while (!stopping.signal.aborted) {
      let pauseSeconds = periodic.intervalSeconds
      try {
        await periodic.work(stopping.signal)
      } catch (error) {
        ports.log.warn(periodic.event, { error })
        pauseSeconds = periodic.retrySeconds ?? pauseSeconds
      }
      await ports.clock.sleep(pauseSeconds * 1000, stopping.signal)
    }
  }
  const ended = run()
  return {
    async stop() {
      stopping.abort()
      await ended
    },
  }
}
