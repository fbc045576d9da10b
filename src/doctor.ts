// What an operator asks before the first start, or when something is amiss: is everything there that the broker needs? It
// looks, and changes nothing: no table, no row, no grant. Nothing secret is sent anywhere, and nothing secret is said.

import { access, readdir, readFile, stat } from 'node:fs/promises'
import { constants } from 'node:fs'
import { connect as connectPlain, isIP, type Socket } from 'node:net'
import { dirname, resolve } from 'node:path'
import { connect as connectTls } from 'node:tls'
import { parseCallers } from './callers-file.ts'
import type { Config } from './config.ts'
import { deepestCodeOf } from './errors.ts'
import type { Clock, Ports } from './ports.ts'
import { type Database, openDatabase } from './postgres/database.ts'
import {
  findUnsafeSettings,
  readClaim,
  readDeploymentId,
  readSampleGrants,
  readSamplePendingGrants,
  readServer,
} from './postgres/deployment.ts'
import { readSchemaState } from './postgres/migrate.ts'
import { findUnusableKeys } from './ready-database.ts'
import { createSealer } from './seal.ts'
import { entryFiles, probe } from './spool-files.ts'
import { createUpstreamLookup } from './upstream-address.ts'

export interface Finding {
  /** `wrong` keeps the broker from its work, `note` does not. */
  level: 'ok' | 'note' | 'wrong'
  about: string
  /** What was found, and what to do about it. */
  text: string
}

type Examiner = Pick<Ports, 'log'> & { clock: Pick<Clock, 'now'> }

type Say = (level: Finding['level'], about: string, text: string) => void

/** What PostgreSQL calls 14, the oldest that the statements are tested with. */
const SERVER_VERSION_MIN = 140_000
/** Tokens end by the database's clock and callers' credentials by this one: half a minute is what JWTs may be off. */
const CLOCK_OFF_SECONDS_MAX = 5
/** A host that takes longer to shake hands is as good as away. */
const HOST_LIMIT_MS = 5_000

/**
 * Looks at everything that the settings point to, in the order of need: what depends on something that is wrong is not
 * looked at. Never throws.
 */
export async function examine(
  ports: Examiner,
  config: Config,
  tell: (finding: Finding) => void,
): Promise<void> {
  const sayThis: Say = (level, about, text) => tell({ level, about, text })
  await examineCallers(config, sayThis)
  await examineDatabase(ports, config, sayThis)
  await examineSpool(config, sayThis)
  await examineHosts(config, sayThis)
  await examineCollector(config, sayThis)
  examineChoices(config, sayThis)
}

async function examineCallers({ callersFile }: Config, say: Say): Promise<void> {
  const about = 'callers'
  if (callersFile === undefined) {
    say('note', about, 'CALLERS_FILE is not set: no service can call the internal listener.')
    return
  }
  let text: string
  try {
    text = await readFile(callersFile, 'utf8')
  } catch (error) {
    say(
      'wrong',
      about,
      `CALLERS_FILE cannot be read (${deepestCodeOf(error)}). Run: broker callers add`,
    )
    return
  }
  try {
    say('ok', about, `${parseCallers(text).length} in CALLERS_FILE`)
  } catch (error) {
    // It names the place in the file, and quotes nothing of it.
    say('wrong', about, error instanceof Error ? error.message : 'CALLERS_FILE cannot be used.')
  }
}

// ── The database ─────────────────────────────────────────────────────────────────────────────────

async function examineDatabase(ports: Examiner, config: Config, say: Say): Promise<void> {
  if (config.databaseUrl === undefined) {
    say(
      'note',
      'database',
      'DATABASE_URL is not set: a PostgreSQL of its own is started in ./data.',
    )
    return
  }
  const database = openDatabase(
    { url: config.databaseUrl, poolMax: 1, applicationName: 'broker doctor' },
    ports.log,
  )
  try {
    await examineServer(ports, config, database, say)
    if (!(await examineSchema(config, database, say))) return
    await examineClaim(database, say)
    await examineKeys(ports, config, database, say)
  } catch (error) {
    say(
      'wrong',
      'database',
      `It cannot be reached, or refuses (${deepestCodeOf(error)}). See DATABASE_URL.`,
    )
  } finally {
    await database.close()
  }
}

