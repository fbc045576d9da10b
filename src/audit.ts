// The audit record of this process: events gather in memory and are written in batches, as one chain of rows.
// It is never in the way: `record` neither waits nor throws. What comes faster than rows are worth is counted, not left
// out, and what cannot be kept while PostgreSQL is away for long is told by a row that says how many.

import { AUDIT_ACTIONS, type AuditDetails, type AuditEvent, type AuditRow } from './audit-event.ts'
import { hashOf, NO_HASH } from './audit-chain.ts'
import { printable } from './log.ts'
import type { Ports } from './ports.ts'
import type { Audit } from './record-stores.ts'
import type { ChainKeys } from './seal.ts'

export interface AuditRecord extends Audit {
  /** Writes what was recorded so far; false when PostgreSQL did not take all of it. */
  flush(): Promise<boolean>
  /** Events that are yet to be written, equal ones as one. */
  waiting(): number
  /** Events for which there was no room, so far. */
  dropped(): number
  /** Writes everything, and the last row of the chain. Gives up after some seconds without PostgreSQL. */
  close(): Promise<void>
}

/** Events gather for this long before they are written, or until they fill a statement. */
const GATHER_MS = 250
/** Equal events within this time are two rows at most: the first at once, the others as a count. */
const COUNT_MS = 1_000
/** Rows in one statement: some 90 kB. A text above 128 kB is freed by V8 only when it goes through all memory. */
const BATCH_MAX = 200
/** Rows that wait while PostgreSQL is away, about 500 bytes each. Beyond it what can be counted is counted for longer. */
const WAITING_MAX = 10_000
/** Room above that for events that cannot be counted: logins and the like. */
const WAITING_RESERVE = 10_000
/** Kinds of equal events that are told apart at a time, 100 to 300 bytes each: tokens in use within a second. */
const TALLIES_MAX = 50_000
/** Rows that refusals may take in `COUNT_MS`; the others are counted by caller and action alone. */
const REFUSAL_ROWS_MAX = 20
/** Between two tries while PostgreSQL is away. */
const RETRY_MS = 1_000
/** What is not written by then at the end of the process is lost: PostgreSQL is away. */
const CLOSE_LIMIT_MS = 5_000

interface Waiting {
  event: AuditEvent
  count: number
  /** Monotonic; from it and the database's clock at the writing comes `at`. */
  atMs: number
}

/** Equal events since the last row about them. */
interface Tally {
  event: AuditEvent
  count: number
}

/**
 * Events of one action by one actor, by what tells equal ones. Of one that came once the user alone is kept: most never
 * come again.
 */
type Seen = Map<string, Tally | string>

