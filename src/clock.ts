// The real clock. Tests and simulations bring their own.

import type { Clock } from './ports.ts'

export const systemClock: Clock = {
  now: () => new Date(),
  monotonicMs: () => performance.now(),
  random: () => Math.random(),
  sleep: (delayMs, signal) =>
    new Promise((resolve) => {
      if (signal?.aborted === true) {
        resolve()
        return
      }
      const end = () => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', end)
        resolve()
      }
      const timer = setTimeout(end, delayMs)
      // A waiting loop is no reason to keep the process alive.
      timer.unref()
      signal?.addEventListener('abort', end, { once: true })
    }),
}
