// The spool: sealed token answers on their way into the database, durable in files of this replica.
// What `write` has confirmed survives a kill and a power cut, and `list` brings it back. Nothing in clear is written.
// When an entry is applied, and when it may go, is decided by whoever writes and removes it, not here.

import { randomUUID } from 'node:crypto'
import { constants } from 'node:fs'
import { chmod, mkdir, open, readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { entryText, isAttemptId, parseEntry } from './spool-entry.ts'
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

const ENTRY_SUFFIX = '.json'
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
  /** Ids of the entries on disk: for the limit, without reading the directory at every write. */
  const present = new Set(await entryIds(root))
  /** Entries that wait for the batch under way. */
  let waiting: Pending[] = []
  let isWriting = false

  const hasRoom = (): boolean => present.size < entriesMax * NEARLY_FULL

  function assertRoom(isRoom: boolean): void {
    if (isRoom) return
    throw Object.assign(new Error('The spool is full.'), { code: 'SPOOL_FULL' })
  }

  /**
   * Entries that come while others are written are written together after them: one fsync of the directory then makes
   * all of their renames durable, and the process wakes for many at a time.
   */
  async function writeBatches(): Promise<void> {
    isWriting = true
    while (waiting.length > 0) {
      const batch = waiting
      waiting = []
      const placed = await Promise.all(batch.map((entry) => place(root, entry)))
      for (const entry of placed) if (entry !== undefined) present.add(entry.attemptId)
      try {
        await syncDirectory(root)
        for (const entry of placed) entry?.resolve()
      } catch (error) {
        for (const entry of placed) entry?.reject(error)
      }
    }
    isWriting = false
  }

  return {
    async write(successor) {
      const { attemptId } = successor
      const text = entryText(successor)
      assertRoom(present.has(attemptId) || present.size < entriesMax)
      await new Promise<void>((resolve, reject) => {
        waiting.push({ attemptId, text, resolve, reject })
        if (!isWriting) void writeBatches()
      })
    },

    // The directory is not synced: an entry that comes back after a power cut is found applied and removed again.
    async remove(attemptId) {
      // The id becomes a file name, so nothing else may pass.
      if (!isAttemptId(attemptId)) throw new TypeError('An attempt id is a UUID in lower case.')
      await rm(join(root, attemptId + ENTRY_SUFFIX), { force: true })
      present.delete(attemptId)
    },

    async list() {
      const entries: Successor[] = []
      const failures: unknown[] = []
      for (const attemptId of await entryIds(root)) {
        try {
          const entry = await readEntry(root, attemptId, log)
          if (entry === undefined) present.delete(attemptId)
          else entries.push(entry)
        } catch (error) {
          failures.push(error)
        }
      }
      const [error] = failures
      if (failures.length > 0)
        log.error('spool_entries_not_read', { count: failures.length, error })
      // Of one grant, each follows on the one before.
      return {
        entries: entries.toSorted((a, b) => a.generation - b.generation),
        isWhole: failures.length === 0,
      }
    },

    isEmpty: () => present.size === 0,
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

/** Puts an entry in its place, durable but for the directory; undefined when that failed, and its writer knows. */
async function place(root: string, entry: Pending): Promise<Pending | undefined> {
  const temporary = join(root, temporaryName())
  try {
    await writeDurably(temporary, entry.text)
    await rename(temporary, join(root, entry.attemptId + ENTRY_SUFFIX))
    return entry
  } catch (error) {
    await rm(temporary).catch(() => undefined)
    entry.reject(error)
    return undefined
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

async function entryIds(root: string): Promise<string[]> {
  return (await readdir(root))
    .filter((name) => name.endsWith(ENTRY_SUFFIX))
    .map((name) => name.slice(0, -ENTRY_SUFFIX.length))
    .filter(isAttemptId)
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

/**
 * Reads one entry; sets it aside when it is none, so that it stands in nobody's way and is not lost either.
 * @throws the file system's error when it cannot be read just now, and may be sound
 */
async function readEntry(
  root: string,
  attemptId: string,
  log: Log,
): Promise<Successor | undefined> {
  const path = join(root, attemptId + ENTRY_SUFFIX)
  try {
    const entry = parseEntry(await readFile(path, 'utf8'))
    if (entry.attemptId !== attemptId) throw new TypeError('The entry has the name of another.')
    return entry
  } catch (error) {
    // Node's errors of the file system have a code; those of reading the text have none.
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT') return undefined
    // The machine is short of something, the disk is at fault, the file is another user's: it may hold the only token there
    // is, so it stays where it is.
    if (code !== undefined && code !== 'EISDIR') throw error
    log.error('spool_entry_unreadable', { attemptId, path: path + UNREADABLE_SUFFIX, error })
    // Where it cannot be renamed either, it is reported again the next time; the others are still listed.
    await rename(path, path + UNREADABLE_SUFFIX).catch(() => undefined)
    return undefined
  }
}

function temporaryName(): string {
  return `.${randomUUID()}${TEMPORARY_SUFFIX}`
}
