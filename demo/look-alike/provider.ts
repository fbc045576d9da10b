// oidc-provider set up to behave as Pagero does: paths, lifetimes, one-time refresh tokens, the look of its answers.
// Pagero has no consent step, and gives a refresh token with every login.

import { type Configuration, interactionPolicy, Provider } from 'oidc-provider'
import type { IssuedAccessTokens } from './issued-access-tokens.ts'
import { errorPage } from './login-pages.ts'
import { type Middleware, PATHS, recordedRequest } from './record.ts'
import type { Store } from './store.ts'

/** Audience of the access tokens. */
export const API = 'https://api.pageroonline.com'
/** The only scope of the API, and what Pagero takes when none is asked for. */
export const DEFAULT_SCOPE = 'all'

export interface ProviderSettings {
  issuer: string
  clientId: string
  clientSecret: string
  redirectUris: readonly string[]
  accessTokenFormat: 'jwt' | 'opaque'
  accessTokenLifeSeconds: number
  refreshTokenLifeSeconds: number
}

/** Builds the provider. What it is asked is answered by its `callback()`. */
export function createProvider(settings: ProviderSettings, store: Store): Provider {
  return new Provider(settings.issuer, configurationOf(settings, store))
}

function configurationOf(settings: ProviderSettings, store: Store): Configuration {
  const policy = interactionPolicy.base()
  policy.remove('consent')
  return {
    adapter: (model: string) => store.adapter(model),
    jwks: { keys: [store.signingKey as never] },
    cookies: { keys: store.cookieKeys },
    clients: [
      {
        client_id: settings.clientId,
        client_secret: settings.clientSecret,
        redirect_uris: [...settings.redirectUris],
        grant_types: ['authorization_code', 'refresh_token'],
        response_types: ['code'],
      },
    ],
    // Only OpenID Connect scopes belong here: one of the API would ask for consent without end.
    scopes: ['openid'],
    responseTypes: ['code'],
    pkce: { required: () => false },
    allowOmittingSingleRegisteredRedirectUri: false,
    rotateRefreshToken: () => true,
    issueRefreshToken: async () => true,
    expiresWithSession: async () => false,
    findAccount: (_context, subject) => ({
      accountId: subject,
      claims: () => ({ sub: subject }),
    }),
    // A grant of its own for each login, so that revoking one login leaves the others.
    loadExistingGrant: async (context) => {
      const { client, session, provider } = context.oidc
      const grant = new provider.Grant({
        clientId: client?.clientId,
        accountId: session?.accountId,
      })
      grant.addOIDCScope('openid')
      grant.addResourceScope(API, DEFAULT_SCOPE)
      await grant.save()
      return grant
    },
    interactions: {
      policy,
      url: (_context, interaction) => `${PATHS.login}${interaction.uid}`,
    },
    features: {
      devInteractions: { enabled: false },
      userinfo: { enabled: false },
      rpInitiatedLogout: { enabled: false },
      revocation: {
        enabled: true,
        allowedPolicy: async (_context, client, token) => token.clientId === client.clientId,
      },
      resourceIndicators: {
        enabled: true,
        defaultResource: async (_context, _client, oneOf) => oneOf?.[0] ?? API,
        useGrantedResource: async () => true,
        getResourceServerInfo: () => ({
          scope: DEFAULT_SCOPE,
          audience: API,
          accessTokenFormat: settings.accessTokenFormat,
          accessTokenTTL: settings.accessTokenLifeSeconds,
        }),
      },
    },
    renderError: (context, { error, error_description: description }) => {
      context.type = 'html'
      context.body = errorPage(error, description)
    },
    routes: {
      authorization: PATHS.authorize,
      token: PATHS.token,
      revocation: PATHS.revoke,
      jwks: PATHS.jwks,
    },
    ttl: {
      AccessToken: settings.accessTokenLifeSeconds,
      AuthorizationCode: 60,
      Grant: settings.refreshTokenLifeSeconds,
      IdToken: settings.accessTokenLifeSeconds,
      Interaction: 600,
      RefreshToken: settings.refreshTokenLifeSeconds,
      Session: 86_400,
    },
  }
}

/** Asks for the scope that Pagero takes when the request names none. */
export const assumeDefaultScope: Middleware = async (context, next) => {
  if (recordedRequest(context).endpoint === 'authorize' && context.query['scope'] === undefined) {
    context.query = { ...context.query, scope: DEFAULT_SCOPE }
  }
  await next()
}

/** Notes whose refresh token a request presents, before anything is done with it. */
export function notePresented(provider: Provider): Middleware {
  return async (context, next) => {
    const recorded = recordedRequest(context)
    const presented = recorded.form['refresh_token']
    if (recorded.endpoint === 'token' && presented !== undefined) {
      const found = await provider.RefreshToken.find(presented)
      if (found?.grantId !== undefined && found.accountId !== undefined) {
        const generation = 1 + (found.rotations ?? 0)
        recorded.presented = { subject: found.accountId, grantId: found.grantId, generation }
      }
    }
    await next()
  }
}

/**
 * Lets requests that present the same code or refresh token in one after the other.
 * Without this two at once would both be granted, between the provider's look and its mark.
 */
export function presentOneAtATime(): Middleware {
  const lastOf = new Map<string, Promise<void>>()
  return async (context, next) => {
    const { endpoint, form } = recordedRequest(context)
    const presented = form['refresh_token'] ?? form['code']
    if (endpoint !== 'token' || presented === undefined) {
      await next()
      return
    }
    const before = lastOf.get(presented)
    const { promise: mine, resolve: letNextIn } = Promise.withResolvers<void>()
    lastOf.set(presented, mine)
    await before
    try {
      await next()
    } finally {
      letNextIn()
      if (lastOf.get(presented) === mine) lastOf.delete(presented)
    }
  }
}

/** Notes what a token request spent and gave out, and prints the answer as Pagero does. */
export function answerAsPagero(issued: IssuedAccessTokens): Middleware {
  return async (context, next) => {
    await next()
    const recorded = recordedRequest(context)
    if (recorded.endpoint !== 'token' || context.status !== 200) return
    if (recorded.replayed) return
    const { AccessToken, AuthorizationCode, RotatedRefreshToken } = context.oidc.entities
    const answer = context.body as Record<string, unknown>
    const grantId = AccessToken?.grantId ?? ''
    recorded.spent = {
      grantId,
      generation: AuthorizationCode === undefined ? 1 + (RotatedRefreshToken?.rotations ?? 0) : 0,
    }
    await issued.add(String(answer['access_token']), {
      subject: AccessToken?.accountId ?? '',
      grantId,
      expiresAtMs: Date.now() + Number(answer['expires_in']) * 1000,
    })
    context.body = {
      access_token: answer['access_token'],
      refresh_token: answer['refresh_token'],
      claims: 'publicid',
      ...(answer['id_token'] === undefined ? {} : { id_token: answer['id_token'] }),
      scope: '',
      token_type: 'bearer',
      expires_in: answer['expires_in'],
    }
  }
}
