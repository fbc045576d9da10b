// The callers of the internal listener: whose key this is, and what they may do. Without CALLERS_FILE: nobody, nothing.
// A change of the file holds within a second; one that cannot be used leaves the last good one in force.
// Rights are asked for by the routes. What the file may hold stands in callers-file.ts.

import { hash, timingSafeEqual } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { createJwtCallers, type JwtCallers, type KnownJwt } from './caller-jwt.ts'
import type { KeySource } from './caller-jwt-entry.ts'
import { createRemoteKeys, type KeySet, KeySetError, readKeyFile } from './caller-keys.ts'
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
import { createLastUse, type Noted } from './last-use.ts'
import type { Clock, Ports } from './ports.ts'
import type { Credential } from './record-stores.ts'

export { type Caller, parseCallers, type Right } from './callers-file.ts'

/** Twice in the second within which a withdrawn key must be refused everywhere. */
const POLL_INTERVAL_MS = 500
/** The scheme is not case-sensitive (RFC 9110 section 11.1). */
const BEARER = /^bearer +/i
/** The id is looked up; the rest is what the hash is for. Longer than any key of ours it is not hashed. */
const API_KEY = /^[Bb][Ee][Aa][Rr][Ee][Rr] +(pgb_([a-z0-9]{4,16})_[A-Za-z0-9_-]{43,128})$/
/** Three parts in base64url (RFC 7515 section 7.1); no key of ours has a dot. Half of what a header section may have. */
const JWT =
  /^[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9_-]{1,8000}\.[A-Za-z0-9_-]{1,8000}\.[A-Za-z0-9_-]{0,4000})$/
/** How nearly every header of ours begins. */
const USUAL = 'Bearer pgb_'
/** A key that was proved is not hashed again for so long. */
const RECENT_MS = 1_000
/** Compared with when no key has the id, so that an unknown id costs what a wrong secret does. */
const NO_DIGEST = Buffer.alloc(32)

export interface Callers {
  /** Returns the caller if that takes no waiting: for an API key, and for a JWT that was verified a moment ago. Never throws. */
  recognize(authorizationHeader: string | undefined): Caller | undefined
  /**
   * Returns the caller whose API key or JWT stands in the `Authorization` header: at once for a key, and for a token that
   * was verified a moment ago.
   * @throws BrokerError `caller_unauthenticated`, in the same words for an unknown, a wrong and an expired credential
   * @throws BrokerError `temporarily_unavailable` while the keys of a token's issuer have never been had
   */
  authenticate(authorizationHeader: string | undefined): Caller | Promise<Caller>
  mayUse(caller: Caller, right: Right): boolean
  maySee(caller: Caller, user: UserKey): boolean
  /** The path as it is sent to Pagero, without its query. */
  mayCall(caller: Caller, method: string, path: string): boolean
  /** What an operator should mend although the last good state is in force: a changed file, keys that cannot be had. */
  warnings(): Readonly<Record<string, string>>
  close(): void
}

interface KnownKey extends Noted {
  caller: Caller
  apiKey: ApiKey
  /** The header that proved the key a moment ago, where the next one is written to be compared with it, and until when. */
  recent?: { bytes: Buffer; given: Buffer; untilMs: number }
}

/** What holds between two loads of the file. */
interface Loaded {
  keys: ReadonlyMap<string, KnownKey>
  jwts: JwtCallers
  /** The keys of issuers, by where they come from. */
  keySets: ReadonlyMap<string, KeySet>
  /** Of a key file that could not be read again, while its last good keys are in force. */
  problem: string | undefined
}

const NOTHING_LOADED: Omit<Loaded, 'jwts'> = {
  keys: new Map(),
  keySets: new Map(),
  problem: undefined,
}

/**
 * Opens the callers file and follows its changes, and those of the key files that it names, until `close`. Undefined:
 * there are no callers.
 *
 * @throws CallersFileError when the file, or a key file, cannot be read or used at the start
 */
