// The one place where a code becomes an HTTP status and an RFC 9457 problem document.

import Type from 'typebox'
import type { FastifyError } from 'fastify'
import { BrokerError, PROBLEM_CODES, type ProblemCode } from '../errors.ts'

export type Listener = 'public' | 'internal'

/** Who reads an answer: a client of a listener, or a gateway that asks whether a call may pass. */
export type Audience = Listener | 'gateway'

interface ProblemKind {
  status: number
  /** Where the public listener answers another status, because only a login helps there. */
  publicStatus?: number
  title: string
  /** For the page at `/problems/{code}`: what happened, and what to do. */
  meaning: string
  remedy: string
}

/** Every code with its status, its constant title and its explanation. A missing code does not compile. */
export const PROBLEM_KINDS: Readonly<Record<ProblemCode, ProblemKind>> = {
  session_required: {
    status: 401,
    title: 'No session',
    meaning: 'The request carries no session cookie, or its session has ended.',
    remedy: 'Send the browser to /auth/login?return_to=… and repeat the request afterwards.',
  },
  csrf_refused: {
    status: 403,
    title: 'Cross-site request refused',
    meaning:
      'A cookie-authenticated request came without the header X-CSRF: 1, or from a page of another origin.',
    remedy:
      'Call from a page of the same origin, or of one in ALLOWED_ORIGINS, and send X-CSRF: 1 with every request.',
  },
  login_transaction_invalid: {
    status: 400,
    title: 'Login is not valid any more',
    meaning:
      'The answer from Pagero belongs to no login that this browser has begun: it was used already, is older than ten minutes, or was begun in another browser. Or a connect link, a confirmation or the start of a session is used up, too old, or somebody else’s.',
    remedy: 'Begin the login again, or make a new connect link.',
  },
  authorization_denied: {
    status: 403,
    title: 'Access was not granted',
    meaning: 'Pagero answered that the user refused, or may not grant, access.',
    remedy: 'Begin the login again, and allow the access asked for.',
  },
  authorization_failed: {
    status: 502,
    title: 'Pagero could not complete the login',
    meaning: 'Pagero answered the login with an error, or with something that cannot be trusted.',
    remedy: 'Begin the login again. If it fails again, give the request id to the operator.',
  },
  account_mismatch: {
    status: 409,
    title: 'Another Pagero account',
    meaning:
      'This user is connected to one Pagero account, and the login came back with a different one. The older connection is kept.',
    remedy:
      'Log in at Pagero with the account that is connected, or disconnect first. A shared computer may still be logged in as somebody else: add prompt=login to the address of the login or the connect link.',
  },
  caller_unauthenticated: {
    status: 401,
    title: 'Caller not authenticated',
    meaning: 'The request carries no credential, or one that is unknown, expired or malformed.',
    remedy:
      'Send one Authorization header with a valid API key, Authorization: Bearer pgb_<id>_<secret>, or with a JWT of an issuer that the operator has listed. Why a JWT was refused is in the log of the broker.',
  },
  caller_forbidden: {
    status: 403,
    title: 'Caller lacks the right',
    meaning: 'The credential is valid, and this caller may not do this.',
    remedy: 'Ask the operator to add the right, or the path, to this caller in CALLERS_FILE.',
  },
  grant_not_found: {
    status: 404,
    publicStatus: 401,
    title: 'No grant for this user',
    meaning: 'This user has not connected Pagero, or this caller may not see the user.',
    remedy:
      'Let the user log in; for a user of your own make a connect link with POST /v1/users/{user}/connect-links, or take over a refresh token with PUT /v1/users/{user}/grant.',
  },
  confirmation_pending: {
    status: 409,
    title: 'Connection awaits confirmation',
    meaning: 'The user has come back from Pagero, and the application has not confirmed it yet.',
    remedy:
      'The application’s backend confirms that the browser which came back is that user’s: POST /v1/users/{user}/grant/confirm.',
  },
  reauthentication_required: {
    status: 409,
    publicStatus: 401,
    title: 'The user must log in again',
    meaning:
      'Pagero refuses the refresh token of this user for good. The member cause says why, as far as the broker knows.',
    remedy:
      'Send the user to reconnect_url. Without one, the user is of your own: make a connect link with POST /v1/users/{user}/connect-links, and send the user there.',
  },
  temporarily_unavailable: {
    status: 503,
    title: 'Temporarily unavailable',
    meaning:
      'Something the broker needs is away or takes longer than a caller should wait, or there is more to do than it can. The grant is intact.',
    remedy: 'Try again after the seconds in Retry-After.',
  },
  client_rejected_by_pagero: {
    status: 503,
    title: 'Pagero rejects the client',
    meaning:
      'Pagero does not accept the client id and secret of this broker. No grant is touched by it.',
    remedy:
      'The operator must correct PAGERO_CLIENT_ID, PAGERO_CLIENT_SECRET or PAGERO_CLIENT_AUTH.',
  },
  rate_limited: {
    status: 429,
    title: 'Too many requests',
    meaning:
      'This caller, this user, or this address without a good credential has sent more requests than its limit allows. Nothing was done.',
    remedy:
      'Try again after the seconds in Retry-After. The limits are settings of the broker, RATE_LIMIT_PER_CALLER, _USER and _ADDRESS, and hold for each replica; a burst of five seconds passes.',
  },
  request_invalid: {
    status: 400,
    title: 'Request is not valid',
    meaning: 'A part of the request is malformed. The member errors says which, where it is known.',
    remedy: 'Correct the request; sending it again unchanged gives the same answer.',
  },
  method_not_allowed: {
    status: 405,
    title: 'Method not allowed',
    meaning: 'The resource exists and has no such method.',
    remedy: 'Use one of the methods in the Allow header.',
  },
  not_found: {
    status: 404,
    title: 'Not found',
    meaning: 'There is nothing at this path on this listener.',
    remedy: 'Look the path up in the OpenAPI document of the internal listener.',
  },
  payload_too_large: {
    status: 413,
    title: 'Body too large',
    meaning: 'The request body is larger than the limit.',
    remedy: 'Send less, or ask the operator to raise the limit.',
  },
  unsupported_media_type: {
    status: 415,
    title: 'Media type not supported',
    meaning: 'The body has a Content-Type that this resource does not take.',
    remedy: 'Send application/json.',
  },
  uri_too_long: {
    status: 414,
    title: 'Request target too long',
    meaning: 'The path and query are longer than the limit.',
    remedy: 'Shorten the query, or send it in parts.',
  },
  headers_too_large: {
    status: 431,
    title: 'Header fields too large',
    meaning: 'The header section of the request is larger than 16 KiB.',
    remedy: 'Send fewer or shorter headers; old cookies are the usual cause.',
  },
  upstream_refused: {
    status: 401,
    title: 'Pagero refused the call',
    meaning: "Pagero's API refused the user's access token, also after a refresh.",
    remedy:
      'The user may lack rights to the company or document. Logging in again may help if they were changed.',
  },
  upstream_unreachable: {
    status: 502,
    title: 'Pagero is unreachable',
    meaning: "The call to Pagero's API could not be completed: no connection, or one that broke.",
    remedy: 'Try again later. A POST may have been carried out: look before you repeat it.',
  },
  upstream_timeout: {
    status: 504,
    title: 'Pagero took too long',
    meaning: "Pagero's API did not answer within the limit.",
    remedy: 'Try again later. A POST may have been carried out: look before you repeat it.',
  },
  loop_detected: {
    status: 508,
    title: 'Loop detected',
    meaning: 'The request has passed through this broker already.',
    remedy: 'PAGERO_API_URL, or a proxy in front of it, points back at the broker.',
  },
  integrity_failure: {
    status: 500,
    title: 'Stored value failed its integrity check',
    meaning:
      'A sealed value does not open: it was changed or moved in the database, or its key is not configured. Nothing was sent to Pagero.',
    remedy:
      'The operator must look at the log, restore the missing key or the changed row. The grant is kept as it is.',
  },
  internal_error: {
    status: 500,
    title: 'Internal error',
    meaning: 'The broker met something it did not expect.',
    remedy: 'Give the request id to the operator.',
  },
}

