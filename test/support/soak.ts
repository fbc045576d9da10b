// The long runs: rotations without end in peace, under kills and stops of PostgreSQL, through rolling restarts, and with
// answers that only a spool holds. They count; whoever runs them says what the counts must be.

import { setTimeout as delay } from 'node:timers/promises'
import { startBalancer } from './balancer.ts'
import { type Fleet, holdAnswers, inParallel, until } from './fleet.ts'
import { findOverlaps, readHistory, storyOf } from './history.ts'
import type { OwnPostgres } from './own-postgres.ts'
import type { Answer, Replica } from './replica.ts'

export interface PeaceFigures {
  /** Generations that the grants have grown by; the ledger and the server must say the same. */
  rotations: number
  granted: number
  spent: number
  calls: number
  /** How often a caller that was told to come again did so. */
  askedAgain: number
  /** Callers that had no token in the end. */
  unserved: number
  /** Calls at the authorization server beyond one for each rotation. */
  extraCalls: number
  /** Calls of one login at the server that overlapped in time. */
  overlaps: number
  lost: number
  tookMs: number
}

export interface FireFigures {
  rotations: number
  calls: number
  /** Calls that were not answered with a token: refused by a process that is down, or told to come again. */
  unserved: number
  kills: number
  databaseStops: number
  overlaps: number
  /** Presentations of a token that had been presented before: what was in doubt, once more. */
  presentedAgain: number
  /** Logins whose token the server refuses in the end. Such a user logs in again and goes on. */
  lost: number
  /** Those of them whose token was spent for a process that was killed before its fsync: nobody could have kept them. */
  irreducible: number
  /** Those of them whose token nobody that lived to keep the answer presented again within the server's grace. */
  beyondGrace: number
  /** The last minute of each lost login that is not `beyondGrace`, for a person to read. */
  unexplained: string[]
  /** Lost logins that were not reported as `rotation_lost`. */
  unreported: number
  /** Logins reported as dead that the server would still accept. */
  reportedAlive: number
  tookMs: number
}

export interface RestartFigures {
  restarts: number
  /** Distinct exit codes. */
  exitCodes: unknown[]
  calls: number
  failed: Answer[]
  rotations: number
  tookMs: number
}

export interface SpoolFigures {
  /** Grants whose answer only the spool of a dead process held. */
  spooled: number
  /** Distinct statuses of the callers that waited for those answers. */
  served: number[]
  /** Distinct statuses that another replica gave while the owner was dead, and how often. */
  refused: number[]
  refusals: number
  /** Presentations at the server after the kill, until everybody was served again. */
  presentedAgain: number
  recovered: number
  tookMs: number
}

/** Calls under way at a time: more only queue in the test's own process. */
const CALLS_AT_A_TIME = 1_000
/** A machine that has more to do than it can refuses some; as `Retry-After` tells them, they come again. */
const ASKED_MAX = 30
const ASK_AGAIN_MS = 1_000
/** Beyond lease, settle time and the wait for what a dead process may still hold. */
const SETTLE_LIMIT_MS = 120_000
const TELLING_MS = 30_000
/** Two clocks of one machine, read in two processes. */
const CLOCK_TOLERANCE_MS = 20
/**
 * What a process may take from the last byte of an answer to its fsync, on a busy machine: an answer given to a process
 * that was killed within this time could not be kept.
 */
const FSYNC_MS = 500

/**
 * Under fire a machine has its processes to start, again and again: with more calls than this, and more rotations than this
 * share of the grants every 100 ms, it does little else than be late.
 */
const CALLER_PAUSE_MS = 100
const EXPIRING_SHARE = 0.03

