// Which requests may use the session cookie, and which origins are told so by CORS. Pure: headers in, verdict out.
// The cookie is Strict as well; this stands for browsers and sibling hosts that Strict does not stop.

import type { IncomingHttpHeaders } from 'node:http'

export interface OriginRules {
  /** The broker's own origin, as browsers see it. */
  ownOrigin: string
  /** Others whose pages may call, compared exactly. */
  allowedOrigins: readonly string[]
}

const SAFE_METHODS: ReadonlySet<string> = new Set(['GET', 'HEAD', 'OPTIONS'])

/** Places where an answer would be shown inside somebody's page. */
const EMBEDDED: ReadonlySet<string> = new Set(['object', 'embed', 'iframe', 'frame', 'fencedframe'])

/**
 * Returns why a cookie-authenticated request is refused, or undefined when it may pass.
 *
 * The header `X-CSRF: 1` is asked of every one, because a page of another origin cannot send it without
 * asking first. Then Fetch Metadata decides; without it the Origin must be one that is known. Without
 * either, a safe method passes: no browser sends the header so, other clients do.
 *
 * @see {@link https://www.w3.org/TR/fetch-metadata/ Fetch Metadata}
 */
export function refuseCrossSite(
  headers: IncomingHttpHeaders,
  rules: OriginRules & { method: string },
): string | undefined {
  if (headers['x-csrf'] !== '1') return 'The header X-CSRF: 1 is missing.'
  if (EMBEDDED.has(String(headers['sec-fetch-dest']))) return 'The request comes from a frame.'
  const { origin, 'sec-fetch-site': site } = headers
  const ownOrListed = origin === rules.ownOrigin || isListed(origin, rules)
  switch (site) {
    case undefined:
      if (ownOrListed) return undefined
      if (origin === undefined && SAFE_METHODS.has(rules.method)) return undefined
      return 'The request does not come from a page of a known origin.'
    case 'same-origin':
      return origin === undefined || ownOrListed
        ? undefined
        : 'The request does not come from a page of a known origin.'
    case 'same-site':
      return isListed(origin, rules)
        ? undefined
        : 'The request comes from a page of a sibling origin that is not listed.'
    case 'none':
      return headers['sec-fetch-mode'] === 'navigate'
        ? undefined
        : 'The request comes from no page, and is no navigation.'
    default:
      return 'The request comes from a page of another site.'
  }
}

/**
 * Returns why a request may neither begin nor complete a login, or undefined for what a person opened as
 * a page: prefetches, images, frames and scripts spend nothing.
 */
export function refuseNonNavigation(headers: IncomingHttpHeaders): string | undefined {
  if (isPrefetch(headers['sec-purpose']) || isPrefetch(headers['purpose'])) {
    return 'The browser only fetched this ahead of its use.'
  }
  const { 'sec-fetch-dest': dest, 'sec-fetch-mode': mode } = headers
  if (dest !== undefined && dest !== 'document') return 'A login is opened as a page.'
  if (mode !== undefined && mode !== 'navigate') return 'A login is opened as a page.'
  return undefined
}

/** `Sec-Purpose: prefetch;prerender` is one too; older browsers say `Purpose: prefetch`. */
function isPrefetch(purpose: string | string[] | undefined): boolean {
  return purpose !== undefined && String(purpose).toLowerCase().includes('prefetch')
}

const CORS_METHODS = 'GET, HEAD, POST, PUT, PATCH, DELETE'
/** What the proxy passes on, and the broker's own. */
const CORS_REQUEST_HEADERS =
  'Accept, Accept-Language, Content-Encoding, Content-Language, Content-Type, If-Match, If-Modified-Since, ' +
  'If-None-Match, If-Range, If-Unmodified-Since, Prefer, Range, X-CSRF, X-Request-Id'
/** What comes back through the proxy and a page's script may not read unasked. */
const CORS_RESPONSE_HEADERS =
  'Accept-Ranges, Allow, Content-Disposition, Content-Encoding, Content-Range, ETag, Location, ' +
  'Preference-Applied, Proxy-Status, Retry-After, Warning, X-Correlation-Id, X-Request-Id'
/** Ten minutes; Chrome keeps a preflight for two hours at most. */
const CORS_MAX_AGE_SECONDS = 600

/**
 * Returns the CORS headers of an answer. None at all while no origin is listed; then only the exact origin,
 * never `*` and never an echo of an unknown one.
 */
export function corsHeaders(
  headers: IncomingHttpHeaders,
  rules: OriginRules & { preflight: boolean },
): Record<string, string> {
  if (rules.allowedOrigins.length === 0) return {}
  const vary = { vary: 'Origin, Sec-Fetch-Site' }
  const { origin } = headers
  if (origin === undefined || !isListed(origin, rules)) return vary
  return {
    ...vary,
    'access-control-allow-origin': origin,
    'access-control-allow-credentials': 'true',
    ...(rules.preflight
      ? {
          'access-control-allow-methods': CORS_METHODS,
          'access-control-allow-headers': CORS_REQUEST_HEADERS,
          'access-control-max-age': String(CORS_MAX_AGE_SECONDS),
        }
      : { 'access-control-expose-headers': CORS_RESPONSE_HEADERS }),
  }
}

function isListed(origin: string | undefined, rules: OriginRules): boolean {
  return origin !== undefined && rules.allowedOrigins.includes(origin)
}