/** JSON Schema of a problem document, shared by every route as `Problem`. */
export const ProblemSchema = Type.Object(
  {
    type: Type.String({ description: 'Path of the page that explains this problem.' }),
    title: Type.String({ description: 'Constant for a type.' }),
    status: Type.Integer(),
    code: Type.Enum([...PROBLEM_CODES], {
      type: 'string',
      description: 'The last segment of type.',
    }),
    detail: Type.String({ description: 'What was wrong this time, and what to do; for a person.' }),
    instance: Type.String({ description: 'urn:uuid of the request, to be found in the log.' }),
    retry_after: Type.Optional(Type.Integer({ description: 'Seconds; as in Retry-After.' })),
    cause: Type.Optional(Type.String({ description: 'Why a grant died.' })),
    reconnect_url: Type.Optional(Type.String({ description: 'Where a person can log in again.' })),
    attempt_id: Type.Optional(
      Type.String({ description: 'The refresh attempt that the problem is about.' }),
    ),
    errors: Type.Optional(
      Type.Array(
        Type.Object({
          pointer: Type.String({ description: 'JSON Pointer, or the name of a parameter.' }),
          detail: Type.String(),
        }),
      ),
    ),
  },
  { $id: 'Problem', description: 'RFC 9457 problem document.' },
)

/** Problems that end when the user has connected Pagero, and no other way. */
const ENDED_BY_LOGIN: readonly ProblemCode[] = [
  'grant_not_found',
  'confirmation_pending',
  'reauthentication_required',
]

