// The internal listener: what backend services and operators call. No cookie counts here, and but for /livez no
// route of the public listener is served. Reads top to bottom: each line mounts one group of routes on what it needs.

import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AccessTokens } from '../access-token.ts'
import type { Caller, Callers } from '../callers.ts'
import type { Forwarder } from '../forward.ts'
import { parseUserKey, type UserKey } from '../grant.ts'
import type { Importer } from '../import.ts'
import type { Metrics } from '../metrics.ts'
import { NO_ROUTE, type RequestCounts } from '../request-counts.ts'
import type { Ports } from '../ports.ts'
import { createRateLimits, type RateLimitSettings } from '../rate-limit.ts'
import type { QueueWorker } from '../queue.ts'
import type { Revoker } from '../revocation.ts'
import type { Tracing } from '../tracing.ts'
import { type App, buildApp, noteAnswered, SECURITY_HEADERS } from './app.ts'
import {
  authorizeProxiedCall,
  CALLER,
  type CallerAuth,
  recognizeProxiedCall,
} from './caller-auth.ts'
import { registerConnectLinkRoutes } from './connect-link-routes.ts'
import { registerAuditRoutes } from './audit-routes.ts'
import { registerDocsRoutes } from './docs-routes.ts'
import {
  FORWARD_AUTH_FIELDS,
  FORWARD_AUTH_PATH,
  registerForwardAuthRoutes,
} from './forward-auth-routes.ts'
import { registerGrantListRoute } from './grant-list-route.ts'
import { registerGrantRoutes } from './grant-routes.ts'
import { type Check, registerHealthRoutes } from './health-routes.ts'
import { registerImportRoute } from './import-route.ts'
import { registerMetricsRoute } from './metrics-route.ts'
import { CALLER_SECURITY, openApiDocument, registerOpenApi } from './openapi.ts'
import { answerShed, isShed, SHED_REFUSAL, type Overload, refuseOverload } from './overload.ts'
import { type OnBehalf, PROXY_ROUTES } from './proxied-call.ts'
import { registerProxyRoutes } from './proxy-routes.ts'
import { createReadyCalls } from './ready-call.ts'
import { createReadyTokenAnswers } from './ready-token.ts'
import { methodOf } from './refusals.ts'
import { registerTokenRoutes, TOKEN_FIELDS } from './token-routes.ts'
import { registerWebhookRoutes } from './webhook-routes.ts'

export interface InternalParts {
  ports: Pick<
    Ports,
    | 'clock'
    | 'log'
    | 'audit'
    | 'auditEvents'
    | 'sealer'
    | 'grants'
    | 'pendingGrants'
    | 'imports'
    | 'attempts'
    | 'connectLinks'
    | 'sessionTickets'
    | 'sessions'
    | 'outbox'
  >
  callers: Callers
  accessTokens: AccessTokens
  forwarder: Forwarder
  importer: Importer
  /** What `/readyz` asks, by name. */
  checks: Readonly<Record<string, Check>>
  revoker: Pick<Revoker, 'kick'>
  /** Undefined: nobody is told of events. */
  webhookSender?: Pick<QueueWorker, 'kick'> | undefined
  overload?: Omit<Overload, 'stop' | 'shed'>
  metrics?: Pick<Metrics, 'exposition' | 'contentType'> | undefined
  counts?: RequestCounts | undefined
  tracing?: Tracing | undefined
  /** The other listener's app, whose operations are documented here. */
  publicApp: App
  settings: {
    /** What browsers see; named in the documentation, and in connect links. */
    publicUrl: string
    /** Where a connect link may lead back to, besides. */
    allowedOrigins: readonly string[]
    /** The callback: nowhere to lead back to. */
    redirectUri: string
    /** Longest time for receiving one request, uploads included. */
    requestTimeoutMs: number
    /** How long a client may read nothing of an answer that waits for it. */
    answerIdleTimeoutMs: number
    trustedProxies: readonly string[]
    rateLimits: RateLimitSettings
  }
}

