// Taking over a refresh token from another system. It counts only after one refresh has proven it, and that refresh goes
// through the protocol like any other: the token first becomes a grant of its own, named after the import, and is moved
// to its user, in one statement, when Pagero has answered. A crash at any point leaves an import that is gone on with.

import { createHash, randomUUID } from 'node:crypto'
import { closeGrant, sealNewGrant } from './connect.ts'
import { BrokerError, grantNotFound, unavailable } from './errors.ts'
import { type Grant, grantSealContext, importUserKey, type UserKey } from './grant.ts'
import { accessTokenClaims, accountOfClaims, UNKNOWN_ACCOUNT } from './identity.ts'
import { inTime } from './in-time.ts'
import type { Ports } from './ports.ts'
import type { GrantImport } from './grant-stores.ts'
import { openLiveToken, refuseDead } from './live-token.ts'
import type { Refresher } from './refresh.ts'

type ImportPorts = Pick<Ports, 'clock' | 'log' | 'sealer' | 'grants' | 'imports'>

export interface Importer {
  /**
   * Takes over `refreshToken` for the user and returns the grant. The same token given again is the same import. An
   * older grant of the user stays as it was until the new one is proven; then it is replaced and revoked. Who has logged
   * in or was disconnected meanwhile stays so: the import is overtaken, and its token is revoked.
   * @throws BrokerError `request_invalid` before the token is used, `reauthentication_required` when Pagero refuses it or
   *   it was overtaken, `temporarily_unavailable` when there is no verdict yet: the import goes on, and asking again tells
   */
  takeOver(request: { user: UserKey; refreshToken: string; obtainedAt: Date }): Promise<Grant>
  /**
   * Goes on with imports that a crash or an outage interrupted; returns how many there were. One that was refused, and
   * whose success came after all, is moved where it replaces nothing that lives, and revoked otherwise.
   */
  resume(stopping?: AbortSignal): Promise<number>
}

/** Read at a time. */
const PAGE_IMPORTS = 20
/** Rounds of reading and moving; a row moves on when a refresh stores, which is once in minutes. */
const MOVE_TRIES_MAX = 10

