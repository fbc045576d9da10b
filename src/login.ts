// The login of a person: the redirect to Pagero, and the callback that comes back from it. A transaction
// belongs to one browser and is consumed before the code is presented, so a code is presented once at most.

import { BrokerError } from './errors.ts'
import { connectGrant } from './connect.ts'
import type { TokenOutcome, TokenSet, UserKey } from './grant.ts'
import {
  accessTokenClaims,
  accountOfClaims,
  type PageroAccount,
  userKeyOfSubject,
} from './identity.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from './opaque-token.ts'
import type { LoginTransaction, Ports, SealContext } from './ports.ts'
import { safeReturnTo } from './return-to.ts'
import { discardRefreshToken } from './revocation.ts'
import { issueSession, type SessionSettings } from './session.ts'

/** Ten minutes to log in at Pagero, second factor included; also the life of the login cookie. */
export const LOGIN_LIFETIME_SECONDS = 600
/** Tabs of one browser that may be on their way at once; the oldest beyond this is dropped. */
const PENDING_LOGINS_MAX = 5
/** For a person who looks at a page, when Pagero names no time. */
const UNREACHABLE_RETRY_SECONDS = 5

export interface LoginSettings {
  pkce: 'off' | 'S256'
  scope: string
  /** Claim that names the user, in the ID token or else in an access token that is a JWT. */
  subjectClaim: string
  publicUrl: string
  allowedOrigins: readonly string[]
  sessions: SessionSettings
}

/**
 * Begins a login: stores the transaction and returns where to send the browser, and the value of its login
 * cookie. A browser that has one keeps it, so that its tabs do not undo each other.
 *
 * @throws BrokerError `temporarily_unavailable`
 * @see {@link https://www.rfc-editor.org/rfc/rfc6749#section-4.1.1 RFC 6749 §4.1.1}
 * @see {@link https://www.rfc-editor.org/rfc/rfc7636#section-4.2 RFC 7636 §4.2}
 */
export async function beginLogin(
  ports: Pick<Ports, 'sealer' | 'loginTransactions' | 'authorizationServer'>,
  settings: LoginSettings,
  request: {
    returnTo: string | undefined
    prompt: string | undefined
    browserBinding: string | undefined
    sessionToken: string | undefined
  },
): Promise<{ location: string; browserBinding: string }> {
  const browserBinding = isOpaqueToken(request.browserBinding)
    ? request.browserBinding
    : newOpaqueToken()
  const state = newOpaqueToken()
  const stateHash = hashOpaqueToken(state)
  const nonce = settings.scope.split(' ').includes('openid') ? newOpaqueToken() : undefined
  const codeVerifier = settings.pkce === 'S256' ? newOpaqueToken() : undefined
  await ports.loginTransactions.create(
    {
      stateHash,
      browserBindingHash: hashOpaqueToken(browserBinding),
      codeVerifierSealed:
        codeVerifier === undefined
          ? null
          : ports.sealer.seal(codeVerifierContext(stateHash), codeVerifier),
      nonceHash: nonce === undefined ? null : hashOpaqueToken(nonce),
      returnTo: safeReturnTo(request.returnTo, settings),
      replacesSessionHash: isOpaqueToken(request.sessionToken)
        ? hashOpaqueToken(request.sessionToken)
        : null,
    },
    { lifetimeSeconds: LOGIN_LIFETIME_SECONDS, pendingMax: PENDING_LOGINS_MAX },
  )
  const location = ports.authorizationServer.authorizationUrl({
    state,
    nonce,
    // S256: the challenge is base64url of the SHA-256 of the verifier's characters.
    codeChallenge:
      codeVerifier === undefined ? undefined : hashOpaqueToken(codeVerifier).toString('base64url'),
    // The only value that Pagero documents.
    prompt: request.prompt === 'login' ? 'login' : undefined,
  })
  return { location, browserBinding }
}

/**
 * Completes a login: consumes the transaction, presents the code once, stores the grant, begins a session.
 * Called twice with one callback, at once or on two replicas, the second is refused and costs no token request.
 *
 * Whatever is refused after tokens came has its refresh token revoked.
 *
 * @throws BrokerError `login_transaction_invalid`, `authorization_denied`, `authorization_failed`,
 *   `client_rejected_by_pagero`, `temporarily_unavailable`
 * @see {@link https://www.rfc-editor.org/rfc/rfc6749#section-4.1.2 RFC 6749 §4.1.2}
 * @see {@link https://www.rfc-editor.org/rfc/rfc9207#section-2.4 RFC 9207 §2.4}
 */
