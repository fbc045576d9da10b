// What settings must be to each other: each rule a sentence that names both variables.
// The rules of the refresh protocol keep a token from being presented twice; a start that breaks one is refused.

import type { Config, RefreshSettings } from './config.ts'

/** The margin that the refresh protocol keeps between its times, at the deadline for which it was reckoned. */
const MARGIN_SECONDS = 15
const MARGIN_DEADLINE_SECONDS = 45
/** A longer grace than this bounds nothing: deadline and lease of the defaults fit into it. */
const SHORT_GRACE_SECONDS = 70
/** Sums of fractions are not exact; a thousandth of the smallest step is no violation. */
const TOLERANCE_SECONDS = 1e-6

/**
 * What does not fit together among the times of the refresh protocol.
 * A time that could not be read is NaN, and no comparison with it is a violation.
 */
export function refreshProblems(refresh: RefreshSettings): string[] {
  const { deadlineSeconds, leaseSeconds, graceSeconds } = refresh
  const marginSeconds = MARGIN_SECONDS * Math.min(1, deadlineSeconds / MARGIN_DEADLINE_SECONDS)
  const margin =
    'a margin of 15 seconds, or a third of REFRESH_DEADLINE_SECONDS where that is shorter'
  const problems: string[] = []

  if (refresh.sendDeadlineSeconds >= deadlineSeconds) {
    problems.push('REFRESH_SEND_DEADLINE_SECONDS must be less than REFRESH_DEADLINE_SECONDS.')
  }
  if (isLess(leaseSeconds, deadlineSeconds + marginSeconds)) {
    problems.push(
      `REFRESH_LEASE_SECONDS must be at least REFRESH_DEADLINE_SECONDS and ${margin}: a lease shorter than the call is no lease.`,
    )
  }
  if (isLess(refresh.aheadSeconds, leaseSeconds + refresh.defaultMinTtlSeconds + marginSeconds)) {
    problems.push(
      `REFRESH_AHEAD_SECONDS must be at least REFRESH_LEASE_SECONDS, DEFAULT_MIN_TTL_SECONDS and ${margin}, all together.`,
    )
  }
  if (refresh.heartbeatStaleSeconds <= 2 * refresh.heartbeatSeconds) {
    problems.push('HEARTBEAT_STALE_SECONDS must be more than twice HEARTBEAT_SECONDS.')
  }
  if (graceSeconds !== undefined && graceSeconds < SHORT_GRACE_SECONDS) {
    if (isLess(graceSeconds / 3, deadlineSeconds)) {
      problems.push(
        'REFRESH_DEADLINE_SECONDS must be at most a third of REFRESH_GRACE_SECONDS, while that is under 70.',
      )
    }
    if (isLess(graceSeconds / 2, leaseSeconds)) {
      problems.push(
        'REFRESH_LEASE_SECONDS must be at most half of REFRESH_GRACE_SECONDS, while that is under 70.',
      )
    }
  }
  return problems
}

/** What does not fit together among the other settings. A number that could not be read is NaN here too. */
export function otherProblems({ sessions, proxy, ...config }: Config): string[] {
  const problems: string[] = []
  if (sessions.idleSeconds > sessions.absoluteSeconds) {
    problems.push('SESSION_IDLE_SECONDS must be at most SESSION_ABSOLUTE_SECONDS.')
  }
  if (config.tokenCacheTrustMs / 1000 > sessions.idleSeconds / 2) {
    problems.push(
      'TOKEN_CACHE_TRUST_MS must be at most half of SESSION_IDLE_SECONDS: only so often is the use of a session noticed.',
    )
  }
  if (
    config.public.host === config.internal.host &&
    config.public.port === config.internal.port &&
    config.public.port !== 0
  ) {
    problems.push('INTERNAL_PORT must differ from PUBLIC_PORT: the two listeners are apart.')
  }
  // Without a redirect URI that could be read, there is nothing to compare.
  const { redirectUri } = config.pagero
  if (redirectUri !== '' && new URL(redirectUri).hostname !== new URL(config.publicUrl).hostname) {
    problems.push(
      'PUBLIC_URL must have the host of PAGERO_REDIRECT_URI; the port may be another. The cookie of a login would not arrive at the callback.',
    )
  }
  for (const [name, timeoutMs] of [
    ['PROXY_CONNECT_TIMEOUT_MS', proxy.connectTimeoutMs],
    ['PROXY_HEADERS_TIMEOUT_MS', proxy.headersTimeoutMs],
    ['PROXY_IDLE_TIMEOUT_MS', proxy.idleTimeoutMs],
  ] as const) {
    if (timeoutMs > proxy.totalTimeoutMs) {
      problems.push(`${name} must be at most PROXY_TOTAL_TIMEOUT_MS.`)
    }
  }
  return problems
}

function isLess(a: number, b: number): boolean {
  return a < b - TOLERANCE_SECONDS
}
