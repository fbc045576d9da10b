// A broker process whose every secret is known to the test, with recording lines, an authorization server that keeps
// what it gave out, and an API that tells the token back. It provokes and records; canary.test.ts searches and judges.

import { createHash, randomBytes } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { startAuthorizationServer } from '../../demo/look-alike/authorization-server.ts'
import { resetSocket } from '../../src/reset-socket.ts'
import { type Answer, type Browser, createBrowser } from './browser.ts'
import { dumpsOf, faultsOf, recordOf, type Secrets } from './canary-record.ts'
import { type Collector, startCollector } from './collector.ts'
import { createTestDatabase } from './database.ts'
import { freePorts } from './free-ports.ts'
import { type Program, startProgram } from './program.ts'
import { type RecordingLine, startRecordingLine } from './recording-line.ts'
import type { Canary, Haystack } from './secret-scan.ts'
import { answer, startUpstream } from './upstream.ts'

export interface Person {
  browser: Browser
  /** Target of the callback that logged them in. */
  callback: string
}

export interface PendingLogin {
  browser: Browser
  callback: string
  /** Opens the callback, as the redirect would. */
  finish(): Promise<Answer>
}

type GrantType = 'authorization_code' | 'refresh_token'

export interface CanaryBroker {
  program: Program
  /** Where its traces went. */
  collector: Collector
  spoolDir: string
  /** Port at which browsers reach the public listener. */
  browserPort: number
  newBrowser(): Browser
  /** Logs somebody in, in a new browser or in one that was used before. */
  logIn(subject: string, browser?: Browser): Promise<Person>
  /** Goes as far as the callback, without opening it; a subject of undefined refuses access. */
  beginLogin(subject: string | undefined, browser?: Browser): Promise<PendingLogin>
  /** Asks the internal listener, with the API key unless another credential is given; a body alone makes it a POST. */
  ask(
    target: string,
    request?: { authorization?: string; body?: string; method?: string },
  ): Promise<{ status: number; body: string }>
  /** Reports the user's access token as refused; returns the status of that, or of the failed reading before it. */
  renew(subject: string): Promise<number>
  /** The authorization server answers the next requests of a kind so, and spends nothing. */
  failNext(grantType: GrantType, status: number, body: object, times?: number): void
  /** The next refresh is reset before it is carried out, or after. */
  breakNext(moment: 'before' | 'after'): void
  /** The next answer to a refresh ends before its last brace. */
  cutNextAnswer(): void
  refuseRevocations(body: object): void
  forgetFaults(): void
  loseDatabaseConnections(): Promise<void>
  /** Adds a secret of the test's own, and returns it. */
  plant(kind: string, value: string): string
  /** The newest token that the authorization server gave out. */
  latest(kind: 'access token' | 'refresh token'): string
  canaries(): Canary[]
  dumpTables(moment: string): Promise<Haystack[]>
  /** Bytes that browsers received: redirects to the login and cookies apart from the rest. */
  browserTraffic(): Haystack[]
  /** Answers of the internal listener, but for access tokens that were asked for. */
  serviceAnswers(): Haystack[]
}

const CLIENT_ID = 'canary-client'
/** More than a start takes. */
const START_LIMIT_MS = 20_000

/** Starts the broker with everything around it; all of it ends with the test. */
export async function startCanaryBroker(test: Test): Promise<CanaryBroker> {
  const { url, database } = await createTestDatabase(test)
  const secrets: Secrets = {
    // With characters that every form of writing escapes in its own way.
    clientSecret: `${randomBytes(24).toString('base64url')} %+"\\/&=`,
    encryptionKey: randomBytes(32),
    apiKey: `pgb_key1_${randomBytes(32).toString('base64url')}`,
    databaseUrl: url,
  }
  const line = await startRecordingLine(test)
  const redirectUri = `http://localhost:${line.port}/auth/callback`
  const lookAlike = await startAuthorizationServer({
    clientId: CLIENT_ID,
    clientSecret: secrets.clientSecret,
    redirectUris: [redirectUri],
  })
  test.teardown(() => lookAlike.stop())
  const apiUrl = await startTelltaleApi(test)
  const collector = await startCollector(test)
  const directory = await mkdtemp(join(tmpdir(), 'broker-canary-'))
  test.teardown(() => rm(directory, { recursive: true, force: true }))
  const [publicPort = 0, internalPort = 0] = await freePorts(2)
  line.target = publicPort
  const spoolDir = join(directory, 'spool')
  const program = startProgram(test, ['src/main.ts', 'serve'], {
    ...SHORT_TIMES,
    LOG_LEVEL: 'trace',
    REPLICA_NAME: 'canary',
    OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    DATABASE_URL: url,
    ALLOW_UNSAFE_DATABASE: 'true',
    ENCRYPTION_KEYS: `k1:${secrets.encryptionKey.toString('base64')}`,
    PAGERO_CLIENT_ID: CLIENT_ID,
    PAGERO_CLIENT_SECRET: secrets.clientSecret,
    PAGERO_REDIRECT_URI: redirectUri,
    PAGERO_PKCE: 'S256',
    PAGERO_ISSUER: lookAlike.issuer,
    PAGERO_JWKS_URL: lookAlike.jwksUrl,
    PAGERO_AUTHORIZE_URL: lookAlike.authorizeUrl,
    PAGERO_TOKEN_URL: lookAlike.tokenUrl,
    PAGERO_REVOKE_URL: lookAlike.revokeUrl,
    PAGERO_API_URL: apiUrl,
    PUBLIC_HOST: '127.0.0.1',
    PUBLIC_PORT: String(publicPort),
    INTERNAL_HOST: '127.0.0.1',
    INTERNAL_PORT: String(internalPort),
    CALLERS_FILE: await writeCallersFile(directory, secrets.apiKey),
    SPOOL_DIR: spoolDir,
  })
  await program.said(/"broker_started"/, START_LIMIT_MS)
  return {
    program,
    collector,
    spoolDir,
    browserPort: line.port,
    ...peopleOf(line),
    ...servicesOf(internalPort, secrets.apiKey),
    ...faultsOf(lookAlike),
    ...recordOf(lookAlike, line, secrets),
    ...dumpsOf(database),
  }
}

