// What a spool holds, as far as it is known without reading: which entry stands in which file.

export interface Holdings {
  /** Entries that are known. */
  size(): number
  /** Whether there is no file, read or not. */
  isEmpty(): boolean
  has(attemptId: string): boolean
  fileOf(attemptId: string): string | undefined
  /** Tells whether it has been read, or written, what is in the file. */
  isKnown(file: string): boolean
  /** A file of which only the name is known. */
  addUnread(file: string): void
  /** Entries stand in this file from now on. Returns the files that nothing is left in. */
  add(file: string, attemptIds: Iterable<string>): string[]
  /** Tells whether no other entry stands in the file. */
  isLastOf(file: string): boolean
  remove(attemptId: string): void
  removeFile(file: string): void
}

export function createHoldings(): Holdings {
  const fileOf = new Map<string, string>()
  /** Undefined: not read yet. */
  const files = new Map<string, Set<string> | undefined>()

  /** Returns the file when nothing is left in it. */
  function take(attemptId: string): string | undefined {
    const file = fileOf.get(attemptId)
    if (file === undefined) return undefined
    fileOf.delete(attemptId)
    const others = files.get(file)
    others?.delete(attemptId)
    if (others === undefined || others.size > 0) return undefined
    files.delete(file)
    return file
  }

  return {
    size: () => fileOf.size,
    isEmpty: () => files.size === 0,
    has: (attemptId) => fileOf.has(attemptId),
    fileOf: (attemptId) => fileOf.get(attemptId),
    isKnown: (file) => files.get(file) !== undefined,
    addUnread: (file) => void files.set(file, undefined),
    add(file, attemptIds) {
      const entries = files.get(file) ?? new Set()
      files.set(file, entries)
      const emptied: string[] = []
      for (const attemptId of attemptIds) {
        const before = fileOf.get(attemptId) === file ? undefined : take(attemptId)
        if (before !== undefined) emptied.push(before)
        entries.add(attemptId)
        fileOf.set(attemptId, file)
      }
      return emptied
    },
    isLastOf: (file) => (files.get(file)?.size ?? 1) === 1,
    remove: (attemptId) => void take(attemptId),
    removeFile(file) {
      for (const attemptId of files.get(file) ?? []) fileOf.delete(attemptId)
      files.delete(file)
    },
  }
}
