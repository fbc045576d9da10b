// Statements on the way to a token are prepared: PostgreSQL then parses them once for each connection, and plans them anew
// only while that pays; to do both each time is half of what a refresh costs it. A pooler that hands its connections to
// somebody else after each transaction may not know of them; then they are sent like any other, from its first refusal on.

import { hash } from 'node:crypto'
import { CompiledQuery, type Kysely, type RawBuilder, sql } from 'kysely'
import { DatabaseError } from 'pg'
import type { Tables } from './tables.ts'

const MARK = /^\/\* prepared: (\w+) \*\//
const HASH_CHARACTERS = 22

/** Where a value stands that differs from one execution to the next. */
class Place {
  readonly name: string

  constructor(name: string) {
    this.name = name
  }
}

/** A statement to be executed with its values. Errors are those of the driver. */
export type Prepared<Values, Row> = (values: Values) => Promise<Row[]>

/**
 * Makes a statement that is prepared. `name` is for whoever watches the server. `build` is called once: what it puts in
 * by itself stays as it is, and `value` is the place of a value that is given with each execution. What the statement
 * returns must not vary with a migration, and no transaction may have begun before it.
 */
export function prepare<Values extends object, Row = unknown>(
  db: Kysely<Tables>,
  name: string,
  build: (
    value: <Name extends keyof Values & string>(name: Name) => RawBuilder<Values[Name]>,
  ) => RawBuilder<Row>,
): Prepared<Values, Row> {
  const statement = build((placeName) => sql.val(new Place(placeName)) as RawBuilder<never>)
  const { sql: text, parameters } = sql`${sql.raw(`/* prepared: ${name} */`)} ${statement}`.compile(
    db,
  )
  return async (values) => {
    const given = parameters.map((parameter) =>
      parameter instanceof Place ? values[parameter.name as keyof Values] : parameter,
    )
    const { rows } = await db.executeQuery(CompiledQuery.raw(text, given) as CompiledQuery<Row>)
    return rows
  }
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
