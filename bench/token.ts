// The token path, measured: from memory, cold, refreshed, how much memory, and whether the number of grants matters.
// Each figure stands beside the barest thing that does the same, taken in the same run, turn about. About three minutes.

import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { freePorts } from '../test/support/free-ports.ts'
import { type RunningBroker, startBroker } from './support/broker.ts'
import {
  interleave,
  machineFacts,
  median,
  milliseconds,
  rateText,
  ratioOfRounds,
  type Row,
  tableOf,
  type Taken,
} from './support/figures.ts'
import {
  addFiller,
  addUsers,
  createDatabase,
  encryptionKey,
  postmasterOf,
  TOKEN_CHARACTERS,
  using,
  startPostgres,
} from './support/grants.ts'
import { CONNECTIONS, generator, load, type Load, type LoadResult } from './support/load.ts'
import { addPgbenchRows, measureTwoStatements, refreshPeer } from './support/pgbench.ts'
import {
  answers,
  canPin,
  cpuUs,
  pin,
  type Program,
  residentMiB,
  startProgram,
} from './support/processes.ts'

const ROUNDS = 5
const SECONDS = 2
/** Users who are asked for all the time; each is checked with PostgreSQL once a second. */
const HOT_USERS = 100
/** More than the broker keeps in memory: asked for in turn, each has been forgotten when it comes round again. */
const COLD_USERS = 110_000
/** What a broker keeps in memory. */
const CACHED_MAX = 100_000
const GRANTS_FEW = 1_000
const GRANTS_MANY = 1_000_000
/** Users to refresh in one round, each once: more than a round can take. */
const EXPIRED_PER_ROUND = 8_000
/** The longer the way through the code, the longer it takes until all of it has been compiled. */
const WARMING_ROUNDS = 4
/** The longest way of all, and the fewest of it in a second. */
const REFRESH_WARMING_ROUNDS = 8
const EXPIRED_USERS = EXPIRED_PER_ROUND * (REFRESH_WARMING_ROUNDS + ROUNDS)
const PGBENCH_PER_CLIENT = 1_000
/** The broker's own, so that both sides have as many connections. */
const POOL_MAX = 10

/** What is running, to be taken down in the reverse order. */
type Stops = Array<() => Promise<unknown>>

interface Setting {
  directory: string
  /** A million grants, of which `COLD_USERS` can be asked for; a thousand; and those that are to be refreshed. */
  urls: { many: string; few: string; expired: string }
  tokenPort: number
  stops: Stops
}

/** Takes all measures and prints their table. */
export async function measureTokenPath(): Promise<void> {
  const startedMs = performance.now()
  await thenStop(async (stops) => {
    const setting = await setUp(stops)
    say(`prepared in ${secondsSince(startedMs)} s`)
    // Nothing that one of them has started runs beside the next.
    const rows: Row[] = []
    for (const measure of [measureReads, measureRefreshes, measureSize]) {
      rows.push(...(await thenStop((own) => measure({ ...setting, stops: own }))))
    }
    const notes = [
      `load by ${generator}, ${CONNECTIONS} connections`,
      canPin ? 'what is measured alone on one CPU' : 'processes not bound to CPUs',
      `${ROUNDS} rounds of ${SECONDS} s, turn about, medians`,
    ]
    process.stdout.write(`\n${machineFacts(notes)}\n\n${tableOf(rows)}\n`)
    say(`took ${secondsSince(startedMs)} s`)
  })
}

/** Runs `work`, and then stops what it has started, the last first. */
async function thenStop<T>(work: (stops: Stops) => Promise<T>): Promise<T> {
  const stops: Stops = []
  try {
    return await work(stops)
  } finally {
    for (const stop of stops.toReversed()) await stop()
  }
}

async function setUp(stops: Stops): Promise<Setting> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-bench-'))
  stops.push(() => rm(directory, { recursive: true, force: true }))
  const server = await startPostgres(directory, stops)
  await using(server, async ({ pool }) => {
    await pool.query(`alter system set max_wal_size = '16GB'`)
    await pool.query('select pg_reload_conf()')
  })
  const many = await createDatabase(server, 'many', async (database) => {
    await addUsers(database, COLD_USERS, 'fresh')
    await addFiller(database, GRANTS_MANY - COLD_USERS, COLD_USERS)
  })
  const few = await createDatabase(server, 'few', (database) =>
    addUsers(database, GRANTS_FEW, 'fresh'),
  )
  const expired = await createDatabase(server, 'expired', async (database) => {
    await addUsers(database, EXPIRED_USERS, 'expired')
    await addPgbenchRows(database, PGBENCH_PER_CLIENT * ROUNDS)
  })
  // After the filling, which may take both CPUs.
  pin('around', await postmasterOf(server))
  const [tokenPort = 0] = await freePorts(1)
  await start(stops, directory, 'instant-server', {
    place: 'around',
    port: tokenPort,
    env: { TOKEN_CHARACTERS: String(TOKEN_CHARACTERS) },
  })
  return { directory, urls: { many, few, expired }, tokenPort, stops }
}

