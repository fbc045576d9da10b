// What a request has come to before its route: an error that the route throws when its turn has come, in place of trying the
// same once more.

import type { IncomingMessage } from 'node:http'

const FAILURE = Symbol('failure')
type FailedRequest = IncomingMessage & { [FAILURE]?: { error: unknown } }

/** Keeps the error with its request. */
export function keepFailure(request: FailedRequest, error: unknown): void {
  request[FAILURE] = { error }
}

/** Tells whether something was done for the request already, and failed. */
export function hasFailed(request: FailedRequest): boolean {
  return request[FAILURE] !== undefined
}

/** Throws the error that was kept with the request, if there is one. */
export function throwKeptFailure(request: FailedRequest): void {
  const failure = request[FAILURE]
  if (failure !== undefined) throw failure.error
}
