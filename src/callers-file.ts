// CALLERS_FILE: who may call the internal listener, as JSON. Read strictly, with every problem at its JSON pointer
// (RFC 6901) and no value in any message, because a key may have been pasted where its hash belongs.
// Of a key the file holds the SHA-256 alone. Who presents one is checked in callers.ts.

import { type JwtEntry, mayBothMatch, readJwtEntries } from './caller-jwt-entry.ts'
import { isCallPattern, isUserPattern } from './caller-patterns.ts'
import { readList, readMembers, readText } from './strict-json.ts'

export const RIGHTS = [
  'token:read',
  'proxy:call',
  'grant:read',
  'grant:manage',
  'ops:read',
] as const
export type Right = (typeof RIGHTS)[number]

/** A service that may call, without its credentials. */
export interface Caller {
  name: string
  rights: ReadonlySet<Right>
  /** Patterns of the users that it may name. None: nobody. */
  users: readonly string[]
  /** Patterns of the calls that it may make to Pagero. Undefined: every one. */
  proxyAllow: readonly string[] | undefined
}

export interface ApiKey {
  id: string
  /** SHA-256 of the whole key. */
  sha256: Buffer
  expiresAt: Date | undefined
}

export interface CallerEntry extends Caller {
  apiKeys: readonly ApiKey[]
  jwts: readonly JwtEntry[]
}

/** A callers file that cannot be used: every problem, each with its place. */
export class CallersFileError extends Error {
  readonly problems: readonly string[]

  constructor(problems: readonly string[]) {
    super(`CALLERS_FILE cannot be used:\n${problems.map((problem) => `  ${problem}`).join('\n')}`)
    this.name = 'CallersFileError'
    this.problems = problems
  }
}

/** A thousand callers with a few hundred bytes each fit in several times over. */
const FILE_BYTES_MAX = 1024 * 1024
/** The key in use and its successor. */
const ACTIVE_KEYS_MAX = 2

const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/
const NAME_FORM = 'up to 64 of a-z 0-9 . _ -, of which the first is a letter or digit'
const KEY_ID = /^[a-z0-9]{4,16}$/
const SHA256 = /^[0-9a-f]{64}$/
const INSTANT = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)$/

/**
 * Reads the text of a callers file.
 *
 * `now` tells which keys have expired: they no longer count for the limit of two.
 *
 * @throws CallersFileError with every problem there is
 */
export function parseCallers(text: string, now: Date = new Date()): CallerEntry[] {
  const problems: string[] = []
  if (Buffer.byteLength(text) > FILE_BYTES_MAX) {
    throw new CallersFileError([`The file is larger than ${FILE_BYTES_MAX} bytes.`])
  }
  let root: unknown
  try {
    root = JSON.parse(text)
  } catch {
    // The parser's own message quotes the text.
    throw new CallersFileError(['The file is not valid JSON.'])
  }
  const file = readMembers(root, '', { required: ['callers'] }, problems)
  const entries = readList(file['callers'], '/callers', readCaller, problems)
  refuseTwins(entries, problems)
  for (const [index, { apiKeys }] of entries.entries()) {
    const active = apiKeys.filter(({ expiresAt }) => expiresAt === undefined || expiresAt > now)
    if (active.length > ACTIVE_KEYS_MAX) {
      problems.push(`/callers/${index}/api_keys must have at most two keys that have not expired.`)
    }
  }
  if (problems.length > 0) throw new CallersFileError(problems)
  return entries
}