export async function createCallers(
  file: string | undefined,
  ports: Pick<Ports, 'clock' | 'log' | 'credentialUses'>,
): Promise<Callers> {
  const { clock, log, credentialUses } = ports
  const noteUse = createLastUse<Credential>(ports, (used) => credentialUses.note(used))
  let loaded: Loaded = { ...NOTHING_LOADED, jwts: createJwtCallers([], clock) }
  let invalid: string | undefined
  /** The files that are followed, each with its version from before it was read. */
  let followed: ReadonlyMap<string, string> = new Map()
  let isPolling = false

  async function load(path: string, keyFiles: Map<string, string>): Promise<number> {
    const entries = await readCallers(path, clock.now())
    const directory = dirname(path)
    loaded = await loadedOf(entries, { before: loaded, directory, keyFiles, ports })
    return entries.length
  }

  async function reload(path: string): Promise<void> {
    const found = new Map<string, string>()
    for (const one of followed.keys()) found.set(one, await versionOf(one))
    if ([...found].every(([one, version]) => followed.get(one) === version)) return
    const keyFiles = new Map<string, string>()
    const before = loaded.keys
    try {
      const count = await load(path, keyFiles)
      invalid = undefined
      const { keys } = loaded
      for (const id of keys.keys()) if (!before.has(id)) log.info('caller_key_added', { keyId: id })
      for (const id of before.keys()) {
        if (!keys.has(id)) log.info('caller_key_removed', { keyId: id })
      }
      if (loaded.problem === undefined) log.info('callers_file_loaded', { count })
      else log.error('callers_file_invalid', { setting: 'CALLERS_FILE', reason: loaded.problem })
      // A key file that is not named any more is let go.
      for (const one of followed.keys()) if (one !== path) found.delete(one)
    } catch (error) {
      invalid = error instanceof CallersFileError ? (error.problems[0] ?? '') : 'It cannot be used.'
      log.error('callers_file_invalid', { setting: 'CALLERS_FILE', reason: invalid, error })
    }
    followed = new Map([...found, ...keyFiles])
  }

  // By polling: file events do not see a mounted file that is replaced behind its symbolic link.
  let poll: NodeJS.Timeout | undefined
  if (file !== undefined) {
    const keyFiles = new Map([[file, await versionOf(file)]])
    await load(file, keyFiles)
    followed = keyFiles
    poll = setInterval(() => {
      if (isPolling) return
      isPolling = true
      void reload(file).finally(() => (isPolling = false))
    }, POLL_INTERVAL_MS)
    poll.unref()
  }

  async function verify(token: string): Promise<Caller> {
    for (;;) {
      const { jwts } = loaded
      const known = await jwts.verify(token)
      // What was verified under a file that does not hold any more is verified again under the one that does.
      if (jwts !== loaded.jwts) continue
      noteUse({ kind: 'jwt', name: known.caller.name }, known)
      return known.caller
    }
  }

  /** The header that brought the key last, if it is this one: hashing it again is the dearest part of a token answer. */
  function isRecent({ apiKey, recent }: KnownKey, header: string): boolean {
    if (recent === undefined || recent.untilMs < clock.monotonicMs()) return false
    if (recent.bytes.length !== header.length) return false
    // A character of two bytes at the end is not written, and what stood there would count for it.
    if (recent.given.write(header, 'utf8') !== recent.bytes.length) return false
    return timingSafeEqual(recent.given, recent.bytes) && isInForce(apiKey, clock)
  }

  function remember(known: KnownKey, header: string): void {
    const bytes = Buffer.from(header, 'utf8')
    const untilMs = clock.monotonicMs() + RECENT_MS
    known.recent = { bytes, given: Buffer.alloc(bytes.length), untilMs }
    // Here, because this happens once a second at most: what is answered from memory in between is free of it.
    noteUse({ kind: 'api_key', name: known.apiKey.id }, known)
  }

  function recognize(authorizationHeader: string | undefined): Caller | undefined {
    if (authorizationHeader === undefined) return undefined
    if (authorizationHeader.startsWith(USUAL)) {
      const id = authorizationHeader.slice(
        USUAL.length,
        authorizationHeader.indexOf('_', USUAL.length),
      )
      const known = loaded.keys.get(id)
      if (known !== undefined && isRecent(known, authorizationHeader)) return known.caller
    }
    const [, key, id = ''] = API_KEY.exec(authorizationHeader) ?? []
    if (key !== undefined) {
      const known = loaded.keys.get(id)
      if (!isKey(key, known?.apiKey, clock) || known === undefined) return undefined
      remember(known, authorizationHeader)
      return known.caller
    }
    const [, token] = JWT.exec(authorizationHeader) ?? []
    return token === undefined ? undefined : loaded.jwts.recall(token)?.caller
  }

  return {
    recognize,
    authenticate(authorizationHeader) {
      const caller = recognize(authorizationHeader)
      if (caller !== undefined) return caller
      const [, token] = JWT.exec(authorizationHeader ?? '') ?? []
      if (token !== undefined) return verify(token)
      if (authorizationHeader !== undefined && BEARER.test(authorizationHeader)) throw invalidKey()
      throw new BrokerError(
        'caller_unauthenticated',
        'Send an API key of this broker, or a JWT of a known issuer, as Authorization: Bearer ….',
      )
    },
    mayUse: (caller, right) => caller.rights.has(right),
    maySee: (caller, user) => caller.users.some((pattern) => matchesUserPattern(pattern, user)),
    mayCall: ({ proxyAllow }, method, path) =>
      proxyAllow === undefined ||
      proxyAllow.some((pattern) => matchesCallPattern(pattern, method, path)),
    warnings() {
      const callersFile = invalid ?? loaded.problem
      const keys = [...loaded.keySets.values()].map((set) => set.problem()).find(Boolean)
      return {
        ...(callersFile === undefined
          ? {}
          : { callers_file: `the last good one is in force: ${callersFile}` }),
        ...(keys === undefined ? {} : { caller_keys: `a jwks_uri ${keys}` }),
      }
    },
    close() {
      clearInterval(poll)
    },
  }
}

