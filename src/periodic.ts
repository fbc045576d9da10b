// A piece of work done again and again, never overlapping itself, until it is stopped.

import type { Clock, Log } from './ports.ts'

export interface Periodic {
  /** Resolves when the round in progress has ended. */
  stop(): Promise<void>
}

/** Runs `work` at once and then every `intervalSeconds`. An error is logged as `event` and ends nothing. */
export function startPeriodic(
  ports: { clock: Clock; log: Log },
  periodic: { intervalSeconds: number; event: string; work: () => Promise<unknown> },
): Periodic {
  const stopping = new AbortController()
  const run = async () => {
    while (!stopping.signal.aborted) {
      try {
        await periodic.work()
      } catch (error) {
        ports.log.warn(periodic.event, { error })
      }
      await ports.clock.sleep(periodic.intervalSeconds * 1000, stopping.signal)
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
