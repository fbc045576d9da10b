// What must hold of every run, whatever befell it: the record of the authorization server, the ledger and the grants
// tell one story. Each check returns what contradicts it, so that a failure names the user and the generation.

import type { Test } from 'tap'
import { grantSealContext, PAGERO_USER_PREFIX } from '../../src/grant.ts'
import { type Fleet, userKeyOf } from './fleet.ts'

/** Two clocks of one machine, read in two processes. */
const CLOCK_TOLERANCE_MS = 20

interface AttemptRow {
  user: string
  loginId: string
  generation: number
  outcome: string | null
  digest: Buffer
  armedAtMs: number
}

export interface History {
  /** Refresh tokens that the server has spent. */
  spent: number
  /** Attempts whose outcome is `granted`. */
  granted: number
  /** Generations that the grants have grown by since they were connected. */
  increments: number
  /** Calls of one login that overlapped in time. */
  overlaps: string[]
  /** Calls that had no attempt of their own in the ledger before them. */
  unarmed: string[]
  /** Refresh tokens that were presented more often than once. */
  presentedAgain: string[]
}

/** Reads what happened; grants must have been connected once each. */
export async function readHistory(fleet: Fleet): Promise<History> {
  const { rows: attempts } = await fleet.database.pool.query<AttemptRow>(
    `select user_id as "user", login_id as "loginId", generation, outcome, token_digest as digest,
       extract(epoch from armed_at)::float8 * 1000 as "armedAtMs"
     from refresh_attempts order by armed_at`,
  )
  const rows = await fleet.rows()
  const calls = fleet.refreshes()
  return {
    spent: calls.filter(({ spent }) => spent !== undefined).length,
    granted: attempts.filter(({ outcome }) => outcome === 'granted').length,
    increments: rows.reduce((sum, { generation }) => sum + generation - 1, 0),
    overlaps: findOverlaps(calls),
    unarmed: withoutAttempt(fleet, calls, attempts),
    presentedAgain: presentedAgain(calls),
  }
}

/** Nothing is lost, no calls overlapped, and server, ledger and grants agree on what was spent. */
export async function expectIntact(t: Test, fleet: Fleet): Promise<void> {
  const history = await readHistory(fleet)
  t.strictSame(await fleet.lost(), [], 'no grant is lost')
  t.strictSame(history.overlaps, [], 'calls of one login never overlap')
  t.strictSame(history.unarmed, [], 'every call has its attempt in the ledger')
  t.equal(history.granted, history.spent, 'each spent token is granted in the ledger')
  t.equal(history.increments, history.spent, 'and is one generation of a grant')
}

/** What is told before the last attempt of a login, and after it. */
const TOLD_BEFORE_MS = 60_000
const TOLD_AFTER_MS = 3_000

/**
 * The last minute of a login, a line for each thing that happened: its attempts, what came to the server with its tokens,
 * what the replicas logged of its user, and `events` of the test's own.
 */
