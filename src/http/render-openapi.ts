// openapi.yaml without a database and without Pagero: both apps are built from parts that nobody calls,
// since a document needs routes and not requests.

import { Secret } from '../secret.ts'
import { buildInternalApp } from './internal-app.ts'
import { openApiDocument, toYaml } from './openapi.ts'
import { buildPublicApp, type PublicParts } from './public-app.ts'

/** Settings that show in the document: where browsers find the broker, and the path of the callback. */
const PUBLIC_URL = 'http://localhost:3000'
const CALLBACK_PATH = '/auth/callback'

const CONFIG: PublicParts['config'] = {
  pagero: {
    clientId: 'client',
    clientSecret: new Secret(''),
    clientSecretNext: undefined,
    clientAuth: 'client_secret_basic',
    redirectUri: `${PUBLIC_URL}${CALLBACK_PATH}`,
    authorizeUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-authorize',
    tokenUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-token',
    revokeUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-revoke',
    apiUrl: 'https://api.pageroonline.com',
    pkce: 'off',
    scope: 'all openid',
    issuer: undefined,
    jwksUrl: undefined,
  },
  publicUrl: PUBLIC_URL,
  allowedOrigins: [],
  trustedProxies: [],
  rateLimits: { perCaller: 0, perUser: 0, perAddress: 0 },
  sessions: { idleSeconds: 1, absoluteSeconds: 1, perUserMax: 1 },
  subjectClaim: 'sub',
  tokenCacheTrustMs: 0,
  proxy: { totalTimeoutMs: 60_000, idleTimeoutMs: 60_000 },
}

/** A part that is only passed on; calling a function of it would be a TypeError. */
const UNCALLED = {} as never
/** The log is asked once, when an app is built, what it would write. */
const PORTS = { log: {} } as never

/** Returns the text of openapi.yaml: the same for the same sources, whatever the settings. */
export async function renderOpenApi(): Promise<string> {
  const publicApp = await buildPublicApp({
    ports: PORTS,
    config: CONFIG,
    accessTokens: UNCALLED,
    forwarder: UNCALLED,
    revoker: UNCALLED,
  })
  const internalApp = await buildInternalApp({
    ports: PORTS,
    settings: {
      publicUrl: PUBLIC_URL,
      allowedOrigins: [],
      redirectUri: CONFIG.pagero.redirectUri,
      requestTimeoutMs: CONFIG.proxy.totalTimeoutMs,
      answerIdleTimeoutMs: CONFIG.proxy.idleTimeoutMs,
      trustedProxies: [],
      rateLimits: CONFIG.rateLimits,
    },
    callers: UNCALLED,
    accessTokens: UNCALLED,
    forwarder: UNCALLED,
    importer: UNCALLED,
    revoker: UNCALLED,
    checks: {},
    publicApp,
  })
  try {
    return toYaml(openApiDocument({ publicApp, internalApp, publicUrl: PUBLIC_URL }))
  } finally {
    await Promise.all([publicApp.close(), internalApp.close()])
  }
}
