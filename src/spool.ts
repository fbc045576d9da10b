// The spool: sealed token answers on their way into the database, durable in files of this replica.
// What `write` has confirmed survives a kill and a power cut, and `list` brings it back. Nothing in clear is written.
// When an entry is applied, and when it may go, is decided by whoever writes and removes it, not here.
// A file goes with the last of its entries; so those that went before it come back after a restart, and are found applied
// again.

import { rm } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { entryText, isAttemptId } from './spool-entry.ts'
import {
  entryFiles,
  isNamedOpen,
  makeDirectory,
  newFileName,
  openFile,
  probe,
  removeLeftovers,
  type SpoolFile,
  takeOver,
} from './spool-files.ts'
import { createHoldings } from './spool-holdings.ts'
import { type EntryFile, readEntries, readOpenEntries } from './spool-reading.ts'
import type { Log, Spool } from './ports.ts'
import type { Successor } from './grant-stores.ts'

/** 20 refreshes at once, 0.2 s each, kept for 900 s: 90,000. More means that nothing drains any longer. */
const ENTRIES_MAX = 100_000
/** Above this part of it the spool reports itself as not writable, so that what is in flight still finds room. */
const NEARLY_FULL = 0.95
/** Entries that are written together at most. */
const BATCH_MAX = 100
/** Entries in a file, about. What is done with stays until the last of them is, and a restart finds it once more. */
const FILE_ENTRIES_MAX = 1_000
/** So long a file is written to, from its first entry on: what was done with an hour ago shall not come back. */
const FILE_AGE_MAX_MS = 600_000

