// What a database server that takes another's place may not know, and must be told: attempts that are under way, and those
// that have ended in doubt, until their lease is over. Without that nobody would wait for what their requests may still do.

import type { UserKey } from './grant.ts'
import type { Ports } from './ports.ts'
import type { ArmRequest, GrantStore } from './grant-stores.ts'

/** An attempt that ended in doubt. Both instants are monotonic. */
interface Doubt {
  request: ArmRequest
  armedAt: Date
  /** When its token may be presented again. */
  retryAtMs: number
  /** When its lease is over, and that pause: from then on another replica may have taken it over. */
  untilMs: number
}

export interface UnderWay {
  /** Notes an attempt that is armed. A doubt that its user was in is over by it. */
  begin(request: ArmRequest, armedAt: Date): void
  /** Notes that the attempt has its end in the database, or needs none. */
  end(attemptId: string): void
  /** Notes that the attempt has ended in doubt: the last one of each user. */
  doubt(attemptId: string, times: { retryInSeconds: number; leaseEndsAtMs: number }): void
  /**
   * Tells the present server of all of them. Resolves with false when it is to be told once more, because a row has not yet
   * got back the token that is being presented.
   */
  restore(): Promise<boolean>
}

/** Makes the record of a process. */
export function createUnderWay({
  clock,
  grants,
}: {
  clock: Ports['clock']
  grants: Pick<GrantStore, 'rearm' | 'disarm'>
}): UnderWay {
  /** Attempts that are armed and have no end yet in the database. */
  const armed = new Map<string, { request: ArmRequest; armedAt: Date }>()
  const doubtful = new Map<UserKey, Doubt>()

  /** Has the new server know of an attempt that ended in doubt, and of the pause after it; false as in `restore`. */
  async function restoreDoubt({ request, armedAt, retryAtMs, untilMs }: Doubt): Promise<boolean> {
    const { user, attemptId } = request
    const nowMs = clock.monotonicMs()
    // What is still under way is told of anyhow.
    if (untilMs < nowMs || armed.has(attemptId)) return true
    if (!(await grants.rearm(request, armedAt))) return false
    await grants.disarm({
      ...notSent(user, attemptId),
      outcome: 'in_doubt',
      retryInSeconds: Math.max(0, retryAtMs - nowMs) / 1000,
      stayArmed: true,
    })
    return true
  }

  return {
    begin(request, armedAt) {
      doubtful.delete(request.user)
      armed.set(request.attemptId, { request, armedAt })
    },
    end: (attemptId) => void armed.delete(attemptId),
    doubt(attemptId, { retryInSeconds, leaseEndsAtMs }) {
      const known = armed.get(attemptId)
      if (known === undefined) return
      const nowMs = clock.monotonicMs()
      for (const [past, { untilMs }] of doubtful) if (untilMs < nowMs) doubtful.delete(past)
      const retryAtMs = nowMs + retryInSeconds * 1000
      // Whoever was stopped meanwhile learns of it when the lease is over already.
      const untilMs = Math.max(leaseEndsAtMs, retryAtMs)
      doubtful.set(known.request.user, { ...known, retryAtMs, untilMs })
    },
    async restore() {
      const isTold = await Promise.all([
        ...[...armed.values()].map(({ request, armedAt }) => grants.rearm(request, armedAt)),
        ...[...doubtful.values()].map(restoreDoubt),
      ])
      return isTold.every(Boolean)
    },
  }
}

/** The end of an attempt whose request never left. */
export function notSent(user: UserKey, attemptId: string) {
  return {
    user,
    attemptId,
    outcome: 'not_processed' as const,
    httpStatus: null,
    durationMs: 0,
    retryInSeconds: 0,
    stayArmed: false,
    counts: false,
  }
}
