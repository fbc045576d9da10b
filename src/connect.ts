// Putting a grant in place, and taking it away. Either way the refresh token that goes out of use is queued
// for revocation in the same transaction, and `revocation.ts` tells Pagero. Nothing here presents a refresh token.

import { randomUUID } from 'node:crypto'
import { BrokerError, isUnwritten, unavailable } from './errors.ts'
import {
  fingerprintOf,
  type Grant,
  grantSealContext,
  type TokenSet,
  type UserKey,
  importUserKey,
} from './grant.ts'
import type { PageroAccount, UnknownAccount } from './identity.ts'
import type { Clock, Ports } from './ports.ts'
import type { NewGrant } from './grant-stores.ts'
import { discardRefreshToken, sealRevocation } from './revocation.ts'

/**
 * How long a login waits for a database that is away, or for a row that others keep changing: as long as
 * any caller is kept waiting. Its tokens are in hand and its code is spent, so giving up costs a login.
 */
const PATIENCE_MS = 10_000
const PAUSE_MS = 100
/** Rounds of reading and closing; a row moves on when a refresh stores, which is once in minutes. */
const CLOSE_TRIES_MAX = 10

export interface GrantConnection {
  user: UserKey
  tokens: TokenSet & { refreshToken: string }
  /** Monotonic instant before the token request was sent: the access token's life is counted from here. */
  requestedAtMonotonicMs: number
  pagero: PageroAccount | UnknownAccount
  /** False: a user connected to one Pagero account stays with it. */
  allowAccountChange: boolean
}

/**
 * Stores the grant that a login brought, in place of the user's older one, whose refresh token is then revoked.
 *
 * Safe against refreshes and other logins of the same user at the same time. A grant that surely was
 * not stored has its refresh token revoked; one that may have been stored is left alone.
 *
 * @throws BrokerError `account_mismatch`, `temporarily_unavailable`
 */
export async function connectGrant(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'revocations' | 'authorizationServer'>,
  connection: GrantConnection,
): Promise<void> {
  const { user, tokens } = connection
  const loginId = randomUUID()
  /** What a round of unknown end was to replace. */
  let inDoubt: Replaced | undefined
  try {
    await patiently(ports.clock, async () => {
      const row = await ports.grants.find(user)
      // An earlier round was stored, and only its answer was lost.
      if (row?.loginId === loginId) return
      if (inDoubt !== undefined && !isSame(row, inDoubt)) {
        const isRefreshed = row?.loginId === inDoubt.loginId
        inDoubt = undefined
        // That round may have been stored, and a newer login have replaced it and queued its token: this one comes late.
        // Not where the older login has only been refreshed: then it was not, and no statement is left that could.
        if (!isRefreshed) throw new BrokerError('authorization_failed', SUPERSEDED)
      }
      refuseOtherAccount(row, connection)
      const grant = sealNewGrant(ports, connection, loginId, row)
      const before = inDoubt
      inDoubt = { loginId: row?.loginId, generation: grant.replaces }
      try {
        if (await ports.grants.connect(grant)) return
        inDoubt = before
      } catch (error) {
        if (isUnwritten(error)) inDoubt = before
        throw error
      }
      throw movedOn()
    })
  } catch (error) {
    if (inDoubt !== undefined) ports.log.error('login_in_doubt', { user, error })
    else await discardRefreshToken(ports, tokens.refreshToken, user)
    throw error
  }
}

/** A row as it was found; generation 0 is none. */
interface Replaced {
  loginId: string | undefined
  generation: number
}

function isSame(row: Grant | undefined, { loginId, generation }: Replaced): boolean {
  return row?.loginId === loginId && (row?.generation ?? 0) === generation
}

export const SUPERSEDED =
  'A newer login of this user was completed meanwhile, and stays. Nothing is to be done.'

/** Does work for a login, and again while it fails for a passing reason, for as long as any caller is kept waiting. */
export async function patiently(clock: Clock, work: () => Promise<void>): Promise<void> {
  const patientUntilMs = clock.monotonicMs() + PATIENCE_MS
  for (;;) {
    try {
      await work()
      return
    } catch (error) {
      const passing = error instanceof BrokerError && error.code === 'temporarily_unavailable'
      if (!passing || clock.monotonicMs() >= patientUntilMs) throw error
      await clock.sleep(PAUSE_MS)
    }
  }
}

/**
 * Closes the user's grant, ends the sessions and queues the revocation; what waits for confirmation, or is being imported,
 * goes the same way. It is over here at once, whatever Pagero says. Returns false when there is nothing to end.
 *
 * @throws BrokerError `temporarily_unavailable`
 */