/** Builds the app of the internal listener, ready to listen. */
export function buildInternalApp(parts: InternalParts): Promise<App> {
  const { ports, callers, accessTokens, forwarder, settings } = parts
  const limits = createRateLimits(ports, settings.rateLimits)
  const auth: CallerAuth = { callers, limits, ports }
  const calls = {
    listener: 'internal',
    accessTokens,
    forwarder,
    audit: ports.audit,
    log: ports.log,
  } as const
  const fields = Object.entries(SECURITY_HEADERS).flat()
  const onBehalfOf = ({ name }: Caller, user: UserKey): OnBehalf => ({
    user,
    actor: 'caller',
    name,
  })
  const readyTokens = createReadyTokenAnswers({
    callers,
    isOverloaded: parts.overload?.isThere ?? (() => false),
    limits,
    accessTokens,
    tokenFields: Object.entries({ ...SECURITY_HEADERS, ...TOKEN_FIELDS }).flat(),
    gatewayFields: Object.entries({ ...SECURITY_HEADERS, ...FORWARD_AUTH_FIELDS }).flat(),
    audit: ports.audit,
    counts: parts.counts,
  })
  const readyCalls = createReadyCalls({
    ...calls,
    limits,
    recognize({ headers, method = '' }, { prefix, path }) {
      const user = parseUserKey(prefix.split('/', 4)[3] ?? '')
      if (user === undefined) return undefined
      const caller = recognizeProxiedCall(auth, headers.authorization, { user, method, path })
      return caller && onBehalfOf(caller, user)
    },
    fieldsOf: () => fields,
    noteAnswered: (answered) => noteAnswered({ log: ports.log, counts: parts.counts }, answered),
  })
  /** Under overload some calls are refused, the others made as ever. */
  const refusesOrMakes = (request: IncomingMessage, response: ServerResponse): boolean => {
    if (parts.overload?.isThere() !== true || !isShed(parts.overload, request)) {
      return readyCalls(request, response)
    }
    const { url = '' } = request
    // To a gateway the problem is told in a way of its own, by the route.
    if (url.startsWith(FORWARD_AUTH_PATH)) return false
    const ofRefusal = PROXY_ROUTES.internal.prefix.test(url)
      ? { ...SECURITY_HEADERS, 'proxy-status': forwarder.proxyStatusOf(SHED_REFUSAL) }
      : SECURITY_HEADERS
    answerShed(request, response, { listener: 'internal', fields: ofRefusal })
    parts.counts?.ofQuick({ method: methodOf(request), route: NO_ROUTE, status: 503 })()
    return true
  }
  return buildApp(
    ports,
    {
      listener: 'internal',
      counts: parts.counts,
      tracing: parts.tracing,
      trustedProxies: settings.trustedProxies,
      requestTimeoutMs: settings.requestTimeoutMs,
      answerIdleTimeoutMs: settings.answerIdleTimeoutMs,
      tls: false,
      answersAtOnce: readyTokens.answersAtOnce,
      takesAtOnce: (request, response, route) =>
        readyTokens.takesAtOnce(request, response, route) || refusesOrMakes(request, response),
    },
    async (app) => {
      app.decorateRequest(CALLER)
      if (parts.overload !== undefined) refuseOverload(app, parts.overload)
      // Fastify takes text/plain for granted; every body here is JSON.
      app.removeContentTypeParser('text/plain')
      await registerOpenApi(app, 'internal')
      registerTokenRoutes(app, { auth, accessTokens, audit: ports.audit })
      registerForwardAuthRoutes(app, { auth, accessTokens, ports })
      registerGrantRoutes(app, { auth, ports, revoker: parts.revoker, accessTokens })
      registerProxyRoutes(app, {
        ...calls,
        security: CALLER_SECURITY,
        async authorize(request, call) {
          const { caller, user } = await authorizeProxiedCall(auth, request, call)
          return onBehalfOf(caller, user)
        },
      })
      registerConnectLinkRoutes(app, {
        auth,
        ports,
        settings,
        accessTokens,
        revoker: parts.revoker,
      })
      registerGrantListRoute(app, { auth, ports })
      registerImportRoute(app, { auth, importer: parts.importer, ports })
      registerAuditRoutes(app, { auth, ports })
      registerWebhookRoutes(app, { auth, ports, sender: parts.webhookSender })
      registerHealthRoutes(app, {
        clock: ports.clock,
        checks: parts.checks,
        warnings: () => callers.warnings(),
      })
      registerMetricsRoute(app, parts.metrics)
      await registerDocsRoutes(app, {
        document: () =>
          openApiDocument({
            publicApp: parts.publicApp,
            internalApp: app,
            publicUrl: settings.publicUrl,
          }),
      })
    },
  )
}
