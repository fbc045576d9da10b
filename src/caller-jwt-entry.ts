// A `jwt` entry of the callers file: which tokens of which issuer are this caller's, and where the issuer's keys are.
// Who presents such a token is checked in caller-jwt.ts, with the keys of caller-keys.ts.

import { endpointUrl } from './setting-values.ts'
import { type Members, readList, readMembers, readText } from './strict-json.ts'

/** Where the keys of an issuer are: a file, or an URL with what it takes to be let in. */
export type KeySource =
  | { kind: 'file'; file: string }
  | { kind: 'url'; url: string; caFile: string | undefined; tokenFile: string | undefined }

export type ClaimValue = string | number | boolean

/** Tokens of `issuer` for `audience` whose claims are all those of `claims`. */
export interface JwtEntry {
  issuer: string
  audience: string
  keys: KeySource
  /** What the token must say, `sub` among it. Never empty: an issuer alone names nobody. */
  claims: ReadonlyMap<string, ClaimValue>
}

/** Claims that mean something to the check itself (RFC 7519 section 4.1, RFC 7800). */
const OWN_CLAIMS: ReadonlySet<string> = new Set([
  'iss',
  'sub',
  'aud',
  'exp',
  'nbf',
  'iat',
  'jti',
  'cnf',
])
/** Two or three tell a service from any other. */
const CLAIMS_MAX = 20
/** No control characters, no lone surrogates. */
const TEXT = /^\P{C}{1,512}$/u
const PATH = /^[^\0]{1,4096}$/

/** Reads one entry of `jwt`; what is wrong with it is added to `problems`. */
function readJwtEntry(value: unknown, pointer: string, problems: string[]): JwtEntry {
  const members = readMembers(
    value,
    pointer,
    {
      required: ['issuer', 'audience'],
      optional: ['jwks_uri', 'jwks_file', 'ca_file', 'token_file', 'subject', 'claims'],
    },
    problems,
  )
  const text = (name: string): string =>
    readText(
      members[name],
      `${pointer}/${name}`,
      (one) => TEXT.test(one),
      'a text of 1 to 512 characters',
      problems,
    )
  const subject = text('subject')
  const claims = readClaims(members['claims'], `${pointer}/claims`, problems)
  if (members === value && members['subject'] === undefined && members['claims'] === undefined) {
    problems.push(
      `${pointer} must have subject or claims: without them every client of the issuer would be this caller.`,
    )
  }
  if (subject !== '') claims.set('sub', subject)
  return {
    issuer: text('issuer'),
    audience: text('audience'),
    keys: readKeySource(members, pointer, problems),
    claims,
  }
}

/**
 * Tells whether one token could match both entries: same issuer, and no claim of which they want different values.
 * The audience does not tell them apart, because a token may have several.
 */
export function mayBothMatch(one: JwtEntry, other: JwtEntry): boolean {
  if (one.issuer !== other.issuer) return false
  return [...one.claims].every(([name, value]) => {
    const wanted = other.claims.get(name)
    return wanted === undefined || wanted === value
  })
}

function readKeySource(members: Members, pointer: string, problems: string[]): KeySource {
  const path = (name: string): string | undefined =>
    readText(
      members[name],
      `${pointer}/${name}`,
      (one) => PATH.test(one),
      'the path of a file',
      problems,
    ) || undefined
  const url = readText(
    members['jwks_uri'],
    `${pointer}/jwks_uri`,
    (one) => 'value' in endpointUrl(one),
    'an https:// URL (http:// on a loopback host only) without user name and fragment',
    problems,
  )
  const file = path('jwks_file')
  const caFile = path('ca_file')
  const tokenFile = path('token_file')
  // None of the two, or both; that the entry is no object has been told.
  const named = [members['jwks_uri'], members['jwks_file']].filter((one) => one !== undefined)
  if (named.length !== 1 && Object.keys(members).length > 0) {
    problems.push(`${pointer} must have jwks_uri or jwks_file, one of them.`)
  }
  if (file === undefined) return { kind: 'url', url, caFile, tokenFile }
  if (caFile !== undefined || tokenFile !== undefined) {
    problems.push(`${pointer} must have ca_file and token_file with jwks_uri only.`)
  }
  return { kind: 'file', file }
}

function readClaims(value: unknown, pointer: string, problems: string[]): Map<string, ClaimValue> {
  const claims = new Map<string, ClaimValue>()
  if (value === undefined) return claims
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    problems.push(`${pointer} must be a JSON object.`)
    return claims
  }
  const entries = Object.entries(value)
  if (entries.length === 0 || entries.length > CLAIMS_MAX) {
    problems.push(`${pointer} must have 1 to ${CLAIMS_MAX} members.`)
  }
  for (const [name, wanted] of entries as Array<[string, unknown]>) {
    // Its name is not told: it may be anything.
    if (!TEXT.test(name) || OWN_CLAIMS.has(name)) {
      problems.push(`${pointer} must have no members named ${[...OWN_CLAIMS].join(', ')}.`)
    } else if (isClaimValue(wanted)) claims.set(name, wanted)
    else problems.push(`${pointer} must have texts, whole numbers, true or false as values.`)
  }
  return claims
}

function isClaimValue(value: unknown): value is ClaimValue {
  return (
    (typeof value === 'string' && TEXT.test(value)) ||
    typeof value === 'boolean' ||
    Number.isSafeInteger(value)
  )
}

/** Reads the list of a caller's entries. */
export function readJwtEntries(value: unknown, pointer: string, problems: string[]): JwtEntry[] {
  if (Array.isArray(value) && value.length === 0) {
    problems.push(`${pointer} must have an entry, or be left out.`)
  }
  return readList(value, pointer, readJwtEntry, problems)
}
