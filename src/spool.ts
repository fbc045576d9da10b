// The spool: sealed token answers on their way into the database, durable in files of this replica.
// What `write` has confirmed survives a kill and a power cut, and `list` brings it back. Nothing in clear is written.
// When an entry is applied, and when it may go, is decided by whoever writes and removes it, not here.
// An entry is a line of JSON. One that is written alone has a file of its own, those that come together have one together,
// which goes with the last of them; so those that went before it come back after a restart, and are found applied again.

import { randomUUID } from 'node:crypto'
import { constants } from 'node:fs'
import { chmod, link, mkdir, open, readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { entryText, isAttemptId, parseEntry } from './spool-entry.ts'
import { createHoldings } from './spool-holdings.ts'
import type { Log, Spool } from './ports.ts'
import type { Successor } from './grant-stores.ts'

/** 20 refreshes at once, 0.2 s each, kept for 900 s: 90,000. More means that nothing drains any longer. */
const ENTRIES_MAX = 100_000
/** Above this part of it the spool reports itself as not writable, so that what is in flight still finds room. */
const NEARLY_FULL = 0.95
/** A temporary file lives for milliseconds; one this old was left by a process that died. */
const LEFTOVER_AGE_MS = 60_000

/** A new file, whose content is on the disk when a write returns, as after fdatasync; that would be one more call. */
const WRITE_DURABLY = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_DSYNC

/** Entries that are written together at most. */
const BATCH_MAX = 100

const ENTRY_SUFFIX = '.json'
const ENTRIES_SUFFIX = '.jsonl'
const TEMPORARY_SUFFIX = '.tmp'
const UNREADABLE_SUFFIX = '.unreadable'

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
): Promise<Spool> {
  const root = resolve(directory)
  await makeDirectory(root, log)
  await removeLeftovers(root)
  /** The entries on disk: for the limit, and for what is to be removed, without reading the directory each time. */
  const held = createHoldings()
  for (const name of await entryFiles(root)) {
    if (name.endsWith(ENTRY_SUFFIX)) held.add(name, [name.slice(0, -ENTRY_SUFFIX.length)])
    else held.addUnread(name)
  }
  /** Entries that wait for the batch under way. */
  let waiting: Pending[] = []
  let isWriting = false

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
    isWriting = true
    while (waiting.length > 0) {
      const batch = waiting.slice(0, BATCH_MAX)
      waiting = waiting.slice(BATCH_MAX)
      const placed = await placeAll(batch)
      const emptied = placed.flatMap(({ file, attemptId }) => held.add(file, [attemptId]))
      try {
        await syncDirectory(root)
        for (const entry of placed) entry.resolve()
        // What was in them stands in another file now.
        for (const file of emptied) await rm(join(root, file)).catch(() => undefined)
      } catch (error) {
        for (const entry of placed) entry.reject(error)
      }
    }
    isWriting = false
  }

  /** Returns those that are in their place. Where there is no room for the file of all, there may be for some. */
  async function placeAll(batch: readonly Pending[]): Promise<Array<Pending & { file: string }>> {
    try {
      const file = await place(root, batch)
      return batch.map((entry) => ({ ...entry, file }))
    } catch (error) {
      if (batch.length > 1) return (await Promise.all(batch.map((one) => placeAll([one])))).flat()
      for (const entry of batch) entry.reject(error)
      return []
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
        if (!isWriting) void writeBatches()
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

    async list() {
      const entries = new Map<string, Successor>()
      const failures: unknown[] = []
      // Files that are known and have gone are forgotten as well.
      for (const name of new Set([...held.files(), ...(await entryFiles(root))])) {
        const wasKnown = held.isKnown(name)
        try {
          const read = await readEntries(root, name, log)
          if (!noteRead(name, read, wasKnown)) held.removeFile(name)
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
      const probe = join(root, temporaryName())
      try {
        await writeDurably(probe, 'probe')
      } finally {
        await rm(probe, { force: true })
      }
    },
  }
}

interface Pending {
  attemptId: string
  text: string
  resolve: () => void
  reject: (error: unknown) => void
}

/** Puts entries in their place, durable but for the directory, and returns the file. */
async function place(root: string, batch: readonly Pending[]): Promise<string> {
  const temporary = join(root, temporaryName())
  const [first] = batch
  const file =
    batch.length === 1 ? `${first?.attemptId}${ENTRY_SUFFIX}` : randomUUID() + ENTRIES_SUFFIX
  try {
    await writeDurably(temporary, batch.map(({ text }) => text).join('\n'))
    await rename(temporary, join(root, file))
    return file
  } catch (error) {
    await rm(temporary).catch(() => undefined)
    throw error
  }
}

async function makeDirectory(root: string, log: Log): Promise<void> {
  const firstMade = await mkdir(root, { recursive: true, mode: 0o700 })
  if (firstMade !== undefined) {
    // A new directory is only durable when the one above it is synced, up to the first that existed.
    const existing = dirname(firstMade)
    for (let made = root; made !== existing; made = dirname(made))
      await syncDirectory(dirname(made))
    return
  }
  if (((await stat(root)).mode & 0o077) === 0) return
  try {
    await chmod(root, 0o700)
  } catch (error) {
    // A mounted volume may belong to somebody else. Its files are ours alone, and sealed.
    log.warn('spool_directory_not_private', { path: root, error })
  }
}

async function removeLeftovers(root: string): Promise<void> {
  const olderThanMs = Date.now() - LEFTOVER_AGE_MS
  for (const name of await readdir(root)) {
    if (!name.endsWith(TEMPORARY_SUFFIX)) continue
    const path = join(root, name)
    const found = await stat(path).catch(() => undefined)
    if (found !== undefined && found.mtimeMs < olderThanMs) await rm(path, { force: true })
  }
}

async function entryFiles(root: string): Promise<string[]> {
  return (await readdir(root)).filter((name) =>
    [ENTRY_SUFFIX, ENTRIES_SUFFIX].some(
      (suffix) => name.endsWith(suffix) && isAttemptId(name.slice(0, -suffix.length)),
    ),
  )
}

/** Creates the file, and resolves when its content is on the disk. */
async function writeDurably(path: string, text: string): Promise<void> {
  const file = await open(path, WRITE_DURABLY, 0o600)
  try {
    await file.writeFile(text)
  } finally {
    await file.close()
  }
}

/** Makes a rename in the directory durable. */
async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r')
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}

interface EntryFile {
  /** By attempt id. */
  entries: ReadonlyMap<string, Successor>
  /** Something stands there besides that is no entry, and could not be set aside. */
  holdsMore: boolean
}

/**
 * Reads a file; undefined when there are no entries in it. What is no entry is set aside, so that it stands in nobody's way
 * and is not lost either.
 * @throws the file system's error when it cannot be read just now, and may be sound
 */
async function readEntries(root: string, file: string, log: Log): Promise<EntryFile | undefined> {
  const entries = new Map<string, Successor>()
  const sound: string[] = []
  let fault: unknown
  try {
    const text = await readFile(join(root, file), 'utf8')
    for (const line of file.endsWith(ENTRIES_SUFFIX) ? text.split('\n') : [text]) {
      try {
        const entry = parseEntry(line)
        if (file.endsWith(ENTRY_SUFFIX) && file !== entry.attemptId + ENTRY_SUFFIX) {
          throw new TypeError('The entry has the name of another.')
        }
        entries.set(entry.attemptId, entry)
        sound.push(line)
      } catch (error) {
        fault ??= error
      }
    }
    if (fault === undefined) return { entries, holdsMore: false }
  } catch (error) {
    // Node's errors of the file system have a code.
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT') return undefined
    // The machine is short of something, the disk is at fault, the file is another user's: it may hold the only token there
    // is, so it stays where it is.
    if (code !== 'EISDIR') throw error
    fault = error
  }
  const aside = sound.length === 0 ? file : `${file}.${randomUUID()}`
  const path = join(root, aside + UNREADABLE_SUFFIX)
  log.error('spool_entry_unreadable', { path, error: fault })
  try {
    await setAside(root, file, { path, sound })
  } catch {
    // It is reported again the next time; what is sound is still listed.
    return sound.length === 0 ? undefined : { entries, holdsMore: true }
  }
  return sound.length === 0 ? undefined : { entries, holdsMore: false }
}

/** Gives a file another name, having written what is sound in it anew. It needs no room for that but for what is sound. */
async function setAside(
  root: string,
  file: string,
  { path, sound }: { path: string; sound: readonly string[] },
): Promise<void> {
  if (sound.length === 0) return rename(join(root, file), path)
  const temporary = join(root, temporaryName())
  try {
    await writeDurably(temporary, sound.join('\n'))
    await link(join(root, file), path)
    await syncDirectory(root)
    await rename(temporary, join(root, file))
    await syncDirectory(root)
  } catch (error) {
    await rm(temporary).catch(() => undefined)
    throw error
  }
}

function temporaryName(): string {
  return `.${randomUUID()}${TEMPORARY_SUFFIX}`
}
