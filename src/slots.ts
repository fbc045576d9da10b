// A fair limit on how many do something at once.

/** Makes a limit of at most `count` at a time, in the order of asking. */
export function createSlots(count: number): {
  /** Resolves with the function that gives the slot back; calling that again changes nothing. */
  take(): Promise<() => void>
} {
  const waiting: Array<() => void> = []
  let free = count
  const release = () => {
    const next = waiting.shift()
    if (next === undefined) free += 1
    else next()
  }
  return {
    async take() {
      if (free > 0) free -= 1
      else await new Promise<void>((resolve) => waiting.push(resolve))
      let released = false
      return () => {
        if (!released) release()
        released = true
      }
    },
  }
}
