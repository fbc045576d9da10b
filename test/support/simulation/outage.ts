// An hour without the authorization server, in virtual time: replicas of production code whose calls all meet one fault,
// while their users are asked for. What goes wrong is chosen, not drawn; the witness looks on as in any run.

import type { RefreshSettings } from '../../../src/config.ts'
import { connectGrant } from '../../../src/connect.ts'
import { BrokerError } from '../../../src/errors.ts'
import { parseUserKey, type UserKey } from '../../../src/grant.ts'
import { createSimulatedServer } from './authorization-server.ts'
import { createSimulatedDatabase } from './database.ts'
import { type Disk, secretOf } from './disk.ts'
import { createFaults, drawProfile, NO_FAULTS, type TokenCallFault } from './faults.ts'
import { EPOCH_MS, startLife } from './life.ts'
import { createRandom } from './random.ts'
import { type Replica, startReplica } from './replica.ts'
import { createScheduler } from './scheduler.ts'
import { SIMULATED_SETTINGS } from './simulate.ts'
import { createWitness } from './witness.ts'

/** What came of one call for a user's token. */
export interface Asked {
  user: UserKey
  replica: string
  atMs: number
  tookMs: number
  /** Undefined when a token was served. */
  error: { code: string; retryAfterSeconds: number | undefined } | undefined
}

export type Outage = Awaited<ReturnType<typeof setOutage>>

/**
 * Sets up replicas with these users logged in. `faultOf` says what befalls a call at the server; it is asked at each.
 * The caller ends it by `end`.
 */
export async function setOutage(
  settings: { replicas: number; users: readonly string[]; accessTokenLifeSeconds: number },
  faultOf: (user: string) => TokenCallFault,
  refresh: Partial<RefreshSettings> = {},
) {
  const scheduler = createScheduler()
  const { nowMs } = scheduler
  const random = createRandom(1)
  const witness = createWitness(nowMs, undefined)
  const store = { ...SIMULATED_SETTINGS, ...refresh }
  const database = createSimulatedDatabase(
    { refreshTokenLifetime: 'P3Y', ...store },
    () => EPOCH_MS + nowMs(),
  )
  const calls: Array<{ user: string; atMs: number }> = []
  const faults = {
    ...createFaults(random.fork(), {
      ...drawProfile(random),
      ...NO_FAULTS,
      crowdedSpool: false,
    }),
    tokenCall(token: string): TokenCallFault {
      const { user } = server.familyOf(token)
      calls.push({ user, atMs: nowMs() })
      return faultOf(user)
    },
  }
  const server = createSimulatedServer(
    { scheduler, faults, witness },
    {
      graceSeconds: 0,
      punishesReuse: true,
      accessTokenLifeSeconds: settings.accessTokenLifeSeconds,
    },
  )
  const disks = new Map<string, Disk>()
  const replicas = new Map<string, Replica>()
  witness.attach({
    ...{ nowMs, database, server, disks, ...store, cacheTrustMs: 1_000 },
    running: (name) => replicas.get(name)?.life,
  })
  const world = {
    scheduler,
    faults,
    witness,
    database,
    server,
    step: () => {},
    isDown: () => false,
  }
  const users = settings.users.map((name) => parseUserKey(name) as UserKey)

  const { setImmediate: realSetImmediate } = globalThis
  globalThis.setImmediate = ((action: () => void) =>
    scheduler.after(0, action)) as unknown as typeof setImmediate

  for (let i = 0; i < settings.replicas; i += 1) {
    const name = `broker-${i}`
    const life = startLife({ scheduler, random }, name, 0)
    witness.started(life)
    const disk: Disk = new Map()
    disks.set(name, disk)
    replicas.set(name, startReplica(world, life, disk, { ...store, cacheTrustMs: 1_000 }))
  }
  const all = [...replicas.values()]
  // Until every process has settled.
  await scheduler.run({ untilMs: 30_000 })
  for (const user of users) {
    const { access_token: accessToken, refresh_token: refreshToken } = server.logIn(user)
    const connection = {
      user,
      tokens: {
        ...{ accessToken, refreshToken, scope: '', idToken: undefined },
        expiresInSeconds: settings.accessTokenLifeSeconds,
      },
      requestedAtMonotonicMs: all[0]?.life.clock.monotonicMs() ?? 0,
      pagero: { issuer: null, subject: user },
      allowAccountChange: false,
    }
    if (all[0] !== undefined) void connectGrant(all[0].ports, connection)
  }
  await scheduler.run({ untilMs: nowMs() + 5_000 })

  return {
    users,
    database,
    witness,
    /** Calls that reached out for the server, whatever befell them. */
    calls,
    nowMs,

    /** Makes the stored access tokens of these users end in so many seconds. */
    shorten(which: readonly UserKey[], seconds: number): void {
      for (const user of which) {
        const row = database.grants.get(user)
        if (row?.accessToken === null || row === undefined) continue
        const lifeMs = settings.accessTokenLifeSeconds * 1000
        const expiresAtMs = EPOCH_MS + nowMs() + seconds * 1000
        const accessToken = {
          ...row.accessToken,
          requestedAt: new Date(expiresAtMs - lifeMs),
          expiresAt: new Date(expiresAtMs),
        }
        database.grants.set(user, { ...row, accessToken })
      }
    },

    /** Asks every replica for each of the users, again and again for so long, and returns what came of it. */
    async ask(which: readonly UserKey[], forMs: number, everyMs: number): Promise<Asked[]> {
      const asked: Asked[] = []
      const endsAtMs = nowMs() + forMs
      const round = () => {
        for (const { life, accessTokens } of all) {
          for (const user of which) {
            const atMs = nowMs()
            const note = (error: Asked['error']) =>
              asked.push({ user, replica: life.replica, atMs, tookMs: nowMs() - atMs, error })
            accessTokens.fresh(user).then(
              (token) => {
                witness.served(life, user, atMs, token, 0)
                note(undefined)
              },
              (error: unknown) => {
                if (!(error instanceof BrokerError)) throw error
                const { retryAfterSeconds } = error.extensions
                note({ code: error.code, retryAfterSeconds })
              },
            )
          }
        }
        if (nowMs() + everyMs < endsAtMs) scheduler.after(everyMs, round)
      }
      round()
      await scheduler.run({ untilMs: endsAtMs })
      // The last callers have waited for as long as any does.
      await scheduler.run({ untilMs: nowMs() + store.callerWaitSeconds * 1000 })
      return asked
    },

    /** Lets virtual time pass. */
    pass: (forMs: number) => scheduler.run({ untilMs: nowMs() + forMs }),

    /** Users whose stored token the server would refuse. */
    lost: () =>
      users.filter((user) => {
        const sealed = database.grants.get(user)?.refreshTokenSealed
        return sealed === null || sealed === undefined || !server.accepts(secretOf(sealed))
      }),

    end(): void {
      globalThis.setImmediate = realSetImmediate
      for (const { life } of all) life.kill()
    },
  }
}
