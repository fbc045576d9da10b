// What this process knows of grants: access tokens in memory, trusted without asking PostgreSQL for at most
// `tokenCacheTrustMs` after they were last checked, so that a revocation holds on every replica within that time and
// without a broadcast. While PostgreSQL is away they are served up to the stale limit.

import { crc32 } from 'node:zlib'
import { LRUCache } from 'lru-cache'
import { BrokerError, grantNotFound, unavailable } from './errors.ts'
import { accessTokenSecondsLeft, type ServableGrant, type UserKey } from './grant.ts'
import { createGrantReader, type GrantReading } from './grant-reader.ts'
import { inTime } from './in-time.ts'
import { createLastUse, type Noted } from './last-use.ts'
import { type LiveToken, openLiveToken, refuseDead } from './live-token.ts'
import type { Ports } from './ports.ts'
import { createSlabs, type Place } from './slabs.ts'

/** A token without where it comes from. */
export type ServedToken = Readonly<Omit<LiveToken, 'loginId' | 'generation'>>

/** As much of a grant as serving needs, as it was known when it was asked for. */
export interface KnownGrant {
  loginId: string
  generation: number
  /** Undefined when the row holds none, or none that lives. */
  token: LiveToken | undefined
}

export interface TokenCache {
  /**
   * Returns the user's token, if its grant was checked no longer ago than the trust allows, and leaves on record that it was
   * used. Costs a look-up.
   */
  useTrusted(user: UserKey): ServedToken | undefined
  /** What is known of the user's grant, however long ago it was checked: nothing to serve from. */
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
  /** Grants in memory. */
  size(): number
  /** Leaves on record that the user's token was used; see `last-use.ts`. */
  noteUse(user: UserKey): void
  /** Tells whether a refresh ahead of time may begin for the user, at most once in a second; it is taken to have begun. */
  beginAhead(user: UserKey): boolean
}

/** About 1 kB each with a token of 900 characters, its key included: 100 MB. */
const GRANTS_MAX = 100_000

/** Tokens in demand that are kept ready besides, 1.3 kB each; with more, all are let go and decoded again. */
const DECODED_MAX = 5_000

/** A database that takes this long for a read by key is taken to be away, and the stale limit begins to count. */
const CHECK_PATIENCE_MS = 1_000
/** While refresh-ahead fails, it is tried again this often, however many callers come. */
const AHEAD_RETRY_MS = 1_000

/** What is kept of a grant: where in its record each number and text stands. */
const NUMBER = {
  generation: 0,
  /** Monotonic instant before the read that confirmed it last. */
  checkedAtMs: 1,
  /**
   * CRC-32 of the ciphertext that the token was opened from: while it stays, so does what was opened. A row changed on
   * purpose so that they agree gains nothing: what is served is what was opened before. NaN: of none.
   */
  stored: 2,
  lifeSeconds: 3,
  expiresAtMs: 4,
  expiresAtEpochMs: 5,
  /** NaN: not yet, as with the next. */
  useNotedAtMs: 6,
  /** When a refresh ahead of time was last begun for it. */
  aheadTriedAtMs: 7,
} as const
/** Without an access token the last three are empty. */
const TEXT = { loginId: 0, accessToken: 1, fingerprint: 2, scope: 3 } as const

