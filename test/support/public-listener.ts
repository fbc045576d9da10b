// The public listener on a real socket, over the scene's core: what a browser meets. `broker.ts` is not involved.

import type { AddressInfo } from 'node:net'
import type { Test } from 'tap'
import { type LookAlikeApi, startApi } from '../../demo/look-alike/api.ts'
import { createForwarder } from '../../src/forward.ts'
import type { App } from '../../src/http/app.ts'
import { buildPublicApp, type PublicParts } from '../../src/http/public-app.ts'
import type { Ports } from '../../src/ports.ts'
import { createRevoker, type Revoker } from '../../src/revocation.ts'
import { type Browser, createBrowser } from './browser.ts'
import { type Engine, type Scene, setScene } from './engine.ts'
import { PROXY_LIMITS } from './proxy.ts'

type Setup = NonNullable<Parameters<typeof setScene>[1]> & {
  config?: Partial<Omit<PublicParts['config'], 'pagero'>>
  routes?: NonNullable<PublicParts['routes']>
  /** Stands for the look-alike's API. */
  apiUrl?: string
  replace?: (scene: Scene) => Partial<Ports>
}

export interface PublicListener {
  scene: Scene
  engine: Engine
  api: LookAlikeApi
  revoker: Revoker
  publicUrl: string
  /** To ask without a socket, where thousands of requests are needed. */
  app: App
  port: number
  /** A browser with a jar of its own; `listener` sends it to another replica of this one. */
  browser(): Browser
  /** One more replica on the same database. */
  startReplica(): Promise<PublicListener>
}

const PROXY = { ...PROXY_LIMITS, requestBytesMax: 1_000_000, responseBytesMax: 1_000_000 }

/** Starts a public listener with everything behind it; all of it ends with the test. */
export async function startPublicListener(test: Test, setup: Setup = {}): Promise<PublicListener> {
  const scene = await setScene(test, setup)
  const api = await startApi({ isActive: (token) => scene.lookAlike.isActive(token) })
  test.teardown(() => api.stop())
  return startReplica(test, scene, api, setup)
}

async function startReplica(
  test: Test,
  scene: Scene,
  api: LookAlikeApi,
  setup: Setup,
): Promise<PublicListener> {
  const engine = await scene.startEngine({
    replace: setup.replace?.(scene) ?? {},
    tokenCacheTrustMs: setup.config?.tokenCacheTrustMs ?? 0,
  })
  const revoker = createRevoker(engine.ports)
  const config: PublicParts['config'] = {
    pagero: scene.pagero,
    publicUrl: new URL(scene.pagero.redirectUri).origin,
    allowedOrigins: [],
    trustedProxies: [],
    rateLimits: { perCaller: 0, perUser: 0, perAddress: 0 },
    sessions: { idleSeconds: 3_600, absoluteSeconds: 43_200, perUserMax: 20 },
    subjectClaim: 'sub',
    tokenCacheTrustMs: 0,
    proxy: PROXY,
    ...setup.config,
  }
  const forwarder = createForwarder({
    ...PROXY,
    apiUrl: setup.apiUrl ?? api.origin,
    viaPseudonym: 'broker-test',
  })
  const app = await buildPublicApp({
    ports: engine.ports,
    config,
    accessTokens: engine.accessTokens,
    forwarder,
    revoker,
    ...(setup.routes === undefined ? {} : { routes: setup.routes }),
  })
  await app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = app.server.address() as AddressInfo
  revoker.start()
  test.teardown(async () => {
    await revoker.stop()
    await app.close()
    await forwarder.close()
  })
  return {
    scene,
    engine,
    api,
    revoker,
    publicUrl: config.publicUrl,
    app,
    port,
    browser: () => createBrowser(`http://127.0.0.1:${port}`),
    startReplica: () => startReplica(test, scene, api, setup),
  }
}
