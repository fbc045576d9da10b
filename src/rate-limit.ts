// Rate limits: a bucket for each key, refilled evenly. They hold for one process, so with replicas each allows as much.
// A request costs a look-up and a subtraction: no timer, and no new entry but for a key not seen lately.

import { isIPv6 } from 'node:net'
import { BrokerError } from './errors.ts'
import type { Clock, Log, LogFields } from './ports.ts'

/** Requests a second; 0 is no limit. */
export interface RateLimitSettings {
  perCaller: number
  perUser: number
  perAddress: number
}

/** A bucket holds what comes in so many seconds: a page that loads, a batch that starts. */
const BURST_SECONDS = 5
/**
 * Keys that are kept, twice over: about 10 MB. When so many others have come since a key was seen, its bucket is full
 * again, so whoever would fill his by that must send more than any bucket holds.
 */
const KEYS_MAX = 50_000
/** Above so many, those whose buckets are full again are forgotten: nothing is known of them that matters. */
const KEYS_FEW = 200
/** One key's refusals are told once in this time: a flood must not flood the log. */
const NOTE_INTERVAL_MS = 10_000

interface Bucket {
  /** When it is full again, on the monotonic clock: the emptier, the later. */
  fullAtMs: number
  notedAtMs: number
}

export interface RateLimiter {
  /**
   * Counts a request of this key.
   * @throws BrokerError `rate_limited` with the seconds until the next is allowed; a refused request is not counted
   */
  admit(key: string): void
  /**
   * Refuses where nothing is left, without counting: for requests that cost something only if they fail.
   * @throws BrokerError `rate_limited`
   */
  check(key: string): void
  /** Tells whether the next request would pass, without counting. */
  allows(key: string): boolean
  /** Tells whether that of every key would. */
  allowsAll(): boolean
}

/** The limits of one listener. */
export interface RateLimits {
  caller: RateLimiter
  user: RateLimiter
  address: RateLimiter
}

/** Makes the limits of a listener. */
export function createRateLimits(
  ports: { clock: Pick<Clock, 'monotonicMs'>; log: Pick<Log, 'warn'> },
  settings: RateLimitSettings,
): RateLimits {
  const limiter = (perSecond: number, field: 'caller' | 'user' | 'address'): RateLimiter =>
    createRateLimiter(ports, perSecond, (key) => ({ [field]: key }))
  return {
    caller: limiter(settings.perCaller, 'caller'),
    user: limiter(settings.perUser, 'user'),
    address: limiter(settings.perAddress, 'address'),
  }
}

const UNLIMITED: RateLimiter = {
  admit: () => undefined,
  check: () => undefined,
  allows: () => true,
  allowsAll: () => true,
}

function createRateLimiter(
  { clock, log }: { clock: Pick<Clock, 'monotonicMs'>; log: Pick<Log, 'warn'> },
  perSecond: number,
  fieldsOf: (key: string) => LogFields,
): RateLimiter {
  if (perSecond === 0) return UNLIMITED
  const intervalMs = 1000 / perSecond
  /** How far a bucket may be from full before the next request: all that it holds but one. */
  const emptyMs = Math.max(0, BURST_SECONDS * 1000 - intervalMs)
  let recent = new Map<string, Bucket>()
  let earlier = new Map<string, Bucket>()
  /** Of the bucket that is full again last, and of that among the earlier ones. */
  let allFullAtMs = -Infinity
  let earlierFullAtMs = -Infinity

  function bucketOf(key: string, nowMs: number): Bucket {
    const known = recent.get(key)
    if (known !== undefined) return known
    const isSettled = recent.size >= KEYS_FEW && nowMs >= earlierFullAtMs
    if (isSettled || recent.size >= KEYS_MAX) {
      earlier = recent
      earlierFullAtMs = allFullAtMs
      recent = new Map()
    }
    const bucket = earlier.get(key) ?? { fullAtMs: -Infinity, notedAtMs: -Infinity }
    recent.set(key, bucket)
    return bucket
  }

  const allowsAll = (): boolean => allFullAtMs - clock.monotonicMs() <= emptyMs
  const waitMsOf = (bucket: Bucket, nowMs: number): number => bucket.fullAtMs - nowMs - emptyMs

  function refuseEmpty(key: string, bucket: Bucket, nowMs: number): void {
    const waitMs = waitMsOf(bucket, nowMs)
    if (waitMs <= 0) return
    const retryAfterSeconds = Math.ceil(waitMs / 1000)
    if (nowMs - bucket.notedAtMs >= NOTE_INTERVAL_MS) {
      bucket.notedAtMs = nowMs
      log.warn('rate_limited', { ...fieldsOf(key), retryAfterSeconds })
    }
    throw new BrokerError('rate_limited', 'There were too many requests. Try again later.', {
      retryAfterSeconds,
    })
  }

  return {
    admit(key) {
      const nowMs = clock.monotonicMs()
      const bucket = bucketOf(key, nowMs)
      refuseEmpty(key, bucket, nowMs)
      bucket.fullAtMs = Math.max(bucket.fullAtMs, nowMs) + intervalMs
      allFullAtMs = Math.max(allFullAtMs, bucket.fullAtMs)
    },
    check(key) {
      const bucket = recent.get(key) ?? earlier.get(key)
      if (bucket !== undefined) refuseEmpty(key, bucket, clock.monotonicMs())
    },
    allows(key) {
      if (allowsAll()) return true
      const bucket = recent.get(key) ?? earlier.get(key)
      return bucket === undefined || waitMsOf(bucket, clock.monotonicMs()) <= 0
    },
    allowsAll,
  }
}

/**
 * Returns what counts as one address: an IPv4 address, in its IPv6 form too (RFC 4291 section 2.5.5.2), and of IPv6 the
 * /64, within which anybody has as many addresses as he likes. Anything else is one address together.
 */
export function networkOf(address: string): string {
  if (!isIPv6(address)) return /^[\d.]{7,15}$/.test(address) ? address : 'unknown'
  const [bare = ''] = address.split('%')
  const dotted = /^(.*:)(\d+)\.(\d+)\.(\d+)\.(\d+)$/.exec(bare)
  const groups = groupsOf(
    dotted === null
      ? bare
      : `${dotted[1]}${hexPair(dotted[2], dotted[3])}:${hexPair(dotted[4], dotted[5])}`,
  )
  const isMapped = groups.slice(0, 5).every((group) => group === 0) && groups[5] === 0xffff
  if (isMapped) {
    return groups
      .slice(6)
      .flatMap((group) => [group >> 8, group & 0xff])
      .join('.')
  }
  return `${groups
    .slice(0, 4)
    .map((group) => group.toString(16))
    .join(':')}::/64`
}

function hexPair(high = '', low = ''): string {
  return (Number(high) * 256 + Number(low)).toString(16)
}

/** The eight groups of an IPv6 address without dots. */
function groupsOf(address: string): number[] {
  const [head = '', tail] = address.split('::')
  const read = (text = ''): number[] =>
    text === '' ? [] : text.split(':').map((group) => Number.parseInt(group, 16))
  const [first, last] = [read(head), read(tail)]
  return [...first, ...Array<number>(8 - first.length - last.length).fill(0), ...last]
}
