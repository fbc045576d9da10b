// Forward-auth, measured: Debian's nginx with the rules of deploy/nginx/pagero-gateway.conf, which asks the broker for
// each call, beside the same nginx with the same rules that asks nobody and sends a constant header. Both without TLS,
// which costs both alike. The gateway shares its CPU with the broker. About a minute.

import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { freePorts } from '../test/support/free-ports.ts'
import { replaced } from '../test/support/nginx.ts'
import { startBroker } from './support/broker.ts'
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
import { addUsers, createDatabase, TOKEN_CHARACTERS, startPostgres } from './support/grants.ts'
import { CONNECTIONS, generator, load } from './support/load.ts'
import { nginxVersion, startNginx } from './support/nginx.ts'
import { canPin, cpuUs, type Place, type Program } from './support/processes.ts'

const RULES = new URL('../deploy/nginx/pagero-gateway.conf', import.meta.url)
interface Size {
  rounds: number
  smallSeconds: number
  /** So long that a round moves hundreds of answers of 10 MB, and one more or less is no matter. */
  largeSeconds: number
}

const WHOLE: Size = { rounds: 5, smallSeconds: 2, largeSeconds: 4 }
const QUICK: Size = { rounds: 1, smallSeconds: 1, largeSeconds: 1 }
/** Users who are asked for all the time; each is checked with PostgreSQL once a second. */
const HOT_USERS = 100
const SMALL_BYTES = 1_000
const LARGE_BYTES = 10_000_000
/** So few that each gets its 10 MB long before a load generator gives up. */
const LARGE_CONNECTIONS = 8

const SMALL = '/document/v1/documents/user-{number}'
const LARGE = '/file/v1/files/user-{number}'

/** Takes all measures and prints their table. `quick` shows that everything works; its figures are not worth quoting. */
export async function measureForwardAuth({ quick }: { quick: boolean }): Promise<void> {
  const nginx = nginxVersion()
  const size = quick ? QUICK : WHOLE
  const stops: Array<() => Promise<unknown>> = []
  try {
    const directory = await mkdtemp(join(tmpdir(), 'broker-bench-'))
    stops.push(() => rm(directory, { recursive: true, force: true }))
    // nginx's workers may have another user.
    await chmod(directory, 0o755)
    const rows = await measure(await startGateways(directory, stops), size)
    const notes = [
      nginx,
      `load by ${generator}, ${CONNECTIONS} connections, ${LARGE_CONNECTIONS} for 10 MB`,
      canPin
        ? 'gateway and broker on one CPU, whose time is theirs together'
        : 'processes not bound to CPUs',
      `${size.rounds} rounds of ${size.smallSeconds} s, ${size.largeSeconds} s for 10 MB, turn about; medians, in brackets the least and the most of a round`,
    ]
    process.stdout.write(`${machineFacts(notes)}\n\n${tableOf(rows)}\n`)
  } finally {
    for (const stop of stops.toReversed()) await stop()
  }
}

/** A gateway, and all that works for it. */
interface Gateway {
  port: number
  programs: readonly Program[]
}

interface Gateways {
  /** The nginx that asks the broker, and the one that asks nobody. */
  asking: Gateway
  plain: Gateway
}

async function startGateways(
  directory: string,
  stops: Array<() => Promise<unknown>>,
): Promise<Gateways> {
  const server = await startPostgres(directory, stops)
  const databaseUrl = await createDatabase(server, 'few', (database) =>
    addUsers(database, HOT_USERS, 'fresh'),
  )
  const [api = 0, asking = 0, plain = 0] = await freePorts(3)
  const broker = await startBroker(directory, 'broker', { databaseUrl, tokenPort: api })
  stops.push(() => broker.stop())

  const start = async (name: string, place: Place, port: number, http: string) => {
    const probe = `http://127.0.0.1:${port}${SMALL.replace('{number}', '0000000')}`
    const nginx = await startNginx({ directory, name, place, http, probe })
    stops.push(() => nginx.stop())
    return nginx
  }
  await writeFile(join(directory, 'large'), Buffer.alloc(LARGE_BYTES, 'pagero'))
  await start('api', 'around', api, apiRules(directory, api))
  await writeFile(
    join(directory, 'pagero-gateway.key'),
    `proxy_set_header Authorization "${broker.authorization}";\n`,
  )
  const rules = await readFile(RULES, 'utf8')
  const shared = { directory, broker: broker.port, api }
  const askingRules = gatewayRules(rules, { ...shared, port: asking })
  const askingNginx = await start('asking', 'measured', asking, askingRules)
  const plainRules = withoutBroker(gatewayRules(rules, { ...shared, port: plain }))
  const plainNginx = await start('plain', 'measured', plain, plainRules)
  return {
    asking: { port: asking, programs: [askingNginx, broker] },
    plain: { port: plain, programs: [plainNginx] },
  }
}