/** Starts one of the programs of `support/`. */
async function start(
  stops: Stops,
  directory: string,
  name: string,
  options: { place: 'measured' | 'around'; port: number; env: Readonly<Record<string, string>> },
): Promise<Program> {
  const probe = name === 'minimal-server' ? '/constant/1' : '/'
  const program = await startProgram({
    place: options.place,
    parameters: [`bench/support/${name}.ts`],
    env: { PORT: String(options.port), ...options.env },
    outputFile: join(directory, `${name}.log`),
    ready: answers(`http://127.0.0.1:${options.port}${probe}`),
  })
  stops.push(() => program.stop())
  return program
}

async function startMeasured(
  { directory, tokenPort, stops }: Setting,
  name: string,
  databaseUrl: string,
  env: Readonly<Record<string, string>> = {},
): Promise<RunningBroker> {
  const broker = await startBroker(directory, name, { databaseUrl, tokenPort, env })
  stops.push(() => broker.stop())
  return broker
}

// ── From memory, cold, and how much memory ───────────────────────────────────────────────────────

async function measureReads(setting: Setting): Promise<Row[]> {
  const broker = await startMeasured(setting, 'reads', setting.urls.many)
  const [minimalPort = 0, selectPort = 0, barePort = 0] = await freePorts(3)
  const sample = await fetch(`http://127.0.0.1:${broker.port}/v1/users/user-0000000/access-token`, {
    headers: { authorization: broker.authorization },
  })
  const bytes = Buffer.byteLength(await sample.text())
  const minimal = await start(setting.stops, setting.directory, 'minimal-server', {
    place: 'measured',
    port: minimalPort,
    env: { BYTES: String(bytes) },
  })
  await start(setting.stops, setting.directory, 'bare-select', {
    place: 'measured',
    port: selectPort,
    env: {
      DATABASE_URL: setting.urls.many,
      POOL_MAX: String(POOL_MAX),
      CONNECTIONS: String(CONNECTIONS),
    },
  })
  const bare = await start(setting.stops, setting.directory, 'bare-cold', {
    place: 'measured',
    port: barePort,
    env: {
      DATABASE_URL: setting.urls.many,
      KEY: `${encryptionKey.keyId}:${encryptionKey.key.toString('base64')}`,
    },
  })
  const constant = { port: minimalPort, path: '/constant/{number}', first: 0, count: 1 }
  const hot = tokenLoad(broker, 0, HOT_USERS)
  const p99sUs = { constant: [] as number[], hot: [] as number[] }
  const takeNoting = async (program: Program, target: Load, p99s: number[]) => {
    const { taken, result } = await take(program, target)
    p99s.push(result.p99Us)
    return taken
  }
  for (let warming = 0; warming < WARMING_ROUNDS; warming += 1) {
    await load(SECONDS, constant)
    await load(SECONDS, hot)
  }
  const memory = await interleave(ROUNDS, {
    constant: () => takeNoting(minimal, constant, p99sUs.constant),
    hot: () => takeNoting(broker, hot, p99sUs.hot),
  })
  const state = await interleave(ROUNDS, {
    constant: async () => (await take(minimal, constant)).taken,
    grant: async () =>
      (await take(broker, { ...hot, path: '/v1/users/user-{number}/grant' })).taken,
  })
  say('from memory: measured')

  let coldFirst = 0
  let selectFirst = 0
  let bareFirst = 0
  const readBarely = async () => {
    const target = { ...tokenLoad(broker, bareFirst, COLD_USERS), port: barePort }
    const { taken, result } = await take(bare, target)
    bareFirst += result.answered
    return taken
  }
  const readCold = async () => {
    const { taken, result } = await take(broker, tokenLoad(broker, coldFirst, COLD_USERS))
    coldFirst += result.answered
    return taken
  }
  const select = async () => {
    const query = `seconds=${SECONDS}&first=${selectFirst}&count=${COLD_USERS}`
    const response = await fetch(`http://127.0.0.1:${selectPort}/?${query}`)
    const result = (await response.json()) as LoadResult
    selectFirst += result.answered
    return { perSecond: result.answered / result.seconds }
  }
  for (let warming = 0; warming < WARMING_ROUNDS; warming += 1) {
    await select()
    await readBarely()
    await readCold()
  }
  const cold = await interleave(ROUNDS, { select, bare: readBarely, broker: readCold })
  say('cold: measured')

  while (coldFirst < COLD_USERS) await readCold()
  const p99 = { constant: median(p99sUs.constant), hot: median(p99sUs.hot) }
  return [
    { what: `Fastify, constant string of ${bytes} bytes`, figure: rateText(memory.constant) },
    {
      what: `token from memory (${HOT_USERS} users)`,
      figure: rateText(memory.hot),
      ratio: {
        ...ratioOfRounds(memory.hot, memory.constant),
        to: 'Fastify',
        goal: { atLeast: 0.75 },
      },
    },
    {
      what: 'its 99th percentile',
      figure: `${milliseconds(p99.hot)} (Fastify ${milliseconds(p99.constant)})`,
      ratio: { value: p99.hot / p99.constant, to: "Fastify's", goal: { below: 3 } },
    },
    {
      what: 'state of a grant (one select a request)',
      figure: rateText(state.grant),
      ratio: { ...ratioOfRounds(state.grant, state.constant), to: 'Fastify' },
    },
    { what: 'bare named select, no HTTP', figure: rateText(cold.select) },
    {
      what: 'HTTP, one select for many and unsealing alone',
      figure: rateText(cold.bare),
      ratio: { ...ratioOfRounds(cold.bare, cold.select), to: 'the bare select' },
    },
    {
      what: 'token read cold',
      figure: rateText(cold.broker),
      ratio: {
        ...ratioOfRounds(cold.broker, cold.select),
        to: 'the bare select',
        goal: { atLeast: 0.8 },
      },
    },
    memoryRow(residentMiB(broker.child)),
  ]
}

