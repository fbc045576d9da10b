// Grants that a connect link brought and that nobody may use yet. Whoever opened the link has logged in at Pagero, but
// whose browser it was only the application knows: somebody may have sent the link of his own user to another person,
// whose invoices he wants to read. So the browser carries a confirmation to the application, and the grant counts when
// the application's backend returns it for the user who is logged in there.

import { randomUUID } from 'node:crypto'
import {
  type GrantConnection,
  movedOn,
  patiently,
  refuseOtherAccount,
  sealNewGrant,
  SUPERSEDED,
} from './connect.ts'
import { BrokerError, grantNotFound } from './errors.ts'
import type { Grant, UserKey } from './grant.ts'
import { UNKNOWN_ACCOUNT } from './identity.ts'
import { refuseDead } from './live-token.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from './opaque-token.ts'
import type { Ports, SealContext, Sealer } from './ports.ts'
import type { LoginTransaction, PendingGrant } from './login-stores.ts'
import { discardRefreshToken, sealRevocation } from './revocation.ts'
import { issueSession, type SessionSettings } from './session.ts'

/** A backend confirms within seconds; a quarter of an hour also sees it through a restart. */
const PENDING_SECONDS = 900
/** How long a confirmation may be repeated whose answer was lost. */
const CONFIRMED_KEPT_SECONDS = 600
/** One redirect from the application. */
const SESSION_TICKET_SECONDS = 60
/** How long the browser has to be known again, to begin a session after the confirmation. */
export const CONFIRMABLE_SECONDS = PENDING_SECONDS + CONFIRMED_KEPT_SECONDS + SESSION_TICKET_SECONDS
/** Rounds of reading and placing; a grant moves on when a refresh stores, which is once in minutes. */
const CONFIRM_TRIES_MAX = 10

/**
 * Keeps what a connect link brought until the application confirms it, and returns the confirmation for the browser to
 * carry there. An earlier one that waits for the user gives way and is revoked. Whatever is not stored is revoked.
 *
 * @throws BrokerError `account_mismatch`, `authorization_failed` when a newer connection has overtaken it,
 *   `temporarily_unavailable`
 */
export async function holdGrant(
  ports: Pick<
    Ports,
    'clock' | 'log' | 'sealer' | 'grants' | 'pendingGrants' | 'revocations' | 'authorizationServer'
  >,
  connection: GrantConnection,
  login: Pick<LoginTransaction, 'returnTo' | 'browserBindingHash' | 'replacesSessionHash'> & {
    startSession: boolean
  },
): Promise<string> {
  const { user, tokens, pagero } = connection
  const confirmation = newOpaqueToken()
  const place = { user, confirmationHash: hashOpaqueToken(confirmation) }
  const { sealer } = ports
  const sealed = {
    ...place,
    refreshTokenSealed: sealer.seal(
      pendingSealContext('refresh_token_sealed', place),
      tokens.refreshToken,
    ),
    accessTokenSealed:
      tokens.accessToken === undefined
        ? null
        : sealer.seal(pendingSealContext('access_token_sealed', place), tokens.accessToken),
    keyId: sealer.primaryKeyId,
    revocation: sealRevocation(ports, user, tokens.refreshToken),
  }
  let firstTriedAtMs: number | undefined
  try {
    await patiently(ports.clock, async () => {
      // An earlier round may have been stored, and only its answer was lost.
      if (firstTriedAtMs !== undefined && (await isPlaced(ports, place, firstTriedAtMs))) return
      firstTriedAtMs ??= ports.clock.monotonicMs()
      refuseOtherAccount(await ports.grants.find(user), connection)
      const requestedMsAgo = ports.clock.monotonicMs() - connection.requestedAtMonotonicMs
      await ports.pendingGrants.place(
        {
          ...sealed,
          requestedSecondsAgo: requestedMsAgo / 1000,
          expiresInSeconds: tokens.expiresInSeconds,
          scope: tokens.scope,
          pageroIssuer: pagero.issuer,
          pageroSubject: pagero.subject,
          returnTo: login.returnTo,
          startSession: login.startSession,
          allowAccountChange: connection.allowAccountChange,
          browserBindingHash: login.browserBindingHash,
          replacesSessionHash: login.replacesSessionHash,
        },
        PENDING_SECONDS,
      )
    })
  } catch (error) {
    // If it was stored all the same, nobody has its confirmation, and it ends by itself.
    await discardRefreshToken(ports, tokens.refreshToken, user)
    throw error
  }
  ports.log.info('grant_awaits_confirmation', { user })
  return confirmation
}

