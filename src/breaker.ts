// The brake toward the authorization server, one for the process. While it is open no grant is armed but for one probe
// at a time: in a brown-out each call less is a refresh token less at risk. It never changes a grant.

import { BrokerError, unavailable } from './errors.ts'
import type { TokenOutcome, UserKey } from './grant.ts'
import type { Clock, Log } from './ports.ts'

/** Five failures within ten seconds: more than one grant's bad luck, less than an outage anybody has noticed. */
const FAILURES_TO_OPEN = 5
const FAILURE_WINDOW_MS = 10_000

export interface Breaker {
  /**
   * Says at once that a call would not pass.
   * @throws BrokerError `client_rejected_by_pagero` or `temporarily_unavailable` while open
   */
  check(): void
  /** Lets a call pass, as the one probe if the breaker is open. Errors as `check`. */
  admit(): void
  /**
   * Takes note of what came of a call. Returns whether a failure is to be put down to the grant: while nobody is
   * answered, failing says nothing about any one of them.
   */
  report(user: UserKey, outcome: TokenOutcome): boolean
}

/** Why it is open. */
export const BREAKER_FAULTS = ['rejected_client', 'unreachable'] as const
type Fault = (typeof BREAKER_FAULTS)[number]

/** Makes a closed breaker. `probeSeconds` is the least time between two probes. */
export function createBreaker(
  ports: { clock: Pick<Clock, 'monotonicMs'>; log: Log },
  settings: { breakerProbeSeconds: number },
): Breaker {
  const { clock, log } = ports
  let failedAtMs: number[] = []
  let open: { fault: Fault; nextProbeAtMs: number } | undefined
  /** Who has failed since somebody was last answered. */
  const failedSinceAnswer = new Set<UserKey>()

  function openFor(fault: Fault): void {
    if (open?.fault !== fault) log.error('breaker_opened', { reason: fault })
    open = { fault, nextProbeAtMs: clock.monotonicMs() + settings.breakerProbeSeconds * 1000 }
  }

  function check(): void {
    if (open === undefined) return
    const waitMs = open.nextProbeAtMs - clock.monotonicMs()
    if (waitMs <= 0) return
    const retryAfterSeconds = Math.max(1, waitMs / 1000)
    throw open.fault === 'rejected_client'
      ? clientRejected(retryAfterSeconds)
      : unavailable('Pagero does not answer at the moment. The grant is intact.', retryAfterSeconds)
  }

  return {
    check,
    admit() {
      check()
      if (open !== undefined) {
        open.nextProbeAtMs = clock.monotonicMs() + settings.breakerProbeSeconds * 1000
      }
    },

    report(user, outcome) {
      const fault = faultOf(outcome)
      if (fault === undefined) {
        if (open !== undefined) log.info('breaker_closed', { reason: open.fault })
        open = undefined
        failedAtMs = []
        if (outcome.kind !== 'not_processed') failedSinceAnswer.clear()
        return true
      }
      const isOwn = fault === 'unreachable' && open === undefined && !failedSinceAnswer.has(user)
      failedSinceAnswer.add(user)
      const nowMs = clock.monotonicMs()
      failedAtMs = [...failedAtMs.filter((atMs) => atMs > nowMs - FAILURE_WINDOW_MS), nowMs]
      if (
        fault === 'rejected_client' ||
        open !== undefined ||
        failedAtMs.length >= FAILURES_TO_OPEN
      ) {
        openFor(fault)
      }
      return isOwn
    },
  }
}

/** The problem of a client id or secret that Pagero does not accept. */
export function clientRejected(retryAfterSeconds: number): BrokerError {
  return new BrokerError(
    'client_rejected_by_pagero',
    'Pagero does not accept the client id and secret of this broker. The grant is intact; the operator must mend the settings.',
    { retryAfterSeconds },
  )
}

function faultOf(outcome: TokenOutcome): Fault | undefined {
  switch (outcome.kind) {
    case 'granted':
    case 'refused':
      return undefined
    case 'rejected_client':
      return 'rejected_client'
    case 'not_processed':
      return outcome.unreachable ? 'unreachable' : undefined
    case 'in_doubt':
      return 'unreachable'
  }
}
