// Serve or join: the one way to a user's access token, for the token endpoint and for both proxies. It reads, decides,
// and leaves the spending to `refresh.ts`.

import type { RefreshSettings } from './config.ts'
import { BrokerError, grantNotFound } from './errors.ts'
import {
  accessTokenLifeSeconds,
  accessTokenSecondsLeft,
  type Grant,
  PAGERO_USER_PREFIX,
  type RefreshCause,
  type UserKey,
} from './grant.ts'
import type { Ports } from './ports.ts'
import { type LiveToken, openLiveToken, refuseDead, type Refresher } from './refresh.ts'

export interface FreshToken {
  accessToken: string
  /** Whole seconds that it lives from now. */
  expiresInSeconds: number
  expiresAt: Date
  scope: string
  /** base64url of SHA-256 of the access token. */
  fingerprint: string
}

export interface AccessTokens {
  /**
   * Returns an access token that lives for at least `minTtlSeconds` (default: the setting, or half its life if that is
   * less). Costs one read; refreshes when it must, and joins whoever refreshes already.
   * @throws BrokerError `request_invalid` when `minTtlSeconds` is more than half the token's life, `grant_not_found`,
   *   `reauthentication_required`, `temporarily_unavailable`, `client_rejected_by_pagero`, `integrity_failure`
   */
  fresh(user: UserKey, options?: { minTtlSeconds?: number }): Promise<FreshToken>
  /**
   * Compare-and-refresh: refreshes only if the stored token is still the rejected one, at most once in the forced
   * interval; else returns the present one.
   * @throws BrokerError as `fresh`
   */
  replaceRejected(user: UserKey, fingerprint: string): Promise<FreshToken>
}

/** A grant's last use is noted at most this often by one process. */
const TOUCH_INTERVAL_MS = 60_000
/** Users whose last touch is remembered; beyond that the oldest are forgotten and noted again. */
const TOUCHED_USERS_MAX = 100_000

