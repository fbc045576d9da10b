// The navigations of a login: to Pagero, back from it, and the page at the end. They answer a person: a redirect, or a page that says what went wrong.
// What is not a person's navigation (prefetch, image, frame, script) is refused before anything is spent.

import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import { beginLogin, completeLogin, type LoginSettings } from '../login.ts'
import { CONFIRMABLE_SECONDS } from '../pending-grant.ts'
import type { Ports } from '../ports.ts'
import { DONE_PATH } from '../return-to.ts'
import type { Revoker } from '../revocation.ts'
import type { App } from './app.ts'
import {
  navigationResponses,
  navigationRoute,
  queryOf,
  redirectAnswer,
  single,
} from './navigation.ts'
import { sendDonePage } from './page.ts'
import {
  LOGIN_COOKIE,
  readCookie,
  SESSION_COOKIE,
  setLoginCookie,
  setSessionCookie,
} from './session-cookie.ts'

export interface LoginRouteParts {
  ports: Pick<
    Ports,
    | 'clock'
    | 'log'
    | 'audit'
    | 'sealer'
    | 'grants'
    | 'pendingGrants'
    | 'revocations'
    | 'loginTransactions'
    | 'sessions'
    | 'authorizationServer'
  >
  settings: LoginSettings
  accessTokens: Pick<AccessTokens, 'forget'>
  revoker: Pick<Revoker, 'kick'>
}

/** `GET /auth/login`, the callback at the path of the redirect URI, and the page of a login that goes nowhere else. */
export function registerLoginRoutes(app: App, parts: LoginRouteParts): void {
  const { ports, settings, accessTokens, revoker } = parts
  const navigation = navigationRoute({
    ports,
    revoker,
    link: { text: 'Log in again', path: '/auth/login' },
  })

  app.get('/auth/login', { ...navigation, schema: LOGIN_SCHEMA }, async (request, reply) => {
    const query = queryOf(request)
    const begun = await beginLogin(ports, settings, {
      returnTo: single(query, 'return_to'),
      prompt: single(query, 'prompt'),
      browserBinding: readCookie(request.headers, LOGIN_COOKIE),
      sessionToken: readCookie(request.headers, SESSION_COOKIE),
    })
    // A connection of this browser may wait for its confirmation, and keeps its cookie.
    setLoginCookie(reply, begun.browserBinding, CONFIRMABLE_SECONDS)
    return reply.header('cache-control', 'no-store').redirect(begun.location, 302)
  })

  const callbackPath = routeOf(settings.redirectUri)
  app.get(callbackPath, { ...navigation, schema: CALLBACK_SCHEMA }, async (request, reply) => {
    const browserBinding = readCookie(request.headers, LOGIN_COOKIE)
    const login = await completeLogin(ports, settings, {
      parameters: queryOf(request),
      browserBinding,
    })
    const { user } = login
    const requestId = request.id
    // Of a grant that this one replaces: its access token, and its refresh token that waits to be revoked.
    revoker.kick()
    if (login.isPending) {
      // The browser has to be known again when the application has confirmed.
      setLoginCookie(reply, browserBinding ?? '', CONFIRMABLE_SECONDS)
    } else {
      ports.log.info('login_completed', { requestId, user })
      ports.audit.record({
        action: 'login_completed',
        actor: 'session',
        name: user,
        user,
        requestId,
      })
      accessTokens.forget(user)
    }
    if (login.sessionToken !== undefined) setSessionCookie(reply, login.sessionToken)
    return reply.header('cache-control', 'no-store').redirect(login.returnTo, 303)
  })

  app.get(DONE_PATH, { schema: DONE_SCHEMA }, async (_request, reply) => sendDonePage(reply))
}

/** The path of the redirect URI as a route; without a path the callback arrives at `/`. A colon is no parameter there. */
function routeOf(redirectUri: string): string {
  return new URL(redirectUri).pathname.replaceAll(':', '::')
}

const LOGIN_SCHEMA = {
  operationId: 'beginLogin',
  summary: 'Log in',
  description:
    'Send the browser here, by a link or by setting `location`; never by `fetch`. It goes on to Pagero and comes back through the callback to `return_to`.\n\n' +
    'Several tabs of one browser may log in at once. Prefetches, images and frames do not begin a login.',
  tags: ['login'],
  security: [],
  querystring: Type.Object({
    return_to: Type.Optional(
      Type.String({
        description:
          'Where to go after the login: a path of this origin, or an address on an origin that the operator has listed. Anything else, and anything over 2,048 characters, and the callback itself, becomes `/auth/done`, as if it had not been given.',
        examples: ['/invoices?status=new'],
      }),
    ),
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
    ...navigationResponses(['request_invalid', 'rate_limited', 'temporarily_unavailable']),
  },
}

const DONE_SCHEMA = {
  operationId: 'loginDone',
  summary: 'Where a login ends by default',
  description:
    'A page that says that the login is complete, for one that was begun without a `return_to`, or with one that is not allowed.',
  tags: ['login'],
  security: [],
  response: {
    200: {
      description: 'The page. It says the same to everybody.',
      content: {
        'text/html': {
          schema: Type.String({ description: 'HTML.' }),
          example: '<!doctype html>…',
        },
      },
    },
  },
}

const CALLBACK_SCHEMA = {
  operationId: 'completeLogin',
  summary: 'Callback from Pagero',
  description:
    'The path of `PAGERO_REDIRECT_URI`. Pagero sends the browser here; nobody else calls it. Each answer of Pagero works once, within ten minutes, in the browser that began the login.',
  tags: ['login'],
  security: [],
  querystring: Type.Object({
    code: Type.Optional(
      Type.String({ description: 'The authorization code.', examples: ['Yzk5ZDg4NTQ'] }),
    ),
    state: Type.Optional(
      Type.String({
        description: 'As it was sent to Pagero.',
        examples: ['m3wOCdq0CZzVq1cXBdGRMYqfyPPZ2SEfKQXtc1FjxzE'],
      }),
    ),
    iss: Type.Optional(
      Type.String({
        description: 'Issuer; compared exactly where the operator has set one.',
        examples: ['https://authorization-server.example'],
      }),
    ),
    error: Type.Optional(
      Type.String({ description: 'Instead of `code`.', examples: ['access_denied'] }),
    ),
  }),
  response: {
    303: redirectAnswer(
      'Logged in; to `return_to`. After a connect link `confirmation` is added to its query, unless the link wants none.',
      '/invoices?status=new',
      'The session cookie, `__Host-broker-session`, when a session begins.',
    ),
    ...navigationResponses([
      'login_transaction_invalid',
      'rate_limited',
      'request_invalid',
      'authorization_denied',
      'authorization_failed',
      'account_mismatch',
      'client_rejected_by_pagero',
      'temporarily_unavailable',
      'integrity_failure',
      'internal_error',
    ]),
  },
}
