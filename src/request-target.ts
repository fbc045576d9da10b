// The target of a proxied request, read off the raw request line: what is authorized is byte for byte what is sent.
// Nothing here resolves, decodes for use or rebuilds a path. Whatever two parsers could read in two ways is refused.
// Which prefix a route has is the route's own knowledge.

import { BrokerError } from './errors.ts'

/** Twice the longest URL that the usual servers take without settings of their own, and half our header limit. */
export const TARGET_BYTES_MAX = 8_192

/** Path characters of RFC 3986 section 3.3, and whole percent-escapes. The `;` is looked at apart. */
const PATH = /^(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*$/

/**
 * Visible ASCII without `"`, `#`, `<`, `>` and `\`. More than RFC 3986 section 3.4 allows: browsers send
 * `[`, `]`, `{`, `}`, `|`, `^` and the backtick of a query as they are, and no server splits a query at them.
 */
const QUERY = /^[!$-;=?-[\]-~]*$/

/** Dot segments, empty segments, segment parameters, backslashes and NUL. Every segment follows a slash. */
const AMBIGUOUS = /[\\;\0]|\/\/|\/\.{1,2}(?:\/|$)/

/** Some server behind decodes once more than it should; one that decodes three times is not believed in. */
const DECODINGS = 2

export interface ForwardTarget {
  /** What precedes the target, as it was sent: `/api`, or `/v1/users/alice/pagero`. */
  prefix: string
  /** Path and query, to be sent as they are. Begins with a slash. */
  target: string
  /** The target without its query: what an allow-list is matched with. */
  path: string
}

/**
 * Splits the raw URL of a request behind the prefix of its route and checks the rest. The prefix is matched with the
 * raw bytes: `/%61pi/` is not `/api/`, though a router takes it for it. The query is never parsed.
 *
 * `prefix` is anchored at the start and matches up to the slash that begins the target, without it.
 *
 * @throws BrokerError `request_invalid`, `uri_too_long`
 * @see {@link https://www.rfc-editor.org/rfc/rfc3986#section-3.3 RFC 3986 section 3.3}
 */
export function readForwardTarget(rawUrl: string, prefix: RegExp): ForwardTarget {
  const found = prefix.exec(rawUrl)
  if (found === null || found.index !== 0 || rawUrl[found[0].length] !== '/') {
    throw refusal('The path does not begin as this resource does. Send its prefix unescaped.')
  }
  const target = rawUrl.slice(found[0].length)
  if (target.length > TARGET_BYTES_MAX) {
    throw new BrokerError(
      'uri_too_long',
      `Path and query are longer than ${TARGET_BYTES_MAX} characters.`,
    )
  }
  const queryAt = target.indexOf('?')
  const path = queryAt === -1 ? target : target.slice(0, queryAt)
  if (!PATH.test(path)) {
    throw refusal('The path has a character that must be escaped, or a broken percent-escape.')
  }
  if (isAmbiguous(path)) {
    throw refusal(
      'The path has a dot segment, an empty segment, a parameter segment, or an escaped separator.',
    )
  }
  if (queryAt !== -1 && !QUERY.test(target.slice(queryAt + 1))) {
    throw refusal('The query has a character that must be escaped.')
  }
  return { prefix: found[0], target, path }
}

/** Looks for other readings of the path: as it is, and as a careless server may see it after decoding. */
function isAmbiguous(path: string): boolean {
  const slashes = countSlashes(path)
  let form = path
  for (let decodings = 0; ; decodings += 1) {
    if (AMBIGUOUS.test(form) || countSlashes(form) !== slashes) return true
    if (decodings === DECODINGS || !form.includes('%')) return false
    form = decodeOnce(form)
  }
}

/** Byte by byte: no escape is too malformed for it, and what it yields is only looked at. */
function decodeOnce(text: string): string {
  return text.replace(/%([0-9A-Fa-f]{2})/g, (_escape, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  )
}

function countSlashes(text: string): number {
  let count = 0
  for (let at = text.indexOf('/'); at !== -1; at = text.indexOf('/', at + 1)) count += 1
  return count
}

function refusal(detail: string): BrokerError {
  return new BrokerError('request_invalid', detail, { errors: [{ pointer: 'path', detail }] })
}