/** Makes the way to access tokens. Any number of calls at once. */
export function createAccessTokens(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants'>,
  refresher: Refresher,
  settings: Pick<
    RefreshSettings,
    | 'aheadSeconds'
    | 'aheadJitterSeconds'
    | 'defaultMinTtlSeconds'
    | 'callerWaitSeconds'
    | 'forcedIntervalSeconds'
  > & { publicUrl: string },
): AccessTokens {
  const { clock, log, sealer, grants } = ports
  const touchedAtMs = new Map<UserKey, number>()

  async function fresh(
    user: UserKey,
    { minTtlSeconds: asked }: { minTtlSeconds?: number } = {},
  ): Promise<FreshToken> {
    const { grant, readAtMs } = await read(user)
    const halfLifeSeconds = accessTokenLifeSeconds(grant) / 2
    if (asked !== undefined && asked > halfLifeSeconds) {
      throw new BrokerError(
        'request_invalid',
        `min_ttl may be at most ${Math.floor(halfLifeSeconds)}, half the life of this access token.`,
        { errors: [{ pointer: 'min_ttl', detail: 'is more than half the life of the token' }] },
      )
    }
    const minTtlSeconds = asked ?? Math.min(settings.defaultMinTtlSeconds, halfLifeSeconds)
    const secondsLeft = accessTokenSecondsLeft(grant)
    if (secondsLeft > 0 && secondsLeft >= minTtlSeconds) {
      const token = open(grant, readAtMs)
      if (secondsLeft <= aheadSeconds(grant, halfLifeSeconds)) refreshAhead(grant)
      return token
    }
    try {
      return await refreshed(grant, asked === undefined ? 'expiry' : 'min_ttl')
    } catch (error) {
      // A token that still lives is better than none; a life asked for aloud is a promise.
      if (asked !== undefined || secondsLeft <= 0 || !isPassing(error)) throw error
      return open(grant, readAtMs)
    }
  }

  async function replaceRejected(user: UserKey, fingerprint: string): Promise<FreshToken> {
    const { grant, readAtMs } = await read(user)
    if (grant.accessToken?.fingerprint !== fingerprint) return fresh(user)
    const forcedSecondsAgo = await grants.lastForcedSecondsAgo(user)
    if (forcedSecondsAgo !== undefined && forcedSecondsAgo < settings.forcedIntervalSeconds) {
      return accessTokenSecondsLeft(grant) > 0 ? open(grant, readAtMs) : fresh(user)
    }
    return refreshed(grant, 'rejected')
  }

  async function read(user: UserKey): Promise<{ grant: Grant; readAtMs: number }> {
    const readAtMs = clock.monotonicMs()
    const grant = await grants.find(user)
    if (grant === undefined) throw grantNotFound()
    try {
      refuseDead(grant)
    } catch (error) {
      throw withReconnectUrl(error, user)
    }
    noteUse(user)
    return { grant, readAtMs }
  }

  /** Waits for the rotation as long as a caller should; the rotation itself goes on. */
  async function refreshed(grant: Grant, cause: RefreshCause): Promise<FreshToken> {
    const patience = new AbortController()
    const tooLong = clock
      .sleep(settings.callerWaitSeconds * 1000, patience.signal)
      .then((): never => {
        throw stillRefreshing()
      })
    tooLong.catch(() => undefined)
    try {
      const token = await Promise.race([refresher.refresh(grant, cause), tooLong])
      const answer = answerOf(token)
      if (answer.expiresInSeconds <= 0) throw stillRefreshing()
      return answer
    } catch (error) {
      throw withReconnectUrl(error, grant.user)
    } finally {
      patience.abort()
    }
  }

  function refreshAhead(grant: Grant): void {
    refresher.refresh(grant, 'ahead').catch((error: unknown) => {
      log.debug('refresh_ahead_failed', { user: grant.user, error })
    })
  }

  /** The window before the end in which a use refreshes in the background; jittered by user, never over half the life. */
  function aheadSeconds(grant: Grant, halfLifeSeconds: number): number {
    const jitter = settings.aheadJitterSeconds * fractionOf(grant.user)
    return Math.min(settings.aheadSeconds - jitter, halfLifeSeconds)
  }

  function open(grant: Grant, readAtMs: number): FreshToken {
    const token = openLiveToken(sealer, grant, readAtMs)
    if (token === undefined) throw stillRefreshing()
    return answerOf(token)
  }

  function answerOf(token: LiveToken): FreshToken {
    return {
      accessToken: token.accessToken,
      expiresInSeconds: Math.floor((token.expiresAtMs - clock.monotonicMs()) / 1000),
      expiresAt: token.expiresAt,
      scope: token.scope,
      fingerprint: token.fingerprint,
    }
  }

  function noteUse(user: UserKey): void {
    const nowMs = clock.monotonicMs()
    const lastMs = touchedAtMs.get(user)
    if (lastMs !== undefined && nowMs - lastMs < TOUCH_INTERVAL_MS) return
    touchedAtMs.delete(user)
    touchedAtMs.set(user, nowMs)
    const oldest = touchedAtMs.keys().next()
    if (touchedAtMs.size > TOUCHED_USERS_MAX && oldest.done === false) {
      touchedAtMs.delete(oldest.value)
    }
    grants.touch(user).catch((error: unknown) => log.debug('grant_touch_failed', { user, error }))
  }

  function withReconnectUrl(error: unknown, user: UserKey): unknown {
    if (!(error instanceof BrokerError) || error.code !== 'reauthentication_required') return error
    if (user.startsWith(PAGERO_USER_PREFIX)) {
      return new BrokerError(error.code, error.detail, {
        ...error.extensions,
        reconnectUrl: `${settings.publicUrl}/auth/login`,
      })
    }
    return new BrokerError(
      error.code,
      `${error.detail} Make a connect link and send the user there.`,
      error.extensions,
    )
  }

  return { fresh, replaceRejected }
}

function stillRefreshing(): BrokerError {
  return new BrokerError(
    'temporarily_unavailable',
    'The token is being refreshed and the answer is not there yet. The grant is intact.',
    { retryAfterSeconds: 2 },
  )
}

/** Whether an error says nothing about the grant itself. */
function isPassing(error: unknown): boolean {
  return (
    error instanceof BrokerError &&
    (error.code === 'temporarily_unavailable' || error.code === 'client_rejected_by_pagero')
  )
}

/** A number from 0 to 1 that is the same for a user on every replica, so that replicas agree on the window. */
function fractionOf(user: UserKey): number {
  let hash = 2_166_136_261
  for (let i = 0; i < user.length; i += 1) {
    hash = Math.imul(hash ^ user.charCodeAt(i), 16_777_619)
  }
  return (hash >>> 0) / 2 ** 32
}
