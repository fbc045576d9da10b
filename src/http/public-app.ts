// The listener for browsers: login, session and the cookie-authenticated proxy. Of the internal one it has /livez alone.

import cookie from '@fastify/cookie'
import type { AccessTokens } from '../access-token.ts'
import type { Config } from '../config.ts'
import type { Forwarder } from '../forward.ts'
import type { RequestCounts } from '../request-counts.ts'
import type { Ports } from '../ports.ts'
import type { Session } from '../login-stores.ts'
import { createRateLimits, networkOf, type RateLimits } from '../rate-limit.ts'
import type { Revoker } from '../revocation.ts'
import type { Tracing } from '../tracing.ts'
import { createSessionReader } from '../session.ts'
import { type App, buildApp, noteAnswered, securityHeaders } from './app.ts'
import { registerConnectRoutes } from './connect-routes.ts'
import { corsHeaders, type OriginRules } from './csrf.ts'
import { registerLivenessRoute } from './health-routes.ts'
import { registerLoginRoutes } from './login-routes.ts'
import { registerOpenApi } from './openapi.ts'
import { isShed, type Overload, refuseOverload } from './overload.ts'
import type { OnBehalf } from './proxied-call.ts'
import { registerProxyRoutes } from './proxy-routes.ts'
import { createReadyCalls } from './ready-call.ts'
import { createSessionAuth } from './session-cookie.ts'
import { registerSessionRoutes } from './session-routes.ts'

/** An upload may take as long as a proxied call; every other request is here well within this. */
const REQUEST_TIMEOUT_MIN_MS = 30_000

export interface PublicParts {
  ports: Pick<
    Ports,
    | 'clock'
    | 'log'
    | 'audit'
    | 'sealer'
    | 'grants'
    | 'pendingGrants'
    | 'imports'
    | 'revocations'
    | 'loginTransactions'
    | 'connectLinks'
    | 'sessionTickets'
    | 'sessions'
    | 'authorizationServer'
  >
  config: Pick<
    Config,
    | 'pagero'
    | 'publicUrl'
    | 'allowedOrigins'
    | 'trustedProxies'
    | 'rateLimits'
    | 'sessions'
    | 'subjectClaim'
    | 'tokenCacheTrustMs'
  > & { proxy: Pick<Config['proxy'], 'totalTimeoutMs' | 'idleTimeoutMs'> }
  accessTokens: AccessTokens
  forwarder: Forwarder
  revoker: Pick<Revoker, 'kick'>
  overload?: Omit<Overload, 'stop' | 'shed'>
  counts?: RequestCounts | undefined
  tracing?: Tracing | undefined
  /** Further routes of this origin: the demonstration's page. */
  routes?: (app: App) => void | Promise<void>
}

/** Builds the public listener's app, ready to listen or to be injected into. */
export async function buildPublicApp(parts: PublicParts): Promise<App> {
  const { ports, config, accessTokens, forwarder, revoker } = parts
  const { publicUrl, allowedOrigins, pagero } = config
  const rules: OriginRules = { ownOrigin: publicUrl, allowedOrigins }
  const sessions = createSessionReader(ports, {
    lifetimes: config.sessions,
    trustMs: config.tokenCacheTrustMs,
  })
  const loginPorts = { ...ports, sessions: sessions.store }
  const limits = createRateLimits(ports, config.rateLimits)
  const auth = createSessionAuth(sessions, rules, limits, ports.audit)
  const tls = publicUrl.startsWith('https:')
  const fields = Object.entries(securityHeaders({ tls })).flat()
  const calls = {
    listener: 'public',
    accessTokens,
    forwarder,
    audit: ports.audit,
    log: ports.log,
  } as const
  const onBehalfOf = ({ user }: Session): OnBehalf => ({ user, actor: 'session', name: user })
  const readyCalls = createReadyCalls({
    ...calls,
    limits,
    recognize(request) {
      const session = auth.readySession(request)
      return session && onBehalfOf(session)
    },
    fieldsOf({ headers }) {
      const cors = corsHeaders(headers, { ...rules, preflight: false })
      return [...fields, ...Object.entries(cors).flat()]
    },
    noteAnswered: (answered) => noteAnswered({ log: ports.log, counts: parts.counts }, answered),
  })

  return buildApp(
    ports,
    {
      listener: 'public',
      counts: parts.counts,
      tracing: parts.tracing,
      trustedProxies: config.trustedProxies,
      requestTimeoutMs: Math.max(config.proxy.totalTimeoutMs, REQUEST_TIMEOUT_MIN_MS),
      answerIdleTimeoutMs: config.proxy.idleTimeoutMs,
      tls,
      takesAtOnce: (request, response) =>
        // Their route says who refused, and lets pages of other origins read it.
        (parts.overload === undefined || !isShed(parts.overload, request)) &&
        readyCalls(request, response),
    },
    async (app) => {
      await registerOpenApi(app, 'public')
      // Writes cookies alone; session-cookie.ts reads them, because this plugin would take one of two.
      await app.register(cookie, { hook: false })
      // Fastify takes text/plain for granted. A form on another site can send it unasked.
      app.removeContentTypeParser('text/plain')
      answerCors(app, rules)
      if (parts.overload !== undefined) refuseOverload(app, parts.overload)
      limitAddresses(app, limits)

      registerLivenessRoute(app)
      const loginSettings = {
        pkce: pagero.pkce,
        scope: pagero.scope,
        redirectUri: pagero.redirectUri,
        subjectClaim: config.subjectClaim,
        publicUrl,
        allowedOrigins,
        sessions: config.sessions,
      }
      registerLoginRoutes(app, {
        ports: loginPorts,
        settings: loginSettings,
        accessTokens,
        revoker,
      })
      registerConnectRoutes(app, { ports: loginPorts, settings: loginSettings, revoker })
      registerSessionRoutes(app, { ports, auth, sessions, accessTokens, revoker })
      registerProxyRoutes(app, {
        ...calls,
        authorize: async (request) => onBehalfOf(await auth.requireSession(request)),
        security: [{ session: [], csrf: [] }],
      })
      await parts.routes?.(app)
    },
  )
}

/** What a page of a listed origin may fetch. Navigations need no CORS. */
const FETCHED = /^\/(?:api\/|auth\/(?:session|logout)(?:\?|$))/

/** Tells pages of the listed origins, before anything else is looked at, that they may read the answer. */
function answerCors(app: App, rules: OriginRules): void {
  app.addHook('onRequest', async (request, reply) => {
    const { headers, method, url } = request
    if (!FETCHED.test(url)) return
    const preflight = method === 'OPTIONS' && headers['access-control-request-method'] !== undefined
    const cors = corsHeaders(headers, { ...rules, preflight })
    reply.headers(cors)
    if (preflight && cors['access-control-allow-origin'] !== undefined) {
      await reply.code(204).header('cache-control', 'no-store').send()
    }
  })
}

/**
 * Counts what comes without a session by its address: each navigation, which costs a row of the database or its look-up,
 * and through session-cookie.ts each fetch that has no session. Probes are let be.
 */
function limitAddresses(app: App, limits: Pick<RateLimits, 'address'>): void {
  app.addHook('onRequest', (request, _reply, done) => {
    const { url } = request
    if (url !== '/livez') {
      const network = networkOf(request.ip)
      if (FETCHED.test(url)) limits.address.check(network)
      else limits.address.admit(network)
    }
    done()
  })
}