/** Rotates every grant again and again, with so many callers for each at once. */
export async function rotateInPeace(
  fleet: Fleet,
  options: {
    users: readonly string[]
    rotations: number
    callersPerGrant: number
    /** Is told how far it has come: this may take an hour. */
    say?: (text: string) => void
  },
): Promise<PeaceFigures> {
  const startedAtMs = performance.now()
  let calls = 0
  let askedAgain = 0
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
      let answer = await replica?.token(user)
      for (let times = 1; answer?.status === 503 && times < ASKED_MAX; times += 1) {
        askedAgain += 1
        await delay(ASK_AGAIN_MS)
        answer = await replica?.token(user)
      }
      if (answer?.status !== 200) unserved += 1
    })
    const seconds = Math.round((performance.now() - startedAtMs) / 1000)
    options.say?.(`${seconds} s: round ${round + 1} of ${rounds}, ${calls} calls`)
  }
  const { increments, granted, spent, overlaps } = await readHistory(fleet)
  return {
    rotations: increments,
    granted,
    spent,
    calls,
    askedAgain,
    unserved,
    extraCalls: fleet.refreshes().length - increments,
    overlaps: overlaps.length,
    lost: (await fleet.lost()).length,
    tookMs: Math.round(performance.now() - startedAtMs),
  }
}

/**
 * Rotates under load while replicas are killed and the database is stopped, at moments drawn by chance. The server takes
 * `serverMs` for each answer, so that some are always on their way.
 */
export async function rotateUnderFire(
  fleet: Fleet,
  postgres: OwnPostgres,
  options: {
    users: readonly string[]
    kills: number
    databaseStops: number
    serverMs: number
    graceSeconds: number
    /** So long a process lives at most before it is killed again, and half of that on average. */
    aliveMs: number
    /** Is told how far it has come: this may take an hour. */
    say?: (text: string) => void
  },
): Promise<FireFigures> {
  const startedAtMs = performance.now()
  const graceMs = options.graceSeconds * 1000
  const kills: Kill[] = []
  const reports: Reports = new Map()
  let databaseStops = 0
  let calls = 0
  let unserved = 0
  let isOver = false
  fleet.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    ms: options.serverMs,
    times: Infinity,
  })
  const callers = options.users.map(async (user, i) => {
    while (!isOver) {
      const replica = fleet.replicas[(calls + i) % fleet.replicas.length]
      calls += 1
      const answer = await replica?.token(user, { limitMs: 5_000 })
      if (answer?.status !== 200) unserved += 1
      if (answer?.status === 409) await logInAgain(fleet, user, answer, reports)
      await delay(2 * CALLER_PAUSE_MS * Math.random())
    }
  })
  const expiring = (async () => {
    while (!isOver) {
      const some = options.users.filter(() => Math.random() < EXPIRING_SHARE)
      // The database may be away.
      await fleet.expire(some).catch(() => undefined)
      await delay(100)
    }
  })()
  const killing = killAtRandom(fleet.replicas, options, kills)
  const telling = setInterval(() => {
    const seconds = Math.round((performance.now() - startedAtMs) / 1000)
    options.say?.(
      `${seconds} s: ${countAtRandom(kills)} kills, ${databaseStops} stops, ${calls} calls`,
    )
  }, TELLING_MS)
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
  clearInterval(telling)
  await Promise.all([...callers, expiring])
  await settle(fleet, options.users, reports)
  const onTheWay = await findLostOnTheWay(fleet, kills, graceMs)
  const lost = [...reports].filter(([, { isDead }]) => isDead)
  const unexplained = lost.filter(([loginId]) => onTheWay.get(loginId)?.isKeptAgain !== false)
  const calledTokens = fleet.refreshes().map(({ form }) => form['refresh_token'])
  return {
    rotations: fleet.refreshes().filter(({ spent }) => spent !== undefined).length,
    calls,
    unserved,
    kills: countAtRandom(kills),
    databaseStops,
    overlaps: findOverlaps(fleet.refreshes()).length,
    presentedAgain: calledTokens.length - new Set(calledTokens).size,
    lost: lost.length,
    irreducible: lost.filter(([loginId]) => onTheWay.has(loginId)).length,
    beyondGrace: lost.filter(([loginId]) => onTheWay.get(loginId)?.isKeptAgain === false).length,
    unexplained: await Promise.all(
      unexplained.map(([loginId]) => storyOf(fleet, loginId, eventsOf(kills))),
    ),
    unreported: lost.filter(([, { cause }]) => cause !== 'rotation_lost').length,
    reportedAlive: reports.size - lost.length,
    tookMs: Math.round(performance.now() - startedAtMs),
  }
}

