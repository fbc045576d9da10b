// Texts of the environment to values: each reader returns the value, or phrases that say what it must be.
// A phrase goes on behind the variable's name and never holds any part of what was given.
// Which setting is read by which reader, and with what bounds, stands in config.ts.

import { isIP } from 'node:net'
import { Secret } from './secret.ts'

export type Reading<T> = { value: T } | { problems: readonly string[] }

export interface EncryptionKey {
  keyId: string
  key: Uint8Array
}

/** The key of the documentation's examples. Everybody has it, so it is refused. */
export const EXAMPLE_ENCRYPTION_KEY = 'ZXhhbXBsZS1rZXktb2YtdGhlLWRvY3MtcmVwbGFjZSE='

/** AES-256. */
const KEY_BYTES = 32
/** A rotation needs two; more than this is a paste of something else. */
const KEYS_MAX = 32
const KEY_ID = /^[A-Za-z0-9_-]{1,32}$/
/** 32 bytes in base64 or base64url, padded or not. */
const KEY_TEXT = /^(?:[A-Za-z0-9+/]{43}|[A-Za-z0-9_-]{43})=?$/
/** Lists in the environment are written by hand. */
const LIST_MAX = 100

function value<T>(read: T): Reading<T> {
  return { value: read }
}

function mustBe(what: string): { problems: readonly string[] } {
  return { problems: [`must be ${what}`] }
}

/** Reads seconds, milliseconds and the like: digits, with up to three decimals unless `whole`. */
export function numberBetween(min: number, max: number, kind: 'whole' | 'fraction') {
  const pattern = kind === 'whole' ? /^[0-9]{1,15}$/ : /^[0-9]{1,9}(?:\.[0-9]{1,3})?$/
  const noun = kind === 'whole' ? 'a whole number' : 'a number'
  return (text: string): Reading<number> => {
    const read = pattern.test(text) ? Number(text) : Number.NaN
    return read >= min && read <= max
      ? value(read)
      : mustBe(`${noun} from ${min} to ${max}, in digits alone`)
  }
}

/** Reads one of the words. */
export function oneOf<const W extends string>(...words: readonly W[]) {
  return (text: string): Reading<W> => {
    const found = words.find((word) => word === text)
    return found === undefined ? mustBe(words.join(' or ')) : value(found)
  }
}

/** Reads a text that has the pattern; `what` describes it. */
export function matching(pattern: RegExp, what: string) {
  return (text: string): Reading<string> => (pattern.test(text) ? value(text) : mustBe(what))
}

/** Reads a client id: the characters of RFC 6749 appendix A.1, without space at either end. */
export const clientId = matching(
  /^[!-~](?:[ -~]{0,510}[!-~])?$/,
  'up to 512 visible ASCII characters, without space at either end',
)

/** Reads a secret of the same characters (RFC 6749 appendix A.2). */
export function secretText(text: string): Reading<Secret> {
  const read = clientId(text)
  return 'value' in read ? value(new Secret(read.value)) : read
}

/** Reads a path of the file system; whether it is there is seen when it is used. */
export const filePath = matching(/^[^\0]{1,4096}$/, 'a path')

/** Reads an address or host name to bind. */
export function bindHost(text: string): Reading<string> {
  return isIP(text) !== 0 || /^[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})$/.test(text)
    ? value(text)
    : mustBe('an IP address or a host name')
}

/** Reads the URL of a PostgreSQL database. It holds a password, so it is a secret. */
export function databaseUrl(text: string): Reading<Secret> {
  return /^postgres(?:ql)?:\/\//.test(text) && URL.canParse(text)
    ? value(new Secret(text))
    : mustBe('a URL that begins with postgres:// or postgresql://')
}

// ── URLs: checked with a parser, kept as they were written ───────────────────────────────────────

const HTTP_URL = 'an https:// URL (http:// on a loopback host only) without user name and fragment'

