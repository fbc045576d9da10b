// The broker as it is run in production: `src/main.ts serve`, with its defaults, a caller with an API key that may see
// some users, and its log in a file.

import { execFile } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { freePorts } from '../../test/support/free-ports.ts'
import { addCaller } from '../../src/add-caller.ts'
import { encryptionKey } from './grants.ts'
import { answers, type Program, startProgram } from './processes.ts'

export interface RunningBroker extends Program {
  /** Of the internal listener. */
  port: number
  publicPort: number
  authorization: string
}

/** How every program in Node is run that is measured: as `npm start` and the image run the broker. */
export const NODE_PARAMETERS = ['--max-semi-space-size=8', '--heap-growing-percent=30']
export const NODE_ENVIRONMENT = {
  MALLOC_ARENA_MAX: '1',
  MALLOC_TRIM_THRESHOLD_: '67108864',
  MALLOC_MMAP_THRESHOLD_: '131072',
  NODE_COMPILE_CACHE: 'node_modules/.compile-cache',
}

let compiled: Promise<unknown> | undefined

/** The sources are compiled beforehand, as they are when the image is built: what does so itself needs 16 MiB more. */
function compile(): Promise<unknown> {
  const parameters = [...NODE_PARAMETERS, 'src/main.ts', 'openapi']
  const env = { ...process.env, ...NODE_ENVIRONMENT }
  return promisify(execFile)(process.execPath, parameters, { env })
}

/** Starts a broker over the database. `env` changes its settings. */
export async function startBroker(
  directory: string,
  name: string,
  settings: { databaseUrl: string; tokenPort: number; env?: Readonly<Record<string, string>> },
): Promise<RunningBroker> {
  await (compiled ??= compile())
  const [publicPort = 0, port = 0] = await freePorts(2)
  const home = join(directory, name)
  await mkdir(home)
  const callersFile = join(home, 'callers.json')
  await writeFile(callersFile, '{"callers": []}', { mode: 0o600 })
  const { key } = await addCaller(callersFile, 'bench', {
    rights: ['token:read', 'grant:read', 'proxy:call'],
    users: ['user-*'],
    proxyAllow: [
      'GET /document/v1/**',
      'POST /document/v1/**',
      'GET /file/v1/**',
      'POST /file/v1/files',
    ],
  })
  const tokenOrigin = `http://127.0.0.1:${settings.tokenPort}`
  const program = await startProgram({
    place: 'measured',
    parameters: [...NODE_PARAMETERS, 'src/main.ts', 'serve'],
    env: {
      ...NODE_ENVIRONMENT,
      // One caller asks for all there is.
      RATE_LIMIT_PER_CALLER: '1000000',
      RATE_LIMIT_PER_USER: '1000000',
      DATABASE_URL: settings.databaseUrl,
      ENCRYPTION_KEYS: `${encryptionKey.keyId}:${encryptionKey.key.toString('base64')}`,
      PAGERO_CLIENT_ID: 'bench',
      PAGERO_CLIENT_SECRET: 'a secret of the bench alone',
      PAGERO_REDIRECT_URI: `http://127.0.0.1:${publicPort}/callback`,
      PAGERO_AUTHORIZE_URL: `${tokenOrigin}/authorize`,
      PAGERO_TOKEN_URL: `${tokenOrigin}/token`,
      PAGERO_REVOKE_URL: `${tokenOrigin}/revoke`,
      PAGERO_API_URL: tokenOrigin,
      PUBLIC_HOST: '127.0.0.1',
      PUBLIC_PORT: String(publicPort),
      INTERNAL_HOST: '127.0.0.1',
      INTERNAL_PORT: String(port),
      CALLERS_FILE: callersFile,
      SPOOL_DIR: join(home, 'spool'),
      REPLICA_NAME: name,
      SHUTDOWN_LISTEN_SECONDS: '0',
      ...settings.env,
    },
    outputFile: join(home, 'log'),
    ready: answers(`http://127.0.0.1:${port}/readyz`),
  })
  return { ...program, port, publicPort, authorization: `Bearer ${key}` }
}
