// Why a call could not be forwarded: failures from below as errors of ours, and as Proxy-Status of RFC 9209.
// Decided by error codes, never by messages. Nothing of a failure but its kind reaches a client.

import { BrokerError, type ProblemCode } from './errors.ts'

/** Error types of RFC 9209 section 2.3, by the code of the failure: Node's, undici's (`UND_ERR_…`), or the forwarder's own. */
const ERROR_TYPES: ReadonlyMap<string, string> = new Map([
  ['ECONNREFUSED', 'connection_refused'],
  ['ECONNRESET', 'connection_terminated'],
  ['EPIPE', 'connection_terminated'],
  ['UND_ERR_SOCKET', 'connection_terminated'],
  ['ETIMEDOUT', 'connection_timeout'],
  ['UND_ERR_CONNECT_TIMEOUT', 'connection_timeout'],
  ['ENOTFOUND', 'dns_error'],
  ['EAI_AGAIN', 'dns_error'],
  ['ADDRESS_REFUSED', 'destination_ip_prohibited'],
  ['EHOSTUNREACH', 'destination_ip_unroutable'],
  ['ENETUNREACH', 'destination_ip_unroutable'],
  ['CONNECTION_LIMIT', 'connection_limit_reached'],
  ['UND_ERR_HEADERS_TIMEOUT', 'http_response_timeout'],
  ['UND_ERR_BODY_TIMEOUT', 'connection_read_timeout'],
  ['UND_ERR_HEADERS_OVERFLOW', 'http_response_header_section_size'],
  ['ANSWER_TOO_LARGE', 'http_response_body_size'],
  ['UND_ERR_RES_CONTENT_LENGTH_MISMATCH', 'http_response_incomplete'],
])

const TIMEOUTS: ReadonlySet<string> = new Set([
  'connection_timeout',
  'connection_read_timeout',
  'http_response_timeout',
])

/** For the problems that are found before anything is sent. */
const ERROR_TYPES_OF_PROBLEMS: Readonly<Partial<Record<ProblemCode, string>>> = {
  session_required: 'http_request_denied',
  csrf_refused: 'http_request_denied',
  caller_unauthenticated: 'http_request_denied',
  caller_forbidden: 'http_request_denied',
  rate_limited: 'http_request_denied',
  request_invalid: 'http_request_error',
  uri_too_long: 'http_request_error',
  payload_too_large: 'http_request_error',
  loop_detected: 'proxy_loop_detected',
  upstream_timeout: 'http_response_timeout',
  upstream_unreachable: 'http_protocol_error',
  integrity_failure: 'proxy_internal_error',
  internal_error: 'proxy_internal_error',
}

/** Returns what a failure of the call means to the client; an error of ours is returned as it is. */
export function asForwardError(failure: unknown): BrokerError {
  if (failure instanceof BrokerError) return failure
  const code = codeOf(failure)
  if (code === 'UND_ERR_CLOSED' || code === 'UND_ERR_DESTROYED') {
    return new BrokerError(
      'temporarily_unavailable',
      'The broker is shutting down.',
      { retryAfterSeconds: 1 },
      { cause: failure },
    )
  }
  if (code === 'CONNECTION_LIMIT') {
    return new BrokerError(
      'temporarily_unavailable',
      "No connection to Pagero's API is free for this call. Nothing was carried out.",
      { retryAfterSeconds: 1 },
      { cause: failure },
    )
  }
  if (TIMEOUTS.has(errorTypeOf(failure) ?? '')) {
    return new BrokerError(
      'upstream_timeout',
      "Pagero's API did not answer in time. A request that changes something may have been carried out.",
      {},
      { cause: failure },
    )
  }
  return new BrokerError(
    'upstream_unreachable',
    "The call to Pagero's API could not be completed. A request that changes something may have been carried out.",
    {},
    { cause: failure },
  )
}

/**
 * Returns the error for an upstream 401 or 407. What a failed renewal knows of the grant is told with it, but neither
 * its code nor its status: they would hide that it was Pagero's API that refused.
 */
export function upstreamRefused(status: number, renewalError?: unknown): BrokerError {
  const { cause, reconnectUrl } = renewalError instanceof BrokerError ? renewalError.extensions : {}
  return new BrokerError(
    'upstream_refused',
    status === 407
      ? "Something before Pagero's API asks the broker for a credential of its own."
      : "Pagero's API does not accept the user's access token for this call.",
    {
      receivedStatus: status,
      ...(cause === undefined ? {} : { cause }),
      ...(reconnectUrl === undefined ? {} : { reconnectUrl }),
    },
    { cause: renewalError },
  )
}

/**
 * Returns the Proxy-Status of an answer that the broker makes itself: who made it, and why.
 * @see {@link https://www.rfc-editor.org/rfc/rfc9209#section-2.3 RFC 9209 section 2.3}
 */
export function proxyStatusOf(pseudonym: string, error: unknown): string {
  if (!(error instanceof BrokerError)) return `${pseudonym}; error=proxy_internal_error`
  const { receivedStatus } = error.extensions
  if (receivedStatus !== undefined) return `${pseudonym}; received-status=${receivedStatus}`
  // The cause of other problems is not the upstream's: a refused connection may be the database's.
  const fromUpstream =
    error.code === 'upstream_unreachable' ||
    error.code === 'upstream_timeout' ||
    codeOf(error.cause) === 'CONNECTION_LIMIT'
  const type =
    (fromUpstream ? errorTypeOf(error.cause) : undefined) ??
    ERROR_TYPES_OF_PROBLEMS[error.code] ??
    'proxy_internal_response'
  return `${pseudonym}; error=${type}`
}

function errorTypeOf(failure: unknown): string | undefined {
  const code = codeOf(failure)
  if (code === undefined) return undefined
  const known = ERROR_TYPES.get(code)
  if (known !== undefined) return known
  // OpenSSL's verification errors as Node names them: CERT_HAS_EXPIRED, DEPTH_ZERO_SELF_SIGNED_CERT, and kin.
  if (/CERT|^UNABLE_TO_|^INVALID_CA$|^HOSTNAME_MISMATCH$/.test(code)) return 'tls_certificate_error'
  if (/^ERR_SSL_|^ERR_TLS_|^EPROTO$/.test(code)) return 'tls_protocol_error'
  if (code.startsWith('HPE_')) return 'http_protocol_error'
  return undefined
}

function codeOf(failure: unknown): string | undefined {
  const code = failure instanceof Error ? (failure as NodeJS.ErrnoException).code : undefined
  return typeof code === 'string' ? code : undefined
}
