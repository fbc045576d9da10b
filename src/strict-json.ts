// Strict reading of JSON values that an operator has written: every problem at its JSON pointer (RFC 6901), and no value
// in any message, because a key may have been pasted anywhere. What is missing has been told by `readMembers` and is
// passed over after it.

export type Members = Readonly<Record<string, unknown>>

/** Returns the members of an object. Of one that is none, or that lacks what is required, the problem is noted. */
export function readMembers(
  value: unknown,
  pointer: string,
  names: { required: readonly string[]; optional?: readonly string[] },
  problems: string[],
): Members {
  const { required, optional = [] } = names
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    problems.push(`${pointer || 'The file'} must be a JSON object.`)
    return {}
  }
  // The unknown name is not told: it may be anything, a key among it.
  const known = [...required, ...optional]
  if (Object.keys(value).some((name) => !known.includes(name))) {
    problems.push(`${pointer || 'The file'} must have no members but ${known.join(', ')}.`)
  }
  for (const name of required) {
    if (!Object.hasOwn(value, name)) problems.push(`${pointer}/${name} is required.`)
  }
  return value as Members
}

/** Entries of any list. */
const LIST_MAX = 1000

/** Returns the entries of a list, each read by `readEntry`; none when there is no list. */
export function readList<T>(
  value: unknown,
  pointer: string,
  readEntry: (entry: unknown, pointer: string, problems: string[]) => T,
  problems: string[],
): T[] {
  if (value === undefined) return []
  if (!Array.isArray(value) || value.length > LIST_MAX) {
    problems.push(`${pointer} must be a list of at most ${LIST_MAX} entries.`)
    return []
  }
  return value.map((entry: unknown, index) => readEntry(entry, `${pointer}/${index}`, problems))
}

/** Returns the text, or the empty one when it is missing or does not fit. */
export function readText(
  value: unknown,
  pointer: string,
  fits: (text: string) => boolean,
  what: string,
  problems: string[],
): string {
  if (value === undefined) return ''
  if (typeof value === 'string' && fits(value)) return value
  problems.push(`${pointer} must be ${what}.`)
  return ''
}
