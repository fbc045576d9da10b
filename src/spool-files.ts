// The files of the spool. An entry is a line of JSON. One that is written alone has a file of its own, with the name of its
// attempt; those that come together have one together. A name ends with what its file holds, and nothing else is looked at.

import { randomUUID } from 'node:crypto'
import { constants } from 'node:fs'
import {
  chmod,
  type FileHandle,
  link,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { Successor } from './grant-stores.ts'
import type { Log } from './ports.ts'
import { isAttemptId, parseEntry } from './spool-entry.ts'

export const ENTRY_SUFFIX = '.json'
const ENTRIES_SUFFIX = '.jsonl'
const TEMPORARY_SUFFIX = '.tmp'
const UNREADABLE_SUFFIX = '.unreadable'

/** A temporary file lives for milliseconds; one this old was left by a process that died. */
const LEFTOVER_AGE_MS = 60_000

/** A new file, whose content is on the disk when a write returns, as after fdatasync; that would be one more call. */
const WRITE_DURABLY = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_DSYNC

/** An entry as it is written. */
export interface SpoolLine {
  attemptId: string
  text: string
}

/**
 * Puts entries in their place. Returns the file, and what makes its name durable too: they are kept when that has ended.
 * Each call waits for its turn on a busy machine, so there are no more in a row than there must be.
 */
export async function place(
  root: string,
  batch: readonly SpoolLine[],
): Promise<{ file: string; syncDirectory: () => Promise<void> }> {
  const [first] = batch
  const file =
    batch.length === 1 ? `${first?.attemptId}${ENTRY_SUFFIX}` : randomUUID() + ENTRIES_SUFFIX
  const opening = open(root, 'r')
  // It is awaited below, unless something else fails first.
  opening.catch(() => undefined)
  const temporary = join(root, temporaryName())
  try {
    const handle = await open(temporary, WRITE_DURABLY, 0o600)
    try {
      await handle.writeFile(batch.map(({ text }) => text).join('\n'))
    } catch (error) {
      await handle.close()
      throw error
    }
    await Promise.all([handle.close(), rename(temporary, join(root, file))])
  } catch (error) {
    await rm(temporary).catch(() => undefined)
    close(await opening.catch(() => undefined))
    throw error
  }
  return {
    file,
    async syncDirectory() {
      const directory = await opening
      try {
        await directory.sync()
      } finally {
        close(directory)
      }
    },
  }
}

/** Nobody waits for it: what was to become durable is so by now, or has failed. */
function close(handle: FileHandle | undefined): void {
  handle?.close().catch(() => undefined)
}

/**
 * Makes the directory where it is missing, and closes it to others.
 * @throws the file system's error when it cannot be made
 */
export async function makeDirectory(root: string, log: Log): Promise<void> {
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

/** Removes what processes left that died while they wrote. */
export async function removeLeftovers(root: string): Promise<void> {
  const olderThanMs = Date.now() - LEFTOVER_AGE_MS
  for (const name of await readdir(root)) {
    if (!name.endsWith(TEMPORARY_SUFFIX)) continue
    const path = join(root, name)
    const found = await stat(path).catch(() => undefined)
    if (found !== undefined && found.mtimeMs < olderThanMs) await rm(path, { force: true })
  }
}

/** The names of the files that hold entries. */
export async function entryFiles(root: string): Promise<string[]> {
  return (await readdir(root)).filter((name) =>
    [ENTRY_SUFFIX, ENTRIES_SUFFIX].some(
      (suffix) => name.endsWith(suffix) && isAttemptId(name.slice(0, -suffix.length)),
    ),
  )
}

/** @throws the file system's error when nothing can be written, or no name of it made durable */
export async function probe(root: string): Promise<void> {
  const path = join(root, temporaryName())
  try {
    await writeDurably(path, 'probe')
    await syncDirectory(root)
  } finally {
    await rm(path, { force: true })
  }
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

export interface EntryFile {
  /** By attempt id. */
  entries: ReadonlyMap<string, Successor>
  /** Something stands there besides that is no entry, and could not be set aside. */
  holdsMore: boolean
}

/**
 * Reads a file, or `only` one entry of it; undefined when there are none. What is no entry is set aside, so that it stands in
 * nobody's way and is not lost either.
 * @throws the file system's error when it cannot be read just now, and may be sound
 */
export async function readEntries(
  root: string,
  file: string,
  log: Log,
  only?: string,
): Promise<EntryFile | undefined> {
  const entries = new Map<string, Successor>()
  const sound: string[] = []
  let fault: unknown
  try {
    const text = await readFile(join(root, file), 'utf8')
    for (const line of file.endsWith(ENTRIES_SUFFIX) ? text.split('\n') : [text]) {
      if (only !== undefined && !line.includes(only)) {
        sound.push(line)
        continue
      }
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
