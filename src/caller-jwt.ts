// JWTs of callers (RFC 7519, RFC 9068, RFC 8725): whose a token is, once it has been verified. Made anew with each load of
// the callers file, so that nothing verified under the old one is remembered. Where keys come from is in caller-keys.ts.

import { hash } from 'node:crypto'
import * as jose from 'jose'
import type { JwtEntry } from './caller-jwt-entry.ts'
import type { KeySet } from './caller-keys.ts'
import type { Caller } from './callers-file.ts'
import { BrokerError } from './errors.ts'
import type { Noted } from './last-use.ts'
import type { Clock } from './ports.ts'

/** Signatures by a key pair. `none`, and the HMACs, which a public key could be passed off as, are not among them. */
const ALGORITHMS = [
  'RS256',
  'RS384',
  'RS512',
  'PS256',
  'PS384',
  'PS512',
  'ES256',
  'ES384',
  'ES512',
  'EdDSA',
  'Ed25519',
]
/** Kubernetes sends no `typ`, most issuers `JWT`, those of RFC 9068 `at+jwt`. A token of another kind is for something else. */
const TYPES: ReadonlySet<unknown> = new Set([
  undefined,
  'jwt',
  'at+jwt',
  'application/jwt',
  'application/at+jwt',
])
/** For the clocks of two hosts that keep time. */
const LEEWAY_SECONDS = 10
/** Renewed by whoever holds them: Kubernetes within the hour, issuers of client credentials within the day. */
const LIFETIME_SECONDS_MAX = 86_400
/** How long a verified token passes without its signature being checked again. A key withdrawn at a URL takes longer to show. */
const REMEMBERED_MS = 60_000
/** About 2 MB. One token of each process that calls, within a minute; the oldest goes first. */
const REMEMBERED_MAX = 10_000

/** A caller's entry with the keys of its issuer. */
export interface KnownJwt extends Noted {
  caller: Caller
  entry: JwtEntry
  keys: KeySet
}

export interface JwtCallers {
  /** Returns whose token this is if it was verified a moment ago. */
  recall(token: string): KnownJwt | undefined
  /**
   * Verifies the token and returns whose it is.
   * @throws BrokerError `caller_unauthenticated`, in the same words for whatever is wrong; its cause says what, for the log
   * @throws BrokerError `temporarily_unavailable` while the issuer's keys have never been had
   */
  verify(token: string): Promise<KnownJwt>
}

interface Verified {
  known: KnownJwt
  version: unknown
  expiresAtSeconds: number
}

interface Remembered {
  known: KnownJwt
  version: unknown
  untilMs: number
}

/** Makes the check of tokens against these entries. Any number of calls at once. */
export function createJwtCallers(jwts: readonly KnownJwt[], clock: Clock): JwtCallers {
  /** By the SHA-256 of the token: looking it up compares no secret. */
  const remembered = new Map<string, Remembered>()

  function remember(token: string, { known, version, expiresAtSeconds }: Verified): void {
    const leftMs = expiresAtSeconds * 1000 - clock.now().getTime()
    if (leftMs <= 0) return
    const oldest = remembered.keys().next().value
    if (oldest !== undefined && remembered.size >= REMEMBERED_MAX) remembered.delete(oldest)
    remembered.set(digestOf(token), {
      known,
      version,
      untilMs: clock.monotonicMs() + Math.min(REMEMBERED_MS, leftMs),
    })
  }

  return {
    recall(token) {
      const digest = digestOf(token)
      const found = remembered.get(digest)
      if (found === undefined) return undefined
      const { known, version, untilMs } = found
      if (clock.monotonicMs() < untilMs && version === known.keys.version) return known
      remembered.delete(digest)
      return undefined
    },

    async verify(token) {
      let refusal: unknown = new Refusal('names no caller')
      try {
        const claims = readUnverified(token)
        // Of one caller alone: a file where two could match is not taken.
        for (const known of jwts.filter(({ entry }) => isFor(entry, claims))) {
          try {
            // From before: if other keys come meanwhile, the token is verified with them next time.
            const { version } = known.keys
            const expiresAtSeconds = await verifyFor(token, known, clock)
            remember(token, { known, version, expiresAtSeconds })
            return known
          } catch (error) {
            if (error instanceof BrokerError) throw error
            refusal = error
          }
        }
      } catch (error) {
        if (error instanceof BrokerError) throw error
        refusal = error
      }
      throw new BrokerError(
        'caller_unauthenticated',
        'The token is not valid.',
        { credentialRefused: true },
        { cause: refusal },
      )
    },
  }
}

/** Why a token was refused, in constant words, for the log. */
export function refusalReason(refusal: unknown): string | undefined {
  if (refusal instanceof Refusal) return refusal.message
  if (!(refusal instanceof jose.errors.JOSEError)) return undefined
  return 'claim' in refusal ? `${refusal.code} ${String(refusal.claim)}` : refusal.code
}

/** A fault that jose does not look for. */
class Refusal extends Error {}

function digestOf(token: string): string {
  return hash('sha256', token, 'base64')
}

/** The claims as they stand there, to find the entry; nothing is believed of them until the signature is verified. */
function readUnverified(token: string): jose.JWTPayload {
  const header = jose.decodeProtectedHeader(token)
  if (Object.hasOwn(header, 'crit')) throw new Refusal('has a critical header')
  const { typ } = header
  if (!TYPES.has(typeof typ === 'string' ? typ.toLowerCase() : typ)) {
    throw new Refusal('is a token of another type')
  }
  return jose.decodeJwt(token)
}

function isFor({ issuer, claims: wanted }: JwtEntry, claims: jose.JWTPayload): boolean {
  return (
    claims.iss === issuer &&
    [...wanted].every(([name, value]) => Object.hasOwn(claims, name) && claims[name] === value)
  )
}

/** Verifies everything that has been read, and returns when the token expires. */
async function verifyFor(
  token: string,
  { entry, keys }: KnownJwt,
  clock: Pick<Clock, 'now'>,
): Promise<number> {
  const { payload } = await jose.jwtVerify(token, (header) => keys.keyFor(header), {
    algorithms: ALGORITHMS,
    issuer: entry.issuer,
    audience: entry.audience,
    requiredClaims: ['iss', 'aud', 'exp', 'iat'],
    clockTolerance: LEEWAY_SECONDS,
    currentDate: clock.now(),
    // Also refuses a token that is issued in the future.
    maxTokenAge: LIFETIME_SECONDS_MAX,
  })
  if (!isFor(entry, payload)) throw new Refusal('names no caller')
  // Bound to a key that its sender must prove to have (RFC 8705, RFC 9449). That is not asked for here, so it is no use.
  if (payload.cnf !== undefined) throw new Refusal('is bound to a key')
  const { exp = 0, iat = 0 } = payload
  if (exp - iat > LIFETIME_SECONDS_MAX) throw new Refusal('lives for more than a day')
  return exp
}
