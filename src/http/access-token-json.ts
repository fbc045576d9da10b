// The answer with an access token as text: the members of the schema `AccessToken`, in ASCII alone. Writing the same token
// as JSON again and again is a tenth of what such an answer costs, so the text of tokens in demand is kept and only the
// seconds that are left are put in.

import type { FreshToken } from '../access-token.ts'

/** Tokens told apart at one time; 1.3 kB for each that is in demand. With more, all are forgotten and learnt again. */
const KEPT_MAX = 5_000

interface Kept {
  accessToken: string
  scope: string
  expiresAtMs: number
  /** What stands before the seconds, and after them. */
  before: string
  after: string
}

/** Makes the writer of a listener for tokens that may be asked for again and again. */
export function createAccessTokenJson(): (token: FreshToken) => string {
  /** By fingerprint; without a text for those that were asked for once so far. */
  const kept = new Map<string, Kept | undefined>()
  return (token) => {
    const { fingerprint } = token
    let text = kept.get(fingerprint)
    if (text === undefined || !isOf(text, token)) {
      const isInDemand = kept.has(fingerprint)
      if (kept.size >= KEPT_MAX) kept.clear()
      text = textAround(token)
      kept.set(fingerprint, isInDemand ? text : undefined)
    }
    return joined(text, token)
  }
}

/** Writes a token once, and keeps nothing. */
export function accessTokenJson(token: FreshToken): string {
  return joined(textAround(token), token)
}

function joined({ before, after }: Kept, token: FreshToken): string {
  return `${before}${token.expiresInSeconds}${after}`
}

/** A fingerprint stands for a token, and not for its scope and its end; and nothing is served on its word alone. */
function isOf({ accessToken, scope, expiresAtMs }: Kept, token: FreshToken): boolean {
  return (
    accessToken === token.accessToken &&
    scope === token.scope &&
    expiresAtMs === token.expiresAt.getTime()
  )
}

function textAround({ accessToken, scope, expiresAt, fingerprint }: FreshToken): Kept {
  const end = expiresAt.toISOString()
  return {
    accessToken,
    scope,
    expiresAtMs: expiresAt.getTime(),
    before: `{"access_token":${quoted(accessToken)},"token_type":"Bearer","expires_in":`,
    after: `,"expires_at":"${end}","scope":${quoted(scope)},"fingerprint":"${fingerprint}"}`,
  }
}

/** ASCII without what JSON escapes: what tokens are made of. */
const PLAIN = /^[ !#-[\]-~]*$/

/** A JSON string of ASCII alone: so that the characters of an answer are its bytes. */
function quoted(text: string): string {
  if (PLAIN.test(text)) return `"${text}"`
  return JSON.stringify(text).replace(
    // eslint-disable-next-line no-control-regex
    /[^\x20-\x7e]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
}
