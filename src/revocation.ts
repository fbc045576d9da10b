// Refresh tokens that are out of use here and that Pagero must still be told to forget (RFC 7009).
// They wait sealed in the database until Pagero has confirmed, so a restart or an outage loses none.

import { randomUUID } from 'node:crypto'
import { grantSealContext, PAGERO_USER_PREFIX, type UserKey } from './grant.ts'
import type { Ports, SealContext } from './ports.ts'
import type { NewRevocation, Revocation, Successor } from './grant-stores.ts'
import {
  BACKOFF_LAST_SECONDS,
  backoffSeconds,
  createQueueWorker,
  type QueueWorker,
} from './queue.ts'

/** Few at a time: revoking is never urgent enough to crowd out refreshes at the authorization server. */
const CONCURRENCY = 4
/** Longer than a revocation may take (15 s) with room to spare; after a crash another replica takes over then. */
const LEASE_SECONDS = 60
/** A queue that is empty, or in the hands of others, is looked at again after this. */
const POLL_MS = 5_000
const BACKOFF_FIRST_SECONDS = 5

/** Stands for a login that was refused before it was known whose it is. No subject is empty, so no user has this key. */
const UNKNOWN_USER = PAGERO_USER_PREFIX as UserKey

/** Seals a refresh token for the queue. With the same id it is queued once, however often it is added. */
export function sealRevocation(
  ports: Pick<Ports, 'sealer'>,
  user: UserKey,
  refreshToken: string,
  revocationId: string = randomUUID(),
): NewRevocation {
  return {
    revocationId,
    user,
    tokenSealed: ports.sealer.seal(revocationSealContext(revocationId), refreshToken),
    keyId: ports.sealer.primaryKeyId,
  }
}

/**
 * Has a refresh token revoked that a login brought and nobody will keep. Never throws: where the queue
 * cannot take it, Pagero is told at once, and if that fails too the log says so.
 */
export async function discardRefreshToken(
  ports: Pick<Ports, 'log' | 'sealer' | 'revocations' | 'authorizationServer'>,
  refreshToken: string,
  user: UserKey = UNKNOWN_USER,
): Promise<void> {
  try {
    await ports.revocations.add(sealRevocation(ports, user, refreshToken))
  } catch (error) {
    if (await ports.authorizationServer.revoke(refreshToken)) return
    ports.log.error('refresh_token_orphaned', { user, error })
  }
}

/**
 * Queues the revocation of a successor that no grant takes any more, and then forgets the successor. It may be
 * done again after a crash at any point.
 * @throws BrokerError `temporarily_unavailable`, `integrity_failure`
 */
export async function revokeSuperseded(
  ports: Pick<Ports, 'log' | 'sealer' | 'revocations' | 'grants' | 'spool'>,
  successor: Successor,
): Promise<void> {
  const { user, attemptId, generation } = successor
  const refreshToken = ports.sealer.open(
    grantSealContext('refresh_token_sealed', successor),
    successor.refreshTokenSealed,
  )
  await ports.revocations.add(sealRevocation(ports, user, refreshToken, attemptId))
  await ports.grants.finishSuperseded(successor)
  await ports.spool.remove(attemptId)
  ports.log.warn('late_answer_revoked', { user, attemptId, generation })
}

export type Revoker = QueueWorker

/** Makes the loop that empties the queue. Any number of replicas may run one. */
export function createRevoker(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'revocations' | 'authorizationServer'>,
): Revoker {
  return createQueueWorker(ports, {
    concurrency: CONCURRENCY,
    pollMs: POLL_MS,
    event: 'revocations_postponed',
    take: (limit) => ports.revocations.take(limit, LEASE_SECONDS),
    work: (revocation) => revokeOne(ports, revocation),
  })
}

async function revokeOne(
  ports: Pick<Ports, 'clock' | 'log' | 'sealer' | 'revocations' | 'authorizationServer'>,
  revocation: Revocation,
): Promise<void> {
  const { revocationId, user, tokenSealed, failureCount } = revocation
  let refreshToken: string
  try {
    refreshToken = ports.sealer.open(revocationSealContext(revocationId), tokenSealed)
  } catch (error) {
    // Kept: the key may come back.
    ports.log.error('revocation_unreadable', { user, error })
    await ports.revocations.retryLater(revocationId, BACKOFF_LAST_SECONDS)
    return
  }
  if (await ports.authorizationServer.revoke(refreshToken)) {
    await ports.revocations.done(revocationId)
    ports.log.info('refresh_token_revoked', { user })
    return
  }
  const delaySeconds = backoffSeconds(BACKOFF_FIRST_SECONDS, failureCount, ports.clock.random())
  ports.log.warn('revocation_failed', { user, retryAfterSeconds: Math.round(delaySeconds) })
  await ports.revocations.retryLater(revocationId, delaySeconds)
}

/** What a sealed token of the queue is bound to: its row. */
export function revocationSealContext(revocationId: string): SealContext {
  return {
    table: 'revocations',
    column: 'token_sealed',
    row: revocationId,
    salt: revocationId,
    generation: 1,
  }
}
