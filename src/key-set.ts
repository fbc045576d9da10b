// The keys that signatures are checked with, fetched from a URL of the settings and kept for a while. Each fetch is a
// connection of its own, to an address that the lookup allows; no redirect is followed.

import type { LookupFunction } from 'node:net'
import * as jose from 'jose'
import { Agent, fetch } from 'undici'

/** Far above any key set; what is beyond it is cut off. */
const ANSWER_BYTES_MAX = 262_144
const TIMEOUT_MS = 5_000

/** Makes the key set at `url`: fetched when first needed, again for a key not in it, at most twice a minute. */
export function createKeySet(url: string, lookup: LookupFunction): jose.JWTVerifyGetKey {
  const dispatcher = new Agent({
    allowH2: false,
    // No connection is kept.
    pipelining: 0,
    maxHeaderSize: 16_384,
    maxResponseSize: ANSWER_BYTES_MAX,
    connect: {
      timeout: TIMEOUT_MS,
      rejectUnauthorized: true,
      minVersion: 'TLSv1.2',
      lookup,
    },
  })
  return jose.createRemoteJWKSet(new URL(url), {
    timeoutDuration: TIMEOUT_MS,
    cooldownDuration: 30_000,
    cacheMaxAge: 600_000,
    async [jose.customFetch](target, options) {
      const answer = await fetch(target, {
        ...options,
        headers: [...options.headers],
        dispatcher,
      })
      return answer as unknown as Response
    },
  })
}