interface Pending {
  attemptId: string
  text: string
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
  { entriesMax = ENTRIES_MAX, fileAgeMaxMs = FILE_AGE_MAX_MS } = {},
): Promise<Spool> {
  const root = resolve(directory)
  await makeDirectory(root, log)
  await removeLeftovers(root)
  /** The entries on disk: for the limit, and for what is to be removed, without reading the directory each time. */
  const held = createHoldings()
  for (const name of await entryFiles(root)) held.addUnread(name)
  /** Entries that wait for those that are being written. */
  let waiting: Pending[] = []
  let isWriting = false
  /** The file that is written to. */
  let current: SpoolFile | undefined
  let opening: Promise<SpoolFile> | undefined
  /** Its name, from before it is there: all other files of such names are another process's. */
  let openName: string | undefined

  const hasRoom = (): boolean => held.size() < entriesMax * NEARLY_FULL

  function assertRoom(isRoom: boolean): void {
    if (isRoom) return
    throw Object.assign(new Error('The spool is full.'), { code: 'SPOOL_FULL' })
  }

  /** Opens a file to write to, unless one is being opened. */
  function open(): Promise<SpoolFile> {
    if (opening !== undefined) return opening
    openName = newFileName()
    opening = openFile(root, openName)
      .then((file) => (current = file))
      .catch((error: unknown) => {
        openName = undefined
        throw error
      })
      .finally(() => (opening = undefined))
    return opening
  }

  /** Opens it beforehand, so that the next entry need not wait for that; it is told so if that fails once more. */
  async function openAhead(): Promise<void> {
    if (current === undefined) await open().catch(() => undefined)
  }

  /** Ends writing to the file, which is removed when nothing was written to it. */
  async function leave(file: SpoolFile): Promise<void> {
    current = undefined
    openName = undefined
    await file.close().catch(() => undefined)
    if (file.lines() === 0) await rm(join(root, file.name)).catch(() => undefined)
  }

  /**
   * Entries that come while others are written are written together after them: what makes them durable costs as much for
   * many as for one, and the process wakes once for all. Until then an answer is lost with the process, so it waits for
   * nothing else.
   */
  async function writeBatches(): Promise<void> {
    isWriting = true
    while (waiting.length > 0) {
      const batch = waiting.slice(0, BATCH_MAX)
      waiting = waiting.slice(BATCH_MAX)
      await writeBatch(batch)
    }
    isWriting = false
  }

  async function writeBatch(batch: readonly Pending[]): Promise<void> {
    let file: SpoolFile | undefined
    try {
      file = current ?? (await open())
      if (!(await file.append(batch.map(({ text }) => text)))) {
        await leave(file)
        return await writeBatch(batch)
      }
    } catch (error) {
      if (file !== undefined) await leave(file)
      const [only] = batch
      // Where the file has come to an end, a new one has not; where there is no room for all, there may be for some.
      if (file !== undefined && file.lines() > 0) await writeBatch(batch)
      else if (batch.length === 1) only?.reject(error)
      else for (const entry of batch) await writeBatch([entry])
      return
    }
    const emptied = held.add(
      file.name,
      batch.map(({ attemptId }) => attemptId),
    )
    for (const entry of batch) entry.resolve()
    // What was in them stands in another file now.
    for (const one of emptied) await rm(join(root, one)).catch(() => undefined)
    if (file.lines() < FILE_ENTRIES_MAX && file.ageMs() < fileAgeMaxMs) return
    await leave(file)
    void openAhead()
  }

  /** Removes a file that nothing is left in. */
  async function removeFile(name: string): Promise<void> {
    if (name === current?.name) {
      // What is being written will stand in it.
      if (isWriting) return
      await leave(current)
      void openAhead()
    }
    await rm(join(root, name), { force: true })
  }

  /** Reads the file, and takes note of what stands in it. Returns its name from now on. */
  async function readFile(found: string): Promise<{ name: string; read: EntryFile | undefined }> {
    if (found === openName) return readOpenFile(found)
    const name = await closedNameOf(found)
    const known = held.entriesOf(name)
    const read = await readEntries(root, name, log)
    held.mark(name, read?.holdsMore ?? false)
    forgetMissing(name, known, read)
    // A file of another process, or of one that has died.
    if (known === undefined) {
      const ids = [...(read?.entries.keys() ?? [])]
      held.add(
        name,
        ids.filter((attemptId) => !held.has(attemptId)),
      )
      if (read?.entries.size === 0) await rm(join(root, name), { force: true })
    }
    if (read?.holdsMore !== true && held.entriesOf(name)?.length === 0) held.removeFile(name)
    return { name, read }
  }

  /** Reads the file that is written to. What was written since it was read is not missing. */
  async function readOpenFile(
    name: string,
  ): Promise<{ name: string; read: EntryFile | undefined }> {
    const known = held.entriesOf(name)
    const read = await readOpenEntries(root, name)
    if (read?.holdsMore === true) held.mark(name, true)
    forgetMissing(name, known, read)
    if (read?.holdsMore !== true && held.entriesOf(name)?.length === 0) held.removeFile(name)
    // What is no entry is set aside when nothing is added to the file any more.
    if (read?.holdsMore === true && name === current?.name && !isWriting) {
      await leave(current)
      void openAhead()
    }
    return { name, read }
  }

  /** The name under which nobody adds to the file. */
  async function closedNameOf(found: string): Promise<string> {
    if (!isNamedOpen(found) || held.isKnown(found)) return found
    const name = await takeOver(root, found)
    held.removeFile(found)
    if (!held.isKnown(name)) held.addUnread(name)
    return name
  }

  function forgetMissing(
    name: string,
    known: readonly string[] | undefined,
    read: EntryFile | undefined,
  ): void {
    for (const attemptId of known ?? []) {
      if (read?.entries.has(attemptId) !== true) held.forget(attemptId, name)
    }
  }

  await openAhead()
  return {
    async write(successor) {
      const { attemptId } = successor
      const text = entryText(successor)
      assertRoom(held.has(attemptId) || held.size() < entriesMax)
      await new Promise<void>((resolve, reject) => {
        waiting.push({ attemptId, text, resolve, reject })
        if (!isWriting) void writeBatches()
      })
    },

    // The directory is not synced: an entry that comes back after a restart is found applied and removed again.
    async remove(attemptId) {
      if (!isAttemptId(attemptId)) throw new TypeError('An attempt id is a UUID in lower case.')
      const name = held.fileOf(attemptId)
      if (name === undefined) return
      if (held.isLastOf(name)) await removeFile(name)
      held.remove(attemptId)
    },

    async list() {
      const entries = new Map<string, Successor>()
      const failures: unknown[] = []
      // Files that are known and have gone are forgotten as well.
      for (const found of new Set([...held.files(), ...(await entryFiles(root))])) {
        try {
          const { name, read } = await readFile(found)
          // What has been removed may still stand beside others, and what was written again in two files.
          for (const [attemptId, entry] of read?.entries ?? []) {
            if (held.fileOf(attemptId) === name) entries.set(attemptId, entry)
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

    isEmpty: () => held.isEmpty(),
    hasRoom,

    async checkWritable() {
      assertRoom(hasRoom())
      await probe(root)
    },
  }
}