/** SIGTERM to one replica after the other, behind a balancer that heeds /readyz and repeats nothing. */
export async function restartInTurn(
  fleet: Fleet,
  options: { users: readonly string[]; restarts: number },
): Promise<RestartFigures> {
  const startedAtMs = performance.now()
  const { users } = options
  const balancer = await startBalancer(fleet.replicas)
  fleet.lookAlike.faults.push({
    endpoint: 'token',
    kind: 'delay',
    when: 'after',
    ms: 300,
    times: Infinity,
  })
  const failed: Answer[] = []
  let calls = 0
  let isOver = false
  const callers = users.map(async (user) => {
    while (!isOver) {
      const answer = await balancer.token(user)
      calls += 1
      if (answer.status !== 200) failed.push(answer)
      await delay(20)
    }
  })
  const expiring = (async () => {
    for (let round = 0; !isOver; round += 1) {
      await fleet.expire(users.filter((_, i) => i % 8 === round % 8))
      await delay(150)
    }
  })()
  const exitCodes = new Set<unknown>()
  try {
    for (let restart = 0; restart < options.restarts; restart += 1) {
      const replica = fleet.replicas[restart % fleet.replicas.length]
      exitCodes.add(await replica?.kill('SIGTERM'))
      await replica?.start()
      await delay(300)
    }
  } finally {
    isOver = true
    await Promise.all([...callers, expiring])
    await balancer.stop()
  }
  return {
    restarts: options.restarts,
    exitCodes: [...exitCodes],
    calls,
    failed,
    rotations: fleet.refreshes().length,
    tookMs: Math.round(performance.now() - startedAtMs),
  }
}

/**
 * Takes the database away when the server has answered `owner` for every user, kills `owner`, and brings both back while
 * `other` is asked all the time, for `deadMs`.
 */
export async function killWhileSpooled(
  fleet: Fleet,
  { owner, other }: { owner: Replica; other: Replica },
  options: {
    users: readonly string[]
    deadMs: number
    database: { stop(): Promise<unknown>; start(): Promise<unknown> }
  },
): Promise<SpoolFigures> {
  const startedAtMs = performance.now()
  const { users, database } = options
  // Until the server has accepted its client once, few are presented at a time.
  const [first = ''] = users
  await fleet.expire([first])
  await owner.token(first)
  const heldBefore = await fleet.spooled(owner)
  const letGo = holdAnswers(fleet, users.length)
  await fleet.expire()
  const before = fleet.refreshes().length
  const waiting = users.map((user) => owner.token(user))
  await until(
    () => fleet.refreshes().length - before >= users.length,
    SETTLE_LIMIT_MS,
    'all calls at the server',
  )
  await database.stop()
  letGo()
  await until(
    async () => (await fleet.spooled(owner)) - heldBefore >= users.length,
    SETTLE_LIMIT_MS,
    'all in the spool',
  )
  const spooled = (await fleet.spooled(owner)) - heldBefore
  const served = await Promise.all(waiting)
  await owner.kill('SIGKILL')
  await database.start()
  const refused: Answer[] = []
  const endsAtMs = performance.now() + options.deadMs
  await inParallel(users, users.length, async (user) => {
    while (performance.now() < endsAtMs) refused.push(await other.token(user))
  })
  await owner.start()
  const recovered = await Promise.all(users.map((user) => other.token(user)))
  return {
    spooled,
    served: [...new Set(served.map(({ status }) => status))],
    refused: [...new Set(refused.map(({ status }) => status))],
    refusals: refused.length,
    presentedAgain: fleet.refreshes().length - before - users.length,
    recovered: recovered.filter(({ status }) => status === 200).length,
    tookMs: Math.round(performance.now() - startedAtMs),
  }
}

type Refresh = ReturnType<Fleet['refreshes']>[number]

interface Kill {
  replica: string
  atMs: number
  /** It did not become ready, and was killed to be started again. */
  isRestart?: true
}

/** What callers were told of logins that are said to be dead, by login; `isDead` when the server refuses its token too. */
type Reports = Map<string, { cause: unknown; isDead: boolean }>

