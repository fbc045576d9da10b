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
  /** Tells whether it is known what is in the file, and that nothing is but these. */
  holdsOnly(file: string, attemptIds: { has(attemptId: string): boolean }): boolean
  /** The names of all files, read or not. */
  files(): string[]
  /** A file of which only the name is known. */
  addUnread(file: string): void
  /** Entries stand in this file from now on. Returns the files that nothing is left in. */
  add(file: string, attemptIds: Iterable<string>): string[]
  /** Nothing else stands in a file that is known. Returns whether anything does. */
  keepOnly(file: string, attemptIds: { has(attemptId: string): boolean }): boolean
  /** Whether a file holds something besides that is no entry and must not go with them. */
  mark(file: string, holdsMore: boolean): void
  /** Tells whether the file may go with this entry, as nothing else stands in it. */
  isLastOf(file: string): boolean
  remove(attemptId: string): void
  removeFile(file: string): void
}

export function createHoldings(): Holdings {
  const fileOf = new Map<string, string>()
  /** Undefined: not read yet. */
  const files = new Map<string, Set<string> | undefined>()
  const holdingMore = new Set<string>()

  /** Returns the file when nothing is left in it. */
  function take(attemptId: string): string | undefined {
    const file = fileOf.get(attemptId)
    if (file === undefined) return undefined
    fileOf.delete(attemptId)
    const others = files.get(file)
    others?.delete(attemptId)
    if (others === undefined || others.size > 0 || holdingMore.has(file)) return undefined
    files.delete(file)
    return file
  }

  return {
    size: () => fileOf.size,
    isEmpty: () => files.size === 0,
    has: (attemptId) => fileOf.has(attemptId),
    fileOf: (attemptId) => fileOf.get(attemptId),
    isKnown: (file) => files.get(file) !== undefined,
    holdsOnly(file, attemptIds) {
      const entries = files.get(file)
      if (entries === undefined || holdingMore.has(file)) return false
      for (const attemptId of entries) if (!attemptIds.has(attemptId)) return false
      return true
    },
    files: () => [...files.keys()],
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
    keepOnly(file, attemptIds) {
      const entries = files.get(file)
      for (const attemptId of entries ?? []) {
        if (attemptIds.has(attemptId)) continue
        entries?.delete(attemptId)
        fileOf.delete(attemptId)
      }
      return entries !== undefined && entries.size > 0
    },
    mark(file, holdsMore) {
      if (holdsMore) holdingMore.add(file)
      else holdingMore.delete(file)
    },
    isLastOf: (file) => (files.get(file)?.size ?? 1) === 1 && !holdingMore.has(file),
    remove: (attemptId) => void take(attemptId),
    removeFile(file) {
      for (const attemptId of files.get(file) ?? []) fileOf.delete(attemptId)
      files.delete(file)
      holdingMore.delete(file)
    },
  }
}