function readCaller(value: unknown, pointer: string, problems: string[]): CallerEntry {
  const members = readMembers(
    value,
    pointer,
    { required: ['name', 'rights', 'users'], optional: ['api_keys', 'jwt', 'proxy_allow'] },
    problems,
  )
  if (members === value && members['api_keys'] === undefined && members['jwt'] === undefined) {
    problems.push(
      `${pointer} must have api_keys or jwt. A caller without a credential is taken out.`,
    )
  }
  const texts = (name: string, fits: (text: string) => boolean, what: string): string[] =>
    readList(
      members[name],
      `${pointer}/${name}`,
      (entry, at) => readText(entry, at, fits, what, problems),
      problems,
    )
  const apiKeys = readList(members['api_keys'], `${pointer}/api_keys`, readApiKey, problems)
  if (Array.isArray(members['api_keys']) && members['api_keys'].length === 0) {
    problems.push(`${pointer}/api_keys must have a key, or be left out.`)
  }
  return {
    name: readText(members['name'], `${pointer}/name`, matches(NAME), NAME_FORM, problems),
    rights: new Set(texts('rights', isRight, `one of ${RIGHTS.join(', ')}`) as Right[]),
    users: texts('users', isUserPattern, 'a user key, in which * stands for any run of characters'),
    proxyAllow:
      members['proxy_allow'] === undefined
        ? undefined
        : texts(
            'proxy_allow',
            isCallPattern,
            'a method and a path, such as GET /file/v1/**, with ** at the end only',
          ),
    apiKeys,
    jwts: readJwtEntries(members['jwt'], `${pointer}/jwt`, problems),
  }
}

function readApiKey(value: unknown, pointer: string, problems: string[]): ApiKey {
  const members = readMembers(
    value,
    pointer,
    { required: ['id', 'sha256'], optional: ['expires_at'] },
    problems,
  )
  const text = (name: string, fits: (text: string) => boolean, what: string): string =>
    readText(members[name], `${pointer}/${name}`, fits, what, problems)
  const expiresAt = text('expires_at', isInstant, 'a time such as 2027-01-01T00:00:00Z')
  return {
    id: text('id', matches(KEY_ID), '4 to 16 of a-z 0-9'),
    sha256: Buffer.from(text('sha256', matches(SHA256), '64 lower-case hex digits'), 'hex'),
    expiresAt: expiresAt === '' ? undefined : new Date(expiresAt),
  }
}

function matches(pattern: RegExp): (text: string) => boolean {
  return (text) => pattern.test(text)
}

function isRight(text: string): boolean {
  return RIGHTS.some((right) => right === text)
}

function isInstant(text: string): boolean {
  return INSTANT.test(text) && !Number.isNaN(Date.parse(text))
}

/** Two entries under one name, two keys under one id, or a token of two callers would leave to chance which one counts. */
function refuseTwins(entries: readonly CallerEntry[], problems: string[]): void {
  const names = new Set<string>()
  const ids = new Set<string>()
  for (const [index, { name, apiKeys }] of entries.entries()) {
    if (name !== '' && names.has(name)) {
      problems.push(`/callers/${index}/name must not repeat the name of another caller.`)
    }
    names.add(name)
    for (const [keyIndex, { id }] of apiKeys.entries()) {
      if (id !== '' && ids.has(id)) {
        problems.push(
          `/callers/${index}/api_keys/${keyIndex}/id must not repeat the id of another key.`,
        )
      }
      ids.add(id)
    }
  }
  refuseAmbiguousJwts(entries, problems)
}

function refuseAmbiguousJwts(entries: readonly CallerEntry[], problems: string[]): void {
  const earlier: Array<{ name: string; jwt: JwtEntry; pointer: string }> = []
  for (const [index, { name, jwts }] of entries.entries()) {
    for (const [jwtIndex, jwt] of jwts.entries()) {
      const pointer = `/callers/${index}/jwt/${jwtIndex}`
      // Within one caller it does not matter which of its entries a token matches.
      const twin = earlier.find((one) => one.name !== name && mayBothMatch(one.jwt, jwt))
      if (twin !== undefined && jwt.issuer !== '') {
        problems.push(
          `${pointer} must not match tokens that ${twin.pointer} matches: let both name a subject, or one claim with different values.`,
        )
      }
      earlier.push({ name, jwt, pointer })
    }
  }
}
