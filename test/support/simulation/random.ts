// Seeded chance: one seed, one run, to the last event. Nothing here is fit for secrets.

export interface Random {
  /** From 0 to 1, without 1. */
  next(): number
  chance(probability: number): boolean
  between(least: number, most: number): number
  pick<T>(items: readonly T[]): T
  /** Another generator whose numbers do not depend on how many this one gives from now on. */
  fork(): Random
}

/** Makes a generator of the sfc32 family: 128 bits of state, passes PractRand, and is three additions a number. */
export function createRandom(seed: number): Random {
  let a = 0x9e3779b9
  let b = seed | 0
  let c = Math.floor(seed / 2 ** 32) | 0
  let counter = 1
  const bits = () => {
    const sum = (a + b + counter) | 0
    counter = (counter + 1) | 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) | 0
    c = ((c << 21) | (c >>> 11)) + sum
    c |= 0
    return sum >>> 0
  }
  // Seeds that are neighbours give unlike numbers only after the state has been mixed.
  for (let i = 0; i < 12; i += 1) bits()
  const next = () => bits() / 2 ** 32
  return {
    next,
    chance: (probability) => next() < probability,
    between: (least, most) => least + next() * (most - least),
    pick(items) {
      const item = items[Math.floor(next() * items.length)]
      if (item === undefined) throw new RangeError('There is nothing to pick from.')
      return item
    },
    fork: () => createRandom(bits() * 2 ** 21 + (bits() >>> 11)),
  }
}
