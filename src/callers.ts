// The callers of the internal listener: whose key this is, and what they may do. Without CALLERS_FILE: nobody, nothing.
// A change of the file holds within a second; one that cannot be used leaves the last good one in force.
// Rights are asked for by the routes. What the file may hold stands in callers-file.ts.

import { hash, timingSafeEqual } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { matchesCallPattern, matchesUserPattern } from './caller-patterns.ts'
import {
  type ApiKey,
  type Caller,
  type CallerEntry,
  CallersFileError,
  parseCallers,
  type Right,
} from './callers-file.ts'
import { BrokerError } from './errors.ts'
import type { UserKey } from './grant.ts'
import type { Clock, Ports } from './ports.ts'

export { addCaller } from './add-caller.ts'
export { type Caller, parseCallers, type Right } from './callers-file.ts'

/** Twice in the second within which a withdrawn key must be refused everywhere. */
const POLL_INTERVAL_MS = 500
/** The scheme is not case-sensitive (RFC 9110 section 11.1). */
const BEARER = /^bearer +/i
/** The id is looked up; the rest is what the hash is for. Longer than any key of ours it is not hashed. */
const API_KEY = /^[Bb][Ee][Aa][Rr][Ee][Rr] +(pgb_([a-z0-9]{4,16})_[A-Za-z0-9_-]{43,128})$/
/** Compared with when no key has the id, so that an unknown id costs what a wrong secret does. */
const NO_DIGEST = Buffer.alloc(32)

export interface Callers {
  /**
   * Returns the caller whose API key stands in the `Authorization` header.
   * @throws BrokerError `caller_unauthenticated`, in the same words for an unknown, a wrong and an expired key
   */
  authenticate(authorizationHeader: string | undefined): Caller
  mayUse(caller: Caller, right: Right): boolean
  maySee(caller: Caller, user: UserKey): boolean
  /** The path as it is sent to Pagero, without its query. */
  mayCall(caller: Caller, method: string, path: string): boolean
  close(): void
}

interface KnownKey {
  caller: Caller
  apiKey: ApiKey
}

/**
 * Opens the callers file and follows its changes until `close`. Undefined: there are no callers.
 *
 * @throws CallersFileError when the file cannot be read or used at the start
 */
export async function createCallers(
  file: string | undefined,
  ports: Pick<Ports, 'clock' | 'log'>,
): Promise<Callers> {
  const { clock, log } = ports
  let keys: ReadonlyMap<string, KnownKey> = new Map()
  let version: string | undefined
  let isPolling = false

  async function reload(path: string): Promise<void> {
    const found = await versionOf(path)
    if (found === version) return
    // Noted before the file is read: a change in between is seen by the next poll, a broken file is told once.
    version = found
    try {
      const entries = await readCallers(path, clock.now())
      keys = keysById(entries)
      log.info('callers_file_loaded', { count: entries.length })
    } catch (error) {
      const [reason = ''] = error instanceof CallersFileError ? error.problems : []
      log.error('callers_file_invalid', {
        setting: 'CALLERS_FILE',
        reason,
        error,
      })
    }
  }

  // By polling: file events do not see a mounted file that is replaced behind its symbolic link.
  let poll: NodeJS.Timeout | undefined
  if (file !== undefined) {
    version = await versionOf(file)
    keys = keysById(await readCallers(file, clock.now()))
    poll = setInterval(() => {
      if (isPolling) return
      isPolling = true
      void reload(file).finally(() => (isPolling = false))
    }, POLL_INTERVAL_MS)
    poll.unref()
  }

  return {
    authenticate(authorizationHeader) {
      if (authorizationHeader === undefined || !BEARER.test(authorizationHeader)) {
        throw new BrokerError(
          'caller_unauthenticated',
          'Send an API key of this broker as Authorization: Bearer pgb_….',
        )
      }
      const [, key, id = ''] = API_KEY.exec(authorizationHeader) ?? []
      const known = keys.get(id)
      if (key === undefined || !isKey(key, known?.apiKey, clock) || known === undefined) {
        throw new BrokerError('caller_unauthenticated', 'The API key is not valid.')
      }
      return known.caller
    },
    mayUse: (caller, right) => caller.rights.has(right),
    maySee: (caller, user) => caller.users.some((pattern) => matchesUserPattern(pattern, user)),
    mayCall: ({ proxyAllow }, method, path) =>
      proxyAllow === undefined ||
      proxyAllow.some((pattern) => matchesCallPattern(pattern, method, path)),
    close() {
      clearInterval(poll)
    },
  }
}

/** Compares digests of equal length in constant time, of a known key and of none alike. */
function isKey(key: string, apiKey: ApiKey | undefined, clock: Pick<Clock, 'now'>): boolean {
  // As text and back: for something this short that takes half as long as asking for bytes.
  const digest = Buffer.from(hash('sha256', key, 'hex'), 'hex')
  const isSame = timingSafeEqual(digest, apiKey?.sha256 ?? NO_DIGEST)
  return isSame && (apiKey?.expiresAt === undefined || apiKey.expiresAt > clock.now())
}

async function readCallers(path: string, now: Date): Promise<CallerEntry[]> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch {
    throw new CallersFileError(['The file cannot be read.'])
  }
  return parseCallers(text, now)
}

/** Differs when the file has been written, replaced, taken away or put back. */
async function versionOf(path: string): Promise<string> {
  try {
    const { dev, ino, size, mtimeNs, ctimeNs } = await stat(path, { bigint: true })
    return [dev, ino, size, mtimeNs, ctimeNs].join(':')
  } catch {
    return 'missing'
  }
}

function keysById(entries: readonly CallerEntry[]): ReadonlyMap<string, KnownKey> {
  const keys = new Map<string, KnownKey>()
  for (const { apiKeys, ...caller } of entries) {
    for (const apiKey of apiKeys) keys.set(apiKey.id, { caller, apiKey })
  }
  return keys
}
