// What comes through when far more is asked for than the broker can do: refreshes, five times as many as it can, for a
// minute. Beside them go tokens that are in memory, which must come all the same. About three minutes.

import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { freePorts } from '../test/support/free-ports.ts'
import { type RunningBroker, startBroker } from './support/broker.ts'
import { machineFacts, milliseconds, tableOf } from './support/figures.ts'
import type { FloodResult } from './support/flood.ts'
import {
  addUsers,
  createDatabase,
  postmasterOf,
  TOKEN_CHARACTERS,
  startPostgres,
} from './support/grants.ts'
import { CONNECTIONS, load } from './support/load.ts'
import { answers, canPin, pin, placed, residentMiB, startProgram } from './support/processes.ts'

const FLOOD = fileURLToPath(new URL('support/flood.ts', import.meta.url))
const USERS = 120_000
const TIMES = 5
const TOKEN = '/v1/users/user-{number}/access-token'
/** Users whose tokens are in memory, and how often they are asked for: a small part of what the broker can do. */
const AT_HAND = 20
const TOKENS_PER_SECOND = 50
const RECOVERY_LIMIT_MS = 5_000
/** So many answers one after the other, and the broker is itself again. */
const IN_A_ROW = 20

/** Takes the measure and prints its table. `quick` shows that everything works; its figures are not worth quoting. */
export async function measureOverload({ quick }: { quick: boolean }): Promise<void> {
  const seconds = quick ? 5 : 60
  const stops: Array<() => Promise<unknown>> = []
  try {
    const directory = await mkdtemp(join(tmpdir(), 'broker-bench-'))
    stops.push(() => rm(directory, { recursive: true, force: true }))
    const server = await startPostgres(directory, stops)
    const databaseUrl = await createDatabase(server, 'flooded', (database) =>
      addUsers(database, USERS, 'expired'),
    )
    pin('around', await postmasterOf(server))
    const [apiPort = 0] = await freePorts(1)
    const api = await startProgram({
      place: 'around',
      parameters: ['bench/support/instant-server.ts'],
      env: { PORT: String(apiPort), TOKEN_CHARACTERS: String(TOKEN_CHARACTERS) },
      outputFile: join(directory, 'api.log'),
      ready: answers(`http://127.0.0.1:${apiPort}/`),
    })
    stops.push(() => api.stop())
    const broker = await startBroker(directory, 'flooded', { databaseUrl, tokenPort: apiPort })
    stops.push(() => broker.stop())
    const fields = { authorization: broker.authorization }
    const target = { port: broker.port, path: TOKEN, count: USERS, fields }
    const warmed = await load(2, { ...target, first: 0 })
    const capable = await load(quick ? 2 : 10, { ...target, first: warmed.answered })
    const capacity = capable.answered / capable.seconds
    const before = residentMiB(broker.child)
    let halfway = 0
    setTimeout(() => (halfway = residentMiB(broker.child)), seconds * 500).unref()
    const first = warmed.answered + capable.answered + CONNECTIONS
    // Whoever came round again would find a token that is fresh.
    const perSecond = Math.min(TIMES * capacity, (USERS - first) / seconds)
    const [flooded, tokens] = await Promise.all([
      flood(broker, { first, count: USERS, perSecond, seconds }),
      // Those of the first users are in memory.
      flood(broker, { first: 0, count: AT_HAND, perSecond: TOKENS_PER_SECOND, seconds }),
    ])
    const recoveryMs = await recovered(broker)
    const after = residentMiB(broker.child)
    const rate = (number: number) => `${Math.round(number / seconds).toLocaleString('en')}/s`
    const rows = [
      {
        what: 'refreshes, as many as it can',
        figure: `${Math.round(capacity).toLocaleString('en')}/s`,
      },
      {
        what: `${(perSecond / capacity).toFixed(1)} times as many asked for`,
        figure: `${rate(flooded.offered - flooded.unsent)} sent, ${rate(flooded.shed)} refused, ${flooded.waiting} waiting at the end, ${flooded.other + flooded.broken + flooded.late} otherwise`,
      },
      {
        what: 'of them made',
        figure: `${rate(flooded.good)}, p99 ${milliseconds(flooded.p99GoodMs * 1000)}`,
        ratio: { value: flooded.good / seconds / capacity, to: 'that', goal: { atLeast: 0.7 } },
      },
      {
        what: 'tokens in memory meanwhile',
        figure: `p99 ${milliseconds(tokens.p99GoodMs * 1000)}`,
        ratio: {
          value: tokens.good / (tokens.offered - tokens.unsent),
          to: 'those asked for',
          goal: { atLeast: 0.99 },
        },
      },
      {
        what: 'until it answers as before',
        figure: milliseconds(recoveryMs * 1000),
        ratio: { value: recoveryMs / RECOVERY_LIMIT_MS, to: '5 s', goal: { below: 1 } },
      },
      {
        what: 'memory before, halfway, after',
        figure: `${[before, halfway, after].map(Math.round).join(', ')} MiB`,
      },
    ]
    const notes = [
      `${seconds} s`,
      canPin ? 'the broker alone on one CPU' : 'processes not bound to CPUs',
      `capacity with ${CONNECTIONS} connections`,
    ]
    process.stdout.write(`${machineFacts(notes)}\n\n${tableOf(rows)}\n`)
  } finally {
    for (const stop of stops.toReversed()) await stop()
  }
}

async function flood(
  broker: RunningBroker,
  size: { first: number; count: number; perSecond: number; seconds: number },
): Promise<FloodResult> {
  const { first, count, perSecond, seconds } = size
  const parameters = [broker.port, TOKEN, first, count, perSecond, seconds].map(String)
  const [program, ...rest] = placed('around', [
    ...['nice', '-n', '19', process.execPath],
    FLOOD,
    ...parameters,
    ...['authorization', broker.authorization],
  ])
  const { stdout } = await promisify(execFile)(program, rest)
  return JSON.parse(/^RESULT (.*)$/m.exec(stdout)?.[1] ?? '') as FloodResult
}

/** Asks one after the other, once the flood is over, until enough are answered in a row; returns how long that took. */
async function recovered(broker: RunningBroker): Promise<number> {
  const startedAtMs = performance.now()
  const url = `http://127.0.0.1:${broker.port}/v1/users/user-0000001/grant`
  for (let inARow = 0; inARow < IN_A_ROW;) {
    const isServed = await fetch(url, { headers: { authorization: broker.authorization } }).then(
      async (answer) => (await answer.arrayBuffer()) && answer.status === 200,
      () => false,
    )
    inARow = isServed ? inARow + 1 : 0
    await delay(10)
    if (performance.now() - startedAtMs > 10 * RECOVERY_LIMIT_MS) return Infinity
  }
  return performance.now() - startedAtMs - IN_A_ROW * 10
}
