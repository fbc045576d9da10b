// What a broker is told of an authorization server, where a test has no more to say of it than where it is.

import type { PageroSettings } from '../../src/config.ts'
import { Secret } from '../../src/secret.ts'

/** Settings of a client at the server with this origin, in Pagero's way; a test changes what it is about. */
export function pageroSettingsOf(
  origin: string,
  changes: Partial<PageroSettings> = {},
): PageroSettings {
  return {
    clientId: 'client',
    clientSecret: new Secret('secret'),
    clientSecretNext: undefined,
    clientAuth: 'client_secret_basic',
    redirectUri: 'http://localhost:3000/callback',
    authorizeUrl: `${origin}/authorize`,
    tokenUrl: `${origin}/token`,
    revokeUrl: `${origin}/revoke`,
    apiUrl: origin,
    pkce: 'off',
    scope: '',
    issuer: undefined,
    jwksUrl: undefined,
    ...changes,
  }
}
