// A fair limit on how many do something at once, and on how many wait for their turn.

export interface Slots {
  /** Resolves with the function that gives the slot back; calling that again changes nothing. */
  take(): Promise<() => void>
  /** Tells whether as many wait as may. Whoever must have a slot may take one all the same. */
  isFull(): boolean
}

/** Makes a limit of at most `count` at a time, in the order of asking. */
export function createSlots(count: number, waitingMax: number): Slots {
  const waiting: Array<() => void> = []
  let free = count
  const release = () => {
    const next = waiting.shift()
    if (next === undefined) free += 1
    else next()
  }
  async function take(): Promise<() => void> {
    if (free > 0) free -= 1
    else await new Promise<void>((resolve) => waiting.push(resolve))
    let released = false
    return () => {
      if (!released) release()
      released = true
    }
  }
  return {
    take,
    isFull: () => free === 0 && waiting.length >= waitingMax,
  }
}
