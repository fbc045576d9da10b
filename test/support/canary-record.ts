// What a canary run provokes and keeps: faults of the authorization server, every secret that it gave out or was sent,
// what browsers received, and the tables. canary-broker.ts puts it together.

import type { Fault, LookAlike } from '../../demo/look-alike/authorization-server.ts'
import type { Database } from '../../src/postgres/database.ts'
import type { CanaryBroker } from './canary-broker.ts'
import type { RecordingLine } from './recording-line.ts'
import type { Canary, Haystack } from './secret-scan.ts'

/** Those that exist before the broker starts. */
export interface Secrets {
  clientSecret: string
  encryptionKey: Buffer
  apiKey: string
  databaseUrl: string
}

/** Ways to make the authorization server fail; each fault is used up by the requests that it befalls. */
export function faultsOf({
  faults,
}: LookAlike): Pick<
  CanaryBroker,
  'failNext' | 'breakNext' | 'cutNextAnswer' | 'refuseRevocations' | 'forgetFaults'
> {
  // Before the one that keeps every answer, which is always last.
  const add = (fault: Fault) => void faults.unshift(fault)
  const refresh = { endpoint: 'token', grantType: 'refresh_token' } as const
  return {
    failNext: (grantType, status, body, times = 1) =>
      add({ endpoint: 'token', grantType, kind: 'status', status, body, times }),
    breakNext: (moment) =>
      add({ ...refresh, kind: moment === 'before' ? 'reset_before' : 'reset_after' }),
    cutNextAnswer: () => {
      const keeper = faults.at(-1)
      add({
        ...refresh,
        kind: 'mutate',
        change: (tokens) => {
          if (keeper?.kind === 'mutate') keeper.change(tokens)
          return JSON.stringify(tokens).slice(0, -1)
        },
      })
    },
    refuseRevocations: (body) =>
      add({ endpoint: 'revoke', kind: 'status', status: 503, body, times: 1_000 }),
    forgetFaults: () => void faults.splice(0, faults.length - 1),
  }
}

/** Keeps every secret that came to be, and what browsers received. */
export function recordOf(
  lookAlike: LookAlike,
  line: RecordingLine,
  secrets: Secrets,
): Pick<CanaryBroker, 'plant' | 'latest' | 'canaries' | 'browserTraffic'> {
  const known: Canary[] = [
    { kind: 'API key', value: secrets.apiKey },
    { kind: 'API key', value: secrets.apiKey.replace('pgb_key1_', '') },
    { kind: 'client secret', value: secrets.clientSecret },
    { kind: 'encryption key', value: secrets.encryptionKey },
    { kind: 'encryption key', value: secrets.encryptionKey.toString('base64') },
    { kind: 'database password', value: decodeURIComponent(new URL(secrets.databaseUrl).password) },
  ]
  const issued: Canary[] = []
  lookAlike.faults.push({
    endpoint: 'token',
    kind: 'mutate',
    times: Number.MAX_SAFE_INTEGER,
    change(tokens) {
      for (const [member, kind] of Object.entries(ISSUED)) {
        const value = tokens[member]
        if (typeof value === 'string') issued.push({ kind, value })
      }
      return tokens
    },
  })
  return {
    plant(kind, value) {
      known.push({ kind, value })
      return value
    },
    latest(kind) {
      const value = issued.findLast((canary) => canary.kind === kind)?.value
      if (typeof value !== 'string') throw new Error(`no ${kind} was given out`)
      return value
    },
    canaries: () => [
      ...known,
      ...issued,
      ...lookAlike.record.flatMap(sentTo),
      ...[...text(line).matchAll(COOKIE)].map(([, value = '']) => ({ kind: 'cookie', value })),
    ],
    browserTraffic: () => trafficOf(text(line), lookAlike.authorizeUrl),
  }
}

const ISSUED = {
  access_token: 'access token',
  refresh_token: 'refresh token',
  id_token: 'ID token',
}
const SENT_IN_FORMS = {
  code: 'authorization code',
  code_verifier: 'PKCE verifier',
  refresh_token: 'refresh token',
  token: 'refresh token',
}
const COOKIE = /^set-cookie: __Host-[\w-]+=([^;\r]{12,})/gim

/** Secrets of one request to the authorization server. */
function sentTo({ endpoint, rawTarget, headers, form }: LookAlike['record'][number]): Canary[] {
  if (endpoint === 'authorize') {
    const { searchParams } = new URL(rawTarget, 'http://localhost')
    return ['state', 'nonce'].map((kind) => ({ kind, value: searchParams.get(kind) ?? '' }))
  }
  if (endpoint !== 'token' && endpoint !== 'revoke') return []
  const inForm = Object.entries(SENT_IN_FORMS).map(([member, kind]) => ({
    kind,
    value: form[member] ?? '',
  }))
  const credentials = headers
    .filter(([name]) => name.toLowerCase() === 'authorization')
    .map(([, value]) => ({ kind: 'client authentication', value: value.replace(/^Basic /, '') }))
  return [...inForm, ...credentials].filter(({ value }) => value !== '')
}

function text(line: RecordingLine): string {
  return line.received().toString('latin1')
}

/** Takes out of the traffic the two kinds of field that carry a secret rightfully. */
function trafficOf(traffic: string, authorizeUrl: string): Haystack[] {
  const redirects: string[] = []
  const cookies: string[] = []
  const rest = traffic.replaceAll(/^(location|set-cookie): (.*)$/gim, (field, name, value) => {
    const isRedirect = String(name).toLowerCase() === 'location'
    if (isRedirect && !String(value).startsWith(`${authorizeUrl}?`)) return field as string
    const taken = isRedirect ? redirects : cookies
    taken.push(field as string)
    return ''
  })
  return [
    { name: 'browser: redirects to the login', content: redirects.join('\n') },
    { name: 'browser: Set-Cookie', content: cookies.join('\n') },
    { name: 'browser: everything else', content: Buffer.from(rest, 'latin1') },
  ]
}

/** The database from behind: its tables as text and as bytes, and its connections to the broker. */
export function dumpsOf({
  pool,
}: Database): Pick<CanaryBroker, 'dumpTables' | 'loseDatabaseConnections'> {
  return {
    async dumpTables(moment) {
      const { rows: tables } = await pool.query<{ name: string }>(
        "select table_name as name from information_schema.tables where table_schema = 'public'",
      )
      return Promise.all(
        tables.map(async ({ name }) => {
          const { rows } = await pool.query<{ text: string; row: Record<string, unknown> }>(
            `select row_to_json(a)::text as text from "${name}" a`,
          )
          const { rows: columns } = await pool.query<Record<string, unknown>>(
            `select * from "${name}"`,
          )
          const bytes = columns.flatMap((row) =>
            Object.values(row).filter((value) => Buffer.isBuffer(value)),
          )
          const texts = rows.map((row) => Buffer.from(`${row.text}\n`))
          return { name: `table ${name} ${moment}`, content: Buffer.concat([...texts, ...bytes]) }
        }),
      )
    },
    async loseDatabaseConnections() {
      await pool.query(
        `select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name = 'broker canary'`,
      )
    },
  }
}