async function examineServer(
  { clock }: Examiner,
  { allowUnsafeDatabase }: Config,
  database: Database,
  say: Say,
): Promise<void> {
  // The first answer takes as long as connecting does.
  await readServer(database)
  const askedAtMs = clock.now().getTime()
  const server = await readServer(database)
  const offSeconds = (server.now.getTime() - (askedAtMs + clock.now().getTime()) / 2) / 1000
  if (server.version < SERVER_VERSION_MIN) {
    say('wrong', 'database', `PostgreSQL ${server.versionText} is too old: 14 is the oldest.`)
  } else if (server.isReadOnly) {
    say('wrong', 'database', 'It takes no writes. DATABASE_URL must lead to the primary.')
  } else say('ok', 'database', `PostgreSQL ${server.versionText}, takes writes`)
  const unsafe = await findUnsafeSettings(database)
  if (unsafe.length === 0) say('ok', 'durability', 'what is committed stays')
  else {
    say(
      allowUnsafeDatabase ? 'note' : 'wrong',
      'durability',
      `A commit may be forgotten, and a token with it: turn on ${unsafe.join(', ')}.`,
    )
  }
  const off = `${Math.abs(offSeconds).toFixed(1)} s ${offSeconds > 0 ? 'behind' : 'ahead of'} that of PostgreSQL`
  if (Math.abs(offSeconds) <= CLOCK_OFF_SECONDS_MAX) {
    say('ok', 'clock', `within ${CLOCK_OFF_SECONDS_MAX} s of that of PostgreSQL`)
  } else {
    say('wrong', 'clock', `This machine's clock is ${off}. Set both by the same time servers.`)
  }
}

/** Whether there is a schema to look into. */
async function examineSchema(
  { migrateAtStart }: Config,
  database: Database,
  say: Say,
): Promise<boolean> {
  const about = 'migrations'
  switch (await readSchemaState(database)) {
    case 'current':
      say('ok', about, 'the schema is current')
      return true
    case 'newer':
      say('wrong', about, 'The schema is of a newer version of the broker. Start that one.')
      return false
    case 'missing':
      if (migrateAtStart) say('note', about, 'Some are missing; the next start applies them.')
      else
        say('wrong', about, 'Some are missing, and MIGRATE_AT_START is false. Run: broker migrate')
      return false
  }
}

async function examineClaim(database: Database, say: Say): Promise<void> {
  const about = 'deployment'
  const claim = await readClaim(database)
  if (claim === 'ours') say('ok', about, 'this is the database that the broker has worked in')
  else if (claim === 'unclaimed') say('note', about, 'no broker has worked in this database yet')
  else {
    say(
      'wrong',
      about,
      'The database is a copy, or was restored, and is not accepted: its tokens may be in use elsewhere.' +
        ' If they are not, run: broker accept-database',
    )
  }
}

async function examineKeys(
  { log }: Examiner,
  { encryptionKeys }: Config,
  database: Database,
  say: Say,
): Promise<void> {
  const about = 'keys'
  const sealer = createSealer(encryptionKeys, await readDeploymentId(database))
  const unusable = await findUnusableKeys(database, { sealer, log })
  if (unusable !== undefined) {
    say('wrong', about, `In ENCRYPTION_KEYS ${unusable}. Put back the one with that id.`)
  } else say('ok', about, `what grants need is there; ${sealer.primaryKeyId} seals`)
  const inUse = [
    ...(await readSampleGrants(database)),
    ...(await readSamplePendingGrants(database)),
  ]
  const others = new Set(inUse.map(({ keyId }) => keyId))
  others.delete(sealer.primaryKeyId)
  if (others.size > 0) {
    say(
      'note',
      about,
      `Grants are sealed with ${[...others].join(', ')} too. Before one is taken out, run: broker keys rotate`,
    )
  }
}

// ── The spool ────────────────────────────────────────────────────────────────────────────────────

async function examineSpool({ spoolDir }: Config, say: Say): Promise<void> {
  const about = 'spool'
  const root = resolve(spoolDir)
  try {
    if ((await stat(root).catch(() => undefined)) === undefined) {
      // As a directory: a file that may be written is of no use.
      await access(`${await existingAbove(root)}/.`, constants.W_OK)
      say('note', about, 'The directory of SPOOL_DIR is made at the start.')
      return
    }
    await probe(root)
    const unreadable = (await readdir(root)).filter((name) => name.endsWith('.unreadable'))
    const files = (await entryFiles(root)).length
    say('ok', about, `SPOOL_DIR takes entries; it has ${files} files`)
    if (unreadable.length > 0) {
      say('note', about, `${unreadable.length} damaged files lie in it, set aside (….unreadable).`)
    }
  } catch (error) {
    say(
      'wrong',
      about,
      `SPOOL_DIR takes no entries (${deepestCodeOf(error)}): it must be ours to write.`,
    )
  }
}