/** Makes the cache of a process. */
export function createTokenCache(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants'>,
  settings: { tokenCacheTrustMs: number; staleLimitSeconds: number; tokenCacheMax?: number },
): TokenCache {
  const { clock, sealer, grants } = ports
  const readGrant = createGrantReader(ports)
  const noteUse = createLastUse<UserKey>(ports, (users) => grants.touch(users))
  const records = createSlabs({
    numbers: Object.keys(NUMBER).length,
    texts: Object.keys(TEXT).length,
  })
  const known = new LRUCache<UserKey, Place>({
    max: settings.tokenCacheMax ?? GRANTS_MAX,
    // Whatever takes a grant's place, or puts it out: nobody else holds on to a place, and nobody waits with one in his hand.
    dispose: (place) => {
      decoded.delete(place)
      records.free(place)
    },
  })
  /** By place; without the token where it was asked for once so far. */
  const decoded = new Map<Place, ServedToken | undefined>()

  const ageMs = (place: Place): number =>
    clock.monotonicMs() - records.number(place, NUMBER.checkedAtMs)

  /** What is at the place now. */
  function grantAt(place: Place): KnownGrant {
    const loginId = records.text(place, TEXT.loginId)
    const generation = records.number(place, NUMBER.generation)
    const token = tokenAt(place)
    return { loginId, generation, token: token && { loginId, generation, ...token } }
  }

  function tokenAt(place: Place): ServedToken | undefined {
    const ready = decoded.get(place)
    if (ready !== undefined) return ready
    const fingerprint = records.text(place, TEXT.fingerprint)
    if (fingerprint === '') return undefined
    const token = {
      accessToken: records.text(place, TEXT.accessToken),
      fingerprint,
      scope: records.text(place, TEXT.scope),
      lifeSeconds: records.number(place, NUMBER.lifeSeconds),
      expiresAtMs: records.number(place, NUMBER.expiresAtMs),
      expiresAtEpochMs: records.number(place, NUMBER.expiresAtEpochMs),
    }
    const isInDemand = decoded.has(place)
    if (decoded.size >= DECODED_MAX) decoded.clear()
    decoded.set(place, isInDemand ? token : undefined)
    return token
  }

  const isTrusted = (place: Place): boolean => ageMs(place) <= settings.tokenCacheTrustMs

  async function read(user: UserKey): Promise<KnownGrant> {
    const place = known.get(user)
    if (place !== undefined && isTrusted(place)) return grantAt(place)
    try {
      const { grant, readAtMs } = await (place === undefined ? readGrant(user) : readSoon(user))
      if (grant !== undefined) return keepRow(grant, readAtMs)
      known.delete(user)
    } catch (error) {
      const away = error instanceof BrokerError && error.code === 'temporarily_unavailable'
      const present = known.get(user)
      if (away && present !== undefined && ageMs(present) <= settings.staleLimitSeconds * 1000) {
        return grantAt(present)
      }
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
    try {
      refuseDead(grant)
      const stored = checksumOf(grant)
      const place = known.get(user)
      if (place !== undefined && records.text(place, TEXT.loginId) === loginId) {
        // The same as at the last check, or a successor that is spooled and on its way into the row.
        const isAhead = records.number(place, NUMBER.generation) > generation
        if (isAhead || isSame(place, grant, stored)) {
          if (!isAhead) extend(place, grant, readAtMs)
          const checkedAtMs = Math.max(records.number(place, NUMBER.checkedAtMs), readAtMs)
          records.setNumber(place, NUMBER.checkedAtMs, checkedAtMs)
          return grantAt(place)
        }
      }
      const token = openLiveToken(sealer, grant, readAtMs)
      return keep(user, { loginId, generation, token }, place, { stored, checkedAtMs: readAtMs })
    } catch (error) {
      known.delete(user)
      throw error
    }
  }

  function keep(
    user: UserKey,
    grant: KnownGrant,
    before: Place | undefined,
    { stored, checkedAtMs }: { stored: number; checkedAtMs: number },
  ): KnownGrant {
    const { loginId, generation, token } = grant
    const useNotedAtMs =
      before === undefined ? Number.NaN : records.number(before, NUMBER.useNotedAtMs)
    const { lifeSeconds = 0, expiresAtMs = 0, expiresAtEpochMs = 0 } = token ?? {}
    const { accessToken = '', fingerprint = '', scope = '' } = token ?? {}
    const place = records.put(
      [
        generation,
        checkedAtMs,
        stored,
        lifeSeconds,
        expiresAtMs,
        expiresAtEpochMs,
        useNotedAtMs,
        Number.NaN,
      ],
      [loginId, accessToken, fingerprint, scope],
    )
    known.set(user, place)
    return grant
  }

  /** Whether the row holds what the token was opened from, in the place and with the life that it had. */
  function isSame(place: Place, grant: ServableGrant, stored: number): boolean {
    return (
      records.number(place, NUMBER.generation) === grant.generation &&
      records.number(place, NUMBER.stored) === stored &&
      records.number(place, NUMBER.expiresAtEpochMs) === grant.accessToken?.expiresAt.getTime()
    )
  }

  /**
   * A process that was stopped between asking and sending has put the end of the token too early, by as long as it was stopped.
   * No reading puts it too late, so the latest is the nearest.
   */
  function extend(place: Place, grant: ServableGrant, readAtMs: number): void {
    const expiresAtMs = readAtMs + accessTokenSecondsLeft(grant) * 1000
    if (expiresAtMs <= records.number(place, NUMBER.expiresAtMs)) return
    records.setNumber(place, NUMBER.expiresAtMs, expiresAtMs)
    decoded.delete(place)
  }

  function noteUseAt(place: Place, user: UserKey): void {
    const noted: Noted = { useNotedAtMs: records.number(place, NUMBER.useNotedAtMs) }
    noteUse(user, noted)
    records.setNumber(place, NUMBER.useNotedAtMs, noted.useNotedAtMs ?? Number.NaN)
  }

  return {
    useTrusted(user) {
      const place = known.get(user)
      if (place === undefined || !isTrusted(place)) return undefined
      noteUseAt(place, user)
      return tokenAt(place)
    },
    known(user) {
      const place = known.peek(user)
      return place === undefined ? undefined : grantAt(place)
    },
    read,
    keepRow,
    forget: (user) => {
      known.delete(user)
    },
    size: () => known.size,
    keepToken(user, token) {
      const { loginId, generation } = token
      const cached = known.get(user)
      if (
        cached !== undefined &&
        records.text(cached, TEXT.loginId) === loginId &&
        records.number(cached, NUMBER.generation) >= generation
      ) {
        return
      }
      const checkedAtMs =
        cached === undefined ? clock.monotonicMs() : records.number(cached, NUMBER.checkedAtMs)
      keep(user, { loginId, generation, token }, cached, { stored: Number.NaN, checkedAtMs })
    },
    noteUse(user) {
      const place = known.peek(user)
      if (place !== undefined) noteUseAt(place, user)
    },
    beginAhead(user) {
      const place = known.peek(user)
      if (place === undefined) return true
      const nowMs = clock.monotonicMs()
      if (nowMs - records.number(place, NUMBER.aheadTriedAtMs) < AHEAD_RETRY_MS) return false
      records.setNumber(place, NUMBER.aheadTriedAtMs, nowMs)
      return true
    },
  }
}

/** NaN where the row holds no access token. */
function checksumOf({ accessToken }: ServableGrant): number {
  return accessToken === null ? Number.NaN : crc32(accessToken.sealed)
}
