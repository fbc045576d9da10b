// Sees everything that happens in a run and says when a rule of the protocol is broken. It knows the truth: who is
// alive, who holds which token, what the authorization server has consumed. It takes nothing from the engine's word.
// What holds once everything has come to rest is judged in rest.ts.

import { fingerprintOf, type TokenOutcome, type UserKey } from '../../../src/grant.ts'
import type {
  ArmRequest,
  NewGrant,
  StoreResult,
  Successor,
  SuccessorId,
} from '../../../src/grant-stores.ts'
import type { Family, SimulatedServer, TokenCall } from './authorization-server.ts'
import type { GrantRow, SimulatedDatabase } from './database.ts'
import { type Disk, secretOf } from './disk.ts'
import { EPOCH_MS, type Life } from './life.ts'

/** Why a family may be lost: what no client can prevent, or what the take-over rule allows. */
export type Excuse =
  /** The successor was in nobody's hands any more: lost on the way, or with a process or disk. */
  | 'successor_lost'
  /** A request reached the server after its client had given it up. */
  | 'stale_request'
  /** The rule let another take over from an owner that was gone for longer than lease and heartbeat. */
  | 'owner_absent'

export interface WitnessWorld {
  nowMs(): number
  database: SimulatedDatabase
  server: SimulatedServer
  disks: Map<string, Disk>
  /** The process that runs under the name now, if one does. */
  running(replica: string): Life | undefined
  unknownSettleSeconds: number
  zombieWaitSeconds: number
  heartbeatSeconds: number
  heartbeatStaleSeconds: number
  forcedIntervalSeconds: number
  cacheTrustMs: number
  staleLimitSeconds: number
}

interface Presentation {
  call: TokenCall
  endedAtMs: number
  outcome: TokenOutcome['kind'] | undefined
}

/** From the delivery of an answer to the end of its fsync: 15 ms here at most, and a little room. */
const FSYNC_MS_MAX = 20
/** The clock of the database and a slow statement may make a token look younger than it is to its reader. */
const NEED_TOLERANCE = 0.7
/** A failover takes the memory of forced refreshes and of back-offs with it. */
const FORGETFUL_MS = 120_000
/** A process that has come back needs this long beyond a heartbeat to be seen by all. */
const RETURN_MS = 3_000

export type Witness = ReturnType<typeof createWitness>

