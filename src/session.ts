// Browser sessions: an opaque token in the cookie, its hash in the database, an idle and an absolute limit
// that the store keeps by the database clock. What a cookie is and who may send it belongs to http/.

import { hash } from 'node:crypto'
import { BrokerError } from './errors.ts'
import type { UserKey } from './grant.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from './opaque-token.ts'
import type { Clock, Ports } from './ports.ts'
import type { Session, SessionLifetimes } from './login-stores.ts'

export interface SessionSettings extends SessionLifetimes {
  /** Beyond this many the user's oldest session ends. */
  perUserMax: number
}

/**
 * Begins a session under a new token and ends the one it replaces, so that no token outlives a login.
 *
 * @throws BrokerError `authorization_failed` when the grant has been closed meanwhile, `temporarily_unavailable`
 */
export async function issueSession(
  ports: Pick<Ports, 'sessions'>,
  user: UserKey,
  options: { settings: SessionSettings; replacesHash: Buffer | null },
): Promise<{ token: string; session: Session }> {
  const token = newOpaqueToken()
  const { idleSeconds, absoluteSeconds, perUserMax } = options.settings
  const session = await ports.sessions.create(
    hashOpaqueToken(token),
    user,
    { idleSeconds, absoluteSeconds },
    { replaces: options.replacesHash, perUserMax },
  )
  if (session === undefined) {
    throw new BrokerError(
      'authorization_failed',
      'The connection was ended at this moment. Begin the login again.',
    )
  }
  return { token, session }
}

/**
 * Returns the live session of this token and moves its idle limit on; undefined when there is none.
 * A text that is no session token costs no statement.
 *
 * @throws BrokerError `temporarily_unavailable`: whether the session lives is not known, so nobody is logged out
 */
export async function resolveSession(
  ports: Pick<Ports, 'sessions'>,
  token: string | undefined,
  lifetimes: SessionLifetimes,
): Promise<Session | undefined> {
  if (!isOpaqueToken(token)) return undefined
  return ports.sessions.resolve(hashOpaqueToken(token), lifetimes)
}

/** Ends the session of this token and returns whose it was; without one nothing happens. */
export async function endSession(
  ports: Pick<Ports, 'sessions'>,
  token: string | undefined,
): Promise<UserKey | undefined> {
  return isOpaqueToken(token) ? ports.sessions.end(hashOpaqueToken(token)) : undefined
}

/** Ends every session of the user and returns how many there were. */
export async function endSessionsOf(
  ports: Pick<Ports, 'sessions'>,
  user: UserKey,
): Promise<number> {
  return ports.sessions.endAll(user)
}

/** About 2 MB at most; the oldest entry goes first. */
const ENTRIES_MAX = 10_000

/** Sessions as they were read at most `trustMs` ago, so that a page's burst of calls costs one statement. */
export interface SessionReader {
  resolve(token: string | undefined): Promise<Session | undefined>
  /** Returns what `resolve` would, if that is in memory; undefined says nothing about the session. */
  ready(token: string | undefined): Session | undefined
  /** Ends trust in one token at once in this process; other replicas follow within `trustMs`. */
  forget(token: string | undefined): void
  /** The same for every token of a user. */
  forgetUser(user: UserKey): void
  /** The store as logins use it: what a new session replaces or crowds out is over in this process at once. */
  store: Ports['sessions']
}

/**
 * Makes a reader that trusts what it has read for `trustMs` and joins calls for one token that come together.
 * Only live sessions are remembered, and none beyond its own end: a new login counts at once, a session that another
 * replica has ended for `trustMs` at the longest.
 */
export function createSessionReader(
  ports: { clock: Clock; sessions: Ports['sessions'] },
  settings: { lifetimes: SessionLifetimes; trustMs: number },
): SessionReader {
  const read = new Map<string, { session: Session; untilMs: number }>()
  const reading = new Map<string, Reading>()

  function begin(key: string, token: string): Reading {
    const askedAtMs = ports.clock.monotonicMs()
    const begun: Reading = {
      keep: true,
      answer: resolveSession(ports, token, settings.lifetimes)
        .then((session) => {
          if (session !== undefined && begun.keep) {
            if (read.size >= ENTRIES_MAX) read.delete(read.keys().next().value ?? key)
            // Its life was counted later than it was asked for, so it is not served beyond its end.
            const trustMs = Math.min(settings.trustMs, session.lifeLeftMs)
            read.set(key, { session, untilMs: askedAtMs + trustMs })
          }
          return session
        })
        .finally(() => {
          if (reading.get(key) === begun) reading.delete(key)
        }),
    }
    reading.set(key, begun)
    return begun
  }

  function forgetHash(tokenHash: Buffer): void {
    const key = tokenHash.toString('base64url')
    read.delete(key)
    const begun = reading.get(key)
    if (begun !== undefined) begun.keep = false
    reading.delete(key)
  }

  function forgetUser(user: UserKey): void {
    for (const [key, { session }] of read) if (session.user === user) read.delete(key)
    // Whose the reads in flight are is not known yet, so none of them is kept.
    for (const begun of reading.values()) begun.keep = false
    reading.clear()
  }

  function trusted(key: string): Session | undefined {
    const known = read.get(key)
    return known !== undefined && ports.clock.monotonicMs() < known.untilMs
      ? known.session
      : undefined
  }

  return {
    async resolve(token) {
      if (!isOpaqueToken(token)) return undefined
      const key = keyOf(token)
      const known = trusted(key)
      if (known !== undefined) return known
      read.delete(key)
      return (reading.get(key) ?? begin(key, token)).answer
    },

    ready: (token) => (isOpaqueToken(token) ? trusted(keyOf(token)) : undefined),

    forget(token) {
      if (isOpaqueToken(token)) forgetHash(hashOpaqueToken(token))
    },

    forgetUser,

    store: {
      ...ports.sessions,
      async create(tokenHash, user, lifetimes, options) {
        const session = await ports.sessions.create(tokenHash, user, lifetimes, options)
        if (options.replaces !== null) forgetHash(options.replaces)
        forgetUser(user)
        return session
      },
    },
  }
}

/** The hash of a token as the text that sessions are remembered by: the token itself is kept nowhere. */
function keyOf(token: string): string {
  // In one step: on the way to every call of a page, this takes half as long.
  return hash('sha256', token, 'base64url')
}

/** A read in flight; `keep` turns false when its answer is out of date before it comes. */
interface Reading {
  keep: boolean
  answer: Promise<Session | undefined>
}
