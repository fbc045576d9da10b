// The two navigations of a login. They answer a person: a redirect, or a page that says what went wrong.
// What is not a person's navigation (prefetch, image, frame, script) is refused before anything is spent.

import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import Type from 'typebox'
import type { AccessTokens } from '../access-token.ts'
import { BrokerError, type ProblemCode } from '../errors.ts'
import { beginLogin, completeLogin, type LoginSettings } from '../login.ts'
import type { Ports } from '../ports.ts'
import type { Revoker } from '../revocation.ts'
import type { App } from './app.ts'
import { refuseNonNavigation } from './csrf.ts'
import { pageResponses, sendProblemPage } from './page.ts'
import { asBrokerError, problemResponses } from './problem.ts'
import { sendProblem } from './problem-answers.ts'
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
    | 'revocations'
    | 'loginTransactions'
    | 'sessions'
    | 'authorizationServer'
  >
  settings: LoginSettings & { redirectUri: string }
  accessTokens: Pick<AccessTokens, 'forget'>
  revoker: Pick<Revoker, 'kick'>
}

/** `GET /auth/login`, and the callback at the path of the redirect URI. */
export function registerLoginRoutes(app: App, parts: LoginRouteParts): void {
  const { ports, settings, accessTokens, revoker } = parts
  const navigation = {
    // HEAD is answered 405: it must neither begin a login nor spend a code.
    exposeHeadRoute: false,
    // Parameters are read from the raw query. The schemas tell what is expected, and refuse nothing.
    validatorCompiler: () => () => true,
    onRequest: refuseOthers,
    errorHandler: (
      error: FastifyError | BrokerError,
      request: FastifyRequest,
      reply: FastifyReply,
    ) => {
      const known = asBrokerError(error)
      const fields = { requestId: request.id, code: known.code, error: known.cause ?? known }
      if (known.code === 'internal_error' || known.code === 'integrity_failure') {
        ports.log.error('login_refused', fields)
      } else ports.log.warn('login_refused', fields)
      ports.audit.record({
        action: 'login_refused',
        actor: 'anyone',
        outcome: 'refused',
        requestId: request.id,
        details: { reason: known.code },
      })
      // A login that was refused after its tokens came has left one to revoke.
      if (known.code === 'authorization_failed') revoker.kick()
      return sendProblemPage(reply, request, known)
    },
  }

  app.get('/auth/login', { ...navigation, schema: LOGIN_SCHEMA }, async (request, reply) => {
    const query = queryOf(request)
    const begun = await beginLogin(ports, settings, {
      returnTo: single(query, 'return_to'),
      prompt: single(query, 'prompt'),
      browserBinding: readCookie(request.headers, LOGIN_COOKIE),
      sessionToken: readCookie(request.headers, SESSION_COOKIE),
    })
    setLoginCookie(reply, begun.browserBinding)
    return reply.header('cache-control', 'no-store').redirect(begun.location, 302)
  })

  const callbackPath = routeOf(settings.redirectUri)
  app.get(callbackPath, { ...navigation, schema: CALLBACK_SCHEMA }, async (request, reply) => {
    const login = await completeLogin(ports, settings, {
      parameters: queryOf(request),
      browserBinding: readCookie(request.headers, LOGIN_COOKIE),
    })
    const { user } = login
    const requestId = request.id
    ports.log.info('login_completed', { requestId, user })
    ports.audit.record({ action: 'login_completed', actor: 'session', name: user, user, requestId })
    // Of a login that this one replaces: its access token, and its refresh token that waits to be revoked.
    accessTokens.forget(user)
    revoker.kick()
    setSessionCookie(reply, login.sessionToken)
    return reply.header('cache-control', 'no-store').redirect(login.returnTo, 303)
  })
}

/** No person sees the answer, so it is a problem document. */
async function refuseOthers(request: FastifyRequest, reply: FastifyReply): Promise<void> {
  const refusal = refuseNonNavigation(request.headers)
  if (refusal !== undefined) {
    await sendProblem(reply, request, 'public', new BrokerError('csrf_refused', refusal))
  }
}

/** The path of the redirect URI as a route; without a path the callback arrives at `/`. A colon is no parameter there. */
function routeOf(redirectUri: string): string {
  return new URL(redirectUri).pathname.replaceAll(':', '::')
}

function queryOf(request: FastifyRequest): URLSearchParams {
  const { url = '' } = request.raw
  const mark = url.indexOf('?')
  return new URLSearchParams(mark === -1 ? '' : url.slice(mark + 1))
}

/** The value of a parameter that occurs once; of a doubled one none is believed. */
function single(query: URLSearchParams, name: string): string | undefined {
  const values = query.getAll(name)
  return values.length === 1 ? values[0] : undefined
}

function redirectAnswer(description: string, location: string, cookie: string): object {
  return {
    description,
    type: 'null',
    headers: {
      Location: { type: 'string', description: 'Where to.', example: location },
      'Set-Cookie': { type: 'string', description: cookie },
    },
  }
}

/** A person gets a page for everything but what no person opened, which gets a problem document. */
function navigationResponses(codes: readonly ProblemCode[]): Record<number, object> {
  const pages = pageResponses(codes)
  const { 403: refused } = problemResponses('public', ['csrf_refused']) as typeof pages
  const descriptions = [pages[403]?.description, refused?.description]
  return {
    ...pages,
    403: {
      description: descriptions.filter((text) => text !== undefined).join('\n\n'),
      content: { ...pages[403]?.content, ...refused?.content },
    },
  }
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
          'Where to go after the login: a path of this origin, or an address on an origin that the operator has listed. Anything else, and anything over 2,048 characters, becomes `/`.',
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
      'Logged in; to `return_to`.',
      '/invoices?status=new',
      'The session cookie, `__Host-broker-session`.',
    ),
    ...navigationResponses([
      'login_transaction_invalid',
      'rate_limited',
      'request_invalid',
      'authorization_denied',
      'authorization_failed',
      'client_rejected_by_pagero',
      'temporarily_unavailable',
      'integrity_failure',
      'internal_error',
    ]),
  },
}