/** Opens the chain of this boot; its first row is written with the first batch. Any number of calls at once. */
export function createAudit(
  ports: Pick<Ports, 'clock' | 'log' | 'auditEvents'>,
  keys: ChainKeys,
  identity: { replica: string; boot: string },
): AuditRecord {
  const { clock, log, auditEvents } = ports
  let waiting: Waiting[] = []
  const groups = new Map<string, Seen>()
  let tallyCount = 0
  let tallyAtMs = 0
  let refusalRows = 0
  /** Events for which there was no room: those that no row tells of yet, and all of them. */
  let dropped = 0
  let droppedEver = 0
  /** Linked, and given to PostgreSQL until it takes them: the same rows each time. */
  let batch: AuditRow[] = []
  const openedAtMs = clock.monotonicMs()
  let sequence = 0
  let head = NO_HASH
  let isAway = false
  let isRunning = false
  let isClosed = false
  let writing: Promise<boolean> | undefined
  /** Of the rows since the opening of the chain: how many have come to wait, and how many are stored. */
  let enqueued = 0
  let stored = 0

  function record(event: AuditEvent): void {
    if (isClosed) {
      log.error('audit_event_too_late', { reason: event.action })
      return
    }
    switch (AUDIT_ACTIONS[event.action]) {
      case 'single':
        if (waiting.length < WAITING_MAX + WAITING_RESERVE) enqueue(event, 1)
        else drop()
        break
      case 'counted by token':
        count(event, event.details === undefined ? (event.fingerprint ?? '') : keyOf(event))
        break
      case 'counted as a refusal':
        if (refusalRows < REFUSAL_ROWS_MAX) count(event, keyOf(event))
        else count(withoutParticulars(event), '')
    }
    if (!isRunning) void run()
  }

  function drop(): void {
    dropped += 1
    droppedEver += 1
  }

  /** The first of its kind is a row at once; those that follow within the time are added up. */
  function count(event: AuditEvent, key: string): void {
    const { action, actor, name = '', user = '' } = event
    const groupName = `${action} ${actor} ${name}`
    let seen = groups.get(groupName)
    if (seen === undefined) groups.set(groupName, (seen = new Map()))
    const known = seen.get(key)
    if (known === undefined) begin(event, seen, key)
    // One account of Pagero that two users have connected may have one token.
    else if (userOf(known) !== user) count(event, `${key} ${user}`)
    else if (typeof known === 'string') seen.set(key, { event, count: 1 })
    else known.count += 1
  }

  function begin(event: AuditEvent, seen: Seen, key: string): void {
    if (tallyCount >= TALLIES_MAX) {
      if (waiting.length < WAITING_MAX) enqueue(event, 1)
      else drop()
      return
    }
    const hasRoom = waiting.length < WAITING_MAX
    seen.set(key, hasRoom ? (event.user ?? '') : { event, count: 1 })
    tallyCount += 1
    if (!hasRoom) return
    enqueue(event, 1)
    if (AUDIT_ACTIONS[event.action] === 'counted as a refusal') refusalRows += 1
  }

  function enqueue(event: AuditEvent, times: number): void {
    waiting.push({ event, count: times, atMs: clock.monotonicMs() })
    enqueued += 1
    writeIfFull()
  }

  /**
   * Makes a row of every count; what nothing was added to is no longer counted. False when too many rows wait already to
   * make them all.
   */
  function tallyUp(roomFor = WAITING_MAX): boolean {
    let isWhole = true
    refusalRows = 0
    if (dropped > 0 && waiting.length < roomFor) {
      enqueue({ action: 'events_dropped', actor: 'broker', outcome: 'failed' }, dropped)
      dropped = 0
    }
    for (const [groupName, seen] of groups) {
      // Into a new map: to take most of them out of the one that is there costs more.
      const still: Seen = new Map()
      for (const [key, known] of seen) {
        if (typeof known === 'string' || known.count === 0) {
          tallyCount -= 1
          continue
        }
        still.set(key, known)
        if (waiting.length >= roomFor) {
          isWhole = false
          continue
        }
        enqueue(withoutRequest(known.event), known.count)
        known.count = 0
      }
      if (still.size === 0) groups.delete(groupName)
      else groups.set(groupName, still)
    }
    return isWhole && dropped === 0
  }

  async function run(): Promise<void> {
    isRunning = true
    while (waiting.length > 0 || batch.length > 0 || tallyCount > 0 || dropped > 0) {
      await clock.sleep(isAway ? RETRY_MS : GATHER_MS)
      const nowMs = clock.monotonicMs()
      if (nowMs >= tallyAtMs) {
        tallyAtMs = nowMs + COUNT_MS
        tallyUp()
      }
      await writeThrough(enqueued)
    }
    isRunning = false
  }

  /** Writes until so many rows since the opening are stored; false when PostgreSQL is away. */
  async function writeThrough(rows: number): Promise<boolean> {
    for (;;) {
      if (stored >= rows) return true
      if (!(await write())) return false
    }
  }

  function writeIfFull(): void {
    if (waiting.length >= BATCH_MAX && !isAway) void write()
  }

  /** Writes a batch, or joins the one that is being written; false when PostgreSQL is away. */
  function write(): Promise<boolean> {
    writing ??= writeBatch().finally(() => {
      writing = undefined
      writeIfFull()
    })
    return writing
  }

  async function writeBatch(): Promise<boolean> {
    try {
      if (batch.length === 0) {
        const now = await auditEvents.now()
        batch = link(waiting.slice(0, BATCH_MAX), now)
        waiting = waiting.slice(BATCH_MAX)
      }
      await auditEvents.append(batch)
      batch = []
      // Nothing is dropped of what has come to wait.
      stored = enqueued - waiting.length
      if (isAway) log.info('audit_resumed')
      isAway = false
      return true
    } catch (error) {
      if (!isAway) log.error('audit_not_written', { count: waiting.length + batch.length, error })
      isAway = true
      return false
    }
  }

  function link(events: readonly Waiting[], now: Date): AuditRow[] {
    const nowMs = clock.monotonicMs()
    const rows: AuditRow[] = []
    if (sequence === 0) rows.push(linked({ event: OPENED, count: 1, atMs: openedAtMs }, now, nowMs))
    for (const one of events) rows.push(linked(one, now, nowMs))
    return rows
  }

  function linked({ event, count: times, atMs }: Waiting, now: Date, nowMs: number): AuditRow {
    const row = {
      chainId: identity.boot,
      sequence,
      at: new Date(now.getTime() - (nowMs - atMs)),
      replica: identity.replica,
      actorKind: event.actor,
      actorName: event.name === undefined ? null : printable(event.name),
      action: event.action,
      user: event.user ?? null,
      outcome: event.outcome ?? 'succeeded',
      requestId: event.requestId === undefined ? null : printable(event.requestId),
      fingerprint: event.fingerprint ?? null,
      count: times,
      details: event.details === undefined ? NO_DETAILS : printableDetails(event.details),
      keyId: keys.primaryKeyId,
      previousHash: head,
    }
    const hash = hashOf(keys, row) as Buffer
    sequence += 1
    head = hash
    return { ...row, hash }
  }

  return {
    record,
    waiting: () => waiting.length + batch.length,
    dropped: () => droppedEver,
    async flush() {
      let isWhole: boolean
      do {
        isWhole = tallyUp()
        if (!(await writeThrough(enqueued))) return false
      } while (!isWhole)
      return true
    },
    async close() {
      const givenUpAtMs = clock.monotonicMs() + CLOSE_LIMIT_MS
      isClosed = true
      tallyUp(Infinity)
      enqueue(CLOSED, 1)
      while (!(await writeThrough(enqueued))) {
        if (clock.monotonicMs() >= givenUpAtMs) {
          log.error('audit_events_lost', { count: waiting.length + batch.length })
          return
        }
        await clock.sleep(RETRY_MS)
      }
    },
  }
}

