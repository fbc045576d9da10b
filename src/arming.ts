// The write-ahead intent: before a refresh token is presented, it is on record in the database that it is going to be, and by
// whom. No intent, no call. What was armed and never sent is taken back.

import { randomUUID } from 'node:crypto'
import type { ComeBack } from './come-back.ts'
import { grantNotFound, isUnwritten, unavailable } from './errors.ts'
import { type Grant, grantSealContext, type RefreshCause, type UserKey } from './grant.ts'
import type { ArmRequest } from './grant-stores.ts'
import type { Persist } from './persist.ts'
import type { Ports } from './ports.ts'
import type { SpentAttempt } from './successor.ts'
import { notSent, type UnderWay } from './under-way.ts'

/** An attempt that this process has armed. */
export interface Attempt extends SpentAttempt {
  cause: RefreshCause
}

export interface Arming {
  /**
   * Arms the row, if it is this process's to arm now; undefined if it is not. Its token may be presented then, once.
   * @throws BrokerError `temporarily_unavailable`, `integrity_failure`, `grant_not_found`
   */
  arm(grant: Grant, cause: RefreshCause): Promise<Attempt | undefined>
  /** A write into the spool has failed: nothing is armed until one succeeds. */
  noteSpoolFailure(): void
  /** The database server has been replaced: what is being armed may be on record on the one that is gone. */
  noteNewServer(): void
}

/** Makes the arming of a process. Any number of calls at once. */
export function createArming(
  {
    clock,
    log,
    sealer,
    grants,
    spool,
  }: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'spool'>,
  {
    underWay,
    comeBack,
    persist,
  }: {
    underWay: Pick<UnderWay, 'begin'>
    comeBack: ComeBack
    persist: Persist
  },
  {
    replica,
    boot,
    leaseSeconds,
    stopping,
  }: {
    replica: string
    boot: string
    leaseSeconds: number
    stopping: AbortSignal
  },
): Arming {
  /** Users with an intent that is being taken back. */
  const takingBack = new Set<UserKey>()
  /** How often the database server has been replaced by another. */
  let servers = 0
  let spoolBroken = false

  async function arm(grant: Grant, cause: RefreshCause): Promise<Attempt | undefined> {
    // It may have waited long for its turn: what is presented now may not be answered before the process is killed.
    if (stopping.aborted) throw unavailable('The broker is stopping.', 1)
    // However often it is tried while the database takes nothing: one intent to take back, not one of each try.
    if (takingBack.has(grant.user)) return undefined
    const context = grantSealContext('refresh_token_sealed', grant)
    // Opened before arming: a value that fails its integrity check leaves no trace and reaches nobody.
    const refreshToken = sealer.open(context, mustBeSealed(grant))
    await requireSpool()
    const attemptId = randomUUID()
    const armingAtMs = clock.monotonicMs()
    const request: ArmRequest = {
      user: grant.user,
      loginId: grant.loginId,
      generation: grant.generation,
      attemptId,
      tokenDigest: sealer.digest(context, refreshToken),
      cause,
      replica,
      boot,
      leaseSeconds,
    }
    const server = servers
    try {
      const armed = await grants.arm(request)
      if (armed === undefined) return undefined
      // The row may have been armed on the server that is gone.
      if (server !== servers) throw unavailable('The database has just been replaced.', 1)
      const { armedAt } = armed
      underWay.begin(request, armedAt)
      return { attemptId, refreshToken, armedAt, armingAtMs, cause }
    } catch (error) {
      // It may have been written all the same, or be written yet.
      if (!isUnwritten(error)) void takeBack(grant, attemptId)
      throw error
    }
  }

  /** Disarms an attempt whose request was never sent, as soon as that can be done. */
  async function takeBack(grant: Grant, attemptId: string): Promise<void> {
    const { user } = grant
    const disarm = () =>
      persist('grant_store_failed', user, () => grants.disarm(notSent(user, attemptId)))
    takingBack.add(user)
    await disarm()
    takingBack.delete(user)
    // A statement that was given up may be carried out after the one that takes it back. While this process lives
    // nobody else frees the row, so it is done again once nothing can be on its way any more.
    await clock.sleep(leaseSeconds * 1000, stopping)
    if (stopping.aborted) return
    await disarm()
    // It would have taken over an attempt of somebody who is gone: nobody else knows any more that its end is unknown.
    if (grant.phase === 'armed' && !comeBack.isUnderWay(user)) comeBack.begin(grant, 0)
  }

  async function requireSpool(): Promise<void> {
    if (!spoolBroken && spool.hasRoom()) return
    try {
      await spool.checkWritable()
      spoolBroken = false
    } catch (error) {
      log.error('spool_not_writable', { error })
      throw unavailable('The broker cannot write its spool and refreshes nothing meanwhile.', 5)
    }
  }

  return {
    arm,
    noteSpoolFailure() {
      spoolBroken = true
    },
    noteNewServer() {
      servers += 1
    },
  }
}

function mustBeSealed(grant: Grant): Buffer {
  if (grant.refreshTokenSealed === null) throw grantNotFound()
  return grant.refreshTokenSealed
}
