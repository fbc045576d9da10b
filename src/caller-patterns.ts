// What a caller's entry may match: users by `*`, proxied calls by method and path.
// Matching never goes back over what it has passed, so no entry can make a request slow. Nothing is decoded here.

/** User patterns: the characters of a user key, and `*`. */
const USER_PATTERN = /^[A-Za-z0-9._~@:+*-]{1,255}$/
/** A method, and a path of RFC 3986 section 3.3 without `*`, with `**` at its end or not. */
const CALL_PATTERN =
  /^(?:GET|HEAD|POST|PUT|PATCH|DELETE) \/(?:[A-Za-z0-9._~!$&'()+,=:@/-]|%[0-9A-Fa-f]{2}){0,2000}(?:\*\*)?$/
const REST = '**'

/** Tells whether the text can stand in `users`. */
export function isUserPattern(text: string): boolean {
  return USER_PATTERN.test(text)
}

/** Tells whether the text can stand in `proxy_allow`. */
export function isCallPattern(text: string): boolean {
  return CALL_PATTERN.test(text)
}

/** Tells whether the pattern covers the user. `*` stands for any run of characters, none included. */
export function matchesUserPattern(pattern: string, user: string): boolean {
  const [first = '', ...others] = pattern.split('*')
  const last = others.pop()
  if (last === undefined) return user === first
  if (user.length < first.length + last.length) return false
  if (!user.startsWith(first) || !user.endsWith(last)) return false
  // Between both ends the leftmost place is always as good as any later one.
  const end = user.length - last.length
  let from = first.length
  for (const part of others) {
    const found = user.indexOf(part, from)
    if (found === -1 || found + part.length > end) return false
    from = found + part.length
  }
  return true
}

/**
 * Tells whether the pattern covers the call. `**` stands for any rest of the path, the empty one included; without it
 * the path must be the same byte for byte. `GET` does not cover `HEAD`.
 */
export function matchesCallPattern(pattern: string, method: string, path: string): boolean {
  const space = pattern.indexOf(' ')
  if (pattern.slice(0, space) !== method) return false
  const wanted = pattern.slice(space + 1)
  return wanted.endsWith(REST) ? path.startsWith(wanted.slice(0, -REST.length)) : path === wanted
}
