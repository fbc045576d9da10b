// Where a browser may be sent after a login. Anything else would make the broker an open redirector
// (RFC 9700 section 4.11), so what is not plainly ours falls back to a page that says it is done.

/** The broker's own page for a login that was to go nowhere in particular. It may have no other, and `/` may be the callback. */
export const DONE_PATH = '/auth/done'

/** The longest `return_to` that is kept, before and after percent-encoding. */
const CHARACTERS_MAX = 2_048

/** C0, DEL, C1, and the backslash, which browsers read as a slash. */
// oxlint-disable-next-line no-control-regex
const FORBIDDEN = /[\u0000-\u001f\u007f-\u009f\\]/

/** A second slash in front, also escaped, is a host to somebody along the way. */
const LEADS_ELSEWHERE = /^\/(?:\/|%2f|%5c)/i

export interface ReturnOrigins {
  publicUrl: string
  allowedOrigins: readonly string[]
  /** Where the callback is. */
  redirectUri: string
}

/**
 * Returns where to go after the login: a path of the broker's own origin as a path, an address on one of
 * `allowedOrigins` in full, and `DONE_PATH` for everything else. What is returned is ASCII and fits a header.
 */
export function safeReturnTo(text: string | undefined, origins: ReturnOrigins): string {
  return (text === undefined ? undefined : parseReturnTo(text, origins)) ?? DONE_PATH
}

/**
 * The same, but undefined for what leads elsewhere. So does the callback: opened without an answer of Pagero it tells a
 * person that the login has failed.
 */
export function parseReturnTo(text: string, origins: ReturnOrigins): string | undefined {
  if (text.length > CHARACTERS_MAX || FORBIDDEN.test(text)) return undefined
  const { publicUrl, allowedOrigins } = origins
  const own = new URL(publicUrl).origin
  const callbackPath = new URL(origins.redirectUri).pathname
  if (text.startsWith('/')) {
    if (LEADS_ELSEWHERE.test(text)) return undefined
    const resolved = URL.parse(text, publicUrl)
    if (resolved?.origin !== own || resolved.pathname === callbackPath) return undefined
    const path = `${resolved.pathname}${resolved.search}${resolved.hash}`
    // `/..//elsewhere` turns into `//elsewhere` only when its dots are resolved.
    return LEADS_ELSEWHERE.test(path) || path.length > CHARACTERS_MAX ? undefined : path
  }
  const origin = [publicUrl, ...allowedOrigins].find(
    (known) => text === known || text.startsWith(`${known}/`),
  )
  if (origin === undefined) return undefined
  const resolved = URL.parse(text)
  if (resolved?.origin !== origin || resolved.href.length > CHARACTERS_MAX) return undefined
  return origin === own && resolved.pathname === callbackPath ? undefined : resolved.href
}

/**
 * Returns the address with this parameter in its query, before a fragment, and in place of any of that name: an
 * application may well send as `return_to` the address that an earlier connection came back to. Name and value need no
 * escaping.
 */
export function withParameter(returnTo: string, name: string, value: string): string {
  const [, path = '', query = '', fragment = ''] =
    /^([^?#]*)(?:\?([^#]*))?(#.*)?$/.exec(returnTo) ?? []
  const kept = query.split('&').filter((pair) => pair !== '' && pair.split('=', 1)[0] !== name)
  return `${path}?${[...kept, `${name}=${value}`].join('&')}${fragment}`
}