/** Makes the importer of a process. */
export function createImporter(
  ports: ImportPorts,
  refresher: Refresher,
  settings: { callerWaitSeconds: number; subjectClaim: string },
): Importer {
  const { clock, log, sealer, grants, imports } = ports
  /** Where the next round goes on, so that imports that cannot be ended keep no other from it. */
  let after: string | undefined

  async function takeOver(request: {
    user: UserKey
    refreshToken: string
    obtainedAt: Date
  }): Promise<Grant> {
    const { user, refreshToken, obtainedAt } = request
    if (obtainedAt > clock.now()) {
      throw new BrokerError('request_invalid', 'obtained_at lies in the future.', {
        errors: [{ pointer: '/obtained_at', detail: 'must not lie in the future' }],
      })
    }
    const importId = randomUUID()
    const proof = { user: importUserKey(importId), loginId: randomUUID(), generation: 1 }
    const entry = await imports.begin(
      {
        importId,
        user,
        obtainedAt,
        tokenDigest: digestOf(refreshToken),
      },
      {
        ...proof,
        refreshTokenSealed: sealer.seal(
          grantSealContext('refresh_token_sealed', proof),
          refreshToken,
        ),
        keyId: sealer.primaryKeyId,
      },
    )
    if (entry.user !== user) throw takenByAnother()
    await withinPatience(goOn(entry))
    const grant = await grants.find(user)
    if (grant === undefined) throw grantNotFound()
    // It was taken over, and has been disconnected or has died since.
    refuseDead(grant)
    return grant
  }

  /** Brings an import to its end: proves the token unless that is done, and moves it. */
  async function goOn(entry: GrantImport): Promise<void> {
    if (entry.outcome === 'imported') return
    const isRefused = entry.outcome === 'refused'
    const proofUser = importUserKey(entry.importId)
    const proof = await grants.find(proofUser)
    if (proof?.state === 'revoked') await endOvertaken(entry)
    if (isRefused && proof?.state !== 'active') {
      throw tokenRefused(isDead(proof) ? proof?.stateReason : null)
    }
    // Another replica has just moved it.
    if (proof === undefined) return
    if (proof.generation === 1) {
      const row = await grants.find(entry.user)
      // No need to prove what will not be moved. An answer that is on its way finds a closed grant, and is revoked.
      if (isOvertaken(entry, row)) await endOvertaken(entry)
      try {
        await refresher.refresh(proof, 'import')
      } catch (error) {
        const dead = error instanceof BrokerError && error.code === 'reauthentication_required'
        if (!dead) throw error
        await imports.refuse(entry.importId)
        log.warn('import_refused', { user: entry.user })
        throw tokenRefused(error.extensions.cause)
      }
    }
    await move(entry, proofUser)
  }

  /**
   * Ends an import that must not be moved any more: closes what proves it, whose token is revoked.
   * @throws BrokerError always, as its caller is told
   */
  async function endOvertaken(entry: GrantImport): Promise<never> {
    const closed = await closeGrant(ports, importUserKey(entry.importId), entry.user)
    if (closed !== undefined) log.warn('import_overtaken', { user: entry.user })
    if (entry.outcome === null) await imports.refuse(entry.importId)
    throw overtaken()
  }

  async function move(entry: GrantImport, proofUser: UserKey): Promise<void> {
    for (let tries = 1; tries <= MOVE_TRIES_MAX; tries += 1) {
      const readAtMs = clock.monotonicMs()
      const proof = await grants.find(proofUser)
      if (proof === undefined) return
      if (proof.generation === 1 || proof.refreshTokenSealed === null) break
      const refreshToken = sealer.open(
        grantSealContext('refresh_token_sealed', proof),
        proof.refreshTokenSealed,
      )
      const row = await grants.find(entry.user)
      if (isOvertaken(entry, row)) await endOvertaken(entry)
      const token = openLiveToken(sealer, proof, readAtMs)
      const claims = token === undefined ? undefined : accessTokenClaims(token.accessToken)
      const account = claims && accountOfClaims(claims, settings.subjectClaim)
      const grant = sealNewGrant(
        ports,
        {
          user: entry.user,
          tokens: {
            refreshToken,
            accessToken: token?.accessToken,
            expiresInSeconds: token?.lifeSeconds ?? 0,
            scope: proof.scope,
            idToken: undefined,
          },
          requestedAtMonotonicMs:
            token === undefined ? readAtMs : token.expiresAtMs - token.lifeSeconds * 1000,
          pagero: account ?? UNKNOWN_ACCOUNT,
        },
        randomUUID(),
        row,
      )
      const moved = await grants.connect({
        ...grant,
        // It is by another clock, and must not look like a login that came after the import was asked for.
        authenticatedAt: entry.obtainedAt < entry.createdAt ? entry.obtainedAt : entry.createdAt,
        movedFrom: {
          importId: entry.importId,
          outcome: entry.outcome,
          user: proofUser,
          generation: proof.generation,
        },
      })
      if (moved) {
        log.info('grant_imported', { user: entry.user, generation: grant.replaces + 1 })
        return
      }
    }
    throw goesOn()
  }

  /** The import goes on when its caller has waited long enough. */
  async function withinPatience(work: Promise<void>): Promise<void> {
    work.catch((error: unknown) => log.debug('import_not_ended', { error }))
    const limitMs = settings.callerWaitSeconds * 1000
    const ended = await inTime(
      clock,
      work.then(() => true),
      limitMs,
    )
    if (ended === undefined) throw goesOn()
  }

  /** Goes on with one after the other, so that imports crowd nobody out; returns how many are over by it. */
  async function goOnWith(page: readonly GrantImport[], stopping?: AbortSignal): Promise<number> {
    let over = 0
    for (const entry of page) {
      if (stopping?.aborted === true) break
      try {
        await goOn(entry)
        over += 1
      } catch (error) {
        const code = error instanceof BrokerError ? error.code : undefined
        if (code === 'reauthentication_required') over += 1
        if (code === 'integrity_failure')
          log.error('import_unreadable', { user: entry.user, error })
        else log.debug('import_not_ended', { user: entry.user, error })
      }
    }
    return over
  }

  return {
    takeOver,
    async resume(stopping) {
      let count = 0
      let isWorthwhile: boolean
      do {
        const page = await imports.findUnfinished({ after, limit: PAGE_IMPORTS })
        const isLast = page.length < PAGE_IMPORTS
        after = isLast ? undefined : page.at(-1)?.importId
        count += page.length
        // Where none of a page comes to an end, Pagero or the database is away, perhaps.
        isWorthwhile = (await goOnWith(page, stopping)) > 0 && !isLast
      } while (isWorthwhile)
      return count
    },
  }
}

/**
 * Tells a token that was given before, whatever keys are in use by then. It needs no key: what it hashes is too random
 * to be guessed.
 */
function digestOf(refreshToken: string): Buffer {
  return createHash('sha256').update('pagero-broker/v1/import/').update(refreshToken).digest()
}

function takenByAnother(): BrokerError {
  return new BrokerError(
    'request_invalid',
    'This refresh token has been taken over before, for another user.',
    { errors: [{ pointer: '/refresh_token', detail: 'was taken over before' }] },
  )
}

function isDead(grant: Grant | undefined): boolean {
  return grant?.state === 'reauthentication_required'
}

/** Whether the user has, or has given up, what the import must not replace. What is dead it may always replace. */
function isOvertaken(entry: GrantImport, row: Grant | undefined): boolean {
  if (entry.isAbandoned) return true
  if (row === undefined || isDead(row)) return false
  // The caller was told that the token is refused, and has gone on since.
  if (entry.outcome === 'refused') return true
  // A login by a release that does not know of decisions is told by its own instant.
  const { decidedAt, authenticatedAt } = row
  return authenticatedAt > entry.createdAt || (decidedAt !== null && decidedAt > entry.createdAt)
}

function overtaken(): BrokerError {
  return new BrokerError(
    'reauthentication_required',
    'This refresh token was not taken over and is revoked: a login, a disconnection or another import has come since the import was begun.',
    { cause: 'revoked_or_expired' },
  )
}

function tokenRefused(cause: string | null = null): BrokerError {
  return new BrokerError(
    'reauthentication_required',
    'Pagero refuses this refresh token. An older grant of the user is as it was.',
    { cause: cause ?? 'revoked_or_expired' },
  )
}

function goesOn(): BrokerError {
  return unavailable(
    'Pagero has not confirmed the refresh token yet. The import goes on; send the same request again to learn its end.',
    5,
  )
}
