// One run from one seed: replicas, callers and faults for some minutes of virtual time, then rest, then judgement.
// Runs must not overlap: a run takes over `setImmediate`, the one way of the engine to go on that is not a port.

import type { RefreshSettings } from '../../../src/config.ts'
import { connectGrant, disconnectGrant } from '../../../src/connect.ts'
import { BrokerError } from '../../../src/errors.ts'
import { parseUserKey, type UserKey } from '../../../src/grant.ts'
import { createSimulatedServer } from './authorization-server.ts'
import { createSimulatedDatabase } from './database.ts'
import type { Disk } from './disk.ts'
import { createFaults, drawProfile, type Profile } from './faults.ts'
import { EPOCH_MS, type Life, startLife } from './life.ts'
import { createRandom } from './random.ts'
import { type Replica, startReplica } from './replica.ts'
import { judgeAtRest, judgeUnasked } from './rest.ts'
import { createScheduler } from './scheduler.ts'
import { createWitness } from './witness.ts'

/** The defaults of production; only what a run waits for at its end is shorter. */
export const SIMULATED_SETTINGS: RefreshSettings & { staleLimitSeconds: number } = {
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
  staleLimitSeconds: 60,
}

/** Short enough for several rotations in a run; half of it is the window of refresh-ahead. */
const ACCESS_TOKEN_LIFE_SECONDS = 100
const TROUBLED_MS = 240_000
/** The latest of requests and statements arrive, deadlines and leases end, whoever has just started has settled. */
const CALM_MS = 110_000
/** The back-off of one grant grows to 15 minutes; twice that, and the wait for owners that stay away. */
const REST_MS = 2_200_000

export interface Run {
  seed: number
  profile: Profile
  violations: readonly string[]
  /** How often what happened. */
  counts: ReadonlyMap<string, number>
  events: number
}

export interface SimulationOptions {
  /** Overrides what the seed draws. */
  profile?: Partial<Profile>
  settings?: Partial<RefreshSettings>
  trace?: (line: string) => void
}

