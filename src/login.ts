// The login of a person: the redirect to Pagero, and the callback that comes back from it. A transaction
// belongs to one browser and is consumed before the code is presented, so a code is presented once at most.

import { BrokerError, unavailable } from './errors.ts'
import { connectGrant, type GrantConnection } from './connect.ts'
import type { TokenOutcome, TokenSet, UserKey } from './grant.ts'
import {
  accessTokenClaims,
  accountOfClaims,
  type PageroAccount,
  UNKNOWN_ACCOUNT,
  userKeyOfSubject,
} from './identity.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from './opaque-token.ts'
import { holdGrant } from './pending-grant.ts'
import type { Ports, SealContext } from './ports.ts'
import type { ReturnedLogin, StartedLogin } from './login-stores.ts'
import { safeReturnTo, withParameter } from './return-to.ts'
import { discardRefreshToken } from './revocation.ts'
import { issueSession, type SessionSettings } from './session.ts'

/** Ten minutes to log in at Pagero, second factor included. */
const LOGIN_LIFETIME_SECONDS = 600
/** Tabs of one browser that may be on their way at once; the oldest beyond this is dropped. */
const PENDING_LOGINS_MAX = 5
export const LOGIN_LIMITS = {
  lifetimeSeconds: LOGIN_LIFETIME_SECONDS,
  pendingMax: PENDING_LOGINS_MAX,
}
/** For a person who looks at a page, when Pagero names no time. */
const UNREACHABLE_RETRY_SECONDS = 5

export interface LoginSettings {
  pkce: 'off' | 'S256'
  scope: string
  /** Claim that names the user, in the ID token or else in an access token that is a JWT. */
  subjectClaim: string
  publicUrl: string
  allowedOrigins: readonly string[]
  redirectUri: string
  sessions: SessionSettings
}

/** What a browser brings along when it begins a login. */
export interface LoginRequest {
  prompt: string | undefined
  browserBinding: string | undefined
  sessionToken: string | undefined
}

/** Where to send the browser, and the value of its login cookie. */
export interface BegunLogin {
  location: string
  browserBinding: string
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
  request: LoginRequest & { returnTo: string | undefined },
): Promise<BegunLogin> {
  const { login, ...begun } = startLogin(ports, settings, request)
  const returnTo = safeReturnTo(request.returnTo, settings)
  await ports.loginTransactions.create({ ...login, returnTo }, LOGIN_LIMITS)
  return begun
}

/** Makes the secrets of a login: what goes to Pagero with the browser, and what is to be stored of it. */
export function startLogin(
  ports: Pick<Ports, 'sealer' | 'authorizationServer'>,
  settings: Pick<LoginSettings, 'pkce' | 'scope'>,
  request: LoginRequest,
): BegunLogin & { login: StartedLogin } {
  const browserBinding = isOpaqueToken(request.browserBinding)
    ? request.browserBinding
    : newOpaqueToken()
  const state = newOpaqueToken()
  const stateHash = hashOpaqueToken(state)
  const nonce = settings.scope.split(' ').includes('openid') ? newOpaqueToken() : undefined
  const codeVerifier = settings.pkce === 'S256' ? newOpaqueToken() : undefined
  const login = {
    stateHash,
    browserBindingHash: hashOpaqueToken(browserBinding),
    codeVerifierSealed:
      codeVerifier === undefined
        ? null
        : ports.sealer.seal(codeVerifierSealContext(stateHash), codeVerifier),
    nonceHash: nonce === undefined ? null : hashOpaqueToken(nonce),
    replacesSessionHash: isOpaqueToken(request.sessionToken)
      ? hashOpaqueToken(request.sessionToken)
      : null,
  }
  const location = ports.authorizationServer.authorizationUrl({
    state,
    nonce,
    // S256: the challenge is base64url of the SHA-256 of the verifier's characters.
    codeChallenge:
      codeVerifier === undefined ? undefined : hashOpaqueToken(codeVerifier).toString('base64url'),
    // The only value that Pagero documents.
    prompt: request.prompt === 'login' ? 'login' : undefined,
  })
  return { login, location, browserBinding }
}

export interface CompletedLogin {
  user: UserKey
  /** Where the browser goes now, with the confirmation if one is needed. */
  returnTo: string
  /** Undefined when no session begins. */
  sessionToken: string | undefined
  /** The application has to confirm it. */
  isPending: boolean
}

type CallbackPorts = Pick<
  Ports,
  | 'clock'
  | 'log'
  | 'sealer'
  | 'grants'
  | 'pendingGrants'
  | 'revocations'
  | 'loginTransactions'
  | 'sessions'
  | 'authorizationServer'
>

/**
 * Completes a login: consumes the transaction, presents the code once, stores the grant, begins a session. One that
 * a connect link began does as the link says: its grant may have to wait for the application, and its session too.
 * Called twice with one callback, at once or on two replicas, the second is refused and costs no token request.
 *
 * Whatever is refused after tokens came has its refresh token revoked.
 *
 * @throws BrokerError `login_transaction_invalid`, `authorization_denied`, `authorization_failed`, `account_mismatch`,
 *   `client_rejected_by_pagero`, `temporarily_unavailable`
 * @see {@link https://www.rfc-editor.org/rfc/rfc6749#section-4.1.2 RFC 6749 §4.1.2}
 * @see {@link https://www.rfc-editor.org/rfc/rfc9207#section-2.4 RFC 9207 §2.4}
 */