/**
 * Whether a round before this one was stored.
 * @throws BrokerError `authorization_failed` when a newer connection of the user has come since, and may have replaced it
 */
async function isPlaced(
  ports: Pick<Ports, 'clock' | 'pendingGrants'>,
  { user, confirmationHash }: Pick<PendingGrant, 'user' | 'confirmationHash'>,
  firstTriedAtMs: number,
): Promise<boolean> {
  if ((await ports.pendingGrants.find(confirmationHash)) !== undefined) return true
  const waiting = await ports.pendingGrants.findWaiting(user)
  if (waiting === undefined) return false
  const waitsForMs = waiting.readAt.getTime() - waiting.createdAt.getTime()
  if (waitsForMs >= ports.clock.monotonicMs() - firstTriedAtMs) return false
  throw new BrokerError('authorization_failed', SUPERSEDED)
}

export interface Confirmation {
  user: UserKey
  confirmation: string
  /** Who confirms, for the record. */
  caller: string
  requestId: string
}

/**
 * Puts the grant that waits for this confirmation in place of the user's older one, whose refresh token is then revoked,
 * and returns it; with the address at which its browser begins a session, if the link asked for one.
 *
 * Safe against refreshes, logins and disconnecting at the same time. Repeated within ten minutes it has the same end, so
 * a caller that has lost the answer asks again. A confirmation of another user is refused and stays as it was.
 *
 * @throws BrokerError `login_transaction_invalid`, `account_mismatch`, `grant_not_found` and `reauthentication_required` when the grant
 *   has ended since, `integrity_failure`, `temporarily_unavailable`
 */
export async function confirmGrant(
  ports: Pick<
    Ports,
    'clock' | 'log' | 'audit' | 'sealer' | 'grants' | 'pendingGrants' | 'sessionTickets'
  >,
  settings: { publicUrl: string },
  request: Confirmation,
): Promise<{ grant: Grant; sessionUrl: string | undefined }> {
  const confirmationHash = hashOpaqueToken(request.confirmation)
  for (let tries = 1; tries <= CONFIRM_TRIES_MAX; tries += 1) {
    const readAtMs = ports.clock.monotonicMs()
    const pending = await ports.pendingGrants.find(confirmationHash)
    if (pending?.user !== request.user) {
      const reason = pending === undefined ? 'nothing waits for it' : 'it is of another user'
      throw refuseConfirmation(ports, request, reason)
    }
    if (pending.confirmedAt === null && !(await placePending(ports, pending, readAtMs, request))) {
      // The row of the grant has moved on, or somebody has confirmed or dropped this one: the next round tells.
      continue
    }
    const grant = await ports.grants.find(pending.user)
    if (grant === undefined) throw grantNotFound()
    refuseDead(grant)
    if (!pending.startSession) return { grant, sessionUrl: undefined }
    const ticket = newOpaqueToken()
    const ticketHash = hashOpaqueToken(ticket)
    if (await ports.sessionTickets.create(ticketHash, confirmationHash, SESSION_TICKET_SECONDS)) {
      return { grant, sessionUrl: `${settings.publicUrl}/auth/session-start/${ticket}` }
    }
  }
  throw movedOn()
}

/** Puts a pending grant in place; false when the grant or this one has changed since it was read. */
async function placePending(
  ports: Pick<Ports, 'clock' | 'log' | 'audit' | 'sealer' | 'grants' | 'pendingGrants'>,
  pending: PendingGrant,
  readAtMs: number,
  request: Confirmation,
): Promise<boolean> {
  const { user, confirmationHash, createdAt } = pending
  const connection = openPending(ports.sealer, pending, readAtMs)
  const row = await ports.grants.find(user)
  try {
    refuseOtherAccount(row, connection)
  } catch (error) {
    await ports.pendingGrants.drop(user, confirmationHash)
    noteRefusal(ports, request, 'another Pagero account')
    throw error
  }
  const grant = sealNewGrant(ports, connection, randomUUID(), row)
  const placed = await ports.grants.connect({
    ...grant,
    authenticatedAt: createdAt,
    confirmedFrom: { confirmationHash, keptSeconds: CONFIRMED_KEPT_SECONDS },
  })
  if (placed) {
    const { caller, requestId } = request
    const generation = grant.replaces + 1
    ports.log.info('grant_confirmed', { requestId, user, caller, generation })
    ports.audit.record({
      action: 'grant_confirmed',
      actor: 'caller',
      name: caller,
      user,
      requestId,
      details: { generation },
    })
  }
  return placed
}

