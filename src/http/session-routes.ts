// The page's own view of its session, and the way out of it. Fetches, so they get JSON and never a redirect.

import type { FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import { disconnectGrant } from '../connect.ts'
import type { Grant } from '../grant.ts'
import type { Ports } from '../ports.ts'
import type { Session } from '../login-stores.ts'
import type { Revoker } from '../revocation.ts'
import { endSession, endSessionsOf, type SessionReader } from '../session.ts'
import type { App } from './app.ts'
import { EXAMPLE_GRANT, grantBody, GrantSchema } from './grant-schemas.ts'
import { jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { clearSessionCookie, type SessionAuth } from './session-cookie.ts'

/** What a page needs of a grant; keys, generations and Pagero's own names stay behind. */
const SessionGrant = Type.Pick(GrantSchema, [
  'state',
  'cause',
  'scope',
  'rolling_expires_at',
  'absolute_expires_at',
  'expires_at',
  'authenticated_at',
  'rotated_at',
])

const SessionSchema = Type.Object(
  {
    user: Type.String({ description: 'Key of the user who has logged in.' }),
    expires_at: Type.String({
      format: 'date-time',
      description:
        'When the session ends if nothing more is called; never beyond its absolute limit.',
    }),
    grant: Type.Union([SessionGrant, Type.Null()], {
      description:
        'The access to Pagero behind this session; null when there is none. When `state` is `reauthentication_required`, log in again.',
    }),
  },
  { $id: 'Session', description: "The browser's session." },
)

const BROWSER_SECURITY = [{ session: [], csrf: [] }]

const SESSION_ROUTE = {
  operationId: 'getSession',
  summary: 'Who is logged in?',
  description:
    'The session of this browser and the state of its access to Pagero. A call keeps the session from falling idle.\n\n' +
    'On `401`, send the browser to `/auth/login?return_to=…`. On `503` nobody is logged out: try again, the cookie is still good.',
  tags: ['session'],
  security: BROWSER_SECURITY,
  response: {
    200: jsonAnswer({
      description: 'The session.',
      schema: 'Session',
      example: {
        user: 'pagero:5d3c6b6e',
        expires_at: '2026-11-23T13:00:00.000Z',
        grant: {
          state: EXAMPLE_GRANT.state,
          cause: EXAMPLE_GRANT.cause,
          scope: EXAMPLE_GRANT.scope,
          rolling_expires_at: EXAMPLE_GRANT.rolling_expires_at,
          absolute_expires_at: EXAMPLE_GRANT.absolute_expires_at,
          expires_at: EXAMPLE_GRANT.expires_at,
          authenticated_at: EXAMPLE_GRANT.authenticated_at,
          rotated_at: EXAMPLE_GRANT.rotated_at,
        },
      },
    }),
    ...problemResponses('public', [
      'request_invalid',
      'session_required',
      'csrf_refused',
      'temporarily_unavailable',
    ]),
  },
}

const LOGOUT_ROUTE = {
  operationId: 'logOut',
  summary: 'Log out',
  description:
    'Ends the session, on every replica within a second. Without a session the answer is the same. The access to Pagero stays, for services that work in the background.\n\n' +
    'With `disconnect=true` the access to Pagero ends too, and every session of the user: for good, until the next login. That needs a session. Pagero is told at once, and again until it has confirmed.',
  tags: ['session'],
  security: BROWSER_SECURITY,
  querystring: Type.Object(
    {
      disconnect: Type.Optional(
        Type.Boolean({ description: 'Also end the access to Pagero.', examples: [true] }),
      ),
    },
    { additionalProperties: false },
  ),
  response: {
    204: {
      description:
        'Logged out. The session cookie is cleared, and with `Clear-Site-Data` what pages of this origin keep in `localStorage`, IndexedDB and the like. Other cookies stay, those of your own application too.',
      type: 'null',
    },
    ...problemResponses('public', [
      'request_invalid',
      'session_required',
      'csrf_refused',
      'temporarily_unavailable',
    ]),
  },
} as const

export interface SessionRouteParts {
  ports: Pick<
    Ports,
    'log' | 'audit' | 'sealer' | 'grants' | 'pendingGrants' | 'imports' | 'sessions'
  >
  auth: SessionAuth
  sessions: SessionReader
  accessTokens: Pick<AccessTokens, 'forget'>
  revoker: Pick<Revoker, 'kick'>
}

/** `GET /auth/session` and `POST /auth/logout`. */
export function registerSessionRoutes(app: App, parts: SessionRouteParts): void {
  const { ports, auth, sessions, accessTokens, revoker } = parts
  app.addSchema(SessionSchema)

  app.get('/auth/session', { schema: SESSION_ROUTE }, async (request, reply) => {
    const session = await auth.requireSession(request)
    const grant = await ports.grants.find(session.user)
    return reply.header('cache-control', 'no-store').send(sessionBody(session, grant))
  })

  // Refuses other sites before anything of a body is read.
  const refuseOthers = async (request: FastifyRequest) => void auth.readToken(request)
  const logout = { schema: LOGOUT_ROUTE, onRequest: refuseOthers }
  app.post('/auth/logout', logout, async (request, reply) => {
    const token = auth.readToken(request)
    if (request.query.disconnect === true) {
      const { user } = await auth.requireSession(request)
      await disconnectGrant(ports, user)
      await endSessionsOf(ports, user)
      sessions.forgetUser(user)
      accessTokens.forget(user)
      revoker.kick()
      ports.audit.record({
        action: 'grant_disconnected',
        actor: 'session',
        name: user,
        user,
        requestId: request.id,
      })
    } else {
      const user = await endSession(ports, token)
      sessions.forget(token)
      if (user !== undefined) {
        const requestId = request.id
        ports.audit.record({ action: 'logged_out', actor: 'session', name: user, user, requestId })
      }
    }
    return farewell(reply)
  })
}

/**
 * Clears the cookie by name. `Clear-Site-Data: "cookies"` would clear those of the whole registrable domain, and log the
 * user out of every application that is a sibling of the broker. What the origin has stored is the user's, and goes.
 */
function farewell(reply: FastifyReply): FastifyReply {
  clearSessionCookie(reply)
  return reply
    .code(204)
    .header('cache-control', 'no-store')
    .header('clear-site-data', '"storage"')
    .send()
}

function sessionBody(session: Session, grant: Grant | undefined) {
  const { user, idleExpiresAt, absoluteExpiresAt } = session
  const expiresAt = idleExpiresAt < absoluteExpiresAt ? idleExpiresAt : absoluteExpiresAt
  return {
    user,
    expires_at: expiresAt.toISOString(),
    grant: grant === undefined ? null : sessionGrantBody(grant),
  }
}

function sessionGrantBody(grant: Grant) {
  const body = grantBody(grant)
  return {
    state: body.state,
    cause: body.cause,
    scope: body.scope,
    rolling_expires_at: body.rolling_expires_at,
    absolute_expires_at: body.absolute_expires_at,
    expires_at: body.expires_at,
    authenticated_at: body.authenticated_at,
    rotated_at: body.rotated_at,
  }
}
