// The public keys of an issuer of callers' JWTs: from a file, or from the one URL that the callers file names. Nothing
// that a token says leads anywhere. Keys that have been had once go on working while the URL cannot be reached.

import { readFile } from 'node:fs/promises'
import { request as requestHttp } from 'node:http'
import { request as requestHttps } from 'node:https'
import * as jose from 'jose'
import type { KeySource } from './caller-jwt-entry.ts'
import { BrokerError, unavailable } from './errors.ts'
import type { Clock, Log } from './ports.ts'

/** Keys are asked for at most this often, whatever tokens come: an unknown key id costs no more than that. */
const FETCH_INTERVAL_MS = 30_000
/** After this they are asked for anew, in the background: a withdrawn key ends within it. */
const FRESH_MS = 600_000
const FETCH_TIMEOUT_MS = 5_000
/** Issuers publish a handful of keys of one or two KiB. */
const SET_BYTES_MAX = 262_144
const SET_KEYS_MAX = 100
/** A certificate bundle, or a token. */
const SECRET_FILE_BYTES_MAX = 1024 * 1024

type Keys = ReturnType<typeof jose.createLocalJWKSet>

/** The keys of one issuer. */
export interface KeySet {
  /** Stands for the keys that are known now: another one when they have changed. */
  readonly version: unknown
  /** What stands in the way of having the newest keys; undefined when nothing does. */
  problem(): string | undefined
  /**
   * Returns the key that a token's header names, by `kid` and `alg` alone.
   * @throws JOSEError when there is none
   * @throws BrokerError `temporarily_unavailable` while no keys have been had yet
   */
  keyFor(header: jose.JWTHeaderParameters): Promise<jose.CryptoKey>
}

/** Keys that cannot be used or had; the message is a few constant words. */
export class KeySetError extends Error {}

/**
 * Reads a JSON Web Key Set (RFC 7517).
 * @throws KeySetError
 */
function readKeys(text: string): Keys {
  let set: jose.JSONWebKeySet
  try {
    set = JSON.parse(text) as jose.JSONWebKeySet
  } catch {
    throw new KeySetError('is not valid JSON')
  }
  const keys: unknown = (set as Partial<jose.JSONWebKeySet> | null)?.keys
  if (!Array.isArray(keys) || !keys.every((key) => typeof key === 'object' && key !== null)) {
    throw new KeySetError('is no JSON Web Key Set')
  }
  if (keys.length === 0 || keys.length > SET_KEYS_MAX) {
    throw new KeySetError(`must have 1 to ${SET_KEYS_MAX} keys`)
  }
  // `k` is a shared secret, `d` the private half of a key: neither has a place where keys are published.
  if (keys.some((key) => Object.hasOwn(key as object, 'd') || Object.hasOwn(key as object, 'k'))) {
    throw new KeySetError('must have public keys only')
  }
  return jose.createLocalJWKSet(set)
}

/**
 * Reads the keys of a file once; whoever follows its changes reads it again.
 * @throws KeySetError
 */
export async function readKeyFile(file: string): Promise<KeySet> {
  const keys = readKeys(await readSmallFile(file, SET_BYTES_MAX))
  return { version: keys, problem: () => undefined, keyFor: (header) => keys(header) }
}

