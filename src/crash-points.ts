// Places where a test may have the process die: before and after each step of a rotation, a refusal and a disconnection
// that another process could see. They stand at the ports, so the engine itself knows nothing of them. Never set in
// production; serving with one set is said aloud in the log.

import type { AttemptOutcome } from './grant.ts'
import type { Ports } from './ports.ts'

export const CRASH_POINTS = [
  'before_arm',
  'after_arm',
  'before_send',
  'after_answer',
  'before_spool',
  'after_spool',
  'before_store',
  'after_store',
  'after_doubt',
  'after_refusal',
  'after_verdict',
  'after_close',
  'after_revoke',
] as const
export type CrashPoint = (typeof CRASH_POINTS)[number]

/** Where a process is that has written how an attempt ended. */
const AFTER_END: Partial<Record<AttemptOutcome, CrashPoint>> = {
  in_doubt: 'after_doubt',
  refused: 'after_refusal',
}

/** Returns ports that call `crash`, which must not return, when the process reaches `point`. */
export function withCrashPoint(ports: Ports, point: CrashPoint, crash: () => never): Ports {
  const reach = (here: CrashPoint) => {
    if (here === point) crash()
  }
  async function around<T>(before: CrashPoint, after: CrashPoint, work: () => Promise<T>) {
    reach(before)
    const result = await work()
    reach(after)
    return result
  }
  const { grants, spool, authorizationServer } = ports
  async function then<T>(after: CrashPoint | undefined, work: Promise<T>) {
    const result = await work
    if (after !== undefined) reach(after)
    return result
  }
  return {
    ...ports,
    grants: {
      ...grants,
      arm: (request) => around('before_arm', 'after_arm', () => grants.arm(request)),
      store: (successor) => around('before_store', 'after_store', () => grants.store(successor)),
      disarm: (end) => then(AFTER_END[end.outcome], grants.disarm(end)),
      condemn: (...verdict) => then('after_verdict', grants.condemn(...verdict)),
      close: (...closing) => then('after_close', grants.close(...closing)),
    },
    spool: {
      ...spool,
      write: (successor) => around('before_spool', 'after_spool', () => spool.write(successor)),
    },
    authorizationServer: {
      ...authorizationServer,
      refresh: (refreshToken, limits) =>
        around('before_send', 'after_answer', () =>
          authorizationServer.refresh(refreshToken, limits),
        ),
      revoke: (refreshToken) => then('after_revoke', authorizationServer.revoke(refreshToken)),
    },
  }
}
