// The internal listener over the scene's core, with a callers file on disk. `broker.ts` is not involved.

import { createHash, randomBytes } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { type LookAlikeApi, startApi } from '../../demo/look-alike/api.ts'
import { type Callers, createCallers } from '../../src/callers.ts'
import { createForwarder } from '../../src/forward.ts'
import type { App } from '../../src/http/app.ts'
import type { Check } from '../../src/http/health-routes.ts'
import { buildInternalApp } from '../../src/http/internal-app.ts'
import { buildPublicApp } from '../../src/http/public-app.ts'
import { createImporter } from '../../src/import.ts'
import type { RateLimitSettings } from '../../src/rate-limit.ts'
import { createRevoker } from '../../src/revocation.ts'
import { type Engine, type Scene, setScene } from './engine.ts'
import { PROXY_LIMITS } from './proxy.ts'

export interface CallerEntry {
  rights: readonly string[]
  users: readonly string[]
  proxyAllow?: readonly string[]
  expiresAt?: string
  /** Entries of `jwt`, beside the key. */
  jwt?: readonly object[]
}

export interface InternalListener {
  scene: Scene
  engine: Engine
  callers: Callers
  api: LookAlikeApi
  internalApp: App
  publicApp: App
  /** The Authorization header of each caller, by name. */
  credentials: Readonly<Record<string, { authorization: string }>>
}

const NO_LIMITS: RateLimitSettings = { perCaller: 0, perUser: 0, perAddress: 0 }

const PROXY = { ...PROXY_LIMITS, requestBytesMax: 1_000_000, responseBytesMax: 1_000_000 }

/** Origin of an application on another site. */
export const APPLICATION = 'https://app.example'
const ALLOWED_ORIGINS = [APPLICATION]

/** Builds both listeners' apps for a test; requests are injected, or sent to a port that the test opens. */
export async function buildListeners(
  test: Test,
  options: {
    callers: Readonly<Record<string, CallerEntry>>
    checks?: Readonly<Record<string, Check>>
    rateLimits?: RateLimitSettings
    trustedProxies?: readonly string[]
    /** Of the engine. */
    replace?: NonNullable<Parameters<Scene['startEngine']>[0]>['replace']
    tokenCacheTrustMs?: number
    /** Tells that the process does not keep up. Undefined: it always does. */
    isOverloaded?: () => boolean
  },
): Promise<InternalListener> {
  const scene = await setScene(test)
  const api = await startApi({ isActive: (token) => scene.lookAlike.isActive(token) })
  test.teardown(() => api.stop())
  const engine = await scene.startEngine({
    replace: options.replace ?? {},
    tokenCacheTrustMs: options.tokenCacheTrustMs ?? 0,
  })
  const { file, credentials } = await writeCallersFile(test, options.callers)
  const callers = await createCallers(file, engine.ports)
  test.teardown(() => callers.close())
  const revoker = createRevoker(engine.ports)
  revoker.start()
  test.teardown(() => revoker.stop())
  const forwarder = createForwarder({ ...PROXY, apiUrl: api.origin, viaPseudonym: 'broker-test' })
  test.teardown(() => forwarder.close())
  const publicUrl = new URL(scene.pagero.redirectUri).origin

  const publicApp = await buildPublicApp({
    ports: engine.ports,
    config: {
      pagero: scene.pagero,
      publicUrl,
      allowedOrigins: ALLOWED_ORIGINS,
      trustedProxies: options.trustedProxies ?? [],
      rateLimits: options.rateLimits ?? NO_LIMITS,
      sessions: { idleSeconds: 3_600, absoluteSeconds: 43_200, perUserMax: 20 },
      subjectClaim: 'sub',
      tokenCacheTrustMs: 0,
      proxy: PROXY,
    },
    accessTokens: engine.accessTokens,
    forwarder,
    revoker,
  })
  const internalApp = await buildInternalApp({
    ports: engine.ports,
    callers,
    accessTokens: engine.accessTokens,
    forwarder,
    importer: createImporter(engine.ports, engine.refresher, {
      callerWaitSeconds: 3,
      subjectClaim: 'sub',
    }),
    revoker,
    checks: options.checks ?? {},
    ...(options.isOverloaded === undefined
      ? {}
      : { overload: { isThere: options.isOverloaded, refuses: options.isOverloaded } }),
    publicApp,
    settings: {
      publicUrl,
      allowedOrigins: ALLOWED_ORIGINS,
      redirectUri: scene.pagero.redirectUri,
      requestTimeoutMs: PROXY.totalTimeoutMs,
      answerIdleTimeoutMs: PROXY.idleTimeoutMs,
      trustedProxies: options.trustedProxies ?? [],
      rateLimits: options.rateLimits ?? NO_LIMITS,
    },
  })
  test.teardown(async () => {
    await internalApp.close()
    await publicApp.close()
  })
  return { scene, engine, callers, api, internalApp, publicApp, credentials }
}

async function writeCallersFile(
  test: Test,
  entries: Readonly<Record<string, CallerEntry>>,
): Promise<{ file: string; credentials: Record<string, { authorization: string }> }> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-callers-'))
  test.teardown(() => rm(directory, { recursive: true, force: true }))
  const credentials: Record<string, { authorization: string }> = {}
  const callers = Object.entries(entries).map(([name, entry], index) => {
    const id = `key${index}`
    const key = `pgb_${id}_${randomBytes(32).toString('base64url')}`
    credentials[name] = { authorization: `Bearer ${key}` }
    return {
      name,
      api_keys: [
        {
          id,
          sha256: createHash('sha256').update(key).digest('hex'),
          expires_at: entry.expiresAt ?? '2099-01-01T00:00:00Z',
        },
      ],
      ...(entry.jwt === undefined ? {} : { jwt: entry.jwt }),
      rights: entry.rights,
      users: entry.users,
      ...(entry.proxyAllow === undefined ? {} : { proxy_allow: entry.proxyAllow }),
    }
  })
  const file = join(directory, 'callers.json')
  await writeFile(file, JSON.stringify({ callers }), { mode: 0o600 })
  return { file, credentials }
}