/** Makes the keys of a URL. They are asked for at once, and then when they are needed; never by a timer. */
export function createRemoteKeys(
  source: Extract<KeySource, { kind: 'url' }>,
  ports: { clock: Clock; log: Log },
): KeySet {
  const { clock, log } = ports
  let keys: Keys | undefined
  let text = ''
  let hadAtMs = -Infinity
  let askedAtMs = -Infinity
  let asking: Promise<void> | undefined
  let problem: string | undefined

  async function ask(): Promise<void> {
    try {
      const answer = await fetchText(source)
      // The same keys stay the same version, so that what was verified with them stays verified.
      if (answer !== text || keys === undefined) keys = readKeys(answer)
      text = answer
      hadAtMs = clock.monotonicMs()
      problem = undefined
    } catch (error) {
      problem = error instanceof KeySetError ? error.message : 'cannot be fetched'
      log.warn('caller_keys_unavailable', {
        setting: 'CALLERS_FILE',
        reason: `a jwks_uri ${problem}`,
        error,
      })
    }
  }

  /** Joins the request under way, or begins one if the last is long enough ago. */
  async function refresh(): Promise<void> {
    if (asking === undefined && clock.monotonicMs() - askedAtMs >= FETCH_INTERVAL_MS) {
      askedAtMs = clock.monotonicMs()
      asking = ask().finally(() => (asking = undefined))
    }
    await asking
  }

  void refresh()
  return {
    get version() {
      return keys
    },
    problem: () => problem,
    async keyFor(header) {
      if (keys === undefined) await refresh()
      else if (clock.monotonicMs() - hadAtMs >= FRESH_MS) void refresh()
      if (keys === undefined) throw noKeysYet(askedAtMs + FETCH_INTERVAL_MS - clock.monotonicMs())
      const known = keys
      try {
        return await known(header)
      } catch (error) {
        if (!(error instanceof jose.errors.JWKSNoMatchingKey)) throw error
        await refresh()
        if (keys === known) throw error
        return keys(header)
      }
    },
  }
}

function noKeysYet(waitMs: number): BrokerError {
  return unavailable(
    'The keys of the issuer of this token cannot be had at the moment, so it cannot be judged.',
    Math.max(1, Math.ceil(waitMs / 1000)),
  )
}

/**
 * Fetches the text behind the URL, on a connection of its own; no redirect is followed.
 * @throws KeySetError
 */
async function fetchText(source: Extract<KeySource, { kind: 'url' }>): Promise<string> {
  const url = new URL(source.url)
  // Read each time: Kubernetes renews both.
  const ca = source.caFile && (await readSmallFile(source.caFile, SECRET_FILE_BYTES_MAX))
  const token = source.tokenFile && (await readSmallFile(source.tokenFile, SECRET_FILE_BYTES_MAX))
  const options = {
    method: 'GET',
    agent: false,
    headers: {
      accept: 'application/jwk-set+json, application/json',
      ...(token === undefined ? {} : { authorization: `Bearer ${token.trim()}` }),
    },
    signal: AbortSignal.timeout(FETCH_TIMEOUT_MS),
    maxHeaderSize: 16_384,
  } as const
  const tls = { rejectUnauthorized: true, minVersion: 'TLSv1.2', ...(ca && { ca }) } as const
  return new Promise((resolve, reject) => {
    const request =
      url.protocol === 'https:'
        ? requestHttps(url, { ...options, ...tls })
        : requestHttp(url, options)
    const fail = (reason: string, cause?: unknown) => {
      reject(new KeySetError(reason, { cause }))
      request.destroy()
    }
    request.on('error', (error) => fail('cannot be fetched', error))
    request.on('response', (response) => {
      if (response.statusCode !== 200) {
        fail(`answers ${response.statusCode}`)
        return
      }
      const chunks: Buffer[] = []
      let bytes = 0
      response.on('error', (error) => fail('cannot be fetched', error))
      response.on('data', (chunk: Buffer) => {
        chunks.push(chunk)
        bytes += chunk.length
        if (bytes > SET_BYTES_MAX) fail(`is larger than ${SET_BYTES_MAX} bytes`)
      })
      response.on('end', () => resolve(Buffer.concat(chunks).toString('utf8')))
    })
    request.end()
  })
}

/** @throws KeySetError */
async function readSmallFile(file: string, bytesMax: number): Promise<string> {
  const text = await readFile(file, 'utf8').catch((error: unknown) => {
    throw new KeySetError('cannot be read', { cause: error })
  })
  if (Buffer.byteLength(text) > bytesMax) throw new KeySetError(`is larger than ${bytesMax} bytes`)
  return text
}
