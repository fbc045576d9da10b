// Which calls use a connection to the API, and which wait for one. There are so many connections; one user's calls hold
// a part of them at most, so that his slow ones leave the rest to others; and only so many wait, as large a part of them
// one user's, and not for long.

/** No connection to the API is free for a call, and it is not to wait any longer. */
export class ConnectionLimitError extends Error {
  readonly code = 'CONNECTION_LIMIT'
}

export interface ForwardQueueLimits {
  connections: number
  connectionsPerUser: number
  waitingMax: number
  waitMs: number
}

export interface ForwardQueue {
  /**
   * Calls `start` when a connection is free for a call of this user, in the order of asking: at once if one is. Or calls
   * `refuse`: at once when too many wait, or after having waited too long.
   *
   * @returns the function that gives the connection back, or leaves the queue, as `start` is given it too; calling it
   *   again changes nothing
   */
  enter(
    user: string,
    start: (leave: () => void) => void,
    refuse: (error: ConnectionLimitError) => void,
  ): () => void
}

interface Waiting {
  user: string
  begin: () => void
}

/** Makes the queue of one forwarder. */
export function createForwardQueue(limits: ForwardQueueLimits): ForwardQueue {
  const waiting = new Set<Waiting>()
  /** As large a part of the queue as of the connections: nobody fills it alone. */
  const waitingPerUserMax = Math.ceil(
    (limits.waitingMax * limits.connectionsPerUser) / limits.connections,
  )
  /** Calls of each user that wait. */
  const waitingOf = new Map<string, number>()
  /** Connections of each user who has any. */
  const held = new Map<string, number>()
  let heldByAll = 0

  const isFreeFor = (user: string): boolean =>
    heldByAll < limits.connections && (held.get(user) ?? 0) < limits.connectionsPerUser
  const hold = (user: string) => {
    heldByAll += 1
    held.set(user, (held.get(user) ?? 0) + 1)
  }
  const wait = (place: Waiting) => {
    waiting.add(place)
    waitingOf.set(place.user, (waitingOf.get(place.user) ?? 0) + 1)
  }
  const waitNoMore = (place: Waiting) => {
    if (!waiting.delete(place)) return
    const left = (waitingOf.get(place.user) ?? 0) - 1
    if (left > 0) waitingOf.set(place.user, left)
    else waitingOf.delete(place.user)
  }
  const mayWait = (user: string): boolean =>
    waiting.size < limits.waitingMax && (waitingOf.get(user) ?? 0) < waitingPerUserMax
  const giveBack = (user: string) => {
    heldByAll -= 1
    const left = (held.get(user) ?? 0) - 1
    if (left > 0) held.set(user, left)
    else held.delete(user)
    // What was given back is enough for one: for each of the others there is as little as before.
    for (const next of waiting) {
      if (!isFreeFor(next.user)) continue
      next.begin()
      return
    }
  }

  return {
    enter(user, start, refuse) {
      let isOver = false
      let isHeld = false
      let timer: NodeJS.Timeout | undefined
      const leave = () => {
        if (isOver) return
        isOver = true
        waitNoMore(place)
        clearTimeout(timer)
        if (isHeld) giveBack(user)
      }
      const begin = () => {
        waitNoMore(place)
        clearTimeout(timer)
        isHeld = true
        hold(user)
        start(leave)
      }
      const place: Waiting = { user, begin }
      if (isFreeFor(user)) {
        begin()
      } else if (mayWait(user)) {
        wait(place)
        timer = setTimeout(() => {
          leave()
          refuse(new ConnectionLimitError())
        }, limits.waitMs)
      } else {
        isOver = true
        refuse(new ConnectionLimitError())
      }
      return leave
    },
  }
}
