// Lists for operators that come page by page, with a cursor: their parameters, and the page itself.

import Type from 'typebox'
import { USER_KEY_PATTERN } from '../grant.ts'
import { jsonAnswer } from './openapi.ts'
import { problemResponses } from './problem.ts'

export const PAGE_SIZE = 100
/** Keeps one answer under 500 KiB, whatever it lists. */
const PAGE_SIZE_MAX = 500

/** The query parameters that all of them have. `things` is what is listed. */
export function pageParameters(things: string, cursor: { pattern: string; example: string }) {
  return {
    after: Type.Optional(
      Type.String({
        pattern: cursor.pattern,
        description: '`next` of the page before.',
        examples: [cursor.example],
      }),
    ),
    limit: Type.Optional(
      Type.Integer({
        minimum: 1,
        maximum: PAGE_SIZE_MAX,
        default: PAGE_SIZE,
        description: `${things} on a page.`,
        examples: [PAGE_SIZE],
      }),
    ),
  }
}

/** The query parameter that leaves one user's. */
export function userFilter(description: string) {
  return Type.Optional(Type.String({ pattern: USER_KEY_PATTERN, description, examples: ['alice'] }))
}

/** The schema of a page, by the schema of what is on it. */
export function listOf(schema: string) {
  return Type.Object(
    {
      items: Type.Array(Type.Ref(schema)),
      next: Type.Unsafe<unknown>({
        type: ['string', 'null'],
        description: 'Cursor for `after`; null at the end.',
      }),
    },
    { $id: `${schema}List` },
  )
}

/** The answers of a list. */
export function listAnswers(things: string, schema: string, example: unknown) {
  return {
    200: jsonAnswer({
      description: `A page of ${things}.`,
      schema: `${schema}List`,
      example: { items: [example], next: null },
    }),
    ...problemResponses('internal', [
      'request_invalid',
      'caller_unauthenticated',
      'caller_forbidden',
      'temporarily_unavailable',
    ]),
  }
}

/** The page of so many, of rows that were asked for with one more than that: it tells whether there is a next page. */
export function pageOf<Row, Body>(
  rows: readonly Row[],
  limit: number,
  { body, cursor }: { body: (row: Row) => Body; cursor: (row: Row) => string },
): { items: Body[]; next: string | null } {
  const items = rows.slice(0, limit)
  const last = rows.length > limit ? items.at(-1) : undefined
  return { items: items.map(body), next: last === undefined ? null : cursor(last) }
}