const NO_DETAILS: AuditDetails = {}

const OPENED: AuditEvent = { action: 'chain_opened', actor: 'broker' }
const CLOSED: AuditEvent = { action: 'chain_closed', actor: 'broker' }

function userOf(seen: Tally | string): string {
  return typeof seen === 'string' ? seen : (seen.event.user ?? '')
}

/** What sets apart events of one action that are not the same. */
function keyOf({ actor, user, fingerprint, outcome, details }: AuditEvent): string {
  return JSON.stringify([actor, user, fingerprint, outcome, details])
}

/** A row that counts several requests names none of them. */
function withoutRequest(event: AuditEvent): AuditEvent {
  const { requestId, ...others } = event
  return requestId === undefined ? event : others
}

/** As much of a refusal as is kept in a flood of them. */
function withoutParticulars({ action, actor, name, outcome }: AuditEvent): AuditEvent {
  return {
    action,
    actor,
    ...(name === undefined ? {} : { name }),
    ...(outcome === undefined ? {} : { outcome }),
  }
}

/** The members that have a value, their texts made plain and cut to length. */
function printableDetails(details: AuditDetails): AuditDetails {
  const entries = Object.entries(details).filter(([, value]) => value !== undefined)
  return Object.fromEntries(entries.map(([name, value]) => [name, printableValue(value)]))
}

function printableValue(value: unknown): unknown {
  if (typeof value === 'string') return printable(value)
  return Array.isArray(value) ? value.map(printableValue) : value
}
