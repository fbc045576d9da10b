// Refreshes hold no connection to PostgreSQL while Pagero takes its time: two connections are enough for many.

import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import { parseUserKey, type UserKey } from '../src/grant.ts'
import { openDatabase } from '../src/postgres/database.ts'
import { createGrantStore } from '../src/postgres/grant-store.ts'
import { Secret } from '../src/secret.ts'
import { setScene } from './support/engine.ts'
import { holdAnswers, inParallel, until } from './support/fleet.ts'
import { silentLog } from './support/silent-log.ts'

const APPLICATION = 'two connections'
const USERS = 50
const ANSWER_MS = 20_000

t.setTimeout(180_000)

t.test(
  'two connections, fifty refreshes, answers of twenty seconds: other queries stay fast',
  async (t) => {
    const scene = await setScene(t)
    const database = openDatabase(
      { url: new Secret(scene.url), poolMax: 2, applicationName: APPLICATION },
      silentLog,
    )
    t.teardown(() => database.close())
    const engine = await scene.startEngine({
      // As in production; half of what a caller waits for its turn is enough for all of them.
      refresh: { concurrency: USERS, deadlineSeconds: 45, leaseSeconds: 60, callerWaitSeconds: 30 },
      replace: {
        grants: createGrantStore(database, {
          refreshTokenLifetime: 'P3Y',
          ...{ heartbeatStaleSeconds: 20, databaseSettleSeconds: 0, zombieWaitSeconds: 600 },
        }),
      },
    })
    const names = Array.from({ length: USERS }, (_, n) => `user-${n}`)
    await inParallel([...names, 'rested'], 8, (name) => scene.connect(engine, name))
    // Until the server has accepted the client once, few are presented at a time.
    await scene.expire('rested' as UserKey)
    await engine.accessTokens.fresh('rested' as UserKey)
    const before = scene.refreshes().length
    for (const name of names) await scene.expire(name as UserKey)
    const letGo = holdAnswers(scene, USERS)
    t.teardown(letGo)

    const startedAtMs = performance.now()
    const answers = names.map((name) => engine.accessTokens.fresh(name as UserKey))
    await until(() => scene.refreshes().length - before === USERS, 10_000, 'fifty calls')
    const rested = parseUserKey('rested') as UserKey
    const tookMs: number[] = []
    const open = new Set<string>()
    while (performance.now() - startedAtMs < ANSWER_MS) {
      const beforeMs = performance.now()
      await engine.accessTokens.fresh(rested)
      tookMs.push(performance.now() - beforeMs)
      const { rows } = await scene.database.pool.query<{ state: string }>(
        `select state from pg_stat_activity
       where application_name = $1 and state not in ('idle', 'active')`,
        [APPLICATION],
      )
      for (const { state } of rows) open.add(state)
      await delay(50)
    }
    t.equal(scene.refreshes().filter(({ endedAt }) => endedAt === undefined).length, USERS)
    letGo()
    t.equal((await Promise.all(answers)).length, USERS, 'and all are served in the end')
    t.strictSame([...open], [], 'no transaction is open')
    tookMs.sort((a, b) => a - b)
    t.ok(tookMs.length > 50)
    t.ok(
      (tookMs[Math.floor(tookMs.length * 0.9)] ?? Infinity) < 250,
      'nine of ten in a quarter of a second',
    )
  },
)
