// Reading a file of the spool. What is no entry is set aside, so that it stands in nobody's way and is not lost either.

import { randomUUID } from 'node:crypto'
import { link, readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { Successor } from './grant-stores.ts'
import type { Log } from './ports.ts'
import { parseEntry } from './spool-entry.ts'
import { syncDirectory, writeTemporary } from './spool-files.ts'

const UNREADABLE_SUFFIX = '.unreadable'

export interface EntryFile {
  /** By attempt id. */
  entries: ReadonlyMap<string, Successor>
  /** Something stands there besides that is no entry, and was not set aside. */
  holdsMore: boolean
}

/**
 * Reads a file that nobody writes to; undefined when it is gone, or was set aside as a whole.
 * @throws the file system's error when it cannot be read just now, and may be sound
 */
export async function readEntries(
  root: string,
  file: string,
  log: Log,
): Promise<EntryFile | undefined> {
  const read = await parseFile(root, file)
  if (read === undefined) return undefined
  const { entries, sound, fault } = read
  if (fault === undefined) return { entries, holdsMore: false }
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

/**
 * Reads a file that this process may be adding to: its last line may be about to be written, and what is no entry stays.
 * Errors as `readEntries`.
 */
export async function readOpenEntries(root: string, file: string): Promise<EntryFile | undefined> {
  const read = await parseFile(root, file, (text) => text.slice(0, text.lastIndexOf('\n') + 1))
  return read && { entries: read.entries, holdsMore: read.fault !== undefined }
}

interface Parsed {
  entries: ReadonlyMap<string, Successor>
  /** The lines that they stand in. */
  sound: readonly string[]
  /** Why something else there is no entry. */
  fault: unknown
}

/** Undefined when there is no such file. */
async function parseFile(
  root: string,
  file: string,
  wholeLinesOf = (text: string) => text,
): Promise<Parsed | undefined> {
  const entries = new Map<string, Successor>()
  const sound: string[] = []
  let fault: unknown
  try {
    const text = wholeLinesOf(await readFile(join(root, file), 'utf8'))
    for (const line of text.split('\n')) {
      // Each line ends with a break.
      if (line === '') continue
      try {
        const entry = parseEntry(line)
        entries.set(entry.attemptId, entry)
        sound.push(line)
      } catch (error) {
        fault ??= error
      }
    }
    return { entries, sound, fault }
  } catch (error) {
    // Node's errors of the file system have a code.
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT') return undefined
    // The machine is short of something, the disk is at fault, the file is another user's: it may hold the only token there
    // is, so it stays where it is.
    if (code !== 'EISDIR') throw error
    return { entries, sound, fault: error }
  }
}

/** Gives a file another name, having written what is sound in it anew. It needs no room for that but for what is sound. */
async function setAside(
  root: string,
  file: string,
  { path, sound }: { path: string; sound: readonly string[] },
): Promise<void> {
  if (sound.length === 0) return rename(join(root, file), path)
  const temporary = await writeTemporary(root, sound.map((line) => `${line}\n`).join(''))
  try {
    await link(join(root, file), path)
    await syncDirectory(root)
    await rename(temporary, join(root, file))
    await syncDirectory(root)
  } catch (error) {
    await rm(temporary).catch(() => undefined)
    throw error
  }
}
