// The demonstration: the broker as it is, against the look-alike of Pagero, with a page to click.
// Everything it keeps is in ./data, or DEMO_DATA_DIR; a second run goes on where the first one ended.

import { createWriteStream } from 'node:fs'
import { createServer } from 'node:net'
import { relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { startBroker } from '../src/broker.ts'
import { readConfig } from '../src/config.ts'
import { createLog } from '../src/log.ts'
import { startEmbeddedPostgres } from '../src/postgres/embedded.ts'
import { startApi } from './look-alike/api.ts'
import { startAuthorizationServer } from './look-alike/authorization-server.ts'
import { registerPageRoutes } from './page-routes.ts'
import { type DemoFiles, filesIn, readOrMakeSecrets } from './secrets.ts'

const CLIENT_ID = 'token-broker-demo'
const HOST = '127.0.0.1'
/** Another site than localhost, where the page is: logging in crosses sites, as it does at Pagero. */
const LOOK_ALIKE_HOST = '127.0.0.1'
/**
 * Where the look-alike listens unless the environment says otherwise. Its port is part of its issuer, and that of who a
 * user is: it stays as it is for as long as the folder does.
 */
const LOOK_ALIKE_PORT = 3002
const LOOK_ALIKE_API_PORT = 3003

/** A stop that takes longer has met something that does not end. */
const STOP_LIMIT_MS = 15_000

interface Ports {
  public: number
  internal: number
  lookAlike: number
  api: number
}

/** What has been started, to be stopped in the reverse order. */
const stops: Array<() => Promise<unknown>> = []

async function stopAll(): Promise<void> {
  for (const stop of stops.splice(0).toReversed()) await stop()
}

function portsOf(env: NodeJS.ProcessEnv): Ports {
  return {
    public: Number(env['PUBLIC_PORT'] ?? 3000),
    internal: Number(env['INTERNAL_PORT'] ?? 3001),
    lookAlike: Number(env['LOOK_ALIKE_PORT'] ?? LOOK_ALIKE_PORT),
    api: Number(env['LOOK_ALIKE_API_PORT'] ?? LOOK_ALIKE_API_PORT),
  }
}

/** Returns a sentence about the first port that somebody else listens on. */
async function takenPort(ports: Ports): Promise<string | undefined> {
  for (const [name, port] of Object.entries(ports)) {
    if (await isFree(port)) continue
    const way = { public: 'PUBLIC_PORT', internal: 'INTERNAL_PORT', api: 'LOOK_ALIKE_API_PORT' }[
      name
    ]
    const advice =
      way === undefined
        ? 'Stop what listens there and start again.'
        : `Stop what listens there, or choose another: ${way}=${port + 100} npm run demo`
    return `Port ${port} is taken. ${advice}`
  }
  return undefined
}

async function isFree(port: number): Promise<boolean> {
  const probe = createServer()
  const free = await new Promise<boolean>((resolve) => {
    probe.once('error', () => resolve(false))
    probe.listen(port, HOST, () => resolve(true))
  })
  await new Promise((resolve) => probe.close(resolve))
  return free
}

async function startAll(ports: Ports, directory: string, files: DemoFiles): Promise<void> {
  const secrets = readOrMakeSecrets(directory, files)
  const redirectUri = `http://localhost:${ports.public}/auth/callback`

  const postgres = await startEmbeddedPostgres({ directory: files.postgres, durable: true })
  stops.push(() => postgres.stop())
  const lookAlike = await startAuthorizationServer({
    clientId: CLIENT_ID,
    clientSecret: secrets.clientSecret,
    redirectUris: [redirectUri],
    host: LOOK_ALIKE_HOST,
    port: ports.lookAlike,
    stateFile: files.lookAlike,
  })
  stops.push(() => lookAlike.stop())
  const api = await startApi({
    isActive: (accessToken) => lookAlike.isActive(accessToken),
    host: LOOK_ALIKE_HOST,
    port: ports.api,
  })
  stops.push(() => api.stop())

  const config = readConfig({
    DATABASE_URL: postgres.url,
    ENCRYPTION_KEYS: secrets.encryptionKeys,
    PAGERO_CLIENT_ID: CLIENT_ID,
    PAGERO_CLIENT_SECRET: secrets.clientSecret,
    PAGERO_REDIRECT_URI: redirectUri,
    PAGERO_ISSUER: lookAlike.issuer,
    PAGERO_JWKS_URL: lookAlike.jwksUrl,
    PAGERO_AUTHORIZE_URL: lookAlike.authorizeUrl,
    PAGERO_TOKEN_URL: lookAlike.tokenUrl,
    PAGERO_REVOKE_URL: lookAlike.revokeUrl,
    PAGERO_API_URL: api.origin,
    PUBLIC_HOST: HOST,
    PUBLIC_PORT: String(ports.public),
    INTERNAL_HOST: HOST,
    INTERNAL_PORT: String(ports.internal),
    CALLERS_FILE: files.callers,
    SPOOL_DIR: files.spool,
    REPLICA_NAME: 'demo',
    // No balancer has to move on before the listeners close.
    SHUTDOWN_LISTEN_SECONDS: '0',
  })
  const logFile = createWriteStream(files.log, { flags: 'a', mode: 0o600 })
  stops.push(() => new Promise((resolve) => logFile.end(() => resolve(undefined))))
  const log = createLog({
    level: config.logLevel,
    replica: config.replicaName,
    destination: logFile,
  })
  const broker = await startBroker(config, { log, publicRoutes: registerPageRoutes })
  stops.push(() => broker.stop())
}

/** What to open and what to try; the commands work as printed, from the folder in which the demo was started. */
function welcomeText(ports: Ports, files: DemoFiles, startedInSeconds: number): string {
  const users = `http://localhost:${ports.internal}/v1/users/pagero:alice`
  const curl = `curl -sS -H @${relative(process.cwd(), files.callerHeader)}`
  return `
  Pagero token broker, ready in ${startedInSeconds.toFixed(1)} s

    Open  http://localhost:${ports.public}        log in as Alice or Bob
    Docs  http://localhost:${ports.internal}/docs

  As a backend service, once Alice has logged in:

    A fresh access token
    ${curl} ${users}/access-token

    A call to Pagero's API with it
    ${curl} '${users}/pagero/document/v1/documents?limit=2'

    The state of the grant
    ${curl} ${users}/grant

  The log is in ${relative(process.cwd(), files.log)}. Ctrl-C stops; the next run has the same data.
`
}

async function main(): Promise<void> {
  const directory = resolve(
    process.env['DEMO_DATA_DIR'] ?? fileURLToPath(new URL('../data/', import.meta.url)),
  )
  const files = filesIn(directory)
  const ports = portsOf(process.env)
  const taken = await takenPort(ports)
  if (taken !== undefined) {
    console.error(taken)
    process.exitCode = 1
    return
  }

  let starting: Promise<void> | undefined
  let stopping: Promise<void> | undefined
  const stop = () => {
    stopping ??= (async () => {
      setTimeout(() => process.exit(1), STOP_LIMIT_MS).unref()
      await starting?.catch(() => undefined)
      await stopAll()
      console.log('\n  Stopped.')
    })()
  }
  process.on('SIGINT', stop)
  process.on('SIGTERM', stop)

  try {
    starting = startAll(ports, directory, files)
    await starting
  } catch (error) {
    await stopAll()
    throw error
  }
  if (stopping === undefined) {
    console.log(welcomeText(ports, files, performance.now() / 1000))
  }
}

await main().catch((error: unknown) => {
  console.error(
    `The demo did not start. ${error instanceof Error ? error.message : 'No reason was given.'}`,
  )
  process.exitCode = 1
})
