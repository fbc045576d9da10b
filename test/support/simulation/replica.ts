// One replica of the broker as src/broker.ts starts it, without its listeners: the engine is the production code, the
// ports are simulated.

import { type AccessTokens, createAccessTokens } from '../../../src/access-token.ts'
import { type AntiEntropy, createAntiEntropy } from '../../../src/anti-entropy.ts'
import type { RefreshSettings } from '../../../src/config.ts'
import { createHeartbeat } from '../../../src/failover.ts'
import { startPeriodic } from '../../../src/periodic.ts'
import type { Log, LogFields, Ports } from '../../../src/ports.ts'
import { createRecovery } from '../../../src/recovery.ts'
import { createRefresher, type Refresher } from '../../../src/refresh.ts'
import { createRevoker } from '../../../src/revocation.ts'
import type { SimulatedServer } from './authorization-server.ts'
import { type DatabaseWorld, linkDatabase } from './database-link.ts'
import { createSimulatedSealer, createSimulatedSpool, type Disk } from './disk.ts'
import type { Life } from './life.ts'

export interface Replica {
  life: Life
  ports: SimulatedPorts
  refresher: Refresher
  accessTokens: AccessTokens
  antiEntropy: AntiEntropy
  /** Resolves when the process accepts requests. */
  listening: Promise<void>
}

export type SimulatedPorts = Pick<
  Ports,
  | 'clock'
  | 'log'
  | 'sealer'
  | 'grants'
  | 'pendingGrants'
  | 'imports'
  | 'replicas'
  | 'revocations'
  | 'authorizationServer'
  | 'spool'
>

/** The revoker's own poll costs an event each five seconds; a round as often as this finds the same work. */
const REVOKE_SECONDS = 15

/** Grants come by logins alone here, so none ever waits for a confirmation, or for its proof. */
const NOTHING_PENDING: Partial<Ports['pendingGrants']> = {
  findWaiting: async () => undefined,
  drop: async () => false,
}
const NOTHING_IMPORTED: Partial<Ports['imports']> = { abandon: async () => [] }

/** Starts the broker's core in a process. */
export function startReplica(
  world: DatabaseWorld & { server: SimulatedServer },
  life: Life,
  disk: Disk,
  settings: RefreshSettings & { cacheTrustMs: number; staleLimitSeconds: number },
): Replica {
  const { witness } = world
  const ports = {
    ...linkDatabase(world, life),
    clock: life.clock,
    log: createLog((event, { error, attemptId: _unseeded, fingerprint: _long, ...fields }) => {
      const code = error instanceof Error ? ` (${error.message})` : ''
      witness.note(life, `log ${event} ${JSON.stringify(fields)}${code}`)
    }),
    sealer: createSimulatedSealer(),
    pendingGrants: NOTHING_PENDING as Ports['pendingGrants'],
    imports: NOTHING_IMPORTED as Ports['imports'],
    authorizationServer: world.server.connect(life, world.step) as Ports['authorizationServer'],
    spool: createSimulatedSpool(world, life, disk),
  }
  const { spool } = ports
  ports.spool = {
    ...spool,
    async write(successor) {
      world.step(life, 'before_spool')
      await life.call<void>((settle) => settle.resolve())
      await spool.write(successor)
      world.step(life, 'after_spool')
      await life.call<void>((settle) => settle.resolve())
    },
  }
  const identity = { replica: life.replica, boot: life.boot }
  const refresher = createRefresher(ports, settings, identity)
  const antiEntropy = createAntiEntropy(ports, settings, identity)
  const accessTokens = createAccessTokens(ports, refresher, {
    ...settings,
    publicUrl: 'https://broker.example',
    tokenCacheTrustMs: settings.cacheTrustMs,
    tokenCacheMax: 10,
  })
  const recovery = createRecovery(ports, refresher, identity)
  const beat = createHeartbeat(ports, { antiEntropy, refresher, recovery }, identity)
  const revoker = createRevoker(ports)
  // As in the broker: nothing else begins before the database has heard of this boot. Kubernetes would start it anew.
  const begin = async () => {
    for (;;) {
      try {
        await beat()
        break
      } catch {
        await life.clock.sleep(1_000)
      }
    }
    const { heartbeatSeconds: intervalSeconds } = settings
    const heartbeat = { intervalSeconds, retrySeconds: 1, event: 'heartbeat_failed' }
    startPeriodic(ports, { ...heartbeat, work: beat })
    antiEntropy.start()
    void antiEntropy.untilDrained.then(() => recovery.run())
    const revoking = { intervalSeconds: REVOKE_SECONDS, event: 'revocations_postponed' }
    startPeriodic(ports, { ...revoking, work: () => revoker.runOnce() })
  }
  return { life, ports, refresher, accessTokens, antiEntropy, listening: begin() }
}

function createLog(write: (event: string, fields: LogFields) => void): Log {
  const line = (event: string, fields: LogFields = {}) => write(event, fields)
  return { trace: line, debug: line, info: line, warn: line, error: line }
}