/** The protocol's times, so short that a test can wait for them; the spool keeps its files. */
const SHORT_TIMES = {
  SHUTDOWN_LISTEN_SECONDS: '0',
  REFRESH_DEADLINE_SECONDS: '4',
  REFRESH_SEND_DEADLINE_SECONDS: '2',
  REFRESH_LEASE_SECONDS: '5.5',
  FORCED_REFRESH_INTERVAL_SECONDS: '0',
  REFUSAL_CONFIRM_SECONDS: '0.1',
  UNKNOWN_SETTLE_SECONDS: '0.1',
  DATABASE_SETTLE_SECONDS: '0',
  BREAKER_PROBE_SECONDS: '0.1',
  RETRY_BACKOFF_SECONDS: '0.1',
  TOKEN_CACHE_TRUST_MS: '0',
}

async function writeCallersFile(directory: string, apiKey: string): Promise<string> {
  const file = join(directory, 'callers.json')
  const caller = {
    name: 'canary',
    api_keys: [
      {
        id: 'key1',
        sha256: createHash('sha256').update(apiKey).digest('hex'),
        expires_at: '2099-01-01T00:00:00Z',
      },
    ],
    rights: ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'],
    users: ['*'],
  }
  await writeFile(file, JSON.stringify({ callers: [caller] }), { mode: 0o600 })
  return file
}

/** An API that tells the token back where a careless one might: in fields of an answer, and in a refusal. */
async function startTelltaleApi(test: Test): Promise<string> {
  const { url } = await startUpstream(test, (call) => {
    const [credential = ''] = call.values('authorization')
    const echo = [
      `Authorization: ${credential}`,
      `X-Debug: ${credential}`,
      `Set-Cookie: t=${credential.slice(7)}`,
    ]
    if (call.target === '/reset') resetSocket(call.socket)
    else if (call.target === '/refuse') {
      const challenge = `WWW-Authenticate: Bearer error="invalid_token", token="${credential}"`
      answer(call, 401, JSON.stringify({ error: credential }), [...echo, challenge])
    } else answer(call, 200, '{"items":[]}', [...echo, 'Content-Type: application/json'])
  })
  return url
}

// ── People and services ──────────────────────────────────────────────────────────────────────────

function peopleOf(line: RecordingLine): Pick<CanaryBroker, 'newBrowser' | 'logIn' | 'beginLogin'> {
  const newBrowser = () => createBrowser(`http://127.0.0.1:${line.port}`)
  return {
    newBrowser,
    async logIn(subject, browser = newBrowser()) {
      const callback = await browser.authorize(subject, '?return_to=/&prompt=login')
      const { status, body } = await browser.open(callback, 'cross-site')
      if (status !== 303) throw new Error(`The login of ${subject} was answered ${status}: ${body}`)
      return { browser, callback }
    },
    async beginLogin(subject, browser = newBrowser()) {
      const callback = await browser.authorize(subject)
      return { browser, callback, finish: () => browser.open(callback, 'cross-site') }
    },
  }
}

function servicesOf(
  internalPort: number,
  apiKey: string,
): Pick<CanaryBroker, 'ask' | 'renew' | 'serviceAnswers'> {
  const answers: Haystack[] = []
  const ask: CanaryBroker['ask'] = async (target, { authorization, body, method } = {}) => {
    const response = await fetch(`http://127.0.0.1:${internalPort}${target}`, {
      method: method ?? (body === undefined ? 'GET' : 'POST'),
      headers: {
        authorization: authorization ?? `Bearer ${apiKey}`,
        'content-type': 'application/json',
      },
      body: body ?? null,
    })
    const received = await response.text()
    // Whoever asks for a token gets one: that answer, and no other, is not searched.
    const isToken = response.status === 200 && target.endsWith('/access-token')
    const content = JSON.stringify([...response.headers]) + (isToken ? '' : received)
    answers.push({ name: `internal: ${response.status} ${target.split('?')[0]}`, content })
    return { status: response.status, body: received }
  }
  return {
    ask,
    serviceAnswers: () => answers,
    async renew(subject) {
      const path = `/v1/users/pagero:${subject}/access-token`
      const present = await ask(path)
      if (present.status !== 200) return present.status
      const { fingerprint } = JSON.parse(present.body) as { fingerprint: string }
      return (await ask(path, { body: JSON.stringify({ rejected: fingerprint }) })).status
    },
  }
}
