// Logins without a browser, made from the provider's own models: for tests that need thousands of users.

import type { Provider } from 'oidc-provider'
import type { IssuedAccessTokens } from './issued-access-tokens.ts'
import { API, DEFAULT_SCOPE } from './provider.ts'

export interface IssuedLogin {
  accessToken: string
  refreshToken: string
  expiresInSeconds: number
}

/** Makes a login of its own for the subject, as the authorization code grant would have. */
export async function issueLogin(
  provider: Provider,
  issued: IssuedAccessTokens,
  subject: string,
  settings: {
    clientId: string
    accessTokenFormat: 'jwt' | 'opaque'
    accessTokenLifeSeconds: number
  },
): Promise<IssuedLogin> {
  const client = await provider.Client.find(settings.clientId)
  if (client === undefined) throw new Error('The provider does not know its own client.')
  const grant = new provider.Grant({ clientId: client.clientId, accountId: subject })
  grant.addResourceScope(API, DEFAULT_SCOPE)
  const grantId = await grant.save()
  const login = {
    client,
    accountId: subject,
    grantId,
    gty: 'authorization_code',
    scope: DEFAULT_SCOPE,
    resource: API,
    expiresWithSession: false,
  }
  const refreshToken = await new provider.RefreshToken(login as never).save()
  const access = new provider.AccessToken(login as never)
  access.resourceServer = new provider.ResourceServer(API, {
    scope: DEFAULT_SCOPE,
    audience: API,
    accessTokenFormat: settings.accessTokenFormat,
    accessTokenTTL: settings.accessTokenLifeSeconds,
  })
  access.scope = DEFAULT_SCOPE
  const accessToken = await access.save()
  const expiresInSeconds = settings.accessTokenLifeSeconds
  const expiresAtMs = Date.now() + expiresInSeconds * 1000
  await issued.add(accessToken, { subject, grantId, expiresAtMs })
  return { accessToken, refreshToken, expiresInSeconds }
}
