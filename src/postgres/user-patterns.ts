// Patterns of users as SQL reads them.

/** Turns a pattern with `*` into one of LIKE; user keys hold `_`, which means something there. */
export function likePatternOf(pattern: string): string {
  return pattern.replaceAll(/[\\%_]/g, (character) => `\\${character}`).replaceAll('*', '%')
}
