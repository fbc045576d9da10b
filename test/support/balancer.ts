// A load balancer as small as one can be: it sends a call to the next replica whose /readyz said yes when it last
// looked, and repeats nothing.

import { setTimeout as delay } from 'node:timers/promises'
import type { Answer, Replica } from './replica.ts'

/** A tenth of what SHUTDOWN_LISTEN_SECONDS leaves it in the tests. */
const LOOK_EVERY_MS = 100

export interface Balancer {
  token(user: string): Promise<Answer>
  stop(): Promise<void>
}

/** Starts to look at the replicas; resolves when one is ready. */
export async function startBalancer(replicas: readonly Replica[]): Promise<Balancer> {
  const ready = new Set<Replica>()
  let turn = 0
  let stopped = false
  const look = async (replica: Replica) => {
    while (!stopped) {
      if ((await replica.ready()).status === 200) ready.add(replica)
      else ready.delete(replica)
      await delay(LOOK_EVERY_MS)
    }
  }
  const looking = Promise.all(replicas.map(look))
  while (ready.size === 0) await delay(10)
  return {
    async token(user) {
      const choice = [...ready]
      const replica = choice[(turn += 1) % choice.length]
      if (replica === undefined) return { status: 0, body: { error: 'none ready' }, tookMs: 0 }
      return replica.token(user)
    },
    async stop() {
      stopped = true
      await looking
    },
  }
}