/** Opens the tokens of a pending grant. Its access token may have run out meanwhile: the grant counts all the same. */
function openPending(sealer: Sealer, pending: PendingGrant, readAtMs: number): GrantConnection {
  const { accessToken, readAt, pageroIssuer: issuer, pageroSubject: subject } = pending
  const open = (column: PendingColumn, sealed: Buffer) =>
    sealer.open(pendingSealContext(column, pending), sealed)
  const requestedAt = accessToken?.requestedAt ?? readAt
  const expiresAt = accessToken?.expiresAt ?? readAt
  return {
    user: pending.user,
    tokens: {
      refreshToken: open('refresh_token_sealed', pending.refreshTokenSealed ?? Buffer.alloc(0)),
      accessToken:
        accessToken === null ? undefined : open('access_token_sealed', accessToken.sealed),
      expiresInSeconds: (expiresAt.getTime() - requestedAt.getTime()) / 1000,
      scope: pending.scope,
      idToken: undefined,
    },
    requestedAtMonotonicMs: readAtMs - (readAt.getTime() - requestedAt.getTime()),
    pagero: subject === null ? UNKNOWN_ACCOUNT : { issuer, subject },
    allowAccountChange: pending.allowAccountChange,
  }
}

/**
 * Begins the session of a browser whose connection was confirmed: once, and in that browser alone, so that nobody else
 * can be sent into it.
 *
 * @throws BrokerError `login_transaction_invalid`, `authorization_failed` when the grant has been closed meanwhile,
 *   `temporarily_unavailable`
 */
export async function startSession(
  ports: Pick<Ports, 'sessions' | 'sessionTickets'>,
  settings: SessionSettings,
  request: {
    ticket: string
    browserBinding: string | undefined
    sessionToken: string | undefined
  },
): Promise<{ user: UserKey; returnTo: string; sessionToken: string }> {
  const { ticket, browserBinding, sessionToken } = request
  const started =
    isOpaqueToken(ticket) && isOpaqueToken(browserBinding)
      ? await ports.sessionTickets.consume(hashOpaqueToken(ticket), hashOpaqueToken(browserBinding))
      : undefined
  if (started === undefined) {
    throw new BrokerError(
      'login_transaction_invalid',
      'This address belongs to another browser, was used before, or is older than a minute. Go back to the application and begin again there.',
    )
  }
  const { user, returnTo, replacesSessionHash } = started
  const { token } = await issueSession(ports, user, {
    settings,
    // The one that the browser has now; one that it had when it opened the link may have been replaced since.
    replacesHash: isOpaqueToken(sessionToken) ? hashOpaqueToken(sessionToken) : replacesSessionHash,
  })
  return { user, returnTo, sessionToken: token }
}

function refuseConfirmation(
  ports: Pick<Ports, 'log' | 'audit'>,
  request: Confirmation,
  reason: string,
): BrokerError {
  noteRefusal(ports, request, reason)
  // One answer for all reasons: a confirmation of somebody else is as good as none.
  return new BrokerError(
    'login_transaction_invalid',
    'No connection of this user waits for this confirmation: it is too old, a newer one has taken its place, or it belongs to somebody else. Make a new connect link.',
  )
}

function noteRefusal(
  { log, audit }: Pick<Ports, 'log' | 'audit'>,
  { user, caller, requestId }: Confirmation,
  reason: string,
): void {
  log.warn('confirmation_refused', { requestId, user, caller, reason })
  audit.record({
    action: 'confirmation_refused',
    actor: 'caller',
    name: caller,
    user,
    outcome: 'refused',
    requestId,
    details: { reason },
  })
}

type PendingColumn = 'refresh_token_sealed' | 'access_token_sealed'

/** What the sealed columns of a pending grant are bound to: user and confirmation. */
export function pendingSealContext(
  column: PendingColumn,
  { user, confirmationHash }: Pick<PendingGrant, 'user' | 'confirmationHash'>,
): SealContext {
  return {
    table: 'pending_grants',
    column,
    row: user,
    salt: confirmationHash.toString('hex'),
    generation: 1,
  }
}