function memoryRow(rssMiB: number): Row {
  return {
    what: `memory with ${CACHED_MAX.toLocaleString('en')} tokens cached`,
    figure: `${Math.round(rssMiB)} MiB`,
    ratio: { value: rssMiB / 250, to: '250 MiB', goal: { below: 1 } },
  }
}

function tokenLoad({ port, authorization }: RunningBroker, first: number, count: number): Load {
  return {
    port,
    path: '/v1/users/user-{number}/access-token',
    first,
    count,
    fields: { authorization },
  }
}

// ── Refreshes ────────────────────────────────────────────────────────────────────────────────────

async function measureRefreshes(setting: Setting): Promise<Row[]> {
  const url = setting.urls.expired
  const broker = await startMeasured(setting, 'refreshes', url)
  let first = 0
  const refresh = async () => {
    const { taken, result } = await take(broker, tokenLoad(broker, first, EXPIRED_USERS))
    if (result.answered > EXPIRED_PER_ROUND) throw new Error('Some users were asked for twice.')
    first += result.answered
    return taken
  }
  let round = 0
  for (let warming = 0; warming < REFRESH_WARMING_ROUNDS; warming += 1) await refresh()
  const rates = await interleave(ROUNDS, {
    statements: async () => ({
      perSecond: await measureTwoStatements(url, join(setting.directory, 'refresh.sql'), {
        first: PGBENCH_PER_CLIENT * round++,
        count: PGBENCH_PER_CLIENT,
      }),
    }),
    broker: refresh,
  })
  const granted = await using(url, async ({ pool }) => {
    const { rows } = await pool.query<{ count: number }>(
      `select count(*) from grants where generation = 2 and user_id like 'user-%'`,
    )
    return rows[0]?.count ?? 0
  })
  if (granted < first) throw new Error(`${first} refreshes were answered, ${granted} stored.`)
  say('refreshes: measured')
  return [
    { what: `arm and store, durable, by ${refreshPeer}`, figure: rateText(rates.statements) },
    {
      what: 'refresh over HTTP, the authorization server answering at once',
      figure: rateText(rates.broker),
      ratio: {
        ...ratioOfRounds(rates.broker, rates.statements),
        to: 'the two statements',
        goal: { atLeast: 0.5 },
      },
    },
  ]
}

// ── Few and many grants ──────────────────────────────────────────────────────────────────────────

async function measureSize(setting: Setting): Promise<Row[]> {
  // With no trust in memory every request reads its row.
  const env = { TOKEN_CACHE_TRUST_MS: '0' }
  const few = await startMeasured(setting, 'few', setting.urls.few, env)
  const many = await startMeasured(setting, 'many', setting.urls.many, env)
  await load(SECONDS, tokenLoad(few, 0, GRANTS_FEW))
  await load(SECONDS, tokenLoad(many, 0, GRANTS_FEW))
  const rates = await interleave(ROUNDS, {
    few: async () => (await take(few, tokenLoad(few, 0, GRANTS_FEW))).taken,
    many: async () => (await take(many, tokenLoad(many, 0, GRANTS_FEW))).taken,
  })
  return [
    {
      what: `row read for each request, among ${GRANTS_FEW.toLocaleString('en')} grants`,
      figure: rateText(rates.few),
    },
    {
      what: `the same among ${GRANTS_MANY.toLocaleString('en')}`,
      figure: rateText(rates.many),
      ratio: { ...ratioOfRounds(rates.many, rates.few), to: 'few', goal: { atLeast: 0.9 } },
    },
  ]
}

/** Loads the program for a round, and reckons what it spent on it. */
async function take(
  { child }: Program,
  target: Load,
): Promise<{ taken: Taken; result: LoadResult }> {
  const beforeUs = cpuUs(child)
  const result = await load(SECONDS, target)
  const taken = {
    perSecond: result.answered / result.seconds,
    cpuUs: (cpuUs(child) - beforeUs) / result.answered,
  }
  return { taken, result }
}

function secondsSince(startedMs: number): string {
  return ((performance.now() - startedMs) / 1000).toFixed(0)
}

/** Progress goes beside the table, so that the table alone can be kept. */
function say(line: string): void {
  process.stderr.write(`${line}\n`)
}
