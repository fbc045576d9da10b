// The long run: rotations without end over several replicas with many callers each, first in peace and then while
// replicas are killed and PostgreSQL is stopped without warning. It counts; whoever runs it says what the counts must be.

import { setTimeout as delay } from 'node:timers/promises'
import { type Fleet, inParallel, until } from './fleet.ts'
import type { OwnPostgres } from './own-postgres.ts'
import type { Replica } from './replica.ts'

export interface SoakFigures {
  rotations: number
  calls: number
  /** Calls that were not answered with a token: refused by a process that is down, or told to come again. */
  unserved: number
  /** Calls at the authorization server beyond one for each rotation. */
  extraCalls: number
  kills: number
  databaseStops: number
  /** Grants whose stored token the server would refuse, and those of them that could not have been kept. */
  lost: number
  irreducible: number
  /** Lost grants that are not reported as `rotation_lost`. */
  unreported: number
  tookMs: number
}

/** Calls under way at a time: more only queue in the test's own process. */
const CALLS_AT_A_TIME = 200
/** Beyond lease, settle time and the wait for what a dead process may still hold. */
const SETTLE_LIMIT_MS = 120_000
/** Two clocks of one machine, read in two processes. */
const CLOCK_TOLERANCE_MS = 20
/**
 * What a process may take from the last byte of an answer to its fsync, on a busy machine: an answer given to a process
 * that was killed within this time could not be kept.
 */
const FSYNC_MS = 500

/** Rotates every grant again and again, with so many callers for each at once. */
export async function rotateInPeace(
  fleet: Fleet,
  options: { users: readonly string[]; rotations: number; callersPerGrant: number },
): Promise<SoakFigures> {
  const startedAtMs = performance.now()
  let calls = 0
  let unserved = 0
  const rounds = Math.ceil(options.rotations / options.users.length)
  for (let round = 0; round < rounds; round += 1) {
    await fleet.expire()
    const asked = options.users.flatMap((user) =>
      Array.from({ length: options.callersPerGrant }, () => user),
    )
    await inParallel(asked, CALLS_AT_A_TIME, async (user) => {
      const replica = fleet.replicas[calls % fleet.replicas.length]
      calls += 1
      if ((await replica?.token(user))?.status !== 200) unserved += 1
    })
  }
  return figuresOf(fleet, { startedAtMs, calls, unserved, kills: [], databaseStops: 0 })
}

/** Rotates under load while replicas are killed and the database is stopped, at moments drawn by chance. */
export async function rotateUnderFire(
  fleet: Fleet,
  postgres: OwnPostgres,
  options: { users: readonly string[]; kills: number; databaseStops: number },
): Promise<SoakFigures> {
  const startedAtMs = performance.now()
  const kills: Kill[] = []
  let databaseStops = 0
  let calls = 0
  let unserved = 0
  let isOver = false
  const callers = options.users.map(async (user, i) => {
    while (!isOver) {
      const replica = fleet.replicas[(calls + i) % fleet.replicas.length]
      calls += 1
      if ((await replica?.token(user, { limitMs: 5_000 }))?.status !== 200) unserved += 1
      await delay(50 * Math.random())
    }
  })
  const expiring = (async () => {
    while (!isOver) {
      const some = options.users.filter(() => Math.random() < 0.1)
      // The database may be away.
      await fleet.expire(some).catch(() => undefined)
      await delay(100)
    }
  })()
  const killing = killAtRandom(fleet.replicas, options.kills, kills)
  const stopping = (async () => {
    for (; databaseStops < options.databaseStops; databaseStops += 1) {
      await delay(1_000 + 3_000 * Math.random())
      await postgres.stopImmediately()
      await delay(1_000 * Math.random())
      await postgres.start()
      fleet.moveDatabase(postgres.port())
    }
  })()
  await Promise.all([killing, stopping])
  isOver = true
  await Promise.all([...callers, expiring])
  await settle(fleet, options.users)
  return figuresOf(fleet, { startedAtMs, calls, unserved, kills, databaseStops })
}

interface Kill {
  replica: string
  atMs: number
}

async function killAtRandom(replicas: readonly Replica[], count: number, kills: Kill[]) {
  // One lane for each replica, so that each is killed, comes back, and is killed again.
  const lanes = replicas.map(async (replica) => {
    while (kills.length < count) {
      await delay(2_000 * Math.random())
      kills.push({ replica: replica.name, atMs: performance.now() })
      await replica.kill('SIGKILL')
      // It may start while the database is away; then it is started again.
      while (
        !(await replica.start().then(
          () => true,
          () => false,
        ))
      )
        await replica.kill('SIGKILL')
    }
  })
  await Promise.all(lanes)
}

/** Asks for every grant until it is served, or said to be dead. */
async function settle(fleet: Fleet, users: readonly string[]): Promise<void> {
  await fleet.expire()
  await inParallel(users, 20, async (user) => {
    const replica = fleet.replicas[0]
    await until(
      async () => [200, 409].includes((await replica?.token(user))?.status ?? 0),
      SETTLE_LIMIT_MS,
      `an end for ${user}`,
    )
  })
}

async function figuresOf(
  fleet: Fleet,
  run: {
    startedAtMs: number
    calls: number
    unserved: number
    kills: Kill[]
    databaseStops: number
  },
): Promise<SoakFigures> {
  const rows = await fleet.rows()
  const lost = await fleet.lost()
  const reported = new Set(
    rows.filter(({ reason }) => reason === 'rotation_lost').map(({ user }) => user),
  )
  const onTheWay = await findLostOnTheWay(fleet, run.kills)
  const rotations = rows.reduce((sum, { generation }) => sum + generation - 1, 0)
  return {
    rotations,
    calls: run.calls,
    unserved: run.unserved,
    extraCalls: fleet.refreshes().length - rotations,
    kills: run.kills.length,
    databaseStops: run.databaseStops,
    lost: lost.length,
    irreducible: lost.filter((user) => onTheWay.has(user)).length,
    unreported: lost.filter((user) => !reported.has(user)).length,
    tookMs: Math.round(performance.now() - run.startedAtMs),
  }
}

/** Users of whom the server spent a token for a process that was killed between its intent and its fsync. */
async function findLostOnTheWay(fleet: Fleet, kills: readonly Kill[]): Promise<Set<string>> {
  const { rows: attempts } = await fleet.database.pool.query<{
    user: string
    replica: string
    armedAtMs: number
  }>(
    `select user_id as "user", replica, extract(epoch from armed_at)::float8 * 1000 as "armedAtMs"
     from refresh_attempts order by armed_at`,
  )
  const attemptsOf = Map.groupBy(attempts, ({ user }) => user)
  const found = new Set<string>()
  for (const { presented, spent, at, endedAt } of fleet.refreshes()) {
    if (presented === undefined || spent === undefined) continue
    const arrivedAtMs = performance.timeOrigin + at
    const attempt = attemptsOf
      .get(presented.subject)
      ?.findLast(({ armedAtMs }) => armedAtMs <= arrivedAtMs + CLOCK_TOLERANCE_MS)
    const armedAtMs = (attempt?.armedAtMs ?? arrivedAtMs) - performance.timeOrigin
    const syncedAtMs = (endedAt ?? Infinity) + FSYNC_MS
    const killed = kills.some(
      ({ replica, atMs }) =>
        replica === attempt?.replica &&
        atMs >= armedAtMs - CLOCK_TOLERANCE_MS &&
        atMs <= syncedAtMs,
    )
    if (killed) found.add(presented.subject)
  }
  return found
}