export async function completeLogin(
  ports: Pick<
    Ports,
    | 'clock'
    | 'log'
    | 'sealer'
    | 'grants'
    | 'revocations'
    | 'loginTransactions'
    | 'sessions'
    | 'authorizationServer'
  >,
  settings: LoginSettings,
  callback: { parameters: URLSearchParams; browserBinding: string | undefined },
): Promise<{ user: UserKey; returnTo: string; sessionToken: string }> {
  const { parameters, browserBinding } = callback
  const state = readState(parameters)
  if (!isOpaqueToken(browserBinding)) throw transactionInvalid()
  const stateHash = hashOpaqueToken(state)
  const transaction = await ports.loginTransactions.consume(
    stateHash,
    hashOpaqueToken(browserBinding),
  )
  if (transaction === undefined) throw transactionInvalid()

  const response = ports.authorizationServer.readAuthorizationResponse(parameters, state)
  if ('error' in response) throw errorOfResponse(response.error)
  const codeVerifier =
    transaction.codeVerifierSealed === null
      ? undefined
      : ports.sealer.open(codeVerifierContext(stateHash), transaction.codeVerifierSealed)

  const requestedAtMonotonicMs = ports.clock.monotonicMs()
  const tokens = tokensOf(await ports.authorizationServer.exchangeCode(response.code, codeVerifier))
  const { refreshToken } = tokens
  if (refreshToken === undefined) {
    throw failed('Pagero gave no refresh token, so it cannot be used on your behalf later.')
  }
  const identified = await identify(ports, settings, tokens, transaction)
  if ('refusal' in identified) {
    await discardRefreshToken(ports, refreshToken)
    throw failed(identified.refusal)
  }
  const { user, pagero } = identified
  await connectGrant(ports, {
    user,
    tokens: { ...tokens, refreshToken },
    requestedAtMonotonicMs,
    pagero,
    // The key is made of the subject, so another account is another user.
    allowAccountChange: true,
  })
  const { token } = await issueSession(ports, user, {
    settings: settings.sessions,
    replacesHash: transaction.replacesSessionHash,
  })
  return { user, returnTo: transaction.returnTo, sessionToken: token }
}

/** Parameters that must not occur twice (RFC 6749 section 3.1); a doubled one is refused before anything is spent. */
const SINGLE_PARAMETERS = ['state', 'code', 'iss', 'error'] as const

function readState(parameters: URLSearchParams): string {
  for (const name of SINGLE_PARAMETERS) {
    if (parameters.getAll(name).length > 1) throw transactionInvalid()
  }
  const state = parameters.get('state') ?? undefined
  if (!isOpaqueToken(state)) throw transactionInvalid()
  return state
}

/** The error codes of RFC 6749 section 4.1.2.1 and OpenID Connect Core section 3.1.2.6. Others are not repeated. */
const KNOWN_ERRORS: ReadonlySet<string> = new Set([
  'invalid_request',
  'unauthorized_client',
  'unsupported_response_type',
  'invalid_scope',
  'server_error',
  'temporarily_unavailable',
  'interaction_required',
  'login_required',
  'account_selection_required',
  'consent_required',
])

function errorOfResponse(error: string): BrokerError {
  if (error === 'access_denied') {
    return new BrokerError(
      'authorization_denied',
      'Access was refused at Pagero, by you or by its rules. Nothing was changed.',
    )
  }
  const name = KNOWN_ERRORS.has(error) ? error : 'an error that it may not name here'
  return failed(`Pagero answered the login with ${name}.`)
}

function tokensOf(outcome: TokenOutcome): TokenSet {
  if (outcome.kind === 'granted') return outcome.tokens
  throw errorOfOutcome(outcome)
}

function errorOfOutcome(outcome: Exclude<TokenOutcome, { kind: 'granted' }>): BrokerError {
  switch (outcome.kind) {
    case 'refused':
      return failed(
        'Pagero did not accept the authorization code: it is too old or was used before.',
      )
    case 'rejected_client':
      return new BrokerError(
        'client_rejected_by_pagero',
        'Pagero does not accept the credentials of this service. The operator has to correct them.',
      )
    case 'not_processed':
      return new BrokerError(
        'temporarily_unavailable',
        'Pagero cannot be reached at the moment. Nothing was changed; try again shortly.',
        { retryAfterSeconds: outcome.retryAfterSeconds ?? UNREACHABLE_RETRY_SECONDS },
      )
    case 'in_doubt':
      break
  }
  return failed('The answer from Pagero was lost on its way.')
}

/** Whose tokens these are. A refusal is a sentence for the person who logged in. */
async function identify(
  ports: Pick<Ports, 'authorizationServer' | 'log'>,
  settings: Pick<LoginSettings, 'subjectClaim'>,
  tokens: TokenSet,
  transaction: Pick<LoginTransaction, 'nonceHash'>,
): Promise<{ user: UserKey; pagero: PageroAccount } | { refusal: string }> {
  let claims: Readonly<Record<string, unknown>> | undefined
  if (tokens.idToken === undefined) {
    // Asked for and not given, the nonce protects nothing; PKCE does, where it is on (RFC 9700 section 4.5.3). Not refused,
    // because Pagero's printed answer has none, and nobody could log in.
    if (transaction.nonceHash !== null) ports.log.warn('id_token_missing')
    claims = accessTokenClaims(tokens.accessToken ?? '')
  } else {
    const read = await ports.authorizationServer.readIdToken(tokens.idToken, transaction.nonceHash)
    if ('invalid' in read) return { refusal: `The ID token is not to be trusted: ${read.invalid}.` }
    claims = read.claims
  }
  const pagero = claims && accountOfClaims(claims, settings.subjectClaim)
  const user = pagero && userKeyOfSubject(pagero.subject)
  if (pagero === undefined || user === undefined) {
    return {
      refusal:
        'Pagero did not say who has logged in: there is no ID token with the claim that names the user.' +
        ' The operator can ask for one with the scope openid.',
    }
  }
  return { user, pagero }
}

function codeVerifierContext(stateHash: Buffer): SealContext {
  const row = stateHash.toString('hex')
  return {
    table: 'login_transactions',
    column: 'code_verifier_sealed',
    row,
    salt: row,
    generation: 1,
  }
}

function transactionInvalid(): BrokerError {
  return new BrokerError(
    'login_transaction_invalid',
    'This answer belongs to no login that this browser has begun: it was used before, or is older than ten minutes.',
  )
}

function failed(reason: string): BrokerError {
  return new BrokerError('authorization_failed', `${reason} Begin the login again.`)
}
