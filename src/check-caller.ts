// What a caller of the callers file may do, asked by an operator: allowed or refused, and why. By the same patterns and in
// the same order as a request is decided on, without a broker running.

import {
  isCallPattern,
  isUserPattern,
  matchesCallPattern,
  matchesUserPattern,
} from './caller-patterns.ts'
import { type CallerEntry, type Right, RIGHTS } from './callers-file.ts'

export interface CallerQuestion {
  caller: string
  right?: string | undefined
  user?: string | undefined
  /** Method and path of a call to Pagero: `GET /document/v1/documents`. */
  call?: string | undefined
}

export interface CallerVerdict {
  allowed: boolean
  /** A sentence for the operator. */
  reason: string
}

/**
 * Answers the question from the entries of a callers file. Asking about a call asks about `proxy:call` too.
 * @throws Error with a sentence when the question is none that a request could raise
 */
export function checkCaller(
  entries: readonly CallerEntry[],
  { caller: name, right, user, call }: CallerQuestion,
  now: Date = new Date(),
): CallerVerdict {
  if (right !== undefined && !RIGHTS.some((one) => one === right)) {
    throw new Error(`--right must be one of ${RIGHTS.join(', ')}.`)
  }
  if (user !== undefined && (!isUserPattern(user) || user.includes('*'))) {
    throw new Error('--user must be a user key: 1 to 255 of A-Z a-z 0-9 . _ ~ @ : + -')
  }
  if (call !== undefined && (!isCallPattern(call) || call.endsWith('**'))) {
    throw new Error("--call must be a method and a path, such as 'GET /document/v1/documents'.")
  }
  const caller = entries.find((entry) => entry.name === name)
  const refused = (reason: string): CallerVerdict => ({ allowed: false, reason })
  if (caller === undefined) return refused('There is no caller of this name.')
  const living = caller.apiKeys.filter(
    ({ expiresAt }) => expiresAt === undefined || expiresAt > now,
  )
  if (living.length === 0 && caller.jwts.length === 0) return refused('All its keys have expired.')
  const rights = [right, call === undefined ? undefined : 'proxy:call'] as Array<Right | undefined>
  for (const wanted of rights) {
    if (wanted !== undefined && !caller.rights.has(wanted)) {
      return refused(`It has not the right ${wanted}.`)
    }
  }
  const [method = '', path = ''] = call?.split(' ') ?? []
  const { proxyAllow, users } = caller
  if (
    call !== undefined &&
    proxyAllow?.some((one) => matchesCallPattern(one, method, path)) === false
  ) {
    return refused('No entry of its proxy_allow covers the call.')
  }
  const pattern =
    user === undefined ? undefined : users.find((one) => matchesUserPattern(one, user))
  if (user !== undefined && pattern === undefined) {
    return refused('No entry of its users covers the user; a request is answered grant_not_found.')
  }
  return {
    allowed: true,
    reason: [
      `Its rights are ${[...caller.rights].join(', ') || 'none'}.`,
      pattern === undefined
        ? `Its users are ${users.join(', ') || 'none'}.`
        : `The user is covered by ${pattern}.`,
      call === undefined || proxyAllow !== undefined ? '' : 'It may make every call.',
    ]
      .filter(Boolean)
      .join(' '),
  }
}
