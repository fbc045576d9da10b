// Who was given which access token, on record without a line for each request: the first hand-out of a token to a caller
// is logged at once, those that follow are counted and logged once a second. Nothing is left out, only added up.

import type { Caller } from '../callers.ts'
import type { UserKey } from '../grant.ts'
import type { Log } from '../ports.ts'

export interface HandOut {
  requestId: string
  caller: Caller
  user: UserKey
  fingerprint: string
}

export interface HandOutLog {
  note(handOut: HandOut): void
  /** Logs what has been counted. Called once a second until `close`, which calls it once more. */
  flush(): void
  close(): void
}

const EVENT = 'access_token_handed_out'
const FLUSH_INTERVAL_MS = 1_000
/** Tokens counted at once, about 200 bytes each. Beyond it each hand-out is a line again. */
const COUNTED_MAX = 10_000

/** Makes the record of a listener. */
export function createHandOutLog(log: Pick<Log, 'info'>): HandOutLog {
  /** By caller and fingerprint; entries that a whole interval has not added to are dropped. */
  const counted = new Map<Caller, Map<string, { user: UserKey; count: number }>>()
  let size = 0

  function flush(): void {
    for (const [caller, tokens] of counted) {
      for (const [fingerprint, entry] of tokens) {
        const { user, count } = entry
        if (count === 0) {
          tokens.delete(fingerprint)
          size -= 1
        } else {
          log.info(EVENT, { user, caller: caller.name, fingerprint, count })
          entry.count = 0
        }
      }
      // A reloaded callers file brings new objects; the old ones must not stay.
      if (tokens.size === 0) counted.delete(caller)
    }
  }

  const timer = setInterval(flush, FLUSH_INTERVAL_MS)
  timer.unref()

  return {
    note({ requestId, caller, user, fingerprint }) {
      let tokens = counted.get(caller)
      const entry = tokens?.get(fingerprint)
      if (entry !== undefined && entry.user === user) {
        entry.count += 1
        return
      }
      log.info(EVENT, { requestId, user, caller: caller.name, fingerprint })
      if (entry !== undefined || size >= COUNTED_MAX) return
      if (tokens === undefined) {
        tokens = new Map()
        counted.set(caller, tokens)
      }
      tokens.set(fingerprint, { user, count: 0 })
      size += 1
    },
    flush,
    close() {
      clearInterval(timer)
      flush()
    },
  }
}
