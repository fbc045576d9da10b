// The forwarder, measured: both of the broker's proxies with everything that they check, beside Fastify's own proxy plugin,
// Debian's nginx, and the least that Node can do. All before the same API, which asks for nothing and costs next to nothing,
// none with TLS. First small JSON, then 1 GiB each way. About three minutes.

import { execFile } from 'node:child_process'
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { freePorts } from '../test/support/free-ports.ts'
import { NODE_ENVIRONMENT, NODE_PARAMETERS, startBroker } from './support/broker.ts'
import {
  interleave,
  machineFacts,
  type Measured,
  rateText,
  ratioOfRounds,
  type Row,
  tableOf,
  type Taken,
} from './support/figures.ts'
import {
  addSessions,
  addUsers,
  createDatabase,
  sessionTokenOf,
  startPostgres,
} from './support/grants.ts'
import { CONNECTIONS, generator, load } from './support/load.ts'
import { nginxVersion, startNginx } from './support/nginx.ts'
import {
  answers,
  canPin,
  cpuUs,
  forgetPeak,
  peakMiB,
  type Place,
  placed,
  type Program,
  residentMiB,
  startProgram,
} from './support/processes.ts'

/** What one round is. */
interface Size {
  smallRounds: number
  seconds: number
  largeRounds: number
  largeBytes: number
}

const WHOLE: Size = { smallRounds: 7, seconds: 2, largeRounds: 5, largeBytes: 1_073_741_824 }
/** Too short to be quoted: it shows that everything works. */
const QUICK: Size = { smallRounds: 1, seconds: 1, largeRounds: 1, largeBytes: 67_108_864 }

/** Users whose calls come all the time; session and grant of each are checked with PostgreSQL once a second. */
const HOT_USERS = 100
/** Their digits, and those of the one who sends large bodies. */
const FIRST_USER = '0000000'
const BODY = JSON.stringify({ filler: 'x'.repeat(1_000) })
const DOCUMENTS = '/document/v1/documents'
const FILES = '/file/v1/files'

const PLUGIN = '@fastify/http-proxy'
const MIB = 1_048_576
const GROWTH_MIB_MAX = 64

/** What a page of the application sends with its fetches. */
const PAGE_FIELDS = {
  accept: 'application/json',
  cookie: `__Host-broker-session=${sessionTokenOf('{number}')}`,
  'sec-fetch-site': 'same-origin',
  'x-csrf': '1',
}

/** One server, and how it is called. */
interface Contender {
  program: Program
  port: number
  /** Path of the API's root at it. */
  root: string
  fields: Readonly<Record<string, string>>
}

type Name = 'nginx' | 'pipe' | 'plugin' | 'sessions' | 'callers'
type Contenders = Readonly<Record<Name, Contender>>

interface Setting {
  directory: string
  databaseUrl: string
  stops: Array<() => Promise<unknown>>
}

/** Takes all measures and prints their table. `quick` shows that everything works; its figures are not worth quoting. */
export async function measureProxy({ quick }: { quick: boolean }): Promise<void> {
  const nginx = nginxVersion()
  const size = quick ? QUICK : WHOLE
  const stops: Setting['stops'] = []
  const startedMs = performance.now()
  try {
    const setting = await setUp(stops)
    const rows = [...(await measureSmall(setting, size)), ...(await measureLarge(setting, size))]
    const notes = [
      nginx,
      `load by ${generator}, ${CONNECTIONS} connections; one for large bodies`,
      canPin ? 'what is measured alone on one CPU' : 'processes not bound to CPUs',
      `${size.smallRounds} rounds of ${size.seconds} s, ${size.largeRounds} of ${sizeText(size)}, turn about; medians, in brackets the least and the most of a round`,
    ]
    process.stdout.write(`${machineFacts(notes)}\n\n${tableOf(rows)}\n`)
    process.stderr.write(`took ${((performance.now() - startedMs) / 1000).toFixed(0)} s\n`)
  } finally {
    for (const stop of stops.toReversed()) await stop()
  }
}

async function setUp(stops: Setting['stops']): Promise<Setting> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-bench-'))
  stops.push(() => rm(directory, { recursive: true, force: true }))
  // nginx's workers may have another user.
  await chmod(directory, 0o755)
  const server = await startPostgres(directory, stops)
  const databaseUrl = await createDatabase(server, 'few', async (database) => {
    await addUsers(database, HOT_USERS, 'fresh')
    await addSessions(database, HOT_USERS)
  })
  return { directory, databaseUrl, stops }
}

// ── The servers ──────────────────────────────────────────────────────────────────────────────────

