// The spool: sealed token answers on their way into the database, durable in files of this replica.
// What `write` has confirmed survives a kill and a power cut; `list` and `read` bring it back. Nothing in clear is written.
// When an entry is applied, and when it may go, is decided by whoever writes and removes it, not here.
// A file with several entries goes with the last of them; so those that went before it come back after a restart, and are
// found applied again.

import { rm } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { entryText, isAttemptId, successorIdOf } from './spool-entry.ts'
import {
  ENTRY_SUFFIX,
  type EntryFile,
  entryFiles,
  makeDirectory,
  place,
  probe,
  readEntries,
  removeLeftovers,
  type SpoolLine,
} from './spool-files.ts'
import { createHoldings } from './spool-holdings.ts'
import type { Log, Spool } from './ports.ts'
import type { SuccessorId } from './grant-stores.ts'

/** An entry takes a block of 4 kB as a rule. Each login that was refreshed in the last 15 minutes has one, and what is not applied. */
const ENTRIES_MAX = 100_000
/** Above this part of it applied entries go before their time, so that it fills up only with what is not applied. */
const CROWDED = 0.9
/** Above this part of it the spool reports itself as not writable, so that what is in flight still finds room. */
const NEARLY_FULL = 0.95
/** Entries that are written together at most. */
const BATCH_MAX = 100
/**
 * What waits for a batch to end is lost with the process: so it waits this long at most while a second batch may be begun. A
 * sound disk is quicker, and what gathers meanwhile takes one file of several.
 */
const BATCH_PATIENCE_MS = 25
/** Batches at a time. */
const BATCHES_MAX = 2

const NONE: ReadonlySet<string> = new Set()

interface Pending extends SpoolLine {
  resolve: () => void
  reject: (error: unknown) => void
}

/**
 * Opens the spool in a directory, which is made when missing and closed to other users.
 *
 * All calls may run at once. The directory belongs to one replica; it is on a disk that honours fsync.
 *
 * @throws the file system's error when the directory cannot be made or read
 */
export async function createSpool(
  directory: string,
  log: Log,
  entriesMax = ENTRIES_MAX,
): Promise<Spool & { size(): number }> {
  const root = resolve(directory)
  await makeDirectory(root, log)
  await removeLeftovers(root)
  /** The entries on disk: for the limit, and for what is to be removed, without reading the directory each time. */
  const held = createHoldings()
  for (const name of await entryFiles(root)) {
    if (name.endsWith(ENTRY_SUFFIX)) held.add(name, [name.slice(0, -ENTRY_SUFFIX.length)])
    else held.addUnread(name)
  }
  /** Entries that wait for a batch to end. */
  let waiting: Pending[] = []
  let batches = 0
  /** Of these, those that take long. */
  let slow = 0

  const hasRoom = (): boolean => held.size() < entriesMax * NEARLY_FULL

  function assertRoom(isRoom: boolean): void {
    if (isRoom) return
    throw Object.assign(new Error('The spool is full.'), { code: 'SPOOL_FULL' })
  }

  /**
   * Entries that come while others are written are written together after them, into one file: what makes them durable
   * costs as much for many as for one, and the process wakes once for all.
   */
  async function writeBatches(): Promise<void> {
    batches += 1
    while (waiting.length > 0) {
      const batch = waiting.slice(0, BATCH_MAX)
      waiting = waiting.slice(BATCH_MAX)
      let isSlow = false
      const patience = setTimeout(() => {
        isSlow = true
        slow += 1
        beginBatches()
      }, BATCH_PATIENCE_MS)
      await writeBatch(batch)
      clearTimeout(patience)
      if (isSlow) slow -= 1
    }
    batches -= 1
  }

  function beginBatches(): void {
    if (waiting.length > 0 && batches === slow && batches < BATCHES_MAX) void writeBatches()
  }

  async function writeBatch(batch: readonly Pending[]): Promise<void> {
    const placed = await place(root, batch).catch(async (error: unknown) => {
      const [only] = batch
      if (batch.length === 1) only?.reject(error)
      // Where there is no room for the file of all, there may be for some.
      else await Promise.all(batch.map((entry) => writeBatch([entry])))
    })
    if (placed === undefined) return
    const emptied = held.add(
      placed.file,
      batch.map(({ attemptId }) => attemptId),
    )
    try {
      await placed.syncDirectory()
      for (const entry of batch) entry.resolve()
      // What was in them stands in another file now.
      for (const one of emptied) await rm(join(root, one)).catch(() => undefined)
    } catch (error) {
      for (const entry of batch) entry.reject(error)
    }
  }

  /** Takes note of what has been read of a file; false when nothing is known to stand there. */
  function noteRead(name: string, read: EntryFile | undefined, wasKnown: boolean): boolean {
    if (read === undefined) return false
    held.mark(name, read.holdsMore)
    // Removed meanwhile, or written.
    if (wasKnown !== held.isKnown(name)) return true
    if (wasKnown && (held.keepOnly(name, read.entries) || read.holdsMore)) return true
    const found = [...read.entries.keys()].filter((attemptId) => !held.has(attemptId))
    if (found.length === 0) return false
    held.add(name, found)
    return true
  }

  return {
    async write(successor) {
      const { attemptId } = successor
      const text = entryText(successor)
      assertRoom(held.has(attemptId) || held.size() < entriesMax)
      await new Promise<void>((resolve, reject) => {
        waiting.push({ attemptId, text, resolve, reject })
        beginBatches()
      })
    },

    // The directory is not synced: an entry that comes back after a restart is found applied and removed again.
    async remove(attemptId) {
      // The id becomes a file name, so nothing else may pass.
      if (!isAttemptId(attemptId)) throw new TypeError('An attempt id is a UUID in lower case.')
      const name = held.fileOf(attemptId) ?? attemptId + ENTRY_SUFFIX
      if (held.isLastOf(name)) await rm(join(root, name), { force: true })
      held.remove(attemptId)
    },

    async list(known = NONE) {
      const entries = new Map<string, SuccessorId>()
      const failures: unknown[] = []
      const present = new Set(await entryFiles(root))
      // Files that are known and have gone are forgotten as well.
      for (const name of new Set([...held.files(), ...present])) {
        if (present.has(name) && held.holdsOnly(name, known)) continue
        const wasKnown = held.isKnown(name)
        try {
          const read = await readEntries(root, name, log)
          if (!noteRead(name, read, wasKnown)) held.removeFile(name)
          // What has been removed may still stand beside others, and what was written again in two files.
          for (const [attemptId, entry] of read?.entries ?? []) {
            if (held.fileOf(attemptId) === name) entries.set(attemptId, successorIdOf(entry))
          }
        } catch (error) {
          failures.push(error)
        }
      }
      const [error] = failures
      if (failures.length > 0)
        log.error('spool_entries_not_read', { count: failures.length, error })
      // Of one grant, each follows on the one before.
      return {
        entries: [...entries.values()].toSorted((a, b) => a.generation - b.generation),
        isWhole: failures.length === 0,
      }
    },

    has: (attemptId) => held.has(attemptId),

    async read(attemptId) {
      const name = held.fileOf(attemptId)
      const read = name === undefined ? undefined : await readEntries(root, name, log, attemptId)
      return read?.entries.get(attemptId)
    },

    isEmpty: () => held.isEmpty(),
    size: () => held.size(),
    hasRoom,
    surplus: () => Math.max(0, Math.ceil(held.size() - entriesMax * CROWDED)),

    async checkWritable() {
      assertRoom(hasRoom())
      await probe(root)
    },
  }
}