export async function disconnectGrant(
  ports: Pick<Ports, 'log' | 'sealer' | 'grants' | 'pendingGrants' | 'imports'>,
  user: UserKey,
): Promise<boolean> {
  // First, so that what is being confirmed or moved at this moment is either gone by this, or seen below.
  const wasPending = await ports.pendingGrants.drop(user)
  const abandoned = await ports.imports.abandon(user)
  for (const importId of abandoned) {
    await closeGrant(ports, importUserKey(importId), user)
    await ports.imports.refuse(importId)
  }
  const closed = await closeGrant(ports, user, user)
  if (closed !== undefined) ports.log.info('grant_disconnected', { user, generation: closed })
  if (closed === undefined && wasPending) ports.log.info('pending_grant_dropped', { user })
  if (closed === undefined && abandoned.length > 0) ports.log.info('import_abandoned', { user })
  return closed !== undefined || wasPending || abandoned.length > 0
}

/**
 * Closes the row of `key`, whose token is `owner`'s and is queued for revocation. Returns the generation that was closed;
 * undefined when there was nothing to close.
 * @throws BrokerError `temporarily_unavailable`
 */
export async function closeGrant(
  ports: Pick<Ports, 'log' | 'sealer' | 'grants'>,
  key: UserKey,
  owner: UserKey,
): Promise<number | undefined> {
  for (let tries = 1; tries <= CLOSE_TRIES_MAX; tries += 1) {
    const row = await ports.grants.find(key)
    if (row === undefined || row.state === 'revoked') return undefined
    const refreshToken = openRefreshToken(ports, row)
    const revocation =
      refreshToken === undefined ? undefined : sealRevocation(ports, owner, refreshToken)
    if (await ports.grants.close(key, row.generation, revocation)) return row.generation
  }
  throw movedOn()
}

/**
 * Keeps a user with the Pagero account that is connected, unless another one is allowed.
 * @throws BrokerError `account_mismatch`
 */
export function refuseOtherAccount(
  row: Grant | undefined,
  connection: Pick<GrantConnection, 'pagero' | 'allowAccountChange'>,
): void {
  if (row === undefined || row.state === 'revoked' || connection.allowAccountChange) return
  const { issuer, subject } = connection.pagero
  const sameSubject = row.pageroSubject === null || row.pageroSubject === subject
  // One of the two may have come without an ID token, and then without an issuer: that tells no two accounts apart.
  const sameIssuer = row.pageroIssuer === null || issuer === null || row.pageroIssuer === issuer
  if (sameSubject && sameIssuer) return
  throw new BrokerError(
    'account_mismatch',
    subject === null
      ? 'Pagero did not say which account has logged in, so it may be another than the one that this user is connected to, which is kept.'
      : 'This user is connected to another Pagero account, which is kept. Log in with that one, or disconnect it first.',
  )
}

/** Seals the tokens for the generation after the row's, and the row's own refresh token for its revocation. */
export function sealNewGrant(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer'>,
  connection: Omit<GrantConnection, 'allowAccountChange'>,
  loginId: string,
  row: Grant | undefined,
): NewGrant {
  const { user, tokens, pagero } = connection
  const replaces = row?.generation ?? 0
  const sealed = { user, loginId, generation: replaces + 1 }
  const seal = (column: Parameters<typeof grantSealContext>[0], secret: string) =>
    ports.sealer.seal(grantSealContext(column, sealed), secret)
  const replaced = row === undefined ? undefined : openRefreshToken(ports, row)
  return {
    user,
    loginId,
    replaces,
    refreshTokenSealed: seal('refresh_token_sealed', tokens.refreshToken),
    keyId: ports.sealer.primaryKeyId,
    accessToken:
      tokens.accessToken === undefined
        ? null
        : {
            sealed: seal('access_token_sealed', tokens.accessToken),
            fingerprint: fingerprintOf(tokens.accessToken),
          },
    requestedSecondsAgo: (ports.clock.monotonicMs() - connection.requestedAtMonotonicMs) / 1000,
    expiresInSeconds: tokens.expiresInSeconds,
    scope: tokens.scope,
    pageroIssuer: pagero.issuer,
    pageroSubject: pagero.subject,
    // A server that does not rotate gives the same token again: revoking it would end the new grant.
    revocation:
      replaced === undefined || replaced === tokens.refreshToken
        ? undefined
        : sealRevocation(ports, user, replaced),
  }
}

/**
 * Opens the row's refresh token; undefined when there is none left to revoke. One that does not open
 * must not keep its user from logging in again: it is reported and stays unrevoked.
 */
function openRefreshToken(ports: Pick<Ports, 'log' | 'sealer'>, row: Grant): string | undefined {
  const { user, generation, refreshTokenSealed } = row
  if (refreshTokenSealed === null || row.state === 'revoked') return undefined
  try {
    return ports.sealer.open(grantSealContext('refresh_token_sealed', row), refreshTokenSealed)
  } catch (error) {
    ports.log.error('replaced_refresh_token_unreadable', { user, generation, error })
    return undefined
  }
}

/** Somebody else was faster, again and again. */
export function movedOn(): BrokerError {
  return unavailable('The grant of this user is being changed at this moment. Try again.', 1)
}
