// The stores of grants, replicas and revocations in memory: each function is one statement of src/postgres, word for
// word in its meaning. test/grant-store.test.ts holds both against the same sequences of calls.
// Statements are atomic here, as row locks and re-evaluated conditions make them there.

import { type AttemptOutcome, type Grant, RECOVERED, type UserKey } from '../../../src/grant.ts'
import type {
  ArmRequest,
  Evidence,
  GrantStore,
  NewGrant,
  NewRevocation,
  Revocation,
  StoreResult,
  Successor,
  SuccessorId,
} from '../../../src/grant-stores.ts'
import type { GrantStoreSettings } from '../../../src/postgres/grant-store.ts'

export interface AttemptRow {
  attemptId: string
  user: UserKey
  loginId: string
  generation: number
  replica: string
  boot: string
  cause: string
  armedAtMs: number
  finishedAtMs: number | null
  outcome: AttemptOutcome | null
}

interface ReplicaRow {
  boot: string
  seenAtMs: number
  steadySinceMs: number
  spoolDrainedAtMs: number | null
  /** Start of the server. */
  restoredOn: number
  metOn: number
  metAtMs: number
}

interface RevocationRow extends Revocation {
  nextAttemptAtMs: number
}

export interface GrantRow extends Omit<Grant, 'readAt'> {
  /** Of the last arming, whose attempt may be of before. */
  armedAtMs?: number
}

export type SimulatedDatabase = ReturnType<typeof createSimulatedDatabase>

const DAY_MS = 86_400_000

/** The later of two instants, either of which may not have been. */
function laterOf(one: number | null, other: number | null): number | null {
  if (one === null || other === null) return one ?? other
  return Math.max(one, other)
}

/** A token before this one was presented again once it was spent, and perhaps after this one was issued. */
function predecessorWasPresentedAgain(
  login: readonly AttemptRow[],
  generation: number,
  zombieWaitMs: number,
): boolean {
  const last = login.filter((one) => one.generation === generation - 1 && one.outcome === 'granted')
  const spent = login.filter((one) => one.generation < generation && one.outcome === 'granted')
  return login.some(
    (one) =>
      (one.outcome === null || one.outcome === 'in_doubt' || one.outcome === 'refused') &&
      spent.some(
        ({ generation: its, armedAtMs }) => its === one.generation && one.armedAtMs > armedAtMs,
      ) &&
      last.some(({ armedAtMs }) => (one.finishedAtMs ?? one.armedAtMs + zombieWaitMs) >= armedAtMs),
  )
}

