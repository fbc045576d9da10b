// Serve or join: the one way to a user's access token, for the token endpoint and for both proxies. It reads, decides,
// and leaves the spending to `refresh.ts`.

import { BrokerError, grantNotFound, unavailable } from './errors.ts'
import type { RefreshSettings } from './config.ts'
import {
  DEFAULT_ACCESS_TOKEN_LIFE_SECONDS,
  type Grant,
  PAGERO_USER_PREFIX,
  type RefreshCause,
  type UserKey,
} from './grant.ts'
import { inTime } from './in-time.ts'
import type { Ports } from './ports.ts'
import type { LiveToken } from './live-token.ts'
import type { Refresher } from './refresh.ts'
import { createTokenCache, type KnownGrant, type ServedToken } from './token-cache.ts'

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
   * less). Refreshes when it must, and joins whoever refreshes already.
   * @throws BrokerError `request_invalid` when `minTtlSeconds` is more than half the token's life, `grant_not_found`,
   *   `confirmation_pending`, `reauthentication_required`, `temporarily_unavailable`, `client_rejected_by_pagero`, `integrity_failure`
   */
  fresh(user: UserKey, options?: { minTtlSeconds?: number }): Promise<FreshToken>
  /**
   * Returns what `fresh` would, if that is in memory and nothing is to be done for it; undefined says nothing about the
   * grant. Never throws.
   */
  ready(user: UserKey): FreshToken | undefined
  /** Tells whether a token that can be given out as it is is in memory, however long ago it was checked. */
  isAtHand(user: UserKey): boolean
  /**
   * Compare-and-refresh: refreshes only if the stored token is still the rejected one, at most once in the forced
   * interval; else returns the present one.
   * @throws BrokerError as `fresh`
   */
  replaceRejected(user: UserKey, fingerprint: string): Promise<FreshToken>
  /** Drops what is in memory for a user whose grant this replica has just replaced or closed. */
  forget(user: UserKey): void
  /** Grants in memory. */
  cached(): number
}

export type AccessTokenSettings = Pick<
  RefreshSettings,
  | 'aheadSeconds'
  | 'aheadJitterSeconds'
  | 'defaultMinTtlSeconds'
  | 'callerWaitSeconds'
  | 'forcedIntervalSeconds'
> & {
  publicUrl: string
  tokenCacheTrustMs: number
  staleLimitSeconds: number
  /** Grants kept in memory; the cache takes its room at once. Undefined is its default. */
  tokenCacheMax?: number
}

