// What an application's backend does to connect a user of its own: make the link, and confirm whose browser came back.

import type { FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import { createConnectLink } from '../connect-link.ts'
import { BrokerError } from '../errors.ts'
import { confirmGrant } from '../pending-grant.ts'
import type { Ports } from '../ports.ts'
import type { ReturnOrigins } from '../return-to.ts'
import type { Revoker } from '../revocation.ts'
import type { App } from './app.ts'
import { type CallerAuth, callerOf, requireCaller } from './caller-auth.ts'
import { EXAMPLE_GRANT, grantBody, GrantSchema } from './grant-schemas.ts'
import { CALLER_SECURITY, jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { readApplicationUserKey, UserParameters } from './user-parameter.ts'

/** As long as a login may take: the link is for a redirect, not for a letter. */
const TTL_SECONDS = 600
/** A day, for a link that a person has to find the time for. */
const TTL_SECONDS_MAX = 86_400

const EXAMPLE_TICKET = 'dE7zH1m0Jr4n8vX2cQ5tY9wB3kL6pS0aFgHjKlMnOpQ'
const EXAMPLE_CONFIRMATION = 'q2M4v0bq5p3xkJt8cWn1ZrY7uLs6aDfGhJkEoPiUyTw'

const ConnectLink = Type.Object(
  {
    url: Type.String({
      format: 'uri',
      description: 'Redirect the browser of the user here. It works once.',
    }),
    expires_at: Type.String({
      format: 'date-time',
      description: 'Not opened by then, it does nothing.',
    }),
  },
  { $id: 'ConnectLink', description: 'A link that sends one browser to Pagero.' },
)

const ConfirmedGrant = Type.Object(
  {
    ...GrantSchema.properties,
    session_url: Type.Optional(
      Type.String({
        format: 'uri',
        description:
          'Redirect the same browser here within a minute: its session begins, and it goes on to `return_to`. Absent with `start_session: false`.',
      }),
    ),
  },
  {
    $id: 'ConfirmedGrant',
    description: 'The grant, in use now, and where its browser begins a session.',
  },
)

const LINK_BODY = Type.Object(
  {
    return_to: Type.String({
      minLength: 1,
      description:
        'Where the browser goes afterwards: a path of the origin of the public listener, or an address on an origin that the operator has listed. At most 2,048 characters.',
    }),
    confirm: Type.Optional(
      Type.Boolean({
        default: true,
        description:
          '`false` lets the grant count at once, for whoever opens the link. Only where nobody but this user can get hold of it: whoever does can bring somebody else to connect her account to this user.',
      }),
    ),
    start_session: Type.Optional(
      Type.Boolean({
        default: true,
        description:
          'Whether a browser session of the user begins, for pages that call `/api/…`; with `confirm`, after the confirmation.',
      }),
    ),
    allow_account_change: Type.Optional(
      Type.Boolean({
        default: false,
        description:
          'Whether another Pagero account may take the place of the one that the user is connected to.',
      }),
    ),
    ttl: Type.Optional(
      Type.Integer({
        minimum: 1,
        maximum: TTL_SECONDS_MAX,
        default: TTL_SECONDS,
        description: 'Seconds within which the link has to be opened.',
      }),
    ),
  },
  {
    additionalProperties: false,
    examples: [{ return_to: 'https://erp.example.com/settings/pagero', ttl: 600 }],
  },
)

const LINK_MEMBER_TYPES: Readonly<Record<string, string>> = {
  confirm: 'boolean',
  start_session: 'boolean',
  allow_account_change: 'boolean',
  ttl: 'number',
}

/** The validator would take null, an empty text and 0 for false; a link must not do without confirmation by a slip. */
async function refuseOtherTypes({ body }: FastifyRequest): Promise<void> {
  if (typeof body !== 'object' || body === null) return
  for (const [member, value] of Object.entries(body)) {
    const expected = LINK_MEMBER_TYPES[member]
    if (expected === undefined || typeof value === expected) continue
    throw new BrokerError('request_invalid', 'The body does not fit the schema.', {
      errors: [{ pointer: `body/${member}`, detail: `must be a ${expected}` }],
    })
  }
}

const CONFIRMATION_BODY = Type.Object(
  {
    confirmation: Type.String({
      pattern: '^[A-Za-z0-9_-]{43}$',
      description: 'The parameter `confirmation` of the address that the browser came back to.',
    }),
  },
  { additionalProperties: false, examples: [{ confirmation: EXAMPLE_CONFIRMATION }] },
)

export interface ConnectLinkRouteParts {
  auth: CallerAuth
  ports: Pick<
    Ports,
    | 'clock'
    | 'log'
    | 'audit'
    | 'sealer'
    | 'grants'
    | 'pendingGrants'
    | 'connectLinks'
    | 'sessionTickets'
  >
  settings: ReturnOrigins
  accessTokens: Pick<AccessTokens, 'forget'>
  revoker: Pick<Revoker, 'kick'>
}

/** `POST /v1/users/{user}/connect-links` and `POST /v1/users/{user}/grant/confirm`. */
export function registerConnectLinkRoutes(app: App, parts: ConnectLinkRouteParts): void {
  const { auth, ports, settings, accessTokens, revoker } = parts
  for (const schema of [ConnectLink, ConfirmedGrant]) app.addSchema(schema)

  app.post(
    '/v1/users/:user/connect-links',
    {
      ...requireCaller(auth, 'grant:manage'),
      preValidation: refuseOtherTypes,
      schema: {
        operationId: 'createConnectLink',
        summary: 'Make a link that connects a user to Pagero',
        description:
          'For a user of your own application, under your own key. Redirect the browser of that user to `url`; it logs in at Pagero and comes back to `return_to`, with the parameter `confirmation` in its query. Nothing is in use until your backend has returned that with `POST …/grant/confirm`; an older grant serves meanwhile.\n\n' +
          'Why: anybody can send a link on. Somebody may make one for his own user of your application, send it to another person, and have her log in at Pagero: her invoices would be his to read. Your backend sees her come back as herself, and what it confirms for her is not his.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        body: LINK_BODY,
        response: {
          201: jsonAnswer({
            description: 'The link.',
            schema: 'ConnectLink',
            example: {
              url: `https://broker.example.com/auth/connect/${EXAMPLE_TICKET}`,
              expires_at: '2026-11-23T12:10:00.000Z',
            },
          }),
          ...problemResponses('internal', [
            'request_invalid',
            'caller_unauthenticated',
            'caller_forbidden',
            'grant_not_found',
            'payload_too_large',
            'unsupported_media_type',
            'temporarily_unavailable',
          ]),
        },
      },
    },
    async (request, reply) => {
      const user = readApplicationUserKey(request)
      const { body } = request
      const link = await createConnectLink(ports, settings, {
        user,
        returnTo: body.return_to,
        confirm: body.confirm ?? true,
        startSession: body.start_session ?? true,
        allowAccountChange: body.allow_account_change ?? false,
        ttlSeconds: body.ttl ?? TTL_SECONDS,
      })
      const { name } = callerOf(request)
      const requestId = request.id
      ports.log.info('connect_link_made', { requestId, user, caller: name })
      ports.audit.record({ action: 'connect_link_made', actor: 'caller', name, user, requestId })
      return reply.code(201).send({ url: link.url, expires_at: link.expiresAt.toISOString() })
    },
  )

  app.post(
    '/v1/users/:user/grant/confirm',
    {
      ...requireCaller(auth, 'grant:manage'),
      schema: {
        operationId: 'confirmGrant',
        summary: 'Confirm whose browser came back from Pagero',
        description:
          'Send the `confirmation` that the browser brought, for the user who is logged in there by your own rules, and for no other. The connection then takes the place of an older grant, whose refresh token is revoked at Pagero.\n\n' +
          'A confirmation is good for a quarter of an hour, for its own user alone; afterwards Pagero is told to forget the tokens. Repeated within ten minutes it is answered as the first time, with a new `session_url`: a call whose answer was lost is simply sent again.',
        tags: ['grants'],
        security: CALLER_SECURITY,
        params: UserParameters,
        body: CONFIRMATION_BODY,
        response: {
          200: jsonAnswer({
            description: 'Confirmed: the grant is in use.',
            schema: 'ConfirmedGrant',
            example: {
              ...EXAMPLE_GRANT,
              session_url: `https://broker.example.com/auth/session-start/${EXAMPLE_TICKET}`,
            },
          }),
          ...problemResponses('internal', [
            'request_invalid',
            'login_transaction_invalid',
            'caller_unauthenticated',
            'caller_forbidden',
            'grant_not_found',
            'account_mismatch',
            'reauthentication_required',
            'payload_too_large',
            'unsupported_media_type',
            'integrity_failure',
            'temporarily_unavailable',
          ]),
        },
      },
    },
    async (request) => {
      const user = readApplicationUserKey(request)
      const { grant, sessionUrl } = await confirmGrant(ports, settings, {
        user,
        confirmation: request.body.confirmation,
        caller: callerOf(request).name,
        requestId: request.id,
      }).finally(() => {
        // Of the grant that it replaced, or what was refused: there may be a token to revoke.
        accessTokens.forget(user)
        revoker.kick()
      })
      return {
        ...grantBody(grant),
        ...(sessionUrl === undefined ? {} : { session_url: sessionUrl }),
      }
    },
  )
}