export async function storyOf(
  fleet: Fleet,
  loginId: string,
  events: ReadonlyArray<{ atMs: number; text: string }>,
): Promise<string> {
  const { rows: attempts } = await fleet.database.pool.query<{
    user: string
    attemptId: string
    loginId: string
    generation: number
    replica: string
    boot: string
    cause: string
    outcome: string | null
    armedAt: Date
    finishedAt: Date | null
  }>(
    `select user_id as "user", attempt_id as "attemptId", login_id as "loginId", generation, replica,
       boot, cause, outcome, armed_at as "armedAt", finished_at as "finishedAt"
     from refresh_attempts
     where user_id = (select user_id from refresh_attempts where login_id = $1 limit 1)
     order by armed_at`,
    [loginId],
  )
  const last = attempts.findLast((attempt) => attempt.loginId === loginId)
  if (last === undefined) return `${loginId}: no attempt`
  const originMs = Date.now() - performance.now()
  const { user } = last
  const told = [...events]
  for (const { armedAt, finishedAt, attemptId, replica, boot, outcome, ...rest } of attempts) {
    const name = `attempt ${short(attemptId)}`
    told.push({
      atMs: armedAt.getTime() - originMs,
      text: `${name} armed by ${replica} ${short(boot)}: ${rest.cause}, login ${short(rest.loginId)}@${rest.generation}`,
    })
    if (finishedAt === null) continue
    told.push({ atMs: finishedAt.getTime() - originMs, text: `${name} finished: ${outcome}` })
  }
  const { record } = fleet.lookAlike
  const tokenOf = ({ form }: Calls[number]) => form['refresh_token'] ?? form['token'] ?? ''
  const tokens = new Set(record.filter((call) => call.presented?.subject === user).map(tokenOf))
  for (const call of record) {
    if (!tokens.has(tokenOf(call))) continue
    const { at, endedAt, endpoint, presented, spent, status, answered, remotePort } = call
    const whose = presented && `${short(presented.grantId)}@${presented.generation}`
    const end = `${spent === undefined ? 'nothing spent' : 'spent'}, ${status}${answered ? '' : ', not answered'}`
    told.push({
      atMs: at,
      text: `${endpoint} from port ${remotePort} with ${short(tokenOf(call))} of ${whose ?? 'a dead login'}: ${end} at ${Math.round(endedAt ?? NaN)}`,
    })
  }
  for (const { name, log } of fleet.replicas) {
    for (const { time, event, level: _level, replica: _replica, ...rest } of log) {
      if (rest['user'] !== user && event !== 'broker_started' && event !== 'spool_drained') continue
      told.push({
        atMs: Date.parse(String(time)) - originMs,
        text: `${name} logs ${event} ${JSON.stringify(rest)}`,
      })
    }
  }
  const lastMs = last.armedAt.getTime() - originMs
  const lines = told
    .filter(({ atMs }) => atMs > lastMs - TOLD_BEFORE_MS && atMs < lastMs + TOLD_AFTER_MS)
    .toSorted((a, b) => a.atMs - b.atMs)
    .map(({ atMs, text }) => `  ${Math.round(atMs)} ${text}`)
  return [`login ${loginId} of ${user}`, ...lines].join('\n')
}

function short(id: string): string {
  return id.slice(0, 8)
}

type Calls = ReturnType<Fleet['refreshes']>

function nameOf({ presented }: Calls[number]): string {
  return presented === undefined ? 'unknown' : `${presented.subject}@${presented.generation}`
}

/** Calls of one login that overlapped in time. */
export function findOverlaps(calls: Calls): string[] {
  const busyUntil = new Map<string, number>()
  const found: string[] = []
  for (const call of calls.toSorted((a, b) => a.at - b.at)) {
    const family = call.presented?.grantId
    if (family === undefined) continue
    if (call.at < (busyUntil.get(family) ?? -Infinity)) found.push(nameOf(call))
    busyUntil.set(family, call.endedAt ?? Infinity)
  }
  return found
}

/** The k-th call with one token needs k attempts that were armed for it by then. */
function withoutAttempt(fleet: Fleet, calls: Calls, attempts: AttemptRow[]): string[] {
  const attemptsOf = Map.groupBy(attempts, ({ user }) => subjectOf(user))
  const callsOf = new Map<string, number>()
  const found: string[] = []
  for (const call of calls) {
    const token = call.form['refresh_token'] ?? ''
    const count = (callsOf.get(token) ?? 0) + 1
    callsOf.set(token, count)
    const byMs = performance.timeOrigin + call.at + CLOCK_TOLERANCE_MS
    const { presented } = call
    // Of a login that was withdrawn the server has forgotten whose it was.
    const ofUser = presented === undefined ? attempts : attemptsOf.get(presented.subject)
    const own = (ofUser ?? []).filter(
      ({ armedAtMs, generation }) =>
        armedAtMs <= byMs && generation >= (presented?.generation ?? 0),
    )
    const armed = own.filter((attempt) => {
      const place = { ...attempt, user: userKeyOf(attempt.user) }
      const context = grantSealContext('refresh_token_sealed', place)
      return fleet.sealer.digest(context, token).equals(attempt.digest)
    })
    if (armed.length < count) found.push(nameOf(call))
  }
  return found
}

/** After a plain login the key is made from the subject; elsewhere the tests use the subject as the key. */
function subjectOf(user: string): string {
  return user.startsWith(PAGERO_USER_PREFIX) ? user.slice(PAGERO_USER_PREFIX.length) : user
}

function presentedAgain(calls: Calls): string[] {
  const seen = new Set<string>()
  const found: string[] = []
  for (const call of calls) {
    const token = call.form['refresh_token'] ?? ''
    if (seen.has(token)) found.push(nameOf(call))
    seen.add(token)
  }
  return found
}
