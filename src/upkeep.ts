// What is cleared away, and what is warned of, some at a time.

import type { Ports } from './ports.ts'

/** Told of with one statement: an import of many comes due on one day. */
const EXPIRY_WARNINGS_MAX = 1_000

/** Sweeps until nothing is left that can be swept: a flood must not outgrow the broom. Each takes at most `rowsMax`. */
export async function sweepAll(
  rowsMax: number,
  sweeps: ReadonlyArray<() => Promise<number>>,
): Promise<void> {
  const failures: unknown[] = []
  for (const sweep of sweeps) {
    try {
      let swept: number
      do {
        swept = await sweep()
      } while (swept >= rowsMax)
    } catch (error) {
      // One that cannot be swept must not keep the others from it.
      failures.push(error)
    }
  }
  if (failures.length > 0) throw failures[0]
}

/** Warns of the grants that come within 90, 30 or 7 days of their end, once each. */
export async function warnOfExpiry(
  { grants, log }: Pick<Ports, 'grants' | 'log'>,
  stopping: AbortSignal,
): Promise<void> {
  let isLast = false
  while (!isLast && !stopping.aborted) {
    const warnings = await grants.takeExpiryWarnings(EXPIRY_WARNINGS_MAX)
    for (const one of warnings) log.warn('grant_expiring', { ...one })
    isLast = warnings.length < EXPIRY_WARNINGS_MAX
  }
}
