// The only file that spends a refresh token. A rotation arms (write-ahead), sends once, classifies, seals, spools,
// stores, and only then serves. It is detached from its callers: who hangs up cancels nothing.
// What it must never do: call Pagero without a durable intent, present a token twice at once, or store an older value
// over a newer one. Written against ports alone, so that the same code runs in a simulation.

import { type Attempt, createArming } from './arming.ts'
import { createBreaker, clientRejected } from './breaker.ts'
import { createComeBack } from './come-back.ts'
import type { RefreshSettings } from './config.ts'
import { grantNotFound, unavailable } from './errors.ts'
import {
  type Grant,
  type RefreshCause,
  retryWaitSeconds,
  type TokenOutcome,
  type UserKey,
} from './grant.ts'
import { createJudge } from './judge.ts'
import { type LiveToken, openLiveToken, refuseDead } from './live-token.ts'
import { createNewest } from './newest.ts'
import { createPersist } from './persist.ts'
import type { Ports } from './ports.ts'
import { revokeSuperseded } from './revocation.ts'
import { createSlots } from './slots.ts'
import { sealSuccessor } from './successor.ts'
import { createUnderWay } from './under-way.ts'
import { needsConfirming, retryDelaySeconds } from './verdict.ts'

export interface Refresher {
  /**
   * Joins the rotation of this user in flight in this process, or starts one from `grant`, and resolves with the newer
   * token once it is stored. May be called by any number of callers at once; none of them can cancel it.
   * @throws BrokerError `reauthentication_required`, `temporarily_unavailable`, `client_rejected_by_pagero`,
   *   `grant_not_found`, `integrity_failure`
   */
  refresh(grant: Grant, cause: RefreshCause): Promise<LiveToken>
  /**
   * Comes back to a grant whose token may be spent until that is known. Nobody waits for it; it goes by the take-over
   * rule like any other attempt.
   */
  recover(grant: Grant): void
  /**
   * Tells a database server that has taken another's place of the attempts that are under way, and of answers that are
   * not in the spool; attempts that were being armed meanwhile are given up unsent. Resolves with false when it is to be
   * told once more, because a row has not yet got back the token that is being presented.
   */
  restore(): Promise<boolean>
  /** The rotation of this user in flight in this process, if there is one. */
  join(user: UserKey): Promise<LiveToken> | undefined
  /**
   * Asks whether a rotation that were begun now would have its turn while its caller waits.
   * @throws BrokerError `temporarily_unavailable` when it would not
   */
  requireRoom(): void
  /** Tells whether a rotation that were begun now would wait for nobody. */
  isIdle(): boolean
  /** Number of rotations that are not yet stored. */
  inFlight(): number
  /** Arms nothing from now on; resolves when every rotation in flight is stored or safely in the spool. */
  stop(): Promise<void>
}

type RefreshPorts = Pick<
  Ports,
  'clock' | 'log' | 'sealer' | 'grants' | 'revocations' | 'authorizationServer' | 'spool'
>

/** First and longest pause while another replica's rotation is awaited. */
const POLL_FIRST_MS = 50
const POLL_LONGEST_MS = 500
/**
 * How long an armed row is watched whose owner does not present its token again though it might: its breaker is open, and
 * callers of this replica are to be told within a second, as those of the owner are.
 */
const ABANDONED_WAIT_MS = 300
/** Until Pagero has accepted the client once: a secret that is wrong from the start costs no more calls than these. */
const UNPROVEN_CONCURRENCY = 10

/** Resolves or rejects what the callers wait for, once; the rotation itself goes on to its end. */
interface Answer {
  serve(token: LiveToken): void
  fail(error: unknown): void
}

/** Stands around each refresh that is asked for, joined or begun, and returns what it returns. */
export type AroundRefresh = (
  cause: RefreshCause,
  work: () => Promise<LiveToken>,
) => Promise<LiveToken>

/**
 * Makes the one refresher of a process. `identity.boot` is new at each start of it. With `held` nothing is ever armed:
 * the database is a copy, and its tokens may be in use elsewhere.
 */