/** Status of a code for who reads it. */
export function statusOf(code: ProblemCode, audience: Audience): number {
  const kind = PROBLEM_KINDS[code]
  if (audience === 'gateway') return gatewayStatusOf(code, kind.status)
  return audience === 'public' ? (kind.publicStatus ?? kind.status) : kind.status
}

/** Gateways understand three: let the user log in, refused for good, and try again later. */
function gatewayStatusOf(code: ProblemCode, status: number): 401 | 403 | 503 {
  if (ENDED_BY_LOGIN.includes(code)) return 401
  return status < 500 && code !== 'rate_limited' ? 403 : 503
}

/** Returns the problem document of an error. Anything but a BrokerError becomes `internal_error` and tells nothing. */
export function problemDocument(
  error: unknown,
  request: { listener: Audience; requestId: string },
): { status: number; document: Record<string, unknown>; retryAfterSeconds: number | undefined } {
  const known =
    error instanceof BrokerError
      ? error
      : new BrokerError('internal_error', 'The broker met something it did not expect.')
  const { code, detail, extensions } = known
  // A 407 is between the broker and its upstream; to the client it is a bad gateway.
  const status = extensions.receivedStatus === 407 ? 502 : statusOf(code, request.listener)
  const retryAfterSeconds =
    extensions.retryAfterSeconds === undefined
      ? undefined
      : Math.max(1, Math.ceil(extensions.retryAfterSeconds))
  const document: Record<string, unknown> = {
    type: `/problems/${code}`,
    title: PROBLEM_KINDS[code].title,
    status,
    code,
    detail,
    instance: `urn:uuid:${request.requestId}`,
  }
  if (retryAfterSeconds !== undefined) document['retry_after'] = retryAfterSeconds
  if (extensions.cause !== undefined) document['cause'] = extensions.cause
  if (extensions.reconnectUrl !== undefined) document['reconnect_url'] = extensions.reconnectUrl
  if (extensions.attemptId !== undefined) document['attempt_id'] = extensions.attemptId
  if (extensions.errors !== undefined) document['errors'] = extensions.errors
  return { status, document, retryAfterSeconds }
}

/** Turns what Fastify throws into an error of ours; what is unknown tells nothing. */
export function asBrokerError(error: FastifyError | BrokerError): BrokerError {
  if (error instanceof BrokerError) return error
  if (error.validation !== undefined) {
    const where = error.validationContext ?? 'request'
    return new BrokerError('request_invalid', `The ${where} does not fit the schema.`, {
      errors: error.validation.map((problem) => ({
        pointer: `${where}${problem.instancePath}`,
        detail: problem.message ?? 'is not valid',
      })),
    })
  }
  switch (error.code) {
    case 'FST_ERR_CTP_BODY_TOO_LARGE':
      return new BrokerError('payload_too_large', 'The body is larger than the limit.')
    case 'FST_ERR_CTP_INVALID_MEDIA_TYPE':
      return new BrokerError('unsupported_media_type', 'Send application/json.')
    case 'FST_ERR_CTP_INVALID_JSON_BODY':
    case 'FST_ERR_CTP_EMPTY_JSON_BODY':
      return new BrokerError('request_invalid', 'The body is not valid JSON.')
    default:
  }
  if (error.statusCode !== undefined && error.statusCode >= 400 && error.statusCode < 500) {
    return new BrokerError('request_invalid', 'The request is malformed.')
  }
  return new BrokerError(
    'internal_error',
    'The broker met something it did not expect.',
    {},
    { cause: error },
  )
}

/** Response schemas of a route's problems, grouped by status, with an example for each code. */
export function problemResponses(
  listener: Audience,
  given: readonly ProblemCode[],
): Record<number, object> {
  const responses: Record<number, object> = {}
  // Whoever must be known for a call can have made too many of them.
  const limited = given.includes('caller_unauthenticated') || given.includes('session_required')
  const codes = [...new Set<ProblemCode>([...given, ...(limited ? ['rate_limited' as const] : [])])]
  for (const status of new Set(codes.map((code) => statusOf(code, listener)))) {
    const here = codes.filter((code) => statusOf(code, listener) === status)
    responses[status] = {
      description: here.map((code) => `\`${code}\`: ${PROBLEM_KINDS[code].meaning}`).join('\n\n'),
      content: {
        'application/problem+json': {
          schema: Type.Ref('Problem'),
          examples: Object.fromEntries(
            here.map((code) => [
              code,
              {
                summary: PROBLEM_KINDS[code].title,
                value: {
                  type: `/problems/${code}`,
                  title: PROBLEM_KINDS[code].title,
                  status,
                  code,
                  detail: PROBLEM_KINDS[code].remedy,
                  instance: 'urn:uuid:0b7c1a52-6f0e-4f86-9a3e-7d5a3b1c2d4e',
                },
              },
            ]),
          ),
        },
      },
    }
  }
  return responses
}
