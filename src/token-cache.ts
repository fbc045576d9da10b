// What this process knows of grants: access tokens in memory, trusted without asking PostgreSQL for at most
// `tokenCacheTrustMs` after they were last checked, so that a revocation holds on every replica within that time and
// without a broadcast. While PostgreSQL is away they are served up to the stale limit.

import { hash } from 'node:crypto'
import { LRUCache } from 'lru-cache'
import { BrokerError, grantNotFound, unavailable } from './errors.ts'
import { accessTokenSecondsLeft, type ServableGrant, type UserKey } from './grant.ts'
import { createGrantReader, type GrantReading } from './grant-reader.ts'
import { inTime } from './in-time.ts'
import type { Noted } from './last-use.ts'
import type { Ports } from './ports.ts'
import { type LiveToken, openLiveToken, refuseDead } from './live-token.ts'

/** As much of a grant as serving needs. */
export interface KnownGrant extends Noted {
  loginId: string
  generation: number
  /** Undefined when the row holds none, or none that lives. */
  token: LiveToken | undefined
  /**
   * 48 bits of the digest of the ciphertext that `token` was opened from: while it stays, so does what was opened. A row
   * changed on purpose so that they agree gains nothing: what is served is what was opened before.
   */
  stored: number | undefined
  /** Monotonic instant before the read that confirmed it last. */
  checkedAtMs: number
  /** When a refresh ahead of time was last begun for it. */
  aheadTriedAtMs?: number
}

export interface TokenCache {
  /** What is known of the user's grant, if it was checked no longer ago than the trust allows. Costs a look-up. */
  trusted(user: UserKey): KnownGrant | undefined
  /** Returns the same, however long ago it was checked: nothing to serve from. */
  known(user: UserKey): KnownGrant | undefined
  /**
   * Returns what is known of the user's grant, checked no longer ago than the trust allows.
   * @throws BrokerError `grant_not_found`, `reauthentication_required`, `temporarily_unavailable`, `integrity_failure`
   */
  read(user: UserKey): Promise<KnownGrant>
  /** Takes over a row that was read elsewhere. Errors as `read`. */
  keepRow(grant: ServableGrant, readAtMs: number): KnownGrant
  /** Takes over a token that this process has just stored or spooled. */
  keepToken(user: UserKey, token: LiveToken): void
  forget(user: UserKey): void
}

/** About 1.4 kB each with a token of 900 characters: 140 MB at most. */
const GRANTS_MAX = 100_000

/** A database that takes this long for a read by key is taken to be away, and the stale limit begins to count. */
const CHECK_PATIENCE_MS = 1_000

/** Makes the cache of a process. */
export function createTokenCache(
  ports: Pick<Ports, 'clock' | 'sealer' | 'grants'>,
  settings: { tokenCacheTrustMs: number; staleLimitSeconds: number; tokenCacheMax?: number },
): TokenCache {
  const { clock, sealer } = ports
  const readGrant = createGrantReader(ports)
  const known = new LRUCache<UserKey, KnownGrant>({ max: settings.tokenCacheMax ?? GRANTS_MAX })
  /** Nearly all grants have the same one: it is kept once. */
  let lastScope = ''

  function trusted(user: UserKey): KnownGrant | undefined {
    const cached = known.get(user)
    if (cached === undefined) return undefined
    const ageMs = clock.monotonicMs() - cached.checkedAtMs
    return ageMs <= settings.tokenCacheTrustMs ? cached : undefined
  }

  async function read(user: UserKey): Promise<KnownGrant> {
    const cached = known.get(user)
    if (cached !== undefined && trusted(user) === cached) return cached
    try {
      const { grant, readAtMs } = await (cached === undefined ? readGrant(user) : readSoon(user))
      if (grant !== undefined) return keepRow(grant, readAtMs)
      known.delete(user)
    } catch (error) {
      const away = error instanceof BrokerError && error.code === 'temporarily_unavailable'
      const fresh = clock.monotonicMs() - (cached?.checkedAtMs ?? 0)
      if (cached !== undefined && away && fresh <= settings.staleLimitSeconds * 1000) return cached
      throw error
    }
    throw grantNotFound()
  }

  /** A check of what is known must not take as long as a lost connection does to be given up. */
  async function readSoon(user: UserKey): Promise<GrantReading> {
    const reading = await inTime(clock, readGrant(user), CHECK_PATIENCE_MS)
    if (reading !== undefined) return reading
    throw unavailable('The database does not answer at the moment.', 2)
  }

  function keepRow(grant: ServableGrant, readAtMs: number): KnownGrant {
    const { user, loginId, generation } = grant
    const cached = known.get(user)
    try {
      refuseDead(grant)
      const stored = digestOf(grant)
      // The same as at the last check, or a successor that is spooled and on its way into the row.
      const ahead = cached?.loginId === loginId && cached.generation > generation
      if (cached !== undefined && (ahead || isSame(cached, grant, stored))) {
        if (!ahead) extend(cached.token, grant, readAtMs)
        cached.checkedAtMs = Math.max(cached.checkedAtMs, readAtMs)
        return cached
      }
      const token = openLiveToken(sealer, grant, readAtMs)
      if (token !== undefined) {
        // The same text, and from now on the same string.
        if (token.scope === lastScope) token.scope = lastScope
        else lastScope = token.scope
      }
      return keep(user, { loginId, generation, stored, token, checkedAtMs: readAtMs })
    } catch (error) {
      known.delete(user)
      throw error
    }
  }

  function keep(user: UserKey, entry: KnownGrant): KnownGrant {
    const notedAtMs = known.peek(user)?.useNotedAtMs
    if (notedAtMs !== undefined) entry.useNotedAtMs = notedAtMs
    known.set(user, entry)
    return entry
  }

  return {
    trusted,
    known: (user) => known.peek(user),
    read,
    keepRow,
    forget: (user) => {
      known.delete(user)
    },
    keepToken(user, token) {
      const cached = known.get(user)
      if (cached?.loginId === token.loginId && cached.generation >= token.generation) return
      keep(user, {
        loginId: token.loginId,
        generation: token.generation,
        stored: undefined,
        token,
        checkedAtMs: cached?.checkedAtMs ?? clock.monotonicMs(),
      })
    },
  }
}

function digestOf({ accessToken }: ServableGrant): number | undefined {
  if (accessToken === null) return undefined
  return hash('sha256', accessToken.sealed, 'buffer').readUIntBE(0, 6)
}

/**
 * A process that was stopped between asking and sending has put the end of the token too early, by as long as it was stopped.
 * No reading puts it too late, so the latest is the nearest.
 */
function extend(token: LiveToken | undefined, grant: ServableGrant, readAtMs: number): void {
  if (token === undefined) return
  const expiresAtMs = readAtMs + accessTokenSecondsLeft(grant) * 1000
  token.expiresAtMs = Math.max(token.expiresAtMs, expiresAtMs)
}

/** Whether the row holds what the token was opened from, in the place and with the life that it had. */
function isSame(cached: KnownGrant, grant: ServableGrant, stored: number | undefined): boolean {
  return (
    cached.loginId === grant.loginId &&
    cached.generation === grant.generation &&
    cached.stored !== undefined &&
    cached.stored === stored &&
    cached.token?.expiresAtEpochMs === grant.accessToken?.expiresAt.getTime()
  )
}
