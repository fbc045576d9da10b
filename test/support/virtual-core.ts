// The core of one replica in virtual time, for a test that says itself what goes wrong and when: the database, the disk
// and the seal of the simulation, and an authorization server that answers as it is told.

import { successorIdOf } from '../../src/spool-entry.ts'
import type { RefreshSettings } from '../../src/config.ts'
import { BrokerError } from '../../src/errors.ts'
import {
  fingerprintOf,
  type Grant,
  grantSealContext,
  type TokenOutcome,
  type UserKey,
} from '../../src/grant.ts'
import type { Ports } from '../../src/ports.ts'
import type { NewRevocation, Successor } from '../../src/grant-stores.ts'
import { keepingLog } from './keeping-log.ts'
import { createSimulatedDatabase } from './simulation/database.ts'
import { createSimulatedSealer } from './simulation/disk.ts'
import { EPOCH_MS, startLife } from './simulation/life.ts'
import { createRandom } from './simulation/random.ts'
import { createScheduler } from './simulation/scheduler.ts'

export const SETTINGS: RefreshSettings = {
  deadlineSeconds: 45,
  sendDeadlineSeconds: 5,
  leaseSeconds: 60,
  aheadSeconds: 120,
  aheadJitterSeconds: 30,
  defaultMinTtlSeconds: 30,
  callerWaitSeconds: 10,
  forcedIntervalSeconds: 30,
  refusalConfirmSeconds: 3,
  zombieWaitSeconds: 150,
  unknownSettleSeconds: 5,
  databaseSettleSeconds: 15,
  antiEntropySeconds: 30,
  spoolRetentionSeconds: 120,
  heartbeatSeconds: 5,
  heartbeatStaleSeconds: 20,
  breakerProbeSeconds: 5,
  retryBackoffSeconds: 2,
  graceSeconds: undefined,
  concurrency: 20,
}

/** Every call of a port takes this long. */
const CALL_MS = 1
const LOGIN_ID = '8c5fb1d6-0b7e-4a39-9a5c-3f9e0f4f8d10'

/** `lost`: nothing is done. `refused`: nor is it, and that is told. `unconfirmed`: it is done, and the call fails all the same. */
type Fault = 'lost' | 'refused' | 'unconfirmed'

