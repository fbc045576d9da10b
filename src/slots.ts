// A fair limit on how many do something at once, and a guess at how long whoever comes now would wait for it.

/** What a turn is taken to last until some have been seen: about what Pagero takes for an answer. */
const TURN_FIRST_MS = 200
/** Weight of the newest turn in the mean: one slow answer tells little. */
const TURN_WEIGHT = 1 / 8

export interface Slots {
  /** Resolves with the function that gives the slot back; calling that again changes nothing. */
  take(): Promise<() => void>
  /** From now on the whole limit holds. */
  widen(): void
  /** Milliseconds that whoever asked now would wait, judged by the last turns; 0 while a slot is free. */
  waitMs(): number
}

/** Makes a limit of at most `count` at a time, in the order of asking; of at most `narrow` until it is widened. */
export function createSlots(
  count: number,
  clock: { monotonicMs(): number },
  narrow = count,
): Slots {
  const waiting: Array<() => void> = []
  let limit = Math.min(narrow, count)
  let free = limit
  let turnMs = TURN_FIRST_MS
  const release = () => {
    const next = waiting.shift()
    if (next === undefined) free += 1
    else next()
  }
  return {
    async take() {
      if (free > 0) free -= 1
      else await new Promise<void>((resolve) => waiting.push(resolve))
      const takenAtMs = clock.monotonicMs()
      let released = false
      return () => {
        if (released) return
        released = true
        turnMs += (clock.monotonicMs() - takenAtMs - turnMs) * TURN_WEIGHT
        release()
      }
    },
    widen() {
      for (; limit < count; limit += 1) release()
    },
    waitMs: () => (free > 0 ? 0 : ((waiting.length + 1) / limit) * turnMs),
  }
}