/** Starts all contenders before an API; their files have names that begin with `kind`. */
async function startContenders(
  { directory, databaseUrl, stops }: Setting,
  kind: string,
  api: number,
): Promise<Contenders> {
  const [nginxPort = 0, pipePort = 0, pluginPort = 0] = await freePorts(3)
  const UPSTREAM = `http://127.0.0.1:${api}`
  const nginx = await startNginx({
    directory,
    name: `${kind}-nginx`,
    place: 'measured',
    http: proxyRules(nginxPort, api),
    probe: `http://127.0.0.1:${nginxPort}/api${DOCUMENTS}`,
  })
  stops.push(() => nginx.stop())
  const startPeer = async (program: string, port: number, env = {}) => {
    const started = await startNode({
      directory,
      kind,
      program,
      place: 'measured',
      port,
      env: { ...env, UPSTREAM },
    })
    stops.push(() => started.stop())
    return started
  }
  const pipe = await startPeer('pipe-server', pipePort, { CONNECTIONS: String(CONNECTIONS) })
  const plugin = await startPeer('http-proxy-server', pluginPort)
  const broker = await startBroker(directory, `${kind}-broker`, { databaseUrl, tokenPort: api })
  stops.push(() => broker.stop())

  const page = { root: '/api', fields: PAGE_FIELDS }
  return {
    nginx: { program: nginx, port: nginxPort, ...page },
    pipe: { program: pipe, port: pipePort, ...page },
    plugin: { program: plugin, port: pluginPort, ...page },
    sessions: { program: broker, port: broker.publicPort, ...page },
    callers: {
      program: broker,
      port: broker.port,
      root: '/v1/users/user-{number}/pagero',
      fields: { accept: 'application/json', authorization: broker.authorization },
    },
  }
}

function startNode(options: {
  directory: string
  kind: string
  program: string
  place: Place
  port: number
  env?: Readonly<Record<string, string>>
}): Promise<Program> {
  return startProgram({
    place: options.place,
    parameters: [...NODE_PARAMETERS, `bench/support/${options.program}.ts`],
    env: { ...NODE_ENVIRONMENT, ...options.env, PORT: String(options.port) },
    outputFile: join(options.directory, `${options.kind}-${options.program}.log`),
    ready: answers(`http://127.0.0.1:${options.port}/api${DOCUMENTS}`),
  })
}

/** An API that costs as little as it can. */
function apiRules(port: number): string {
  return `access_log off;
    keepalive_requests 1000000;
    server {
      listen 127.0.0.1:${port};
      location / {
        default_type application/json;
        return 200 '${BODY}';
      }
    }`
}

/** A proxy with connections kept open, bodies passed on as they come, and nothing looked at. */
function proxyRules(port: number, api: number): string {
  return `access_log off;
    upstream api {
      server 127.0.0.1:${api};
      keepalive ${CONNECTIONS};
      keepalive_requests 1000000;
    }
    server {
      listen 127.0.0.1:${port};
      client_max_body_size 0;
      location /api/ {
        proxy_pass http://api/;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_request_buffering off;
        proxy_buffers 8 128k;
        proxy_max_temp_file_size 0;
      }
    }`
}

// ── Small calls ──────────────────────────────────────────────────────────────────────────────────

async function measureSmall(setting: Setting, size: Size): Promise<Row[]> {
  const { directory, stops } = setting
  const [api = 0] = await freePorts(1)
  const upstream = await startNginx({
    directory,
    name: 'api',
    place: 'around',
    http: apiRules(api),
    probe: `http://127.0.0.1:${api}/`,
  })
  stops.push(() => upstream.stop())
  const contenders = await startContenders(setting, 'small', api)
  const rows: Row[] = []
  for (const method of ['GET', 'POST'] as const) {
    const take = (name: Name) => () => takeSmall(contenders[name], method, size.seconds)
    const takes = {
      nginx: take('nginx'),
      pipe: take('pipe'),
      plugin: take('plugin'),
      sessions: take('sessions'),
      callers: take('callers'),
    }
    // Once before anything is measured, so that code and connections are warm.
    await interleave(1, takes)
    const measured = await interleave(size.smallRounds, takes)
    rows.push(...smallRows(`${method} of 1 kB`, measured))
  }
  return rows
}

async function takeSmall(
  { program, port, root, fields }: Contender,
  method: 'GET' | 'POST',
  seconds: number,
): Promise<Taken> {
  const beforeUs = cpuUs(program.child)
  const result = await load(seconds, {
    port,
    path: root + DOCUMENTS,
    first: 0,
    count: HOT_USERS,
    method,
    ...(method === 'POST' ? { body: BODY } : {}),
    fields: method === 'POST' ? { ...fields, 'content-type': 'application/json' } : fields,
  })
  return {
    perSecond: result.answered / result.seconds,
    cpuUs: (cpuUs(program.child) - beforeUs) / result.answered,
  }
}

