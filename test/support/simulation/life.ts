// One life of a replica's process: from its start to its death. What is due to a process that has died is dropped;
// what is due to one that is stopped (SIGSTOP) waits until it goes on. What it has sent goes its way regardless.

import { randomUUID } from 'node:crypto'
import type { Clock } from '../../../src/ports.ts'
import type { Random } from './random.ts'
import type { Scheduled, Scheduler } from './scheduler.ts'

export interface Life {
  readonly replica: string
  readonly boot: string
  readonly clock: Clock
  readonly dead: boolean
  readonly paused: boolean
  /** The last instant at which it was stopped, or cut off alone from the database; -Infinity for never. */
  lastAbsentAtMs: number
  /** The last instant at which it was stopped, whatever became of its way to the database; -Infinity for never. */
  lastStoppedAtMs: number
  /** Since when it is dead, stopped or cut off, while it is. */
  absentSinceMs: number
  /** Since when the absence lasted that ended at `lastAbsentAtMs`. */
  lastAbsentSinceMs: number
  /** Its own way to the database is cut. */
  cutOff: boolean
  /** When a statement of it last failed; -Infinity for never. */
  databaseFailedAtMs: number
  /** Runs now, or when it goes on, or never. */
  deliver(action: () => void): void
  after(delayMs: number, action: () => void): Scheduled
  /** Settles like the executor says, as far as the process lives to see it. */
  call<T>(start: (settle: Settle<T>) => void): Promise<T>
  kill(): void
  pause(): void
  resume(): void
  cut(): void
  reconnect(): void
}

export interface Settle<T> {
  resolve(value: T): void
  reject(error: unknown): void
}

/** An arbitrary instant for wall clocks; nothing may depend on it. */
export const EPOCH_MS = Date.UTC(2026, 0, 15)

/** Starts a process. `skewMs` is how far its wall clock is off. */
export function startLife(
  world: { scheduler: Scheduler; random: Random },
  replica: string,
  skewMs: number,
): Life {
  const { scheduler, random } = world
  const startedAtMs = scheduler.nowMs()
  let held: Array<() => void> = []

  function leave(): void {
    life.absentSinceMs = Math.min(life.absentSinceMs, scheduler.nowMs())
  }

  function comeBack(): void {
    if (life.paused || life.cutOff || life.dead) return
    life.lastAbsentAtMs = scheduler.nowMs()
    life.lastAbsentSinceMs = life.absentSinceMs
    life.absentSinceMs = Infinity
  }

  const life: Life & { dead: boolean; paused: boolean } = {
    replica,
    boot: randomUUID(),
    dead: false,
    paused: false,
    lastAbsentAtMs: -Infinity,
    lastStoppedAtMs: -Infinity,
    absentSinceMs: Infinity,
    lastAbsentSinceMs: Infinity,
    cutOff: false,
    databaseFailedAtMs: -Infinity,
    deliver(action) {
      if (life.dead) return
      if (life.paused) held.push(action)
      else action()
    },
    after: (delayMs, action) => scheduler.after(delayMs, () => life.deliver(action)),
    call: (start) =>
      new Promise((resolve, reject) => {
        // A process that has died is still there as closures; nothing they do leaves it.
        life.deliver(() =>
          start({
            resolve: (value) => life.deliver(() => resolve(value)),
            reject: (error) => life.deliver(() => reject(error as Error)),
          }),
        )
      }),
    kill() {
      life.dead = true
      leave()
      held = []
    },
    pause() {
      life.paused = true
      leave()
    },
    resume() {
      if (!life.paused || life.dead) return
      life.paused = false
      life.lastStoppedAtMs = scheduler.nowMs()
      comeBack()
      const due = held
      held = []
      // Timers or sockets first: a process that wakes promises no order.
      const turned = random.chance(0.3) ? due.toReversed() : due
      for (const action of turned) life.after(0, action)
    },
    cut() {
      life.cutOff = true
      leave()
    },
    reconnect() {
      life.cutOff = false
      comeBack()
    },
    clock: {
      now: () => new Date(EPOCH_MS + scheduler.nowMs() + skewMs),
      monotonicMs: () => scheduler.nowMs() - startedAtMs,
      random: () => random.next(),
      sleep: (delayMs, signal) =>
        new Promise((resolve) => {
          if (signal?.aborted === true) {
            resolve()
            return
          }
          const timer = life.after(delayMs, end)
          function end() {
            timer.cancel()
            signal?.removeEventListener('abort', end)
            resolve()
          }
          signal?.addEventListener('abort', end, { once: true })
        }),
    },
  }
  return life
}