export async function completeLogin(
  ports: CallbackPorts,
  settings: LoginSettings,
  callback: { parameters: URLSearchParams; browserBinding: string | undefined },
): Promise<CompletedLogin> {
  const { parameters, browserBinding } = callback
  const state = readState(parameters)
  if (!isOpaqueToken(browserBinding)) throw transactionInvalid()
  const transaction = await ports.loginTransactions.consume(
    hashOpaqueToken(state),
    hashOpaqueToken(browserBinding),
  )
  if (transaction === undefined) throw transactionInvalid()
  try {
    return await completeTransaction(ports, settings, transaction, { parameters, state })
  } catch (error) {
    // Another login would not help: the application has to make another link.
    if (transaction.connect === null || !(error instanceof BrokerError)) throw error
    const { code, detail, extensions, cause } = error
    throw new BrokerError(
      code,
      detail,
      { ...extensions, returnTo: transaction.returnTo },
      { cause: cause ?? error },
    )
  }
}

async function completeTransaction(
  ports: CallbackPorts,
  settings: LoginSettings,
  transaction: ReturnedLogin,
  { parameters, state }: { parameters: URLSearchParams; state: string },
): Promise<CompletedLogin> {
  const { connect, returnTo, stateHash } = transaction
  const response = ports.authorizationServer.readAuthorizationResponse(parameters, state)
  if ('error' in response) throw errorOfResponse(response.error)
  const codeVerifier =
    transaction.codeVerifierSealed === null
      ? undefined
      : ports.sealer.open(codeVerifierSealContext(stateHash), transaction.codeVerifierSealed)

  const requestedAtMonotonicMs = ports.clock.monotonicMs()
  const tokens = tokensOf(await ports.authorizationServer.exchangeCode(response.code, codeVerifier))
  const { refreshToken } = tokens
  if (refreshToken === undefined) {
    throw failed('Pagero gave no refresh token, so it cannot be used on your behalf later.')
  }
  const identified = await identify(ports, settings, tokens, transaction)
  if ('refusal' in identified) {
    await discardRefreshToken(ports, refreshToken, connect?.user)
    throw failed(identified.refusal)
  }
  const { user, pagero } = identified
  const connection: GrantConnection = {
    user,
    tokens: { ...tokens, refreshToken },
    requestedAtMonotonicMs,
    pagero,
    // After a plain login the key is made of the subject, so another account is another user.
    allowAccountChange: connect?.allowAccountChange ?? true,
  }
  if (connect?.confirm === true) {
    const confirmation = await holdGrant(ports, connection, {
      ...transaction,
      startSession: connect.startSession,
    })
    return {
      user,
      returnTo: withParameter(returnTo, 'confirmation', confirmation),
      sessionToken: undefined,
      isPending: true,
    }
  }
  await connectGrant(ports, connection)
  if (connect?.startSession === false) {
    return { user, returnTo, sessionToken: undefined, isPending: false }
  }
  const { token } = await issueSession(ports, user, {
    settings: settings.sessions,
    replacesHash: transaction.replacesSessionHash,
  })
  return { user, returnTo, sessionToken: token, isPending: false }
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
      return unavailable(
        'Pagero cannot be reached at the moment. Nothing was changed; try again shortly.',
        outcome.retryAfterSeconds ?? UNREACHABLE_RETRY_SECONDS,
      )
    case 'in_doubt':
      break
  }
  return failed('The answer from Pagero was lost on its way.')
}

/**
 * Whose tokens these are: by name of the application where a link was made for a user, else by name of Pagero. A refusal
 * is a sentence for the person who logged in.
 */
async function identify(
  ports: Pick<Ports, 'authorizationServer' | 'log'>,
  settings: Pick<LoginSettings, 'subjectClaim'>,
  tokens: TokenSet,
  transaction: Pick<ReturnedLogin, 'nonceHash' | 'connect' | 'returnedAt'>,
): Promise<Pick<GrantConnection, 'user' | 'pagero'> | { refusal: string }> {
  let claims: Readonly<Record<string, unknown>> | undefined
  if (tokens.idToken === undefined) {
    // Asked for and not given, the nonce protects nothing; PKCE does, where it is on (RFC 9700 section 4.5.3). Not refused,
    // because Pagero's printed answer has none, and nobody could log in.
    if (transaction.nonceHash !== null) ports.log.warn('id_token_missing')
    claims = accessTokenClaims(tokens.accessToken ?? '')
  } else {
    const read = await ports.authorizationServer.readIdToken(tokens.idToken, {
      nonceHash: transaction.nonceHash,
      now: transaction.returnedAt,
    })
    if ('invalid' in read) return { refusal: `The ID token is not to be trusted: ${read.invalid}.` }
    claims = read.claims
  }
  const pagero: PageroAccount | undefined = claims && accountOfClaims(claims, settings.subjectClaim)
  if (transaction.connect !== null) {
    return { user: transaction.connect.user, pagero: pagero ?? UNKNOWN_ACCOUNT }
  }
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

/** What a sealed PKCE verifier is bound to: its login transaction. */
export function codeVerifierSealContext(stateHash: Buffer): SealContext {
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