/** Makes an empty database. `nowMs` is its clock; `startedAtMs` when its server came up. */
export function createSimulatedDatabase(settings: GrantStoreSettings, nowMs: () => number) {
  const grants = new Map<UserKey, GrantRow>()
  const attempts = new Map<string, AttemptRow>()
  const replicas = new Map<string, ReplicaRow>()
  const revocations = new Map<string, RevocationRow>()
  /** The row of the deployment, as far as it tells of servers. */
  let server: { startedAtMs: number; noticedAtMs: number; leftAtMs: number | undefined } = {
    ...{ startedAtMs: NaN, noticedAtMs: 0, leftAtMs: undefined },
  }
  const database = {
    grants,
    attempts,
    replicas,
    revocations,
    startedAtMs: 0,

    /** Keeps what is in it; the function that is returned puts all of it back. */
    snapshot(): () => void {
      const copies = [grants, attempts, replicas, revocations].map((table) => ({
        table: table as Map<string, object>,
        rows: [...(table as Map<string, object>)].map(([key, row]) => [key, { ...row }] as const),
      }))
      const then = server
      return () => {
        server = then
        for (const { table, rows } of copies) {
          table.clear()
          for (const [key, row] of rows) table.set(key, row)
        }
      }
    },

    find(user: UserKey): Grant | undefined {
      const row = grants.get(user)
      return row === undefined ? undefined : { ...row, readAt: new Date(nowMs()) }
    },

    findMany(users: readonly UserKey[]): Grant[] {
      return users.flatMap((user) => database.find(user) ?? [])
    },

    arm(request: ArmRequest): { armedAt: Date } | undefined {
      const row = grants.get(request.user)
      const now = nowMs()
      if (
        row === undefined ||
        row.loginId !== request.loginId ||
        row.generation !== request.generation ||
        row.state !== 'active' ||
        (row.nextRetryAt !== null && row.nextRetryAt.getTime() > now) ||
        (row.phase === 'armed' && !takeOverAllowed(row, request.replica, request.boot)) ||
        maySomebodyElseSpeak(row, request.boot) ||
        isSomethingMissing(request.replica, request.leaseSeconds)
      ) {
        return undefined
      }
      const armedAt = new Date(now)
      grants.set(request.user, {
        ...row,
        phase: 'armed',
        attemptId: request.attemptId,
        owner: request.replica,
        ownerBoot: request.boot,
        armedAtMs: now,
        leaseUntil: new Date(now + request.leaseSeconds * 1000),
      })
      const { attemptId, user, loginId, generation, replica, boot, cause } = request
      attempts.set(attemptId, {
        ...{ attemptId, user, loginId, generation, replica, boot, cause },
        armedAtMs: now,
        finishedAtMs: null,
        outcome: null,
      })
      return { armedAt }
    },

    rearm(request: ArmRequest, armedAt: Date): boolean {
      const row = grants.get(request.user)
      const { attemptId, user, loginId, generation, replica, boot, cause } = request
      if (row?.loginId !== loginId || row.generation !== generation || row.state !== 'active') {
        const isBehind = row?.loginId === loginId && row.generation < generation
        return !isBehind || row.state !== 'active'
      }
      const isFree = row.phase === 'idle' || (row.armedAtMs ?? Infinity) < server.noticedAtMs
      if (isFree && row.attemptId !== attemptId) {
        grants.set(user, {
          ...row,
          ...{ phase: 'armed', attemptId, owner: replica, ownerBoot: boot, armedAtMs: nowMs() },
          leaseUntil: new Date(nowMs() + request.leaseSeconds * 1000),
        })
      }
      if (attempts.has(attemptId)) return true
      attempts.set(attemptId, {
        ...{ attemptId, user, loginId, generation, replica, boot, cause },
        ...{ armedAtMs: armedAt.getTime(), finishedAtMs: null, outcome: null },
      })
      return true
    },

    disarm(end: Parameters<GrantStore['disarm']>[0]): void {
      const attempt = attempts.get(end.attemptId)
      if (attempt?.outcome === null) finish(attempt, end.outcome)
      const row = grants.get(end.user)
      if (row?.attemptId !== end.attemptId || row.phase !== 'armed') return
      grants.set(end.user, {
        ...row,
        phase: end.stayArmed ? 'armed' : 'idle',
        nextRetryAt: new Date(nowMs() + end.retryInSeconds * 1000),
        failureCount: row.failureCount + (end.counts ? 1 : 0),
      })
    },

    store(successor: Successor): StoreResult {
      const row = grants.get(successor.user)
      const ours = row !== undefined && row.loginId === successor.loginId && row.state !== 'revoked'
      const attempt = attempts.get(successor.attemptId)
      if (!ours) return attempt?.outcome === 'granted' ? 'already_stored' : 'superseded'
      if (row.generation >= successor.generation) return 'already_stored'
      const now = nowMs()
      grants.set(successor.user, {
        ...row,
        generation: successor.generation,
        refreshTokenSealed: successor.refreshTokenSealed,
        keyId: successor.keyId,
        accessToken: successor.accessToken,
        scope: successor.scope,
        state: 'active',
        stateReason: row.state === 'reauthentication_required' ? RECOVERED : null,
        phase: 'idle',
        nextRetryAt: null,
        failureCount: 0,
        rotatedAt: new Date(now),
        rollingExpiresAt: lifetimeFrom(now),
      })
      if (attempt !== undefined && attempt.outcome !== 'granted') finish(attempt, 'granted')
      return 'stored'
    },

    findStored(successors: readonly SuccessorId[]): ReadonlyMap<string, number> {
      const stored = new Map<string, number>()
      for (const { user, loginId, generation, attemptId } of successors) {
        const row = grants.get(user)
        const ours = row !== undefined && row.loginId === loginId && row.state !== 'revoked'
        const attempt = attempts.get(attemptId)
        const isGranted = attempt?.outcome === 'granted'
        if (ours ? row.generation < generation : !isGranted) continue
        const sinceMs = isGranted ? attempt.finishedAtMs : null
        stored.set(attemptId, sinceMs === null ? 0 : (nowMs() - sinceMs) / 1000)
      }
      return stored
    },

    finishSuperseded(successor: Successor): void {
      const attempt = attempts.get(successor.attemptId)
      if (attempt !== undefined) finish(attempt, 'granted')
    },

    connect(grant: NewGrant): boolean {
      const row = grants.get(grant.user)
      if (row !== undefined && row.generation !== grant.replaces) return false
      const now = nowMs()
      const requestedAtMs = now - grant.requestedSecondsAgo * 1000
      const authenticatedAtMs = grant.authenticatedAt?.getTime() ?? now
      grants.set(grant.user, {
        user: grant.user,
        loginId: grant.loginId,
        state: 'active',
        stateReason: row?.state === 'reauthentication_required' ? RECOVERED : null,
        generation: grant.replaces + 1,
        refreshTokenSealed: grant.refreshTokenSealed,
        accessToken: grant.accessToken && {
          ...grant.accessToken,
          requestedAt: new Date(requestedAtMs),
          expiresAt: new Date(requestedAtMs + grant.expiresInSeconds * 1000),
        },
        scope: grant.scope,
        keyId: grant.keyId,
        pageroIssuer: grant.pageroIssuer,
        pageroSubject: grant.pageroSubject,
        phase: 'idle',
        attemptId: null,
        owner: null,
        ownerBoot: null,
        leaseUntil: null,
        nextRetryAt: null,
        failureCount: 0,
        authenticatedAt: new Date(authenticatedAtMs),
        rotatedAt: new Date(now),
        lastUsedAt: row?.lastUsedAt ?? null,
        rollingExpiresAt: lifetimeFrom(now),
        absoluteExpiresAt: lifetimeFrom(authenticatedAtMs),
        decidedAt: new Date(now),
      })
      queueRevocation(grant.revocation)
      return true
    },

    close(user: UserKey, generation: number, revocation: NewRevocation | undefined): boolean {
      const row = grants.get(user)
      if (row?.generation !== generation || row.state === 'revoked') return false
      grants.set(user, {
        ...row,
        state: 'revoked',
        stateReason: 'disconnected',
        refreshTokenSealed: null,
        keyId: null,
        accessToken: null,
        phase: 'idle',
        nextRetryAt: null,
        decidedAt: new Date(nowMs()),
      })
      queueRevocation(revocation)
      return true
    },

    condemn(
      user: UserKey,
      generation: number,
      verdict: Parameters<GrantStore['condemn']>[2],
    ): boolean {
      const row = grants.get(user)
      if (row?.generation !== generation) return false
      if (row.state !== 'active' && row.state !== 'suspect') return false
      const { state, reason, whileUnknown = false } = verdict
      if (whileUnknown && !database.evidence(user, row.loginId, generation).unknownBefore) {
        return false
      }
      grants.set(user, { ...row, state, stateReason: reason, phase: 'idle' })
      return true
    },

    evidence(user: UserKey, loginId: string, generation: number): Evidence {
      const now = nowMs()
      const row = grants.get(user)
      const login = [...attempts.values()].filter(
        (one) => one.user === user && one.loginId === loginId,
      )
      const same = login.filter((one) => one.generation === generation)
      const refused = same.filter(({ outcome }) => outcome === 'refused')
      const firstRefusedAtMs = Math.min(...refused.map((one) => one.finishedAtMs ?? Infinity))
      if (row === undefined) {
        return {
          unknownBefore: false,
          refusals: 0,
          successorMayComeBack: false,
          laterGeneration: false,
          lifetimeOver: false,
        }
      }
      return {
        unknownBefore:
          same.some(
            ({ outcome, armedAtMs }) =>
              refused.length > 0 &&
              (outcome === 'in_doubt' || outcome === null) &&
              armedAtMs < firstRefusedAtMs,
          ) || predecessorWasPresentedAgain(login, generation, settings.zombieWaitSeconds * 1000),
        refusals: refused.length,
        successorMayComeBack: same.some((one) => {
          if (one.outcome !== null) return false
          if (one.armedAtMs <= now - settings.zombieWaitSeconds * 1000) return false
          const owner = replicas.get(one.replica)
          if (owner === undefined || owner.boot === one.boot) return true
          return (owner.spoolDrainedAtMs ?? -Infinity) <= one.armedAtMs
        }),
        laterGeneration: login.some(
          (one) =>
            one.generation > generation ||
            (one.generation === generation && one.outcome === 'granted'),
        ),
        lifetimeOver:
          Math.min(row.rollingExpiresAt.getTime(), row.absoluteExpiresAt.getTime()) < now + DAY_MS,
      }
    },

    lastForcedSecondsAgo(user: UserKey): number | undefined {
      const forced = [...attempts.values()].filter(
        (one) => one.user === user && one.cause === 'rejected',
      )
      if (forced.length === 0) return undefined
      return (nowMs() - Math.max(...forced.map(({ armedAtMs }) => armedAtMs))) / 1000
    },

    findUndecided(page: Parameters<GrantStore['findUndecided']>[0]): Grant[] {
      return [...grants.values()]
        .filter((row) => row.user > (page.after ?? '') && isUndecidedBy(row, page.replica))
        .toSorted((a, b) => (a.user < b.user ? -1 : 1))
        .slice(0, page.limit)
        .map((row) => ({ ...row, readAt: new Date(nowMs()) }))
    },

    /** Attempts with the token of the row of which nobody knows whether they have spent it. */
    inDoubt({ user, loginId, generation }: GrantRow): AttemptRow[] {
      return [...attempts.values()].filter(
        (one) =>
          one.user === user &&
          one.loginId === loginId &&
          one.generation === generation &&
          (one.outcome === 'in_doubt' || one.outcome === null),
      )
    },

    touch(users: readonly UserKey[]): void {
      for (const user of users) {
        const row = grants.get(user)
        if (row !== undefined) grants.set(user, { ...row, lastUsedAt: new Date(nowMs()) })
      }
    },

    now: (): Date => new Date(nowMs()),
    heartbeat: (replica: string, boot: string, holds = false, metOn?: number) =>
      announce(replica, boot, {
        drainedAsOfMs: null,
        metOn: metOn ?? (holds ? -Infinity : undefined),
      }),
    spoolDrained: (replica: string, boot: string, asOf: Date, metOn?: number) =>
      void announce(replica, boot, { drainedAsOfMs: asOf.getTime(), metOn }),

    restored(replica: string, boot: string, seen: string): void {
      const row = replicas.get(replica)
      if (row?.boot !== boot || String(database.startedAtMs) !== seen) return
      row.restoredOn = database.startedAtMs
    },

    addRevocation: queueRevocation,

    takeRevocations(limit: number, leaseSeconds: number): Revocation[] {
      const now = nowMs()
      const due = [...revocations.values()].filter((one) => one.nextAttemptAtMs <= now)
      return due
        .toSorted((a, b) => a.nextAttemptAtMs - b.nextAttemptAtMs)
        .slice(0, limit)
        .map((one) => {
          one.nextAttemptAtMs = now + leaseSeconds * 1000
          return { ...one }
        })
    },

    revocationDone(revocationId: string): void {
      revocations.delete(revocationId)
    },

    retryRevocationLater(revocationId: string, delaySeconds: number): void {
      const row = revocations.get(revocationId)
      if (row === undefined) return
      row.nextAttemptAtMs = nowMs() + delaySeconds * 1000
      row.failureCount += 1
    },
  }

  function finish(attempt: AttemptRow, outcome: AttemptOutcome): void {
    attempt.outcome = outcome
    attempt.finishedAtMs = nowMs()
  }

  function isUndecidedBy(row: GrantRow, replica: string): boolean {
    const { phase, state } = row
    if (row.owner === replica && ((phase === 'armed' && state === 'active') || state === 'suspect'))
      return true
    if (phase !== 'idle' || state !== 'active' || row.nextRetryAt === null) return false
    return database
      .inDoubt(row)
      .some((attempt) => attempt.replica === replica || row.owner === replica)
  }

  function takeOverAllowed(row: GrantRow, replica: string, boot: string): boolean {
    const now = nowMs()
    const leaseOver = (row.leaseUntil?.getTime() ?? Infinity) < now
    if (row.owner === replica && row.ownerBoot === boot) {
      const outcome = attempts.get(row.attemptId ?? '')?.outcome
      if (leaseOver || outcome === 'in_doubt' || outcome === 'refused') return true
    }
    if (database.startedAtMs >= now - settings.databaseSettleSeconds * 1000) return false
    const owner = replicas.get(row.owner ?? '')
    const armedAtMs = row.armedAtMs ?? now
    const drainedAtMs = owner?.boot === row.ownerBoot ? null : owner?.spoolDrainedAtMs
    if ((drainedAtMs ?? -Infinity) > armedAtMs) return true
    const staleMs = settings.heartbeatStaleSeconds * 1000
    const ownerMayBringIt =
      owner !== undefined &&
      owner.seenAtMs > now - staleMs &&
      (owner.boot === row.ownerBoot || armedAtMs > now - settings.zombieWaitSeconds * 1000)
    const taker = replicas.get(replica)
    const steady =
      taker?.boot === boot &&
      taker.seenAtMs > now - staleMs / 2 &&
      taker.steadySinceMs < now - settings.databaseSettleSeconds * 1000
    return leaseOver && !ownerMayBringIt && steady
  }

  function maySomebodyElseSpeak(row: GrantRow, boot: string): boolean {
    const now = nowMs()
    return [...attempts.values()].some((one) => {
      const owner = replicas.get(one.replica)
      return (
        one.user === row.user &&
        one.armedAtMs > now - settings.zombieWaitSeconds * 1000 &&
        one.loginId === row.loginId &&
        one.generation === row.generation &&
        one.outcome === null &&
        row.attemptId !== null &&
        one.attemptId !== row.attemptId &&
        one.boot !== boot &&
        owner !== undefined &&
        owner.seenAtMs > now - settings.heartbeatStaleSeconds * 1000 &&
        (owner.boot === one.boot || (owner.spoolDrainedAtMs ?? -Infinity) <= one.armedAtMs)
      )
    })
  }

  function isSomethingMissing(replica: string, leaseSeconds: number): boolean {
    const now = nowMs()
    const staleMs = settings.heartbeatStaleSeconds * 1000
    if (server.startedAtMs !== database.startedAtMs) return true
    if (server.leftAtMs !== undefined && server.noticedAtMs >= now - staleMs / 2) return true
    if (replicas.get(replica)?.restoredOn !== server.startedAtMs) return true
    const absentUntilMs = server.noticedAtMs + Math.max(staleMs, leaseSeconds * 1000)
    const livedAtMs = now < absentUntilMs ? (server.leftAtMs ?? Infinity) : now
    return [...replicas.values()].some((one) => {
      if (one.restoredOn === server.startedAtMs) return false
      if (one.metOn === server.startedAtMs) {
        return one.metAtMs >= now - 3 * staleMs && one.seenAtMs > now - staleMs
      }
      const isEarly = server.noticedAtMs >= now - settings.zombieWaitSeconds * 1000
      return isEarly && one.seenAtMs > livedAtMs - staleMs
    })
  }

  /** `metOn` is the server that the process has met last. */
  function announce(
    replica: string,
    boot: string,
    { drainedAsOfMs, metOn }: { drainedAsOfMs: number | null; metOn: number | undefined },
  ): string | undefined {
    const { startedAtMs } = database
    if (server.startedAtMs !== startedAtMs) {
      const seen = [...replicas.values()].map(({ seenAtMs }) => seenAtMs)
      const leftAtMs = seen.length === 0 ? undefined : Math.max(...seen)
      server = { startedAtMs, noticedAtMs: nowMs(), leftAtMs }
    }
    const row = replicas.get(replica)
    const same = row?.boot === boot
    if (row !== undefined && !same && drainedAsOfMs !== null) return undefined
    const restoredOn = row?.restoredOn ?? metOn ?? startedAtMs
    const steady = same && row.seenAtMs > nowMs() - (settings.heartbeatStaleSeconds / 2) * 1000
    replicas.set(replica, {
      boot,
      seenAtMs: nowMs(),
      steadySinceMs: steady ? row.steadySinceMs : nowMs(),
      spoolDrainedAtMs: laterOf(same ? row.spoolDrainedAtMs : null, drainedAsOfMs),
      restoredOn,
      metOn: startedAtMs,
      metAtMs: row?.metOn === startedAtMs ? row.metAtMs : nowMs(),
    })
    return restoredOn === startedAtMs ? undefined : String(startedAtMs)
  }

  function queueRevocation(revocation: NewRevocation | undefined): void {
    if (revocation === undefined || revocations.has(revocation.revocationId)) return
    const { revocationId } = revocation
    revocations.set(revocationId, { ...revocation, failureCount: 0, nextAttemptAtMs: nowMs() })
  }

  /** Calendar years only, as the setting's default; the 29th of February is left to PostgreSQL. */
  function lifetimeFrom(atMs: number): Date {
    const years = Number(/^P(\d+)Y$/.exec(settings.refreshTokenLifetime)?.[1])
    const date = new Date(atMs)
    date.setUTCFullYear(date.getUTCFullYear() + years)
    return date
  }

  return database
}
