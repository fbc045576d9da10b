// The path parameter `{user}`: its rule, its schema, and reading it.
// The router has percent-decoded it once; nothing here or later decodes again, so `%2f` behind `%25` stays refused.

import type { FastifyRequest } from 'fastify'
import Type from 'typebox'
import { BrokerError } from '../errors.ts'
import { parseUserKey, type UserKey } from '../grant.ts'

/** Path parameters of every route under `/v1/users/{user}`. */
export const UserParameters = Type.Object({
  user: Type.String({
    description:
      'Key of the user: 1 to 255 characters of `A-Z a-z 0-9 . _ ~ @ : + -`, compared byte for byte.',
    minLength: 1,
    maxLength: 255,
    pattern: '^[A-Za-z0-9._~@:+-]+$',
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
          'must be 1 to 255 characters of A-Z a-z 0-9 . _ ~ @ : + - after one percent-decoding',
      },
    ],
  })
}