/** Visible ASCII without `#`, which begins a fragment, and the backslash. */
const VISIBLE = /^[!"$-[\]-~]+$/
/** A scheme in lower case, and an authority without user name. */
const AUTHORITY = /^https?:\/\/[^/?@]+(?:[/?]|$)/

/** Parses a URL that may carry secrets: TLS, or a host that is this machine. */
function parseHttpUrl(text: string): URL | undefined {
  // The parser mends spaces, backslashes and missing slashes; what it would mend is refused.
  if (!VISIBLE.test(text) || !AUTHORITY.test(text) || !URL.canParse(text)) return undefined
  const url = new URL(text)
  return url.protocol === 'https:' || isLoopback(url.hostname) ? url : undefined
}

/** The parser has brought every spelling of an IPv4 address into four decimal parts. */
function isLoopback(hostname: string): boolean {
  return hostname === 'localhost' || hostname === '[::1]' || /^127(?:\.\d{1,3}){3}$/.test(hostname)
}

/** Reads an endpoint's URL; a query is allowed (RFC 6749 section 3.1). */
export function endpointUrl(text: string): Reading<string> {
  return parseHttpUrl(text) === undefined ? mustBe(HTTP_URL) : value(text)
}

/** Reads where a collector is: by plain HTTP too, for it stands beside the broker and is sent no secret of a user. */
export function collectorUrl(text: string): Reading<string> {
  const fits =
    VISIBLE.test(text) && AUTHORITY.test(text) && URL.canParse(text) && !/[?#]/.test(text)
  return fits ? value(text) : mustBe('an http:// or https:// URL without user, query and fragment')
}

/** A field's name (RFC 9110 section 5.1) and its value, percent-encoded, as OpenTelemetry writes them in a variable. */
const FIELD_PAIR = /^[!#$%&'*+.^`|~\w-]+=([\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]+)$/
/** What a field's value may be of. */
const FIELD_VALUE = /^[\x20-\x7e]+$/

/** Reads header fields, of which any may hold a credential. */
export function fieldPairs(text: string): Reading<Secret> {
  const fits = text.split(',').every((pair) => {
    const [, encoded = ''] = FIELD_PAIR.exec(pair.trim()) ?? []
    try {
      return FIELD_VALUE.test(decodeURIComponent(encoded))
    } catch {
      return false
    }
  })
  return fits
    ? value(new Secret(text))
    : mustBe('name=value, name=value, … with percent-encoded values')
}

/** Reads a URL without query: an issuer. It stays byte for byte as it is. */
export function plainUrl(text: string): Reading<string> {
  return parseHttpUrl(text) === undefined || text.includes('?')
    ? mustBe(`${HTTP_URL}, and without query`)
    : value(text)
}

/** What the public listener serves itself, or proxies; a callback there would never arrive. */
const OWN_PATH =
  /^\/(?:livez|auth\/(?:login|done|session|logout|(?:connect|session-start)\/.*)|api(?:\/.*)?)$/

/** Reads a redirect URI. Its path is the callback's route, which is compared undecoded. */
export function redirectUri(text: string): Reading<string> {
  const read = plainUrl(text)
  if (!('value' in read)) return read
  const { pathname } = new URL(text)
  if (/[%*]/.test(pathname)) return mustBe(`${HTTP_URL}, and without % and * in its path`)
  if (OWN_PATH.test(pathname)) {
    const own =
      '/auth/login, /auth/connect, /auth/session-start, /auth/done, /auth/session, /auth/logout, /livez, /api'
    return { problems: [`must not have a path that the broker serves itself: ${own}`] }
  }
  return read
}

/** Reads an origin as browsers write it, so that comparing texts is comparing origins (RFC 6454 section 6.2). */
export function origin(text: string): Reading<string> {
  return parseHttpUrl(text)?.origin === text
    ? value(text)
    : mustBe(
        'an origin such as https://host or https://host:8443: https:// (http:// on a loopback host only), ' +
          'lower case, no default port, no path and no trailing slash',
      )
}

// ── Lists ────────────────────────────────────────────────────────────────────────────────────────

/** Reads a list separated by commas; each entry by `readEntry`, none twice. */
export function listOf<T>(readEntry: (text: string) => Reading<T>) {
  return (text: string): Reading<T[]> => {
    const entries = text.split(',').map((entry) => entry.trim())
    if (entries.length > LIST_MAX) return { problems: [`must have at most ${LIST_MAX} entries`] }
    const values: T[] = []
    const problems: string[] = []
    for (const [index, entry] of entries.entries()) {
      const read = readEntry(entry)
      if ('value' in read) values.push(read.value)
      else problems.push(...read.problems.map((problem) => `entry ${index + 1} ${problem}`))
      if (entries.indexOf(entry) < index) problems.push(`entry ${index + 1} is there twice`)
    }
    return problems.length > 0 ? { problems } : value(values)
  }
}

/** Reads an IP address or a CIDR block. A block of all addresses would trust everybody, so it is none. */
export function addressOrBlock(text: string): Reading<string> {
  const [address = '', prefix, ...rest] = text.split('/')
  const version = isIP(address)
  const prefixMax = version === 4 ? 32 : 128
  const fits =
    prefix === undefined ||
    (/^[1-9][0-9]{0,2}$/.test(prefix) && Number(prefix) <= prefixMax && rest.length === 0)
  return version !== 0 && !address.includes('%') && fits
    ? value(text)
    : mustBe('an IP address or a CIDR block such as 192.0.2.0/24')
}

/** Reads a duration of calendar years, months and days, longer than nothing. */
export function calendarDuration(text: string): Reading<string> {
  return /^P(?=\d)(?:\d{1,3}Y)?(?:\d{1,3}M)?(?:\d{1,5}D)?$/.test(text) && /[1-9]/.test(text)
    ? value(text)
    : mustBe('an ISO 8601 duration of years, months and days, longer than nothing, such as P3Y')
}

/** Reads the ring of encryption keys: `kid:base64` of 32 bytes each, separated by commas or lines. */
export function encryptionKeys(text: string): Reading<EncryptionKey[]> {
  const entries = text
    .split(/[,\n]/)
    .map((entry) => entry.trim())
    .filter((entry) => entry !== '')
  if (entries.length === 0 || entries.length > KEYS_MAX) {
    return mustBe(`1 to ${KEYS_MAX} entries of the form kid:base64`)
  }
  const keys: EncryptionKey[] = []
  const problems: string[] = []
  for (const [index, entry] of entries.entries()) {
    const read = encryptionKey(entry, keys)
    if (typeof read === 'string') problems.push(`entry ${index + 1} ${read}`)
    else keys.push(read)
  }
  return problems.length > 0 ? { problems } : value(keys)
}

/** A second secret is there while it replaces the first. */
const WEBHOOK_SECRETS_MAX = 2

/** Reads the secrets that webhooks are signed with: `whsec_` and base64 of 24 to 64 bytes, as Standard Webhooks has them. */
export function webhookSecrets(text: string): Reading<Secret[]> {
  const entries = text.split(/[\s,]+/).filter((entry) => entry !== '')
  const wellFormed = (entry: string) => {
    const [, base64 = ''] = /^whsec_([A-Za-z0-9+/]+={0,2})$/.exec(entry) ?? []
    const bytes = Buffer.from(base64, 'base64')
    return bytes.length >= 24 && bytes.length <= 64 && new Set(bytes).size > 1
  }
  return entries.length > 0 &&
    entries.length <= WEBHOOK_SECRETS_MAX &&
    new Set(entries).size === entries.length &&
    entries.every(wellFormed)
    ? value(entries.map((entry) => new Secret(entry)))
    : mustBe(
        'one secret or two different ones, each whsec_ and the base64 of 24 to 64 random bytes',
      )
}

function encryptionKey(entry: string, earlier: readonly EncryptionKey[]): EncryptionKey | string {
  const colon = entry.indexOf(':')
  const keyId = entry.slice(0, Math.max(colon, 0))
  if (!KEY_ID.test(keyId))
    return 'must begin with a key id of 1 to 32 of A-Z a-z 0-9 _ - and a colon'
  const text = entry.slice(colon + 1)
  const key = Buffer.from(text, 'base64')
  if (!KEY_TEXT.test(text) || key.length !== KEY_BYTES) {
    return `must be exactly ${KEY_BYTES} bytes in base64 after its colon`
  }
  if (key.every((byte) => byte === key[0])) return 'must be random: all its bytes are the same'
  if (key.equals(Buffer.from(EXAMPLE_ENCRYPTION_KEY, 'base64'))) {
    return 'must be a key of your own, not the example of the documentation'
  }
  if (earlier.some((one) => one.keyId === keyId)) return 'must not repeat the key id of another'
  if (earlier.some((one) => key.equals(one.key))) return 'must not repeat the key of another'
  return { keyId, key }
}
