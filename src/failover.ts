// The heartbeat, and what follows when it meets another database server than the last time: a standby that took over may
// lack the last commits; to one that knows nothing of a replica all is owed that its spool holds. Until every replica that
// lived then has brought back what it holds, the store lets nobody arm.

import type { AntiEntropy } from './anti-entropy.ts'
import type { Ports } from './ports.ts'
import type { ReplicaStore } from './grant-stores.ts'
import type { Recovery } from './recovery.ts'
import type { Refresher } from './refresh.ts'

/**
 * Makes the heartbeat of a process: a function that says that it lives, and begins to bring back what it holds when that
 * is owed. What fails is done again with a later beat.
 * @throws BrokerError `temporarily_unavailable` when the database cannot be written
 */
export function createHeartbeat(
  ports: Pick<Ports, 'log'> & {
    replicas: Pick<ReplicaStore, 'heartbeat' | 'restored'>
    spool: Pick<Ports['spool'], 'isEmpty'>
  },
  parts: {
    antiEntropy: Pick<AntiEntropy, 'runOnce'>
    refresher: Pick<Refresher, 'restore'>
    recovery: Pick<Recovery, 'run'>
  },
  { replica, boot }: { replica: string; boot: string },
): () => Promise<void> {
  const { log, replicas, spool } = ports
  const { antiEntropy, refresher, recovery } = parts
  let isRestoring = false

  async function restore(server: string): Promise<void> {
    log.warn('database_server_replaced')
    // What is under way first: an answer that comes meanwhile is stored and spooled, and the pass finds it.
    const isTold = await refresher.restore()
    if (!(await antiEntropy.runOnce()) || !isTold) return
    try {
      await replicas.restored(replica, boot, server)
    } finally {
      // What has failed may have been written all the same, and then no later beat comes here again.
      recovery.run()
    }
  }

  return async () => {
    const owed = await replicas.heartbeat(replica, boot, !spool.isEmpty())
    if (owed === undefined || isRestoring) return
    isRestoring = true
    void restore(owed)
      .catch((error: unknown) => log.warn('database_not_restored', { error }))
      .finally(() => (isRestoring = false))
  }
}