/**
 * Makes of the entries what requests are checked against. Keys that a URL has given stay, and so do those of a key file
 * that cannot be read any more.
 *
 * @throws CallersFileError when there are no keys at all for an entry
 */
async function loadedOf(
  entries: readonly CallerEntry[],
  options: {
    before: Loaded
    directory: string
    /** Filled with the key files, whether they can be read or not, each with its version from before it was read. */
    keyFiles: Map<string, string>
    ports: Pick<Ports, 'clock' | 'log'>
  },
): Promise<Loaded> {
  const { before, directory, keyFiles, ports } = options
  const keys = new Map<string, KnownKey>()
  const jwts: KnownJwt[] = []
  const keySets = new Map<string, KeySet>()
  const problems: string[] = []
  let problem: string | undefined

  async function keySetOf(given: KeySource, pointer: string): Promise<KeySet | undefined> {
    const source = resolved(given, directory)
    const name = JSON.stringify(source)
    const known = keySets.get(name)
    if (known !== undefined) return known
    const earlier = before.keySets.get(name)
    if (source.kind === 'url') return earlier ?? createRemoteKeys(source, ports)
    keyFiles.set(source.file, await versionOf(source.file))
    try {
      return await readKeyFile(source.file)
    } catch (error) {
      const what = `${pointer}/jwks_file ${error instanceof KeySetError ? error.message : 'cannot be used'}.`
      if (earlier === undefined) problems.push(what)
      else problem ??= what
      return earlier
    }
  }

  for (const [index, { apiKeys, jwts: jwtEntries, ...caller }] of entries.entries()) {
    for (const apiKey of apiKeys) keys.set(apiKey.id, { caller, apiKey })
    for (const [jwtIndex, entry] of jwtEntries.entries()) {
      const keySet = await keySetOf(entry.keys, `/callers/${index}/jwt/${jwtIndex}`)
      if (keySet === undefined) continue
      keySets.set(JSON.stringify(resolved(entry.keys, directory)), keySet)
      jwts.push({ caller, entry, keys: keySet })
    }
  }
  if (problems.length > 0) throw new CallersFileError(problems)
  return {
    keys,
    jwts: createJwtCallers(jwts, ports.clock),
    keySets,
    problem,
  }
}

/** Paths in the callers file are relative to its folder. */
function resolved(source: KeySource, directory: string): KeySource {
  const absolute = (path: string): string => resolve(directory, path)
  if (source.kind === 'file') return { kind: 'file', file: absolute(source.file) }
  return {
    ...source,
    caFile: source.caFile && absolute(source.caFile),
    tokenFile: source.tokenFile && absolute(source.tokenFile),
  }
}

function invalidKey(): BrokerError {
  return new BrokerError('caller_unauthenticated', 'The API key is not valid.', {
    credentialRefused: true,
  })
}

/** Compares digests of equal length in constant time, of a known key and of none alike. */
function isKey(key: string, apiKey: ApiKey | undefined, clock: Pick<Clock, 'now'>): boolean {
  // As text and back: for something this short that takes half as long as asking for bytes.
  const digest = Buffer.from(hash('sha256', key, 'hex'), 'hex')
  const isSame = timingSafeEqual(digest, apiKey?.sha256 ?? NO_DIGEST)
  return isSame && apiKey !== undefined && isInForce(apiKey, clock)
}

function isInForce({ expiresAt }: ApiKey, clock: Pick<Clock, 'now'>): boolean {
  return expiresAt === undefined || expiresAt > clock.now()
}

async function readCallers(path: string, now: Date): Promise<CallerEntry[]> {
  let text: string
  let names: number
  try {
    text = await readFile(path, 'utf8')
    names = (await stat(path)).nlink
  } catch {
    throw new CallersFileError(['The file cannot be read.'])
  }
  // A file that is mounted by itself stays what it was when another takes its place: a key taken out would go on working.
  if (names === 0) {
    throw new CallersFileError([
      'The file has been replaced where it is mounted from, and its successor cannot be seen here. Mount its folder.',
    ])
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
