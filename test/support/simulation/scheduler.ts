// Virtual time. One thread runs one event after the other; between two events every promise that can settle has settled.

export interface Scheduled {
  cancel(): void
}

export interface Scheduler {
  nowMs(): number
  /** Runs the action after the delay; events of one instant run in the order of their scheduling. */
  after(delayMs: number, action: () => void): Scheduled
  /** Runs events until the condition holds, or nothing is left, or `untilMs` is reached. */
  run(limits: { untilMs: number; done?: () => boolean }): Promise<void>
  /** Events run so far. */
  count(): number
}

interface Entry {
  atMs: number
  order: number
  action: (() => void) | undefined
}

/** No seed needs a tenth of it: more is a loop that never rests. */
const EVENTS_MAX = 400_000

/** Makes a scheduler that stands at 0. */
export function createScheduler(): Scheduler {
  const heap: Entry[] = []
  let nowMs = 0
  let order = 0
  let count = 0

  return {
    nowMs: () => nowMs,
    count: () => count,

    after(delayMs, action) {
      const entry: Entry = { atMs: nowMs + Math.max(0, delayMs), order: (order += 1), action }
      push(heap, entry)
      return {
        cancel() {
          entry.action = undefined
        },
      }
    },

    async run({ untilMs, done }) {
      await settled()
      while (done?.() !== true) {
        const [first] = heap
        if (first === undefined || first.atMs > untilMs) {
          nowMs = Math.max(nowMs, untilMs)
          return
        }
        pop(heap)
        if (first.action === undefined) continue
        count += 1
        if (count > EVENTS_MAX) throw new Error('The run does not come to rest.')
        nowMs = first.atMs
        first.action()
        await settled()
      }
    },
  }
}

/**
 * Resolves when no promise reaction is left to run.
 *
 * Called from a promise reaction, as everything behind an `await` is. Node runs the next-tick queue only once V8's
 * queue of reactions is empty, reactions queued by reactions included, so the tick asked for here comes after all of
 * them. Unlike a turn of the event loop it costs no system call. The code under simulation has no other way to go on:
 * its timers and input come from the ports, and its `setImmediate` is taken over by the run.
 */
function settled(): Promise<void> {
  return Promise.resolve().then(() => new Promise((resolve) => process.nextTick(resolve)))
}

// ── A binary heap by instant, then by order ──────────────────────────────────────────────────────

function isBefore(a: Entry, b: Entry): boolean {
  return a.atMs < b.atMs || (a.atMs === b.atMs && a.order < b.order)
}

function push(heap: Entry[], entry: Entry): void {
  let at = heap.length
  while (at > 0) {
    const above = (at - 1) >> 1
    const parent = heap[above] as Entry
    if (isBefore(parent, entry)) break
    heap[at] = parent
    at = above
  }
  heap[at] = entry
}

function pop(heap: Entry[]): void {
  const last = heap.pop() as Entry
  if (heap.length === 0) return
  let at = 0
  for (;;) {
    let below = 2 * at + 1
    if (below >= heap.length) break
    if (below + 1 < heap.length && isBefore(heap[below + 1] as Entry, heap[below] as Entry)) {
      below += 1
    }
    const child = heap[below] as Entry
    if (isBefore(last, child)) break
    heap[at] = child
    at = below
  }
  heap[at] = last
}
