// The files of the spool, and how one is written. A line is an entry in JSON. Lines are added to a file for as long as it is
// named as open; whoever finds one that another process has opened closes it by giving it another name, and then it
// holds what it holds: the process that opened it, should it still live, takes to a new one. So none writes where another
// reads, and no lock is needed that a process could die with.

import { randomUUID } from 'node:crypto'
import {
  close as closeWithCallback,
  constants,
  fsync,
  ftruncate,
  open as openWithCallback,
  write,
} from 'node:fs'
import { chmod, mkdir, readdir, rename, rm, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import type { Log } from './ports.ts'
import { isAttemptId } from './spool-entry.ts'

const OPEN_SUFFIX = '.open.jsonl'
const CLOSED_SUFFIX = '.jsonl'
/** Of a file with one entry, as releases before wrote them. */
const SINGLE_SUFFIX = '.json'
const TEMPORARY_SUFFIX = '.tmp'

/** A temporary file lives for milliseconds; one this old was left by a process that died. */
const LEFTOVER_AGE_MS = 60_000

/** A new file, whose content is on the disk when a write returns, as after fdatasync; that would be one more call. */
const WRITE_DURABLY = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_DSYNC

// Descriptors and no handles, which Node would close for us when it collects them, and complain.
const openDescriptor = promisify(openWithCallback)
const closeDescriptor = promisify(closeWithCallback)
const syncDescriptor = promisify(fsync)
const truncateDescriptor = promisify(ftruncate)
const writeDescriptor = promisify(write)

/** A file that entries are added to, one call at a time. */
export interface SpoolFile {
  readonly name: string
  /** How many were added. */
  lines(): number
  /** Since the first of them. */
  ageMs(): number
  /**
   * Adds entries, which are durable when it resolves with true. With false another process has taken the file over, or
   * somebody has removed it, and they may not be in it.
   * @throws the file system's error; the file is then to be closed
   */
  append(texts: readonly string[]): Promise<boolean>
  close(): Promise<void>
}

/** A name for `openFile`: known before the file is there, so that who made it can tell it from another's. */
export function newFileName(): string {
  return randomUUID() + OPEN_SUFFIX
}

/**
 * Begins a file. Its name is durable when it resolves, so that each entry need only wait for one write.
 * @throws the file system's error; nothing is left of it then
 */
export async function openFile(root: string, name: string): Promise<SpoolFile> {
  const path = join(root, name)
  const descriptor = await openDescriptor(path, WRITE_DURABLY | constants.O_APPEND, 0o600)
  const close = (): Promise<void> => closeDescriptor(descriptor)
  try {
    await syncDirectory(root)
  } catch (error) {
    await close()
    await rm(path, { force: true })
    throw error
  }
  let lines = 0
  let lengthBytes = 0
  let firstAtMs: number | undefined
  return {
    name,
    lines: () => lines,
    ageMs: () => performance.now() - (firstAtMs ?? performance.now()),
    async append(texts) {
      const bytes = Buffer.from(texts.map((text) => `${text}\n`).join(''))
      try {
        await writeAll(descriptor, bytes)
      } catch (error) {
        // What stands there of them was confirmed to nobody, and must not be taken for damage.
        await truncateDescriptor(descriptor, lengthBytes).catch(() => undefined)
        throw error
      }
      // Whoever takes it over gives it another name before he reads it: if this one is still there, he reads them too.
      if (!(await exists(path))) return false
      lengthBytes += bytes.length
      lines += texts.length
      firstAtMs ??= performance.now()
      return true
    },
    close,
  }
}

async function writeAll(descriptor: number, bytes: Buffer): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    written += (await writeDescriptor(descriptor, bytes, written)).bytesWritten
  }
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false
    throw error
  }
}

/** Whether somebody adds to the file, or died before he closed it. */
export function isNamedOpen(name: string): boolean {
  return name.endsWith(OPEN_SUFFIX)
}

/**
 * Takes over a file that another process has opened. Returns its name from now on, under which nothing is added to it.
 * @throws the file system's error
 */
export async function takeOver(root: string, name: string): Promise<string> {
  const closed = name.slice(0, -OPEN_SUFFIX.length) + CLOSED_SUFFIX
  try {
    await rename(join(root, name), join(root, closed))
  } catch (error) {
    // Somebody else may have done so a moment ago; if it has gone, reading it will tell.
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  }
  return closed
}

/** The names of the files that hold entries. */
export async function entryFiles(root: string): Promise<string[]> {
  return (await readdir(root)).filter((name) =>
    [OPEN_SUFFIX, CLOSED_SUFFIX, SINGLE_SUFFIX].some(
      (suffix) => name.endsWith(suffix) && isAttemptId(name.slice(0, -suffix.length)),
    ),
  )
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

/** @throws the file system's error when nothing can be written */
export async function probe(root: string): Promise<void> {
  await rm(await writeTemporary(root, 'probe'), { force: true })
}

/**
 * Creates a file that is nothing yet, and resolves with its path when its content is on the disk.
 * @throws the file system's error; nothing is left of it then
 */
export async function writeTemporary(root: string, text: string): Promise<string> {
  const path = join(root, `.${randomUUID()}${TEMPORARY_SUFFIX}`)
  const descriptor = await openDescriptor(path, WRITE_DURABLY, 0o600)
  try {
    await writeAll(descriptor, Buffer.from(text))
    return path
  } catch (error) {
    await rm(path, { force: true })
    throw error
  } finally {
    await closeDescriptor(descriptor)
  }
}

/** Makes what was named anew in the directory durable under its name. */
export async function syncDirectory(path: string): Promise<void> {
  const descriptor = await openDescriptor(path, constants.O_RDONLY)
  try {
    await syncDescriptor(descriptor)
  } finally {
    await closeDescriptor(descriptor)
  }
}
