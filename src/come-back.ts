// Coming back to a grant whose token may be spent: whoever has presented a token in doubt presents it again by itself, so
// that the grant is not left armed and a loss is told also where nobody asks. Nothing here presents; the refresher does.

import { type Grant, retryWaitSeconds, type UserKey } from './grant.ts'
import type { Ports } from './ports.ts'
import type { GrantStore } from './grant-stores.ts'

/** After an instant of the database's clock, until it surely agrees. */
const MARGIN_MS = 50

export interface ComeBack {
  /** Comes back after the delay, and again until it is known what became of the token. Nobody waits for it. */
  begin(grant: Grant, delaySeconds: number): void
  /** Whether the user's row is being come back to. */
  isUnderWay(user: UserKey): boolean
}

/** Makes what comes back to the grants of a process, by `refresh`, until `stopping`. */
export function createComeBack(
  { clock, log, grants }: Pick<Ports, 'clock' | 'log'> & { grants: Pick<GrantStore, 'find'> },
  options: {
    replica: string
    retrySeconds: number
    leaseSeconds: number
    stopping: AbortSignal
    refresh: (grant: Grant) => Promise<unknown>
  },
): ComeBack {
  const { replica, retrySeconds, leaseSeconds, stopping, refresh } = options
  /** Each user with the newest loop that comes back. */
  const loops = new Map<UserKey, symbol>()

  async function comeBack(grant: Grant, firstDelaySeconds: number): Promise<void> {
    const loop = Symbol(grant.user)
    loops.set(grant.user, loop)
    let delaySeconds = firstDelaySeconds
    for (;;) {
      await clock.sleep(delaySeconds * 1000 + MARGIN_MS, stopping)
      // A newer loop knows better what the row is waiting for.
      if (loops.get(grant.user) !== loop) return
      if (stopping.aborted) break
      delaySeconds = retrySeconds
      try {
        const current = await grants.find(grant.user)
        if (current === undefined || !isUndecided(current, grant)) break
        const waitSeconds = Math.max(retryWaitSeconds(current), anothersSeconds(current))
        // By the take-over rule: somebody else who finds it out may be at it still, or have died over it.
        if (isAnothers(current)) delaySeconds = leaseSeconds
        if (waitSeconds > 0) delaySeconds = waitSeconds
        else await refresh(current)
      } catch (error) {
        log.debug('refresh_recovery_failed', { user: grant.user, error })
      }
    }
    if (loops.get(grant.user) === loop) loops.delete(grant.user)
  }

  function isAnothers({ phase, owner }: Grant): boolean {
    return phase === 'armed' && owner !== replica
  }

  /** Seconds that the lease of another who has the row will last, by the database clock. */
  function anothersSeconds(grant: Grant): number {
    if (!isAnothers(grant)) return 0
    return ((grant.leaseUntil?.getTime() ?? 0) - grant.readAt.getTime()) / 1000
  }

  return {
    begin: (grant, delaySeconds) => void comeBack(grant, delaySeconds),
    isUnderWay: (user) => loops.has(user),
  }
}

/** Whether it is not known yet what became of the token that `grant` held. */
function isUndecided(current: Grant, { loginId, generation }: Grant): boolean {
  const isSame = current.loginId === loginId && current.generation === generation
  return isSame && (current.state === 'active' || current.state === 'suspect')
}
