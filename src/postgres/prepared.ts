// Statements on the way to a token are prepared: PostgreSQL then parses them once for each connection, and plans them anew
// only while that pays; to do both each time is half of what a refresh costs it. A pooler that hands its connections to
// somebody else after each transaction may not know of them; then they are sent like any other, from its first refusal on.

import { hash } from 'node:crypto'
import { type RawBuilder, sql } from 'kysely'
import { DatabaseError } from 'pg'

const MARK = /^\/\* prepared: (\w+) \*\//
const HASH_CHARACTERS = 22

/**
 * Stands first in a statement that is to be prepared, and gives it a name for whoever watches the server. Neither its text may
 * vary, nor, with a migration, what it returns; and no transaction may have begun before it.
 */
export function prepared(name: string): RawBuilder<unknown> {
  return sql.raw(`/* prepared: ${name} */`)
}

/** Of a handful of statements: their texts do not vary. */
const names = new Map<string, string>()

/** The name under which the statement is prepared; undefined when it is not to be. Another text has another name. */
export function preparedNameOf(text: string): string | undefined {
  if (!text.startsWith('/*')) return undefined
  const known = names.get(text)
  if (known !== undefined) return known
  const [, name] = MARK.exec(text) ?? []
  if (name === undefined) return undefined
  const full = `broker_${name}_${hash('sha256', text, 'base64url').slice(0, HASH_CHARACTERS)}`
  names.set(text, full)
  return full
}

/**
 * SQLSTATEs with which a server refuses a prepared statement because of its being prepared, before it does anything.
 * @see {@link https://www.postgresql.org/docs/current/errcodes-appendix.html PostgreSQL, Appendix A}
 */
const REFUSALS: ReadonlySet<string | undefined> = new Set([
  '26000', // invalid_sql_statement_name: it was prepared on another connection behind the pooler
  '42P05', // duplicate_prepared_statement: somebody else has prepared it on this one
  '0A000', // feature_not_supported: what it returns is not what it was
])

/** Tells whether the same statement, sent as any other, may pass. */
export function refusesPrepared(error: unknown): boolean {
  return error instanceof DatabaseError && REFUSALS.has(error.code)
}