async function killAtRandom(
  replicas: readonly Replica[],
  options: { kills: number; aliveMs: number },
  kills: Kill[],
) {
  // One lane for each replica, so that each is killed, comes back, and is killed again.
  const lanes = replicas.map(async (replica) => {
    for (;;) {
      await delay(options.aliveMs * Math.random())
      if (countAtRandom(kills) >= options.kills) return
      kills.push({ replica: replica.name, atMs: performance.now() })
      await replica.kill('SIGKILL')
      // It may start while the database is away; then it is started again.
      while (
        !(await replica.start().then(
          () => true,
          () => false,
        ))
      ) {
        kills.push({ replica: replica.name, atMs: performance.now(), isRestart: true })
        await replica.kill('SIGKILL')
      }
    }
  })
  await Promise.all(lanes)
}

function eventsOf(kills: readonly Kill[]) {
  return kills.map(({ atMs, replica, isRestart }) => ({
    atMs,
    text: `${replica} is killed${isRestart ? ', not yet ready' : ''}`,
  }))
}

function countAtRandom(kills: readonly Kill[]): number {
  return kills.filter(({ isRestart }) => !isRestart).length
}

/** Notes what was told of a dead login, and logs the user in again, as its person would. */
async function logInAgain(
  fleet: Fleet,
  user: string,
  { body }: Answer,
  reports: Reports,
): Promise<void> {
  try {
    const { loginId } = await fleet.row(user)
    const isDead = (await fleet.lost([user])).length > 0
    reports.set(loginId, { cause: body['cause'], isDead })
    await fleet.connect([user])
  } catch {
    // The database is away; the next answer says the same.
  }
}

/** Asks for every grant until it is served, or said to be dead. */
async function settle(fleet: Fleet, users: readonly string[], reports: Reports): Promise<void> {
  await fleet.expire()
  await inParallel(users, 20, async (user) => {
    const replica = fleet.replicas[0]
    await until(
      async () => {
        const answer = await replica?.token(user)
        if (answer?.status === 409) await logInAgain(fleet, user, answer, reports)
        return answer?.status === 200
      },
      SETTLE_LIMIT_MS,
      `a token for ${user}`,
    )
  })
}

/**
 * Logins of which the server spent the last token for a process that was killed between its intent and its fsync; and
 * whether it was presented again within the grace by a process that lived to keep the answer.
 */
async function findLostOnTheWay(
  fleet: Fleet,
  kills: readonly Kill[],
  graceMs: number,
): Promise<Map<string, { isKeptAgain: boolean }>> {
  // Read now and not at the start of this process: the two clocks part slowly.
  const originMs = Date.now() - performance.now()
  const { rows: attempts } = await fleet.database.pool.query<{
    user: string
    loginId: string
    replica: string
    armedAtMs: number
  }>(
    `select user_id as "user", login_id as "loginId", replica,
       extract(epoch from armed_at)::float8 * 1000 as "armedAtMs"
     from refresh_attempts order by armed_at`,
  )
  const attemptsOf = Map.groupBy(attempts, ({ user }) => user)
  const calls = fleet.refreshes()
  const callsWith = Map.groupBy(calls, ({ form }) => form['refresh_token'])
  const attemptOf = (subject: string, { at }: Refresh) =>
    attemptsOf
      .get(subject)
      ?.findLast(({ armedAtMs }) => armedAtMs - originMs <= at + CLOCK_TOLERANCE_MS)
  const isKilled = (attempt: { replica: string; armedAtMs: number }, { endedAt }: Refresh) =>
    kills.some(
      ({ replica, atMs }) =>
        replica === attempt.replica &&
        atMs >= attempt.armedAtMs - originMs - CLOCK_TOLERANCE_MS &&
        atMs <= (endedAt ?? Infinity) + FSYNC_MS,
    )
  const found = new Map<string, { isKeptAgain: boolean }>()
  for (const call of calls) {
    const { presented, spent, at, form } = call
    if (presented === undefined || spent === undefined) continue
    const attempt = attemptOf(presented.subject, call)
    if (attempt === undefined) continue
    // What came after it was had: only by the last of its tokens can a login have been lost.
    if (!isKilled(attempt, call)) {
      found.delete(attempt.loginId)
      continue
    }
    const isKeptAgain = callsWith.get(form['refresh_token'])?.some((again) => {
      if (again.at <= at || again.at > at + graceMs) return false
      const next = attemptOf(presented.subject, again)
      return next !== undefined && !isKilled(next, again)
    })
    found.set(attempt.loginId, { isKeptAgain: isKeptAgain === true })
  }
  return found
}
