// A process's way to the simulated database: latency, outages, and statements of which nobody knows whether they ran.

import { BrokerError } from '../../../src/errors.ts'
import type { Ports } from '../../../src/ports.ts'
import type { GrantStore, ReplicaStore, RevocationStore } from '../../../src/grant-stores.ts'
import type { SimulatedDatabase } from './database.ts'
import type { Faults, StatementFault, Step } from './faults.ts'
import type { Life } from './life.ts'
import type { Scheduler } from './scheduler.ts'
import type { Witness } from './witness.ts'

export interface DatabaseWorld {
  scheduler: Scheduler
  faults: Faults
  witness: Witness
  database: SimulatedDatabase
  /** Nobody reaches the database. */
  isDown(): boolean
  /** Lets a process die or stop here. */
  step(life: Life, step: Step): void
}

/** As src/postgres/database.ts has it. */
const STATEMENT_LIMIT_MS = 10_000
/** Of the statements that are not applied, those that fail sooner than this are refused by the server: every other one. */
const REFUSAL_MS = 2

/** The database ports of one process; what the refresh protocol does not use is absent. */
export function linkDatabase(
  world: DatabaseWorld,
  life: Life,
): Pick<Ports, 'grants' | 'replicas' | 'revocations'> {
  const { scheduler, faults, witness, database } = world
  const reachable = () => !world.isDown() && !life.cutOff

  /** Never twice in a row: that would be an absence, which an outage or a cut is for. */
  let heartbeatFailed = false
  function heartbeatFault(): StatementFault {
    const fault = heartbeatFailed ? 'none' : faults.statement()
    heartbeatFailed = fault !== 'none'
    return fault
  }

  /** Sends one statement; `apply` runs at the database, whatever has become of the process by then. */
  function statement<T>(name: string, apply: () => T): Promise<T> {
    return life.call((settle) => {
      const fail = (delayMs: number, isUnwritten = false) =>
        scheduler.after(delayMs, () => {
          life.databaseFailedAtMs = scheduler.nowMs()
          settle.reject(databaseAway(isUnwritten))
        })
      if (!reachable()) {
        // Nothing was sent.
        fail(faults.statementMs(), true)
        return
      }
      const fault = name === 'heartbeat' ? heartbeatFault() : faults.statement()
      const { startedAtMs } = database
      /** A server that is gone carries out nothing any more, and closes its connections. */
      const isThere = () => reachable() && database.startedAtMs === startedAtMs
      if (fault !== 'none') {
        witness.note(life, `${name}: statement ${fault}`)
        // To whoever waits, a database that is slow is one that is away.
        life.databaseFailedAtMs = scheduler.nowMs()
      }
      if (fault === 'not_applied') {
        const delayMs = faults.statementMs()
        // The server has refused it, or the connection was lost: then nobody knows.
        fail(delayMs, delayMs < REFUSAL_MS)
        return
      }
      if (fault === 'late') {
        fail(STATEMENT_LIMIT_MS)
        scheduler.after(STATEMENT_LIMIT_MS + faults.slowMs() / 4, () => {
          if (!world.isDown() && database.startedAtMs === startedAtMs) apply()
        })
        return
      }
      const outMs = fault === 'slow' ? faults.slowMs() : faults.statementMs()
      scheduler.after(outMs, () => {
        if (!isThere()) {
          fail(0)
          return
        }
        const result = apply()
        scheduler.after(faults.statementMs(), () => {
          if (fault === 'applied' || !isThere()) fail(0)
          else settle.resolve(result)
        })
      })
    })
  }

  /** A statement that a rotation stands or falls with. */
  async function step<T>(name: 'arm' | 'store', apply: () => T): Promise<T> {
    world.step(life, `before_${name}`)
    const result = await statement(name, apply)
    world.step(life, `after_${name}`)
    // Whoever stops here goes on later; whoever dies does not.
    return life.call((settle) => settle.resolve(result))
  }

  const grants: Partial<GrantStore> = {
    find: (user) => statement('find', () => database.find(user)),
    findMany: (users) => statement('findMany', () => database.findMany(users)),
    arm: async (request) => {
      const armed = await step('arm', () => {
        const before = database.grants.get(request.user)
        const result = database.arm(request)
        if (result !== undefined) witness.armed(life, request, before)
        return result
      })
      if (armed !== undefined) witness.mayPresent(life, request)
      return armed
    },
    disarm: (end) =>
      statement('disarm', () => {
        witness.note(life, `disarm ${end.outcome}, ${end.stayArmed ? 'stays armed' : 'idle'}`)
        database.disarm(end)
      }),
    store: (successor) =>
      step('store', () => {
        const result = database.store(successor)
        witness.stored(life, successor, result)
        return result
      }),
    findStored: (successors) =>
      statement('findStored', () => {
        const stored = database.findStored(successors)
        for (const one of successors) {
          if (stored.has(one.attemptId)) witness.foundStored(life, one)
        }
        return stored
      }),
    finishSuperseded: (successor) =>
      statement('finishSuperseded', () => database.finishSuperseded(successor)),
    connect: (grant) =>
      statement('connect', () => {
        const connected = database.connect(grant)
        if (connected) witness.connected(life, grant)
        return connected
      }),
    close: (user, generation, revocation) =>
      statement('close', () => {
        const before = database.grants.get(user)
        const closed = database.close(user, generation, revocation)
        if (closed && before !== undefined) witness.closed(life, before)
        return closed
      }),
    condemn: (user, generation, verdict) =>
      statement('condemn', () => {
        const before = database.grants.get(user)
        const given = database.condemn(user, generation, verdict)
        const after = database.grants.get(user)
        if (after !== before && after !== undefined) witness.condemned(life, after)
        return given
      }),
    evidence: (user, loginId, generation) =>
      statement('evidence', () => database.evidence(user, loginId, generation)),
    lastForcedSecondsAgo: (user) =>
      statement('lastForced', () => database.lastForcedSecondsAgo(user)),
    findUndecided: (page) => statement('findUndecided', () => database.findUndecided(page)),
    rearm: (request, armedAt) =>
      statement('rearm', () => {
        witness.note(life, `arms ${request.user} again at generation ${request.generation}`)
        return database.rearm(request, armedAt)
      }),
    touch: (users) => statement('touch', () => database.touch(users)),
  }
  /** The server that this process has met last. */
  let metOn: number | undefined
  async function announce<T>(name: string, apply: () => T): Promise<T> {
    const [result, server] = await statement(name, () => [apply(), database.startedAtMs] as const)
    metOn = server
    return result
  }

  const replicas: Pick<ReplicaStore, 'now' | 'heartbeat' | 'spoolDrained' | 'restored'> = {
    restored: (replica, boot, server) =>
      statement('restored', () => {
        witness.note(life, 'has brought back what it holds')
        database.restored(replica, boot, server)
      }),
    heartbeat: (replica, boot, holds) =>
      announce('heartbeat', () => database.heartbeat(replica, boot, holds, metOn)),
    now: () => statement('now', () => database.now()),
    spoolDrained: (replica, boot, asOf) =>
      announce('spoolDrained', () => {
        witness.note(life, 'spool drained')
        database.spoolDrained(replica, boot, asOf, metOn)
      }),
  }
  const revocations: RevocationStore = {
    add: (revocation) => statement('add', () => database.addRevocation(revocation)),
    take: (limit, leaseSeconds) =>
      statement('take', () => database.takeRevocations(limit, leaseSeconds)),
    done: (id) => statement('done', () => database.revocationDone(id)),
    retryLater: (id, delaySeconds) =>
      statement('retryLater', () => database.retryRevocationLater(id, delaySeconds)),
  }
  return { grants: grants as GrantStore, replicas: replicas as ReplicaStore, revocations }
}

function databaseAway(isUnwritten: boolean): BrokerError {
  return new BrokerError(
    'temporarily_unavailable',
    'The database cannot be reached.',
    { retryAfterSeconds: 2 },
    { isUnwritten },
  )
}