async function existingAbove(path: string): Promise<string> {
  const above = dirname(path)
  const found = await stat(above).catch(() => undefined)
  return found === undefined && above !== path ? existingAbove(above) : above
}

// ── Pagero's hosts ───────────────────────────────────────────────────────────────────────────────

async function examineHosts(config: Config, say: Say): Promise<void> {
  const { authorizeUrl, tokenUrl, revokeUrl, apiUrl, jwksUrl } = config.pagero
  const urls = {
    PAGERO_AUTHORIZE_URL: authorizeUrl,
    PAGERO_TOKEN_URL: tokenUrl,
    PAGERO_REVOKE_URL: revokeUrl,
    PAGERO_API_URL: apiUrl,
    PAGERO_JWKS_URL: jwksUrl,
  }
  const settingOf = new Map<string, string>()
  for (const [setting, url] of Object.entries(urls)) {
    const { origin } = url === undefined ? {} : new URL(url)
    if (origin !== undefined && !settingOf.has(origin)) settingOf.set(origin, setting)
  }
  const lookup = createUpstreamLookup({ allowPrivate: config.allowPrivateUpstreams })
  await Promise.all(
    [...settingOf].map(async ([origin, setting]) => {
      const failure = await failureOf(new URL(origin), lookup)
      if (failure === undefined) say('ok', 'pagero', `${origin} answers`)
      else say('wrong', 'pagero', `${origin} does not answer (${failure}). See ${setting}.`)
    }),
  )
}

/** The broker works without it, so it is never wrong. */
async function examineCollector({ traces }: Config, say: Say): Promise<void> {
  if (traces === undefined) return
  const { origin } = new URL(traces.endpoint)
  const failure = await failureOf(new URL(origin), createUpstreamLookup({ allowPrivate: true }))
  if (failure === undefined) say('ok', 'traces', `${origin} answers`)
  else {
    say(
      'note',
      'traces',
      `${origin} does not answer (${failure}): traces are lost meanwhile. See OTEL_EXPORTER_OTLP_ENDPOINT.`,
    )
  }
}

/** Shakes hands with the host as the broker would, and says nothing to it. Returns what went wrong, in a code. */
function failureOf(
  { protocol, hostname, port }: URL,
  lookup: ReturnType<typeof createUpstreamLookup>,
): Promise<string | undefined> {
  const host = hostname.replace(/^\[(.*)\]$/, '$1')
  const isTls = protocol === 'https:'
  return new Promise((settle) => {
    const socket: Socket = isTls
      ? connectTls({
          host,
          port: Number(port || 443),
          // A name alone may be told: for an address the certificate is compared with the address.
          ...(isIP(host) === 0 ? { servername: host } : {}),
          lookup,
          minVersion: 'TLSv1.2',
          rejectUnauthorized: true,
        })
      : connectPlain({ host, port: Number(port || 80), lookup })
    const end = (failure: string | undefined) => {
      socket.destroy()
      settle(failure)
    }
    socket.setTimeout(HOST_LIMIT_MS, () => end('ETIMEDOUT'))
    socket.once(isTls ? 'secureConnect' : 'connect', () => end(undefined))
    socket.once('error', (error) => end(deepestCodeOf(error)))
  })
}

// ── Choices ──────────────────────────────────────────────────────────────────────────────────────

function examineChoices({ pagero, allowUnsafeDatabase }: Config, say: Say): void {
  if (pagero.pkce === 'off') {
    say(
      'note',
      'pkce',
      'It is off; Pagero recommends it with a client secret too: PAGERO_PKCE=S256',
    )
  }
  if (pagero.issuer === undefined) {
    say(
      'note',
      'issuer',
      'PAGERO_ISSUER is not set: answers are not told from those of another server.',
    )
  }
  if (allowUnsafeDatabase) {
    say(
      'note',
      'durability',
      'ALLOW_UNSAFE_DATABASE is true: for tests, never for grants that matter.',
    )
  }
}
