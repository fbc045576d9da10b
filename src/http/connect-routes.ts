// The navigations of a connect link: opening it, and beginning the session that was confirmed. The way from the one to
// the other leads through the callback, in `login-routes.ts`, and through the application's backend.

import Type from 'typebox'
import { openConnectLink } from '../connect-link.ts'
import type { LoginSettings } from '../login.ts'
import { CONFIRMABLE_SECONDS, startSession } from '../pending-grant.ts'
import type { Ports } from '../ports.ts'
import type { Revoker } from '../revocation.ts'
import type { App } from './app.ts'
import {
  navigationResponses,
  navigationRoute,
  queryOf,
  redirectAnswer,
  single,
} from './navigation.ts'
import {
  LOGIN_COOKIE,
  readCookie,
  SESSION_COOKIE,
  setLoginCookie,
  setSessionCookie,
} from './session-cookie.ts'

export interface ConnectRouteParts {
  ports: Pick<
    Ports,
    | 'log'
    | 'audit'
    | 'sealer'
    | 'connectLinks'
    | 'sessionTickets'
    | 'sessions'
    | 'authorizationServer'
  >
  settings: LoginSettings
  revoker: Pick<Revoker, 'kick'>
}

/** `GET /auth/connect/{ticket}` and `GET /auth/session-start/{ticket}`. */
export function registerConnectRoutes(app: App, parts: ConnectRouteParts): void {
  const { ports, settings, revoker } = parts
  // A login here would make another user than the application's.
  const navigation = navigationRoute({ ports, revoker, link: undefined })

  app.get(
    '/auth/connect/:ticket',
    { ...navigation, schema: CONNECT_SCHEMA },
    async (request, reply) => {
      const begun = await openConnectLink(ports, settings, {
        ticket: request.params.ticket,
        prompt: single(queryOf(request), 'prompt'),
        browserBinding: readCookie(request.headers, LOGIN_COOKIE),
        sessionToken: readCookie(request.headers, SESSION_COOKIE),
      })
      const { user } = begun
      const requestId = request.id
      ports.log.info('connect_link_opened', { requestId, user })
      ports.audit.record({ action: 'connect_link_used', actor: 'anyone', user, requestId })
      setLoginCookie(reply, begun.browserBinding, CONFIRMABLE_SECONDS)
      return reply.header('cache-control', 'no-store').redirect(begun.location, 302)
    },
  )

  app.get(
    '/auth/session-start/:ticket',
    { ...navigation, schema: SESSION_START_SCHEMA },
    async (request, reply) => {
      const { user, returnTo, sessionToken } = await startSession(ports, settings.sessions, {
        ticket: request.params.ticket,
        browserBinding: readCookie(request.headers, LOGIN_COOKIE),
        sessionToken: readCookie(request.headers, SESSION_COOKIE),
      })
      const requestId = request.id
      ports.log.info('session_started_by_confirmation', { requestId, user })
      ports.audit.record({
        action: 'login_completed',
        actor: 'session',
        name: user,
        user,
        requestId,
      })
      setSessionCookie(reply, sessionToken)
      return reply.header('cache-control', 'no-store').redirect(returnTo, 303)
    },
  )
}

const TicketParameters = Type.Object({
  ticket: Type.String({
    description: 'From the address that the application was given.',
    examples: ['dE7zH1m0Jr4n8vX2cQ5tY9wB3kL6pS0aFgHjKlMnOpQ'],
  }),
})

const CONNECT_SCHEMA = {
  operationId: 'openConnectLink',
  summary: 'Open a connect link',
  description:
    'Redirect the browser of your user to the `url` of a connect link, as it is. It goes on to Pagero, comes back through the callback, and then to the `return_to` of the link.\n\n' +
    'A link is used up when it is opened. Prefetches, `HEAD`, images and frames do not open it. Whoever opens it a second time is shown a page that leads back to the application.',
  tags: ['login'],
  security: [],
  params: TicketParameters,
  querystring: Type.Object({
    prompt: Type.Optional(
      Type.String({
        description:
          '`login` has Pagero ask for the password even where the browser is logged in there: for a shared computer, or another account. Other values are ignored.',
        examples: ['login'],
      }),
    ),
  }),
  response: {
    302: redirectAnswer(
      "To Pagero's login.",
      'https://sso.pageroonline.com/oauth/v2/oauth-authorize?response_type=code&client_id=…',
      'The login cookie, `__Host-broker-login`.',
    ),
    ...navigationResponses([
      'login_transaction_invalid',
      'request_invalid',
      'temporarily_unavailable',
    ]),
  },
} as const

const SESSION_START_SCHEMA = {
  operationId: 'startSession',
  summary: 'Begin the session of a confirmed connection',
  description:
    'Redirect the browser to the `session_url` that the confirmation was answered with, as it is. It works once, within a minute, and in the browser alone that was at Pagero; then it goes on to the `return_to` of the link.',
  tags: ['login'],
  security: [],
  params: TicketParameters,
  response: {
    303: redirectAnswer(
      'To `return_to`.',
      '/invoices?status=new',
      'The session cookie, `__Host-broker-session`.',
    ),
    ...navigationResponses([
      'login_transaction_invalid',
      'request_invalid',
      'temporarily_unavailable',
    ]),
  },
} as const