/** Runs one seed. The same seed and options give the same run, event for event. */
export async function simulate(seed: number, options: SimulationOptions = {}): Promise<Run> {
  const random = createRandom(seed)
  // By itself, so that a seed gives the run that it gave before there was this.
  const crowdedSpool = createRandom(-1 - seed).chance(0.25)
  const profile = { ...drawProfile(random), crowdedSpool, ...options.profile }
  const settings = { ...SIMULATED_SETTINGS, ...options.settings }
  const scheduler = createScheduler()
  const { nowMs } = scheduler
  const faults = createFaults(random.fork(), profile)
  const witness = createWitness(nowMs, options.trace)
  const database = createSimulatedDatabase(
    { refreshTokenLifetime: 'P3Y', ...settings },
    () => EPOCH_MS + nowMs(),
  )
  const server = createSimulatedServer(
    { scheduler, faults, witness },
    { ...profile, accessTokenLifeSeconds: ACCESS_TOKEN_LIFE_SECONDS },
  )
  const names = Array.from({ length: profile.replicas }, (_, i) => `broker-${i}`)
  const disks = new Map<string, Disk>(names.map((name) => [name, new Map()]))
  const replicas = new Map<string, Replica>()
  const users = Array.from(
    { length: profile.users },
    (_, i) => parseUserKey(`user-${i}`) as UserKey,
  )
  const chance = random.fork()
  let down = false
  let ceased = false
  let failoversLeft = profile.failovers
  let promoted = 0
  let promoting = false
  /** Replicas that nobody will start again. */
  const gone = new Set<string>()
  witness.attach({
    nowMs,
    database,
    server,
    disks,
    running: (name) => replicas.get(name)?.life,
    ...settings,
    cacheTrustMs: profile.cacheTrustMs,
  })

  // ── Processes ──────────────────────────────────────────────────────────────────────────────────

  function start(name: string): void {
    const skewMs = chance.between(-profile.skewMs, profile.skewMs)
    const life = startLife({ scheduler, random: chance }, name, skewMs)
    witness.started(life)
    const world = { scheduler, faults, witness, database, server, step, isDown: () => down }
    const disk = disks.get(name) ?? new Map()
    replicas.set(name, startReplica(world, life, disk, { ...settings, ...profile }))
  }

  function kill(life: Life): void {
    if (life.dead) return
    life.kill()
    witness.died(life)
    if (!chance.chance(profile.keepsDisk)) {
      disks.get(life.replica)?.clear()
      witness.note(life, 'its disk is lost')
    }
    if (!chance.chance(profile.restarts)) return
    const afterMs = chance.chance(0.5) ? chance.between(50, 3_000) : chance.between(3_000, 150_000)
    scheduler.after(afterMs, () => {
      if (gone.has(life.replica)) return
      if (replicas.get(life.replica)?.life.dead === true) start(life.replica)
    })
  }

  function stop(life: Life): void {
    if (life.dead || life.paused) return
    life.pause()
    witness.note(life, 'is stopped')
    const forMs = chance.chance(0.5) ? chance.between(10, 20_000) : chance.between(20_000, 200_000)
    scheduler.after(forMs, () => resume(life))
  }

  function resume(life: Life): void {
    if (!life.paused || life.dead) return
    witness.note(life, 'goes on')
    life.resume()
  }

  function step(life: Life): void {
    if (life.dead || life.paused) return
    const end = faults.step(life)
    if (end === 'die') kill(life)
    if (end === 'stop') stop(life)
    // In the middle of a rotation: that is where the last commits matter.
    if (failoversLeft > 0 && chance.chance(0.1)) failOver()
  }

  // ── Troubles of the database ───────────────────────────────────────────────────────────────────

  function loseDatabase(): void {
    if (down || ceased) return
    down = true
    const restarts = chance.chance(0.5)
    witness.note(undefined, 'the database is away')
    scheduler.after(chance.between(500, 120_000), () => {
      if (!ceased) returnDatabase(restarts)
    })
  }

  function returnDatabase(restarted: boolean): void {
    down = false
    if (restarted) database.startedAtMs = EPOCH_MS + nowMs()
    witness.note(undefined, `the database is back${restarted ? ', restarted' : ''}`)
  }

  /** The standby has everything up to now; what is committed from here to the end of the old server is lost. */
  function failOver(): void {
    if (down || ceased) return
    failoversLeft -= 1
    const putBack = database.snapshot()
    const lagMs = chance.chance(0.5) ? chance.between(1, 1_000) : chance.between(1_000, 8_000)
    scheduler.after(lagMs, () => {
      if (down || ceased) return
      down = true
      promoting = true
      scheduler.after(chance.between(500, 20_000), () => {
        promoting = false
        putBack()
        // It came up long ago, as a standby.
        database.startedAtMs = promoted += 1
        witness.failedOver(lagMs)
        returnDatabase(false)
      })
    })
  }

  function cutOff(life: Life): void {
    if (life.dead || ceased) return
    life.cut()
    witness.note(life, 'is cut off from the database')
    scheduler.after(chance.between(500, 150_000), () => reconnect(life))
  }

  function reconnect(life: Life): void {
    if (!life.cutOff) return
    life.reconnect()
    witness.note(life, 'reaches the database again')
  }

  // ── Callers, users and operators ───────────────────────────────────────────────────────────────

  const upReplicas = () => [...replicas.values()].filter(({ life }) => !life.dead)

  /** A request to a process that is stopped waits in its socket, one to a process that starts at the balancer. */
  async function accepted({ life, listening }: Replica): Promise<void> {
    await listening
    await life.call<void>((settle) => settle.resolve())
  }

  async function ask(replica: Replica, user: UserKey): Promise<'served' | BrokerError> {
    const askedAtMs = nowMs()
    const { life, accessTokens } = replica
    await accepted(replica)
    const minTtlSeconds = chance.chance(0.2) ? Math.floor(chance.between(0, 51)) : 0
    try {
      const known = chance.chance(0.06) ? await accessTokens.fresh(user) : undefined
      const token =
        known === undefined
          ? await accessTokens.fresh(user, minTtlSeconds === 0 ? {} : { minTtlSeconds })
          : await accessTokens.replaceRejected(user, known.fingerprint)
      witness.served(life, user, askedAtMs, token, known === undefined ? minTtlSeconds : 0)
      return 'served'
    } catch (error) {
      if (!(error instanceof BrokerError)) throw error
      witness.count(error.code)
      if (error.code === 'reauthentication_required') witness.toldDead(life, user, askedAtMs)
      if (error.code === 'integrity_failure') witness.violate('seal', error.message, life)
      return error
    }
  }

  async function logIn(replica: Replica, user: UserKey): Promise<void> {
    const { life, ports } = replica
    await accepted(replica)
    const requestedAtMonotonicMs = life.clock.monotonicMs()
    const login = server.logIn(user)
    witness.note(life, `${user} logs in, family ${login.family.id}`)
    const connection = {
      user,
      tokens: {
        accessToken: login.access_token,
        refreshToken: login.refresh_token,
        expiresInSeconds: ACCESS_TOKEN_LIFE_SECONDS,
        scope: '',
        idToken: undefined,
      },
      requestedAtMonotonicMs,
      pagero: { issuer: null, subject: user },
      allowAccountChange: false,
    }
    await connectGrant(ports, connection).catch(onlyPassing)
    replica.accessTokens.forget(user)
  }

  async function disconnect(replica: Replica, user: UserKey): Promise<void> {
    await accepted(replica)
    const family = witness.logins.get(user)?.family
    const closed = await disconnectGrant(replica.ports, user).catch(onlyPassing)
    replica.accessTokens.forget(user)
    if (closed === true && family !== undefined && witness.logins.get(user)?.family === family) {
      witness.closedAtMs.set(family, nowMs())
    }
  }

  function revokeAsUser(user: UserKey): void {
    const family = witness.logins.get(user)?.family
    if (family === undefined || family.ended !== undefined) return
    family.ended = 'user'
    witness.note(undefined, `${user} revokes the login at the server`)
  }

  function plan(times: number, action: () => unknown): void {
    for (let i = 0; i < times; i += 1) {
      scheduler.after(chance.between(1_000, TROUBLED_MS), () => void action())
    }
  }

  function withAny(action: (replica: Replica, user: UserKey) => unknown): void {
    const up = upReplicas()
    if (up.length > 0) action(chance.pick(up), chance.pick(users))
  }

  function keepAsking(): void {
    if (ceased) return
    withAny(ask)
    scheduler.after(chance.between(200, 6_000), keepAsking)
  }

  // ── Rest ───────────────────────────────────────────────────────────────────────────────────────

  function cease(): void {
    ceased = true
    faults.cease()
    if (!promoting) returnDatabase(false)
    for (const name of names) {
      const life = replicas.get(name)?.life
      if (life === undefined) continue
      reconnect(life)
      resume(life)
      if (!life.dead) continue
      // One at least must be left to answer.
      const another = names.some((one) => one !== name && !gone.has(one))
      if (another && chance.chance(0.3)) gone.add(name)
      else start(name)
    }
    for (const name of gone) disks.get(name)?.clear()
    witness.note(
      undefined,
      `nothing goes wrong any more; gone for good: ${[...gone].join() || '–'}`,
    )
  }

  /** One caller asks until it is answered by a token of a rotation after `sinceMs`, or for good. */
  async function askUntilAnswered(user: UserKey, sinceMs: number): Promise<void> {
    const replica = chance.pick(upReplicas())
    let answered = false
    const round = async (): Promise<void> => {
      const answer = await ask(replica, user)
      const row = database.grants.get(user)
      const rotated = row !== undefined && row.rotatedAt.getTime() > sinceMs
      answered = answer === 'served' ? rotated : isFinal(answer)
      if (!answered) scheduler.after(10_000, () => void round())
    }
    void round()
    const endsAtMs = nowMs() + REST_MS
    await scheduler.run({ untilMs: endsAtMs, done: () => answered || violated() })
    if (!answered && !violated()) witness.violate('rest', `${user} is never answered for good`)
  }

  const violated = () => witness.violations.length > 0

  const { setImmediate: realSetImmediate } = globalThis
  const { stackTraceLimit } = Error
  // A fifth of the time of a run went into the stacks of errors that nobody reads.
  Error.stackTraceLimit = 0
  globalThis.setImmediate = ((action: () => void) =>
    scheduler.after(0, action)) as unknown as typeof setImmediate
  try {
    for (const name of names) start(name)
    for (const user of users) await logInAtStart(user)
    keepAsking()
    plan(profile.outages, loseDatabase)
    plan(profile.cuts, () => withAny(({ life }) => cutOff(life)))
    plan(profile.logins, () => withAny(logIn))
    plan(profile.disconnects, () => withAny(disconnect))
    plan(profile.revocations, () => withAny((_replica, user) => revokeAsUser(user)))
    plan(profile.kills / 2, () => withAny(({ life }) => kill(life)))
    await scheduler.run({ untilMs: nowMs() + TROUBLED_MS, done: violated })
    if (!violated()) cease()
    await scheduler.run({ untilMs: nowMs() + CALM_MS, done: violated })
    const sinceMs = EPOCH_MS + nowMs()
    const isRunning = (name: string) => replicas.get(name)?.life.dead === false
    if (!violated()) judgeUnasked(witness, database, server, { nowMs: sinceMs, isRunning })
    for (const user of users) if (!violated()) await askUntilAnswered(user, sinceMs)
    // The last words: a disarm, a revocation, the verdict.
    await scheduler.run({ untilMs: nowMs() + CALM_MS, done: violated })
    if (!violated()) judgeAtRest(witness, database, server)
  } finally {
    globalThis.setImmediate = realSetImmediate
    Error.stackTraceLimit = stackTraceLimit
    for (const { life } of replicas.values()) life.kill()
  }
  return {
    seed,
    profile,
    violations: witness.violations,
    counts: witness.counts,
    events: scheduler.count(),
  }

  async function logInAtStart(user: UserKey): Promise<void> {
    let connected = false
    const first = replicas.get(names[0] ?? '')
    if (first === undefined) return
    void logIn(first, user).then(() => (connected = true))
    await scheduler.run({ untilMs: nowMs() + 60_000, done: () => connected })
  }
}

function isFinal(error: BrokerError): boolean {
  return error.code === 'reauthentication_required' || error.code === 'grant_not_found'
}

function onlyPassing(error: unknown): undefined {
  const passing = ['temporarily_unavailable', 'authorization_failed']
  if (error instanceof BrokerError && passing.includes(error.code)) return undefined
  throw error
}