/** Sets the scene for the replica that `identity` names; the database has heard of it. */
export function setVirtualCore(identity = { replica: 'broker-0', boot: 'boot-0' }) {
  const scheduler = createScheduler()
  const { clock } = startLife({ scheduler, random: createRandom(1) }, identity.replica, 0)
  const log = keepingLog()
  const sealer = createSimulatedSealer()
  const nowMs = () => EPOCH_MS + scheduler.nowMs()
  const database = createSimulatedDatabase({ refreshTokenLifetime: 'P3Y', ...SETTINGS }, nowMs)
  const disk = new Map<string, Successor>()
  /** What goes wrong with the next calls of a port's function, call by call. */
  const faults = new Map<string, Array<Fault | undefined>>()
  const calls: string[] = []
  const presented: Array<{ token: string; limits: { sendBeforeMs: number; deadlineMs: number } }> =
    []
  const revoked: string[] = []
  const ends: Array<Parameters<Ports['grants']['disarm']>[0]> = []
  /** What the server answers to the next presentations; when there is nothing, the successor. */
  const answers: Array<TokenOutcome & { afterMs?: number }> = []
  const server = {
    confirmsRevocations: true,
    spoolHasRoom: true,
    spoolIsWhole: true,
    entriesMax: 100,
  }

  database.heartbeat(identity.replica, identity.boot)

  function grantOf(user: UserKey): Grant {
    const grant = database.find(user)
    if (grant === undefined) throw new Error(`There is no grant of ${user}.`)
    return grant
  }

  const call =
    <A extends unknown[], R>(name: string, apply: (...args: A) => R) =>
    async (...args: A): Promise<R> => {
      calls.push(name)
      await clock.sleep(CALL_MS)
      const fault = faults.get(name)?.shift()
      if (fault === 'lost' || fault === 'refused') throw away({ isUnwritten: fault === 'refused' })
      const result = apply(...args)
      if (fault === 'unconfirmed') throw away()
      return result
    }

  const ports = {
    clock,
    log,
    sealer,
    grants: {
      find: call('find', database.find),
      arm: call('arm', database.arm),
      rearm: call('rearm', database.rearm),
      disarm: call('disarm', (end: Parameters<Ports['grants']['disarm']>[0]) => {
        ends.push(end)
        database.disarm(end)
      }),
      store: call('store', database.store),
      findStored: call('findStored', database.findStored),
      finishSuperseded: call('finishSuperseded', database.finishSuperseded),
      condemn: call('condemn', database.condemn),
      evidence: call('evidence', database.evidence),
      findUndecided: call('findUndecided', database.findUndecided),
    } as unknown as Ports['grants'],
    replicas: {
      heartbeat: call('heartbeat', database.heartbeat),
      restored: call('restored', database.restored),
      now: call('now', database.now),
      spoolDrained: call('spoolDrained', database.spoolDrained),
    } as unknown as Ports['replicas'],
    revocations: {
      add: call('add', (revocation: NewRevocation) => database.addRevocation(revocation)),
      take: call('take', database.takeRevocations),
      done: call('done', database.revocationDone),
      retryLater: call('retryLater', database.retryRevocationLater),
    } satisfies Ports['revocations'],
    spool: {
      write: call('write', (successor: Successor) => void disk.set(successor.attemptId, successor)),
      remove: call('remove', (attemptId: string) => void disk.delete(attemptId)),
      list: call('list', (known?: { has(attemptId: string): boolean }) => ({
        entries: [...disk.values()]
          .filter(({ attemptId }) => known?.has(attemptId) !== true)
          .map(successorIdOf),
        isWhole: server.spoolIsWhole,
      })),
      has: (attemptId) => disk.has(attemptId),
      read: call('read', (attemptId: string) => disk.get(attemptId)),
      isEmpty: () => disk.size === 0,
      hasRoom: () => server.spoolHasRoom,
      surplus: () => Math.max(0, disk.size - server.entriesMax),
      checkWritable: call('checkWritable', () => {
        if (!server.spoolHasRoom) throw away()
      }),
    } satisfies Ports['spool'],
    authorizationServer: {
      async refresh(token: string, limits: { sendBeforeMs: number; deadlineMs: number }) {
        presented.push({ token, limits })
        const { afterMs = 50, ...outcome } = answers.shift() ?? granted(presented.length)
        await clock.sleep(afterMs)
        return outcome
      },
      revoke: call('revoke', (token: string) => {
        revoked.push(token)
        return server.confirmsRevocations
      }),
    } as unknown as Ports['authorizationServer'],
  }

  return {
    identity,
    ports,
    database,
    disk,
    faults,
    calls,
    presented,
    revoked,
    ends,
    answers,
    server,
    log,
    scheduler,
    pass: (seconds: number) => scheduler.run({ untilMs: scheduler.nowMs() + seconds * 1000 }),
    /** Runs until the promise has settled, and tells how. */
    async outcomeOf<T>(work: Promise<T>, seconds = 3_600): Promise<T | BrokerError> {
      let end: { as: T | BrokerError } | undefined
      void work.then(
        (value) => (end = { as: value }),
        (error: unknown) => (end = { as: error as BrokerError }),
      )
      const untilMs = scheduler.nowMs() + seconds * 1000
      await scheduler.run({ untilMs, done: () => end !== undefined })
      if (end === undefined) throw new Error('It has not settled.')
      return (end as { as: T | BrokerError }).as
    },
    /** Stores a grant that has been logged in just now; its access token has run out unless it is given a life. */
    connect(name: string, { lifeSeconds = 0, loginId = LOGIN_ID } = {}): Grant {
      const user = name as UserKey
      const place = { user, loginId, generation: 1 }
      database.connect({
        ...{ user, loginId, replaces: 0, keyId: 'simulated', scope: '' },
        refreshTokenSealed: sealer.seal(
          grantSealContext('refresh_token_sealed', place),
          `${name}-rt`,
        ),
        accessToken: {
          sealed: sealer.seal(grantSealContext('access_token_sealed', place), `${name}-at`),
          fingerprint: fingerprintOf(`${name}-at`),
        },
        requestedSecondsAgo: 1,
        expiresInSeconds: lifeSeconds + 1,
        pageroIssuer: null,
        pageroSubject: null,
        revocation: undefined,
      })
      return grantOf(user)
    },
    grantOf,
    /** The refresh token that the row holds, in clear. */
    storedTokenOf(user: UserKey): string {
      const grant = grantOf(user)
      const { refreshTokenSealed } = grant
      if (refreshTokenSealed === null) return 'none'
      return sealer.open(grantSealContext('refresh_token_sealed', grant), refreshTokenSealed)
    },
    /** A successor of the user's grant, sealed as the engine would. */
    successorOf(user: UserKey, attemptId: string, generation = 2): Successor {
      const place = { user, loginId: LOGIN_ID, generation }
      return {
        ...place,
        attemptId,
        refreshTokenSealed: sealer.seal(
          grantSealContext('refresh_token_sealed', place),
          `rt-of-${attemptId}`,
        ),
        keyId: 'simulated',
        accessToken: null,
        scope: '',
        httpStatus: 200,
        durationMs: 1,
      }
    },
    events: () => log.events.map(({ event }) => event),
  }
}

function granted(number: number): TokenOutcome & { afterMs?: number } {
  return {
    kind: 'granted',
    httpStatus: 200,
    tokens: {
      accessToken: `at-${number}`,
      refreshToken: `rt-${number}`,
      expiresInSeconds: 600,
      scope: '',
      idToken: undefined,
    },
  }
}

function away(options: { isUnwritten?: boolean } = {}): BrokerError {
  return new BrokerError('temporarily_unavailable', 'The database cannot be reached.', {}, options)
}