function smallRows(what: string, measured: Readonly<Record<Name, Measured>>): Row[] {
  const { nginx, plugin } = measured
  const judged = (of: string, one: Measured): Row[] => [
    {
      what: `${what}: ${of}`,
      figure: rateText(one),
      ratio: { ...ratioOfRounds(one, plugin), to: PLUGIN, goal: { atLeast: 1.7 } },
    },
    {
      what: 'the same',
      figure: '',
      ratio: { ...ratioOfRounds(one, nginx), to: 'nginx', goal: { atLeast: 0.25 } },
    },
  ]
  return [
    { what: `${what}: nginx`, figure: rateText(nginx) },
    { what: `${what}: bare ${PLUGIN}`, figure: rateText(plugin) },
    { what: `${what}: bare undici pipe`, figure: rateText(measured.pipe) },
    ...judged('the broker, a page with its session', measured.sessions),
    ...judged('the broker, a service with its key', measured.callers),
  ]
}

// ── Large bodies ─────────────────────────────────────────────────────────────────────────────────

type Direction = 'down' | 'up'

async function measureLarge(setting: Setting, size: Size): Promise<Row[]> {
  const [api = 0] = await freePorts(1)
  const upstream = await startNode({
    directory: setting.directory,
    kind: 'large',
    program: 'bulk-server',
    place: 'around',
    port: api,
  })
  setting.stops.push(() => upstream.stop())
  const contenders = await startContenders(setting, 'large', api)
  const all = Object.values(contenders)
  // Once before anything is measured, so that code and buffers are warm.
  for (const contender of all) {
    await takeLarge(contender, 'down', QUICK.largeBytes)
    await takeLarge(contender, 'up', QUICK.largeBytes)
  }
  const { nginx, pipe, sessions } = contenders
  const beforeMiB = residentMiB(sessions.program.child)
  for (const { program } of all) forgetPeak(program.child)
  const rows: Row[] = []
  for (const direction of ['down', 'up'] as const) {
    const take = (name: Name) => () => takeLarge(contenders[name], direction, size.largeBytes)
    const measured = await interleave(size.largeRounds, {
      nginx: take('nginx'),
      pipe: take('pipe'),
      plugin: take('plugin'),
      sessions: take('sessions'),
      callers: take('callers'),
    })
    rows.push(...largeRows(`${sizeText(size)} ${direction}`, measured))
  }
  const peakOf = ({ program }: Contender) => Math.round(peakMiB(program.child))
  const growthMiB = peakMiB(sessions.program.child) - beforeMiB
  return [
    ...rows,
    {
      what: 'memory that the broker takes for it',
      figure: `${Math.round(growthMiB)} MiB, at most ${peakOf(sessions)} MiB in all (undici pipe ${peakOf(pipe)}, nginx ${peakOf(nginx)})`,
      ratio: { value: growthMiB / GROWTH_MIB_MAX, to: `${GROWTH_MIB_MAX} MiB`, goal: { below: 1 } },
    },
  ]
}

/** Sends a body through, and reckons the CPU time for each mebibyte. */
async function takeLarge(
  { program, port, root, fields }: Contender,
  direction: Direction,
  bytes: number,
): Promise<Taken> {
  const named = (text: string) => text.replaceAll('{number}', FIRST_USER)
  const beforeUs = cpuUs(program.child)
  const [command, ...parameters] = placed('around', [
    process.execPath,
    fileURLToPath(new URL('support/bulk-client.ts', import.meta.url)),
    direction,
    String(port),
    `${named(root)}${FILES}?${bytes}`,
    String(bytes),
    ...Object.entries(fields).flat().map(named),
  ])
  const { stdout } = await promisify(execFile)(command, parameters)
  const { seconds } = JSON.parse(/^RESULT (.*)$/m.exec(stdout)?.[1] ?? '') as { seconds: number }
  const mebibytes = bytes / MIB
  return {
    perSecond: mebibytes / seconds,
    cpuUs: (cpuUs(program.child) - beforeUs) / mebibytes,
  }
}

function largeRows(what: string, measured: Readonly<Record<Name, Measured>>): Row[] {
  const judged = (of: string, one: Measured): Row => ({
    what: `${what}: ${of}`,
    figure: bulkText(one),
    ratio: { ...ratioOfRounds(one, measured.pipe), to: 'the pipe', goal: { atLeast: 0.8 } },
  })
  return [
    { what: `${what}: nginx`, figure: bulkText(measured.nginx) },
    { what: `${what}: bare ${PLUGIN}`, figure: bulkText(measured.plugin) },
    { what: `${what}: bare undici pipe`, figure: bulkText(measured.pipe) },
    judged('the broker, a page with its session', measured.sessions),
    judged('the broker, a service with its key', measured.callers),
  ]
}

function bulkText({ perSecond, cpuUs: us = 0 }: Taken): string {
  return `${Math.round(perSecond).toLocaleString('en')} MiB/s, ${((us * 1_024) / 1e6).toFixed(2)} s CPU per GiB`
}

function sizeText({ largeBytes }: Size): string {
  return largeBytes < 1_024 * MIB ? `${largeBytes / MIB} MiB` : `${largeBytes / MIB / 1_024} GiB`
}
