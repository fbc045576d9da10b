// The path parameter `{user}`: its rule, its schema, and reading it.
// The router has percent-decoded it once; nothing here or later decodes again, so `%2f` behind `%25` stays refused.

import type { FastifyRequest } from 'fastify'
import Type from 'typebox'
import { BrokerError } from '../errors.ts'
import { PAGERO_USER_PREFIX, parseUserKey, USER_KEY_PATTERN, type UserKey } from '../grant.ts'

/** Path parameters of every route under `/v1/users/{user}`. */
export const UserParameters = Type.Object({
  user: Type.String({
    description:
      'Key of the user: 1 to 255 characters of `A-Z a-z 0-9 . _ ~ @ : + -`, compared byte for byte. Neither `.` nor `..`, which clients take out of a path.',
    minLength: 1,
    maxLength: 255,
    pattern: USER_KEY_PATTERN,
    examples: ['alice'],
  }),
})

/**
 * Returns the user that the path names.
 * @throws BrokerError `request_invalid` with the rule, if it is no user key
 */
export function readUserKey(request: FastifyRequest): UserKey {
  const user = parseUserKey((request.params as { user: string }).user)
  if (user !== undefined) return user
  throw new BrokerError('request_invalid', 'The path does not name a user.', {
    errors: [
      {
        pointer: 'params/user',
        detail:
          'must be 1 to 255 characters of A-Z a-z 0-9 . _ ~ @ : + - after one percent-decoding, and neither . nor ..',
      },
    ],
  })
}

/**
 * Returns the user that the path names, if an application may name it: nobody can log in as such a user by having a
 * Pagero account with the right name.
 * @throws BrokerError `request_invalid`
 */
export function readApplicationUserKey(request: FastifyRequest): UserKey {
  const user = readUserKey(request)
  if (!user.startsWith(PAGERO_USER_PREFIX)) return user
  throw new BrokerError(
    'request_invalid',
    `User keys that begin with ${PAGERO_USER_PREFIX} are made by logins alone.`,
    { errors: [{ pointer: 'params/user', detail: `must not begin with ${PAGERO_USER_PREFIX}` }] },
  )
}