/** Makes the witness of one run; `attach` gives it the world before anything happens. */
export function createWitness(nowMs: () => number, trace: ((line: string) => void) | undefined) {
  let world!: WitnessWorld
  const violations: string[] = []
  const counts = new Map<string, number>()
  const lives = new Map<string, Life>()
  const names = new Map<string, string>()
  const presentations = new Map<string, Presentation[]>()
  /** Calls whose answer, on its way or delivered, holds this token. */
  const holders = new Map<string, Set<TokenCall>>()
  const deliveredAtMs = new Map<TokenCall, number>()
  const stored = new Set<string>()
  const spoolFailed = new Set<string>()
  /** Tokens that have come to a disk, by attempt. */
  const spooled = new Map<string, string>()
  /** Tokens that no grant takes any more: the queue of revocations has them. */
  const superseded = new Set<string>()
  /** Tokens whose owner was absent when somebody else took over. */
  const takenOver = new Set<string>()
  const lies = new Map<string, number>()
  const refusals = new Map<string, number>()
  const mayPresent = new Map<string, ArmRequest>()
  /** Attempts whose arming was committed, whether or not the process has been told yet. */
  const committed = new Set<string>()
  /** Those of them that were committed when the process had died: it can have sent nothing. */
  const armedByDead = new Set<string>()
  const excuses = new Map<Family, Set<Excuse>>()
  const logins = new Map<string, { loginId: string; generation: number; family: Family }>()
  const closedAtMs = new Map<Family, number>()
  /** The last forced refresh of a user, and the last time that its grant came to life or was closed. */
  const forced = new Map<string, { generation: number; atMs: number }>()
  const leftAtMs = new Map<string, number>()
  /** Tokens whose commit a failover has lost, and attempts. */
  const setBack = new Set<string>()
  const forgotten = new Set<string>()
  let failedOverAtMs = -Infinity
  /** Tokens condemned while the end of another attempt was not known. */
  const doubted = new Set<string>()
  /** Access tokens of a login whose statement was under way for this long, which the row cannot know. */
  const storedLateMs = new Map<string, number>()

  function note(life: Life | undefined, text: string): void {
    trace?.(`${(nowMs() / 1000).toFixed(3).padStart(9)} s  ${nameOf(life)}  ${text}`)
  }

  function nameOf(life: Life | undefined): string {
    if (life === undefined) return 'world'.padEnd(11)
    if (!names.has(life.boot)) {
      const earlier = [...lives.values()].filter(({ replica }) => replica === life.replica).length
      names.set(life.boot, `${life.replica}#${earlier}`)
    }
    return (names.get(life.boot) ?? '').padEnd(11)
  }

  function violate(rule: string, text: string, life?: Life): void {
    violations.push(`${rule}: ${text}`)
    note(life, `VIOLATION of ${rule}: ${text}`)
  }

  const count = (name: string) => counts.set(name, (counts.get(name) ?? 0) + 1)

  function excuse(family: Family, reason: Excuse): void {
    const known = excuses.get(family) ?? new Set()
    excuses.set(family, known.add(reason))
    count(reason)
    note(undefined, `family ${family.id} is past saving: ${reason}`)
  }

  const onDisk = (token: string) =>
    [...world.disks.values()].some((disk) =>
      [...disk.values()].some((entry) => secretOf(entry.refreshTokenSealed) === token),
    )

  const isHeld = (token: string) =>
    stored.has(token) ||
    [...(holders.get(token) ?? [])].some(({ life }) => !life.dead) ||
    onDisk(token)

  /** Whether the spool of the replica holds a later token of the row's login. */
  const hasEntryAfter = (replica: string, { loginId, generation }: GrantRow) =>
    [...(world.disks.get(replica)?.values() ?? [])].some(
      (entry) => entry.loginId === loginId && entry.generation > generation,
    )

  /** Whether the process is there, or has been away for too short a time for its heartbeat to be stale. */
  function isPresent(life: Life | undefined): boolean {
    if (life === undefined) return false
    // Two heartbeats may have failed before.
    const staleMs = (world.heartbeatStaleSeconds - 3 * world.heartbeatSeconds) * 1000
    const seenAfterMs = world.heartbeatSeconds * 1000 + RETURN_MS
    if (life.dead || life.paused || life.cutOff) {
      // Whoever leaves again before a heartbeat has not been back, to the others.
      const wasSeen = life.absentSinceMs - life.lastAbsentAtMs > seenAfterMs
      return nowMs() - (wasSeen ? life.absentSinceMs : life.lastAbsentSinceMs) < staleMs
    }
    return nowMs() - life.lastAbsentAtMs > seenAfterMs
  }

  /**
   * RF-25: after a failover nobody presents a token whose successor, or whose answer, somebody is about to bring back.
   * Those who are away are left to their fate.
   */
  function judgeSetBack(life: Life, request: ArmRequest): void {
    const token = request.tokenDigest.toString()
    const { loginId, generation } = request
    const onDisks = [...world.disks].flatMap(([name, disk]) =>
      [...disk.values()].some((one) => one.loginId === loginId && one.generation > generation)
        ? [world.running(name)]
        : [],
    )
    const callers = (presentations.get(token) ?? []).flatMap(({ call, outcome }) =>
      (call.open || outcome === 'granted') && !call.life.dead ? [call.life] : [],
    )
    for (const one of [...onDisks, ...callers]) {
      if (one === life && callers.includes(one)) continue
      const row = world.database.replicas.get(one?.replica ?? '')
      // The standby may lack the heartbeat of one that has just come back: to it, that one is still gone.
      const isKnown =
        one !== undefined && row?.boot === one.boot && row.seenAtMs - EPOCH_MS > one.lastAbsentAtMs
      if (isKnown && isPresent(one)) {
        violate('failover', `${token} is armed while ${nameOf(one)} holds what came of it`, life)
      }
      takenOver.add(token)
    }
  }

  /** RF-01, RF-35: nobody refreshes what has just been refreshed. */
  function judgeNeed(life: Life, request: ArmRequest, before: GrantRow | undefined): void {
    const token = before?.accessToken
    // Whoever was stopped between reading and thinking takes the token for older than it is.
    if (nowMs() - life.lastAbsentAtMs < RETURN_MS) return
    if (nowMs() - failedOverAtMs < FORGETFUL_MS) return
    if (request.cause === 'recovery' || token === null || token === undefined) return
    const livedSeconds = (EPOCH_MS + nowMs() - token.requestedAt.getTime()) / 1000
    const lifeSeconds = (token.expiresAt.getTime() - token.requestedAt.getTime()) / 1000
    if (request.cause === 'rejected') {
      const last = forced.get(request.user)
      forced.set(request.user, { generation: request.generation, atMs: nowMs() })
      if (last === undefined || last.generation === request.generation) return
      if (nowMs() - last.atMs >= (world.forcedIntervalSeconds * 1000) / 2) return
    } else if (livedSeconds >= (lifeSeconds / 2) * NEED_TOLERANCE) return
    violate('need', `${request.user} is refreshed after ${livedSeconds.toFixed(1)} s`, life)
  }

  /** Judges the arming of a row that was armed before. */
  function judgeTakeOver(life: Life, request: ArmRequest, before: GrantRow): void {
    const token = request.tokenDigest.toString()
    const owner = lives.get(before.ownerBoot ?? '')
    if (owner === undefined || owner === life) return
    count('taken over')
    const now = nowMs()
    const boot = world.database.replicas.get(owner.replica)?.boot
    if (owner.dead && boot !== owner.boot && !hasEntryAfter(owner.replica, before)) return
    if (owner.dead && boot !== owner.boot && failedOverAtMs > -Infinity) {
      // The row may be that of an earlier attempt; whether anybody present holds more is judged above.
      takenOver.add(token)
      return
    }
    const successor = world.running(owner.replica)
    const armedAtMs = world.database.attempts.get(before.attemptId ?? '')?.armedAtMs ?? 0
    const inTime = EPOCH_MS + now - armedAtMs <= world.zombieWaitSeconds * 1000
    if (successor?.boot === boot && boot !== owner.boot && isPresent(successor) && inTime) {
      violate('take-over', 'the owner has restarted and its spool holds the successor', life)
      return
    }
    const leaseUntilMs = (before.leaseUntil?.getTime() ?? Infinity) - EPOCH_MS
    if (leaseUntilMs >= now) {
      violate('take-over', 'the lease is not over and the owner has not restarted', life)
    } else if (isPresent(owner)) {
      violate('take-over', `the owner ${nameOf(owner)} is alive and connected`, life)
    }
    takenOver.add(token)
  }

  return {
    violations,
    counts,
    excuses,
    logins,
    lies,
    refusals,
    closedAtMs,
    doubted,
    takenOver,
    presentations,
    armedByDead,
    note,
    count,
    violate,
    isHeld,
    attach(given: WitnessWorld) {
      world = given
    },

    // ── Processes ────────────────────────────────────────────────────────────────────────────────

    started(life: Life) {
      lives.set(life.boot, life)
      note(life, 'starts')
    },

    died(life: Life) {
      note(life, 'dies')
      for (const [token, calls] of holders) {
        for (const call of calls) {
          if (call.life !== life) continue
          const sinceMs = deliveredAtMs.get(call)
          if (sinceMs === undefined || stored.has(token) || onDisk(token)) continue
          if (superseded.has(token)) continue
          const heldMs = nowMs() - sinceMs
          const interrupted = life.lastStoppedAtMs >= sinceMs || life.paused
          if (heldMs > FSYNC_MS_MAX && !spoolFailed.has(token) && !interrupted) {
            violate('H4', `the answer was held for ${Math.round(heldMs)} ms and not spooled`, life)
          }
        }
      }
    },

    /** A standby has taken the place of the database, without the commits of the last `lagMs`. */
    failedOver(lagMs: number) {
      note(undefined, `the standby takes over, ${Math.round(lagMs)} ms of commits are lost`)
      count('failed over')
      failedOverAtMs = nowMs()
      for (const attemptId of committed) {
        if (!world.database.attempts.has(attemptId)) forgotten.add(attemptId)
      }
      const kept = new Set<string>()
      for (const row of world.database.grants.values()) {
        kept.add(secretOf(row.refreshTokenSealed ?? Buffer.alloc(0)))
      }
      for (const { family } of logins.values()) {
        const newest = [...kept].find((one) => one.startsWith(`rt.${family.id}.`))
        const from = Number(newest?.split('.')[2] ?? 0)
        for (let number = from + 1; number <= family.current; number += 1) {
          const token = `rt.${family.id}.${number}`
          if (!stored.delete(token)) continue
          setBack.add(token)
          count('set back')
          // Whoever had it stored keeps it nowhere but on its disk.
          if (!onDisk(token)) holders.delete(token)
        }
      }
    },

    failedOverAtMs: () => failedOverAtMs,

    // ── The database ─────────────────────────────────────────────────────────────────────────────

    armed(life: Life, request: ArmRequest, before: GrantRow | undefined) {
      note(
        life,
        `arms ${request.user} at generation ${request.generation}, cause ${request.cause}` +
          (before?.phase === 'armed' ? `, taking over from ${before.owner}` : ''),
      )
      committed.add(request.attemptId)
      if (life.dead) armedByDead.add(request.attemptId)
      judgeNeed(life, request, before)
      if (failedOverAtMs > -Infinity) judgeSetBack(life, request)
      if (before?.phase === 'armed') judgeTakeOver(life, request, before)
    },

    mayPresent(life: Life, request: ArmRequest) {
      mayPresent.set(`${life.boot} ${request.tokenDigest.toString()}`, request)
    },

    stored(life: Life, successor: Successor, result: StoreResult) {
      const token = secretOf(successor.refreshTokenSealed)
      note(life, `store of ${token} as generation ${successor.generation}: ${result}`)
      if (result === 'stored') leftAtMs.set(successor.user, nowMs())
      if (result === 'superseded') superseded.add(token)
      else stored.add(token)
      count(result)
    },

    spooled({ attemptId, refreshTokenSealed }: Successor) {
      spooled.set(attemptId, secretOf(refreshTokenSealed))
    },

    foundStored(life: Life, { attemptId }: SuccessorId) {
      const token = spooled.get(attemptId)
      if (token === undefined) throw new Error(`${attemptId} was never in a spool`)
      note(life, `finds ${token} stored`)
      stored.add(token)
      count('found stored')
    },

    spoolFailed(life: Life, successor: Successor) {
      spoolFailed.add(secretOf(successor.refreshTokenSealed))
      note(life, 'write into the spool fails')
    },

    connected(life: Life, grant: NewGrant) {
      const token = secretOf(grant.refreshTokenSealed)
      const family = world.server.familyOf(token)
      stored.add(token)
      for (const [accessToken, issued] of world.server.accessTokens) {
        if (issued.refreshToken !== token) continue
        const ageMs = nowMs() - issued.issuedAtMs
        storedLateMs.set(accessToken, ageMs - grant.requestedSecondsAgo * 1000)
      }
      logins.set(grant.user, { loginId: grant.loginId, generation: grant.replaces + 1, family })
      leftAtMs.set(grant.user, nowMs())
      note(life, `login of ${grant.user} is stored with ${token}`)
    },

    closed(life: Life, before: GrantRow) {
      leftAtMs.set(before.user, nowMs())
      note(life, `grant of ${before.user} is closed`)
    },

    condemned(life: Life, row: GrantRow) {
      note(life, `grant of ${row.user} becomes ${row.state}: ${row.stateReason}`)
      count(row.state)
      const token = secretOf(row.refreshTokenSealed ?? Buffer.alloc(0))
      const refused = refusals.get(token) ?? 0
      if (row.state === 'active') return
      const { unknownBefore } = world.database.evidence(row.user, row.loginId, row.generation)
      if (unknownBefore) doubted.add(token)
      if (refused === 0) violate('verdict', 'the server never refused the token', life)
      // What the ledger said when the verdict was reached may be gone.
      else if (refused < 2 && !unknownBefore && failedOverAtMs === -Infinity)
        violate('verdict', 'the refusal was not confirmed', life)
    },

    // ── The authorization server ─────────────────────────────────────────────────────────────────

    sent(call: TokenCall) {
      const { life, token } = call
      note(life, `presents ${token}${call.fault === 'none' ? '' : `, fault ${call.fault}`}`)
      const intent = mayPresent.get(`${life.boot} ${token}`)
      mayPresent.delete(`${life.boot} ${token}`)
      const entry = world.database.attempts.get(intent?.attemptId ?? '')
      if (entry === undefined && !forgotten.has(intent?.attemptId ?? ''))
        violate('intent', `${token} is presented without one`, life)
      const earlier = presentations.get(token) ?? []
      for (const { call: one, endedAtMs, outcome } of earlier) {
        if (takenOver.has(token)) break
        if (one.open && !one.life.dead) {
          violate('H2', `${token} is presented while ${nameOf(one.life)} presents it`, life)
        } else if (outcome === 'granted' && !one.life.dead) {
          violate('H1', `${token} is presented although its successor is at hand`, life)
        } else if (
          outcome === 'in_doubt' &&
          !one.life.dead &&
          endedAtMs > failedOverAtMs &&
          nowMs() - endedAtMs < world.unknownSettleSeconds * 1000
        ) {
          violate('H1', `${token} is presented again before the settle delay`, life)
        }
      }
      presentations.set(token, [...earlier, { call, endedAtMs: Infinity, outcome: undefined }])
      count('presented')
    },

    ended(call: TokenCall, outcome: TokenOutcome) {
      note(
        call.life,
        `ends with ${outcome.kind}${'reason' in outcome ? `, ${outcome.reason}` : ''}`,
      )
      count(outcome.kind)
      const presentation = presentations.get(call.token)?.find((one) => one.call === call)
      if (presentation !== undefined) {
        presentation.outcome = outcome.kind
        presentation.endedAtMs = nowMs()
      }
      if (outcome.kind === 'refused') {
        refusals.set(call.token, (refusals.get(call.token) ?? 0) + 1)
      }
      if (outcome.kind === 'granted') {
        deliveredAtMs.set(call, nowMs())
        return
      }
      for (const calls of holders.values()) calls.delete(call)
    },

    lost(call: TokenCall) {
      for (const calls of holders.values()) calls.delete(call)
    },

    consumed(call: TokenCall, family: Family, successor: string) {
      note(undefined, `the server consumes ${call.token} and issues ${successor}`)
      count('consumed')
      family.consumedAtMs = nowMs()
      if (call.open && !call.life.dead) holders.set(successor, new Set([call]))
    },

    replayed(call: TokenCall, successor: string) {
      note(undefined, `the server replays ${successor} for ${call.token}`)
      count('replayed')
      if (!call.open || call.life.dead) return
      holders.set(successor, (holders.get(successor) ?? new Set()).add(call))
    },

    reused(call: TokenCall, family: Family, successor: string) {
      note(undefined, `the server sees ${call.token} again, family ${family.ended ?? 'kept'}`)
      count('reused')
      if (!call.open || call.life.dead) {
        if (family.ended !== undefined) excuse(family, 'stale_request')
      } else if (!isHeld(successor)) {
        excuse(family, 'successor_lost')
      } else if (takenOver.has(call.token)) {
        // Two generations later the ledger of the present one tells nothing of it.
        const late = call.fault === 'request_late'
        if (family.ended !== undefined) excuse(family, late ? 'stale_request' : 'owner_absent')
      } else {
        violate('H1', `${call.token} is presented although ${successor} is held`, call.life)
      }
    },

    lied(call: TokenCall) {
      note(undefined, `the server refuses ${call.token} for no reason`)
      lies.set(call.token, (lies.get(call.token) ?? 0) + 1)
    },

    revoked(life: Life, family: Family, token: string) {
      note(life, `has ${token} revoked`)
      for (const row of world.database.grants.values()) {
        if (row.refreshTokenSealed === null || row.state === 'revoked') continue
        if (world.server.familyOf(secretOf(row.refreshTokenSealed)) !== family) continue
        violate('revocation', `the grant of ${row.user} is in use and its token revoked`, life)
      }
    },

    // ── Callers ──────────────────────────────────────────────────────────────────────────────────

    /** A caller was told that the user must log in again. */
    toldDead(life: Life, user: UserKey, askedAtMs: number) {
      if (world.database.grants.get(user)?.state === 'reauthentication_required') return
      if ((leftAtMs.get(user) ?? -Infinity) >= askedAtMs) return
      violate('verdict', `a caller is told that ${user} must log in again, which is not so`, life)
    },

    /** A caller that asked at `askedAtMs` got this token. */
    served(
      life: Life,
      user: string,
      askedAtMs: number,
      token: { accessToken: string; fingerprint: string },
      minTtlSeconds: number,
    ) {
      count('served')
      const issued = world.server.accessTokens.get(token.accessToken)
      if (issued === undefined || token.fingerprint !== fingerprintOf(token.accessToken)) {
        violate('H3', `${token.accessToken} was never issued`, life)
        return
      }
      const { family, refreshToken, expiresAtMs } = issued
      if (family.user !== user) violate('H5', `${user} gets a token of ${family.user}`, life)
      const leftMs = expiresAtMs + (storedLateMs.get(token.accessToken) ?? 0) - nowMs()
      if (leftMs <= 0 || leftMs < minTtlSeconds * 1000) {
        violate('H3', `the served token has ${leftMs} ms left of ${minTtlSeconds} s asked`, life)
      }
      // A closed or replaced grant's late answer is in the queue of revocations instead.
      const wasStored = stored.has(refreshToken) || setBack.has(refreshToken)
      if (!wasStored && !onDisk(refreshToken) && !superseded.has(refreshToken)) {
        violate('served before stored', `${refreshToken} is nowhere but in memory`, life)
      }
      const sinceMs = closedAtMs.get(family)
      const away = nowMs() - life.databaseFailedAtMs <= world.staleLimitSeconds * 1000
      if (sinceMs !== undefined && askedAtMs > sinceMs + world.cacheTrustMs && !away) {
        violate('H6', `a token of ${user} is served after the grant was closed`, life)
      }
    },
  }
}