export function createRefresher(
  ports: RefreshPorts,
  settings: RefreshSettings,
  identity: { replica: string; boot: string; held?: boolean },
  around: AroundRefresh = (_cause, work) => work(),
): Refresher {
  const { clock, log, sealer, grants, authorizationServer, spool } = ports
  const inFlight = new Map<UserKey, { answer: Promise<LiveToken>; ended: Promise<void> }>()
  const breaker = createBreaker({ clock, log }, settings)
  const slots = createSlots(settings.concurrency, clock, UNPROVEN_CONCURRENCY)
  const stopping = new AbortController()
  const newest = createNewest(clock, settings.spoolRetentionSeconds)
  const persist = createPersist(ports)
  const underWay = createUnderWay(ports)
  const { condemn, judgeSuspect } = createJudge(ports, persist)
  const comeBack = createComeBack(ports, {
    replica: identity.replica,
    retrySeconds: settings.breakerProbeSeconds,
    leaseSeconds: settings.leaseSeconds,
    stopping: stopping.signal,
    refresh: (grant) => refresh(grant, 'recovery'),
  })
  const { arm, noteSpoolFailure, noteNewServer } = createArming(
    ports,
    { underWay, comeBack, persist },
    { ...identity, leaseSeconds: settings.leaseSeconds, stopping: stopping.signal },
  )

  const refresh = (grant: Grant, cause: RefreshCause): Promise<LiveToken> =>
    around(cause, () => joinOrBegin(grant, cause))

  function joinOrBegin(grant: Grant, cause: RefreshCause): Promise<LiveToken> {
    const running = inFlight.get(grant.user)
    if (running !== undefined) return running.answer
    if (stopping.signal.aborted) return Promise.reject(unavailable('The broker is stopping.', 1))
    if (identity.held === true) {
      return Promise.reject(
        unavailable(
          'The database is a copy or was restored; nothing is refreshed until that is accepted.',
          60,
        ),
      )
    }
    const { promise, resolve, reject } = Promise.withResolvers<LiveToken>()
    // With refresh-ahead nobody waits; a rejection is then nobody's.
    promise.catch(() => undefined)
    const ended = rotate(grant, cause, { serve: resolve, fail: reject })
      .catch(reject)
      .finally(() => inFlight.delete(grant.user))
    inFlight.set(grant.user, { answer: promise, ended })
    return promise
  }

  /** Arms the row and spends its token, or waits for whoever has it. */
  async function rotate(first: Grant, cause: RefreshCause, answer: Answer): Promise<void> {
    let grant = first
    let readAtMs = clock.monotonicMs()
    let pauseMs = POLL_FIRST_MS
    const patienceEndsAtMs = readAtMs + settings.callerWaitSeconds * 1000
    const abandonedUntilMs = readAtMs + ABANDONED_WAIT_MS
    // What may be spent already is come back to however many wait: an answer that was lost can be had for a while only.
    if (cause !== 'recovery') requireRoom()
    for (;;) {
      if (newest.isBehind(grant)) {
        // As a rule it was read just before this process stored what is newer.
        readAtMs = clock.monotonicMs()
        grant = await mustFind(first.user)
      }
      if (grant.loginId !== first.loginId || grant.generation > first.generation) {
        answer.serve(adopt(grant, readAtMs))
        return
      }
      refuseUnspendable(grant)
      refuseBehind(grant)
      if (grant.state === 'suspect') throw await judgeSuspect(grant)
      breaker.check()
      const release = await slots.take()
      try {
        // It may have opened while this grant waited for its turn.
        breaker.admit()
        const attempt = await arm(grant, cause)
        if (attempt !== undefined) {
          await spend(grant, attempt, answer, release)
          return
        }
      } finally {
        release()
      }
      const nowMs = clock.monotonicMs()
      if (nowMs >= patienceEndsAtMs || (nowMs >= abandonedUntilMs && isWithNobody(grant))) {
        throw unavailable('The token is being refreshed and the answer is not there yet.', 2)
      }
      await clock.sleep(pauseMs * (0.75 + clock.random() / 2))
      pauseMs = Math.min(pauseMs * 1.5, POLL_LONGEST_MS)
      readAtMs = clock.monotonicMs()
      grant = await mustFind(first.user)
    }
  }

  /** Half of a caller's patience for its turn, and half for the answer; and who comes later is not held up besides. */
  function requireRoom(): void {
    if (slots.waitMs() > (settings.callerWaitSeconds * 1000) / 2) throw NO_ROOM
  }

  /** Whether the last attempt with an armed row has ended in doubt and no other has begun. */
  function isWithNobody({ phase, leaseUntil, nextRetryAt }: Grant): boolean {
    if (phase !== 'armed' || leaseUntil === null || nextRetryAt === null) return false
    return nextRetryAt.getTime() > leaseUntil.getTime() - settings.leaseSeconds * 1000
  }

  /**
   * A failover may take a confirmed commit back. The row's token is spent then, and its successor waits in the spool
   * for the next pass over it.
   */
  function refuseBehind(grant: Grant): void {
    if (!newest.isBehind(grant)) return
    log.error('grant_went_back', { user: grant.user, generation: grant.generation })
    throw unavailable('The database has lost the newest token; it is being put back.', 5)
  }

  /**
   * Sends once and does what the outcome asks for. The slot is given back once what came is in the spool: so many tokens
   * are on their way to a disk at most.
   */
  async function spend(
    grant: Grant,
    attempt: Attempt,
    answer: Answer,
    release: () => void,
  ): Promise<void> {
    try {
      await present(grant, attempt, answer, release)
    } finally {
      underWay.end(attempt.attemptId)
    }
  }

  async function present(
    grant: Grant,
    attempt: Attempt,
    answer: Answer,
    release: () => void,
  ): Promise<void> {
    const outcome = await authorizationServer.refresh(attempt.refreshToken, {
      sendBeforeMs: attempt.armingAtMs + settings.sendDeadlineSeconds * 1000,
      deadlineMs: attempt.armingAtMs + settings.deadlineSeconds * 1000,
    })
    const isOwn = breaker.report(grant.user, outcome)
    if (outcome.kind === 'granted' || outcome.kind === 'refused') slots.widen()
    const durationMs = clock.monotonicMs() - attempt.armingAtMs
    log.info('refresh_attempt_finished', {
      user: grant.user,
      attemptId: attempt.attemptId,
      generation: grant.generation,
      cause: attempt.cause,
      outcome: outcome.kind,
      durationMs: Math.round(durationMs),
      ...('reason' in outcome ? { reason: outcome.reason } : {}),
      ...('httpStatus' in outcome && outcome.httpStatus !== undefined
        ? { upstreamStatus: outcome.httpStatus }
        : {}),
    })
    switch (outcome.kind) {
      case 'granted':
        return storeThenServe(grant, attempt, outcome, durationMs, answer, release)
      case 'refused':
        return afterRefusal(grant, attempt, outcome, durationMs, answer, release)
      default:
        return afterFailure(grant, attempt, { outcome, isOwn, durationMs }, answer)
    }
  }

  /** Seals for the next generation, spools, stores, then serves. */
  async function storeThenServe(
    grant: Grant,
    attempt: Attempt,
    outcome: Extract<TokenOutcome, { kind: 'granted' }>,
    durationMs: number,
    answer: Answer,
    release: () => void,
  ): Promise<void> {
    const { successor, token } = sealSuccessor(sealer, grant, attempt, outcome, durationMs)
    newest.note(successor, false)
    const serve = () =>
      token === undefined
        ? answer.fail(unavailable('Pagero answered without an access token. Try again.', 1))
        : answer.serve(token)
    let spooled = false
    try {
      await spool.write(successor)
      spooled = true
      newest.note(successor, true)
    } catch (error) {
      noteSpoolFailure()
      log.error('spool_write_failed', { user: grant.user, attemptId: attempt.attemptId, error })
    }
    // Without the spool the row is the only durable place: the slot is kept until it is there.
    if (spooled) release()
    const result = await persist('grant_store_failed', grant.user, async () => {
      try {
        return await grants.store(successor)
      } catch (error) {
        // Durable in the spool is durable enough to serve; the row follows.
        if (spooled) serve()
        throw error
      }
    })
    if (result !== 'superseded') {
      serve()
      return
    }
    answer.fail(unavailable('The grant was replaced or closed meanwhile. Ask again.', 1))
    await persist('revocation_store_failed', grant.user, () => revokeSuperseded(ports, successor))
  }

  /** A refusal is believed only when a second one, some seconds later, says the same. */
  async function afterRefusal(
    grant: Grant,
    attempt: Attempt,
    outcome: Extract<TokenOutcome, { kind: 'refused' }>,
    durationMs: number,
    answer: Answer,
    release: () => void,
  ): Promise<void> {
    await persist('grant_store_failed', grant.user, () =>
      grants.disarm({
        user: grant.user,
        attemptId: attempt.attemptId,
        outcome: 'refused',
        httpStatus: outcome.httpStatus,
        durationMs,
        retryInSeconds: settings.refusalConfirmSeconds,
        stayArmed: true,
        counts: false,
      }),
    )
    underWay.end(attempt.attemptId)
    // If the verdict is not reached here, for want of a database, this process must come back to it.
    comeBack.begin(grant, settings.leaseSeconds)
    const readAtMs = clock.monotonicMs()
    const current = await mustFind(grant.user)
    if (current.loginId !== grant.loginId || current.generation > grant.generation) {
      answer.serve(adopt(current, readAtMs))
      return
    }
    const evidence = await grants.evidence(grant.user, grant.loginId, grant.generation)
    if (needsConfirming(evidence)) {
      release()
      await clock.sleep(settings.refusalConfirmSeconds * 1000 + POLL_FIRST_MS)
      const again = await slots.take()
      try {
        const second = await arm(current, 'recovery')
        if (second !== undefined) return await spend(current, second, answer, again)
      } finally {
        again()
      }
      answer.fail(unavailable('The grant is being checked.', 2))
      return
    }
    answer.fail(await condemn(grant, evidence))
  }

  /** Nothing changes for the grant; it may be armed again after the back-off. */
  async function afterFailure(
    grant: Grant,
    attempt: Attempt,
    failure: {
      outcome: Extract<TokenOutcome, { kind: 'rejected_client' | 'not_processed' | 'in_doubt' }>
      isOwn: boolean
      durationMs: number
    },
    answer: Answer,
  ): Promise<void> {
    const { outcome, isOwn, durationMs } = failure
    const retryInSeconds = retryDelaySeconds(grant, outcome, settings, isOwn)
    if (outcome.kind === 'in_doubt') {
      const leaseEndsAtMs = attempt.armingAtMs + settings.leaseSeconds * 1000
      underWay.doubt(attempt.attemptId, { retryInSeconds, leaseEndsAtMs })
    }
    answer.fail(
      outcome.kind === 'rejected_client'
        ? clientRejected(settings.breakerProbeSeconds)
        : unavailable('Pagero did not answer the refresh. The grant is intact.', retryInSeconds, {
            attemptId: attempt.attemptId,
          }),
    )
    await persist('grant_store_failed', grant.user, () =>
      grants.disarm({
        user: grant.user,
        attemptId: attempt.attemptId,
        outcome: outcome.kind,
        httpStatus: outcome.httpStatus ?? null,
        durationMs,
        retryInSeconds,
        stayArmed: outcome.kind === 'in_doubt',
        counts: isOwn,
      }),
    )
    // What was taken over may have spent the token, whatever became of this attempt.
    const isDoubtful = outcome.kind === 'in_doubt' || grant.phase === 'armed'
    if (isDoubtful) comeBack.begin(grant, retryInSeconds)
  }

  async function restore(): Promise<boolean> {
    noteNewServer()
    const [isTold] = await Promise.all([
      underWay.restore(),
      ...newest.unspooled().map((successor) => grants.store(successor)),
    ])
    return isTold
  }

  async function mustFind(user: UserKey): Promise<Grant> {
    const grant = await grants.find(user)
    if (grant === undefined) throw grantNotFound()
    return grant
  }

  /** Serves what another replica, or a newer login, has stored. */
  function adopt(grant: Grant, readAtMs: number): LiveToken {
    refuseDead(grant)
    const token = openLiveToken(sealer, grant, readAtMs)
    if (token === undefined) throw unavailable('The token has just been replaced. Ask again.', 1)
    log.debug('token_adopted', { user: grant.user, generation: grant.generation })
    return token
  }

  return {
    refresh,
    recover: (grant) => comeBack.begin(grant, 0),
    restore,
    join: (user) => inFlight.get(user)?.answer,
    requireRoom,
    isIdle: () => slots.waitMs() === 0,
    inFlight: () => inFlight.size,
    async stop() {
      stopping.abort()
      await Promise.allSettled([...inFlight.values()].map(({ ended }) => ended))
    },
  }
}

/** @throws BrokerError when the refresh token must not be presented now */
function refuseUnspendable(grant: Grant): void {
  refuseDead(grant)
  const waitSeconds = retryWaitSeconds(grant)
  if (waitSeconds > 0) {
    throw unavailable('The last refresh failed; the next one is not due yet.', waitSeconds, {
      ...(grant.attemptId === null ? {} : { attemptId: grant.attemptId }),
    })
  }
}

/** Made once: when all tokens end at a time it is thrown for thousands. */
const NO_ROOM = unavailable('More users wait for a refresh than can be served soon.', 2)