/** Makes the way to access tokens. Any number of calls at once. */
export function createAccessTokens(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'pendingGrants'>,
  refresher: Refresher,
  settings: AccessTokenSettings,
): AccessTokens {
  const { clock, log, grants } = ports
  const cache = createTokenCache(ports, settings)

  async function fresh(
    user: UserKey,
    { minTtlSeconds: asked }: { minTtlSeconds?: number } = {},
  ): Promise<FreshToken> {
    const known = await read(user)
    cache.noteUse(user)
    const { token } = known
    const halfLifeSeconds = (token?.lifeSeconds ?? DEFAULT_ACCESS_TOKEN_LIFE_SECONDS) / 2
    if (asked !== undefined && asked > halfLifeSeconds) throw askedTooMuch(halfLifeSeconds)
    const minTtlSeconds = asked ?? Math.min(settings.defaultMinTtlSeconds, halfLifeSeconds)
    const leftSeconds = secondsLeft(token)
    if (token !== undefined && leftSeconds > 0 && leftSeconds >= minTtlSeconds) {
      if (
        leftSeconds <= settings.aheadSeconds &&
        leftSeconds <= aheadSeconds(user, halfLifeSeconds)
      ) {
        refreshAhead(user, known)
      }
      return answerOf(token)
    }
    try {
      const answer = await refreshed(user, known, asked === undefined ? 'expiry' : 'min_ttl')
      // What another replica stored may have been on the way, or this process stopped, for most of its life.
      if (asked !== undefined && answer.expiresInSeconds < Math.floor(asked))
        throw stillRefreshing()
      return answer
    } catch (error) {
      if (asked !== undefined || secondsLeft(token) <= 0 || !isPassing(error)) throw error
      // A token that still lives is better than none; a life asked for aloud is a promise. It has been a while since the
      // grant was looked at, and it may have been closed or replaced meanwhile.
      const { token: present } = await read(user)
      if (present === undefined || secondsLeft(present) <= 0) throw error
      return answerOf(present)
    }
  }

  function ready(user: UserKey): FreshToken | undefined {
    const token = cache.useTrusted(user)
    if (token === undefined) return undefined
    const leftSeconds = secondsLeft(token)
    // Within the window of refreshing ahead there is more to decide than fits here.
    if (leftSeconds <= settings.aheadSeconds || leftSeconds < settings.defaultMinTtlSeconds) {
      return undefined
    }
    return answerOf(token, leftSeconds)
  }

  function isAtHand(user: UserKey): boolean {
    const token = cache.known(user)?.token
    if (token === undefined) return false
    return (
      secondsLeft(token) >=
      Math.max(1, Math.min(settings.defaultMinTtlSeconds, token.lifeSeconds / 2))
    )
  }

  async function replaceRejected(user: UserKey, fingerprint: string): Promise<FreshToken> {
    // The ledger first, then the row: whoever was armed in between is then seen as armed, or as done. From the row and
    // not from memory: a login of a moment ago may have replaced the rejected token already.
    const forcedSecondsAgo = await grants.lastForcedSecondsAgo(user)
    const { known, phase } = await readRow(user)
    if (known.token?.fingerprint !== fingerprint) return fresh(user)
    const forcedLately =
      forcedSecondsAgo !== undefined && forcedSecondsAgo < settings.forcedIntervalSeconds
    if (forcedLately && phase === 'idle' && secondsLeft(known.token) > 0) {
      return answerOf(known.token)
    }
    return refreshed(user, known, 'rejected')
  }

  /** Returns what is known of the grant; a dead one is an error that says what helps. */
  async function read(user: UserKey): Promise<KnownGrant> {
    try {
      return await cache.read(user)
    } catch (error) {
      throw await explained(error, user)
    }
  }

  async function readRow(user: UserKey): Promise<{ known: KnownGrant; phase: Grant['phase'] }> {
    const readAtMs = clock.monotonicMs()
    const grant = await grants.find(user)
    try {
      if (grant === undefined) throw grantNotFound()
      return { known: cache.keepRow(grant, readAtMs), phase: grant.phase }
    } catch (error) {
      throw await explained(error, user)
    }
  }

  /** Waits for the rotation as long as a caller should; the rotation itself goes on. */
  async function refreshed(
    user: UserKey,
    known: KnownGrant,
    cause: RefreshCause,
  ): Promise<FreshToken> {
    try {
      const limitMs = settings.callerWaitSeconds * 1000
      const token = await inTime(clock, startRefresh(user, known, cause), limitMs)
      if (token === undefined || secondsLeft(token) <= 0) throw stillRefreshing()
      return answerOf(token)
    } catch (error) {
      throw await explained(error, user)
    }
  }

  /** Starts or joins a rotation, from the row as it is now: what was known may be a second old. */
  async function startRefresh(
    user: UserKey,
    known: KnownGrant,
    cause: RefreshCause,
  ): Promise<LiveToken> {
    const joined = refresher.join(user)
    if (joined !== undefined) return keep(user, await joined)
    refresher.requireRoom()
    const readAtMs = clock.monotonicMs()
    const grant = await grants.find(user)
    if (grant === undefined) throw grantNotFound()
    const moved = grant.loginId !== known.loginId || grant.generation > known.generation
    const newer = moved ? cache.keepRow(grant, readAtMs).token : undefined
    if (newer !== undefined && secondsLeft(newer) > 0) return newer
    return keep(user, await refresher.refresh(grant, cause))
  }

  function keep(user: UserKey, token: LiveToken): LiveToken {
    cache.keepToken(user, token)
    return token
  }

  function refreshAhead(user: UserKey, known: KnownGrant): void {
    // It gives way to those who have no token that lives.
    if (!refresher.isIdle() || !cache.beginAhead(user)) return
    startRefresh(user, known, 'ahead').catch((error: unknown) => {
      log.debug('refresh_ahead_failed', { user, error })
    })
  }

  /** The window before the end in which a use refreshes in the background; jittered by user, never over half the life. */
  function aheadSeconds(user: UserKey, halfLifeSeconds: number): number {
    const jitter = settings.aheadJitterSeconds * fractionOf(user)
    return Math.min(settings.aheadSeconds - jitter, halfLifeSeconds)
  }

  function secondsLeft(token: ServedToken | undefined): number {
    return token === undefined ? 0 : (token.expiresAtMs - clock.monotonicMs()) / 1000
  }

  function answerOf(token: ServedToken, leftSeconds = secondsLeft(token)): FreshToken {
    return {
      accessToken: token.accessToken,
      expiresInSeconds: Math.floor(leftSeconds),
      expiresAt: new Date(token.expiresAtEpochMs),
      scope: token.scope,
      fingerprint: token.fingerprint,
    }
  }

  /** What helps, for errors that say that there is no token to be had. */
  async function explained(error: unknown, user: UserKey): Promise<unknown> {
    if (!(error instanceof BrokerError)) return error
    if (error.code === 'grant_not_found') {
      const waiting = await ports.pendingGrants.findWaiting(user)
      return waiting === undefined ? error : confirmationPending()
    }
    if (error.code !== 'reauthentication_required') return error
    // A login makes keys of one kind alone; for another it would connect somebody else.
    return user.startsWith(PAGERO_USER_PREFIX)
      ? new BrokerError(error.code, error.detail, {
          ...error.extensions,
          reconnectUrl: `${settings.publicUrl}/auth/login`,
        })
      : new BrokerError(
          error.code,
          'Pagero refuses the refresh token of this user for good. Make a connect link and send the user there.',
          error.extensions,
        )
  }

  return {
    fresh,
    ready,
    isAtHand,
    replaceRejected,
    forget: (user) => cache.forget(user),
    cached: () => cache.size(),
  }
}

function confirmationPending(): BrokerError {
  return new BrokerError(
    'confirmation_pending',
    'This user has come back from Pagero, and the application has not confirmed it yet.',
  )
}

function askedTooMuch(halfLifeSeconds: number): BrokerError {
  return new BrokerError(
    'request_invalid',
    `min_ttl may be at most ${Math.floor(halfLifeSeconds)}, half the life of this access token.`,
    { errors: [{ pointer: 'min_ttl', detail: 'is more than half the life of the token' }] },
  )
}

function stillRefreshing(): BrokerError {
  return unavailable(
    'The token is being refreshed and the answer is not there yet. The grant is intact.',
    2,
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
  // FNV-1a: spreads short texts evenly; nothing secret about it.
  let hash = 2_166_136_261
  for (let i = 0; i < user.length; i += 1) {
    hash = Math.imul(hash ^ user.charCodeAt(i), 16_777_619)
  }
  return (hash >>> 0) / 2 ** 32
}
