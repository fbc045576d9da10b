// Grants put into a test's database without a login, and a clock that stands until it is told.

import { randomBytes, randomUUID } from 'node:crypto'
import type { Test } from 'tap'
import { fingerprintOf, grantSealContext, type UserKey } from '../../src/grant.ts'
import type { Clock, Sealer } from '../../src/ports.ts'
import type { GrantStore } from '../../src/grant-stores.ts'
import type { Database } from '../../src/postgres/database.ts'
import { readDeploymentId } from '../../src/postgres/deployment.ts'
import { createGrantStore } from '../../src/postgres/grant-store.ts'
import { createSealer } from '../../src/seal.ts'
import { createTestDatabase } from './database.ts'

/** A clock whose time passes by `pass` alone, and whose pauses end then. */
export function standingClock(): Clock & { pass(ms: number): void } {
  let nowMs = 0
  const waiting: Array<{ atMs: number; end: () => void }> = []
  return {
    now: () => new Date(nowMs),
    monotonicMs: () => nowMs,
    random: () => 0.5,
    sleep: (delayMs) =>
      new Promise((resolve) => void waiting.push({ atMs: nowMs + delayMs, end: resolve })),
    pass(ms) {
      nowMs += ms
      const due = waiting.filter(({ atMs }) => atMs <= nowMs)
      for (const one of due) {
        waiting.splice(waiting.indexOf(one), 1)
        one.end()
      }
    },
  }
}

export interface StoredGrants {
  database: Database
  sealer: Sealer
  grants: GrantStore
  /** Stores a grant of a first login, and returns where its token is bound to. */
  add(user: UserKey, accessToken: string): Promise<Place>
}

export interface Place {
  user: UserKey
  loginId: string
  generation: number
}

/** Opens a database for the test. */
export async function storedGrants(test: Test): Promise<StoredGrants> {
  const { database } = await createTestDatabase(test)
  const sealer = createSealer(
    [{ keyId: 'test', key: randomBytes(32) }],
    await readDeploymentId(database),
  )
  const grants = createGrantStore(database, {
    refreshTokenLifetime: 'P3Y',
    heartbeatStaleSeconds: 20,
    zombieWaitSeconds: 600,
    databaseSettleSeconds: 0,
  })
  return {
    database,
    sealer,
    grants,
    async add(user, accessToken) {
      const place = { user, loginId: randomUUID(), generation: 1 }
      const seal = (column: 'access_token_sealed' | 'refresh_token_sealed', secret: string) =>
        sealer.seal(grantSealContext(column, place), secret)
      await grants.connect({
        user,
        loginId: place.loginId,
        replaces: 0,
        refreshTokenSealed: seal('refresh_token_sealed', `refresh of ${accessToken}`),
        keyId: 'test',
        accessToken: {
          sealed: seal('access_token_sealed', accessToken),
          fingerprint: fingerprintOf(accessToken),
        },
        requestedSecondsAgo: 0,
        expiresInSeconds: 600,
        scope: '',
        pageroIssuer: null,
        pageroSubject: null,
        revocation: undefined,
      })
      return place
    },
  }
}