/** An API that costs as little as it can. */
function apiRules(directory: string, port: number): string {
  return `access_log off;
    sendfile on;
    server {
      listen 127.0.0.1:${port};
      location /document/ {
        default_type application/json;
        return 200 '{"filler":"${'x'.repeat(SMALL_BYTES)}"}';
      }
      location /file/ {
        root ${directory};
        rewrite ^ /large break;
      }
    }`
}

/** The rules as they are delivered, but for TLS, names and ports; and the user stands in the path of each call. */
function gatewayRules(
  rules: string,
  {
    directory,
    port,
    broker,
    api,
  }: { directory: string; port: number; broker: number; api: number },
): string {
  const adapted = replaced(rules, [
    ['server broker-1.internal:3001', `server 127.0.0.1:${broker}`],
    ['server broker-2.internal:3001', `server 127.0.0.1:${broker} backup`],
    ['server api.pageroonline.com:443', `server 127.0.0.1:${api}`],
    ['listen 8443 ssl', `listen 127.0.0.1:${port}`],
    ['proxy_pass https://pagero', 'proxy_pass http://pagero'],
    ['map $ssl_client_s_dn $broker_user', 'map $request_uri $broker_user'],
    ['"~^CN=(?<common_name>[A-Za-z0-9._~@:-]+)(?:,|$)"', '"~(?<common_name>user-[0-9]+)$"'],
    ['/etc/nginx/', `${directory}/`],
    ['/var/log/nginx/', `${directory}/${port}-`],
  ])
  return adapted.replaceAll(/^ *(?:proxy_)?ssl_.*;\n/gm, '')
}

/** The same rules for a gateway that asks nobody. */
function withoutBroker(rules: string): string {
  return replaced(rules, [
    ['auth_request /_broker/forward-auth;', 'auth_request off;'],
    ['$pagero_authorization;', `"Bearer ${'A'.repeat(TOKEN_CHARACTERS)}";`],
  ])
}

async function measure({ asking, plain }: Gateways, size: Size): Promise<Row[]> {
  const take = async ({ port, programs }: Gateway, path: string): Promise<Taken> => {
    const isLarge = path === LARGE
    const spentUs = () => programs.reduce((sum, { child }) => sum + cpuUs(child), 0)
    const beforeUs = spentUs()
    const { answered, seconds } = await load(isLarge ? size.largeSeconds : size.smallSeconds, {
      port,
      path,
      first: 0,
      count: HOT_USERS,
      connections: isLarge ? LARGE_CONNECTIONS : CONNECTIONS,
    })
    return { perSecond: answered / seconds, cpuUs: (spentUs() - beforeUs) / answered }
  }
  await take(plain, SMALL)
  await take(asking, SMALL)
  const rates = await interleave(size.rounds, {
    plainSmall: () => take(plain, SMALL),
    askingSmall: () => take(asking, SMALL),
    plainLarge: () => take(plain, LARGE),
    askingLarge: () => take(asking, LARGE),
  })
  const ratio = (one: Measured, other: Measured, atLeast: number): NonNullable<Row['ratio']> => ({
    ...ratioOfRounds(one, other),
    to: 'plain nginx',
    goal: { atLeast },
  })
  return [
    { what: 'JSON of 1 kB, plain nginx', figure: rateText(rates.plainSmall) },
    {
      what: 'the same by forward-auth, the token in memory',
      figure: rateText(rates.askingSmall),
      ratio: ratio(rates.askingSmall, rates.plainSmall, 0.35),
    },
    { what: '10 MB, plain nginx', figure: rateText(rates.plainLarge) },
    {
      what: 'the same by forward-auth',
      figure: rateText(rates.askingLarge),
      ratio: ratio(rates.askingLarge, rates.plainLarge, 0.95),
    },
  ]
}
