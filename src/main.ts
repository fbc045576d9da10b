#!/usr/bin/env node
// The command line, and but for `tick-shape.ts` the only file of the product that touches `process`. It reads the
// settings, starts what was asked for, and ends it in order.

// oxlint-disable-next-line import/no-unassigned-import -- it must come before everything that the others do
import './tick-shape.ts'
import { randomBytes, randomUUID } from 'node:crypto'
import { parseArgs } from 'node:util'
import closeWithGrace from 'close-with-grace'
import { startBroker } from './broker.ts'
import { BrokerError, deepestCodeOf } from './errors.ts'
import { addCaller, addKey } from './add-caller.ts'
import { type CallerEntry, parseCallers } from './callers-file.ts'
import { checkCaller } from './check-caller.ts'
import { createAudit } from './audit.ts'
import { verifyAudit } from './audit-check.ts'
import type { AuditEvent } from './audit-event.ts'
import { systemClock } from './clock.ts'
import { type Config, ConfigError, readConfig } from './config.ts'
import { CRASH_POINTS, withCrashPoint } from './crash-points.ts'
import { describeUse, findToken } from './find-token.ts'
import { renderOpenApi } from './http/render-openapi.ts'
import { rotateKeys, SEALED_TABLES } from './key-rotation.ts'
import { examine, type Finding } from './doctor.ts'
import { createLog, printable } from './log.ts'
import type { Credential } from './record-stores.ts'
import { createCredentialUseStore } from './postgres/credential-use-store.ts'
import { type Database, openDatabase } from './postgres/database.ts'
import { createAuditStore } from './postgres/audit-store.ts'
import { acceptDatabase, readDeploymentId } from './postgres/deployment.ts'
import { migrate, readSchemaState } from './postgres/migrate.ts'
import { createSealedValueStore } from './postgres/sealed-value-store.ts'
import { createChainKeys, createSealer } from './seal.ts'
import { readFile } from 'node:fs/promises'
import { text as readText } from 'node:stream/consumers'

const USAGE = `broker <command>

  serve                     run the broker (settings come from the environment; see README.md)
  doctor                    look whether everything is there that the broker needs, and say what to do; changes nothing
  migrate                   bring the database's schema up to this version, and exit
  accept-database           after a restore, or in a copy: confirm that nothing else uses its tokens
  audit verify              check that the audit record is whole: no row changed, moved or missing
  tokens find               read an access token, or its SHA-256, from standard input, and print who had it
  keys generate [ID]        print a new entry for ENCRYPTION_KEYS
  keys rotate ID            seal everything in the database with this key, the first of ENCRYPTION_KEYS; beside running
                            replicas
  callers add NAME          add a caller to CALLERS_FILE and print its API key, once
      --rights a,b          token:read, proxy:call, grant:read, grant:manage, ops:read
      --users a,b           user keys it may name; * stands for any run of characters
      --proxy-allow a,b     METHOD /path pairs; none = every path
      --expires-at TIME     when the key ends, such as 2027-01-01T00:00:00Z; never if not given
      --another-key         a second key for a caller that is there, which otherwise stays as it is
  callers list              list the callers of CALLERS_FILE, with their keys, when these end, and (with DATABASE_URL)
                            when each was used last
  callers check             check that CALLERS_FILE can be used, or whether a caller may do something
      --caller NAME --right R --user U --call 'GET /path'
  openapi                   print the OpenAPI document

CALLERS_FILE may be given as --file for the callers commands.
`

/** Beyond the longest refresh a broken shutdown is cut short; the spool has what matters by then. */
const SHUTDOWN_MARGIN_SECONDS = 10

/** Columns of what the doctor says. */
const LEVEL_CHARACTERS = 5
const ABOUT_CHARACTERS = 10

/** Errors that are told of while the process is being ended. */
const SHUTDOWN_ERRORS_MAX = 10

/**
 * What ends a process. Heard here, because close-with-grace exits at the second one, whatever is in flight; and a second
 * one is usual: a Ctrl-C reaches npm as well, which passes it on.
 */
const STOP_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT'] as const
const ERRORS = ['uncaughtException', 'unhandledRejection'] as const

async function serve(): Promise<void> {
  const config = readConfig(process.env)
  const log = createLog({ level: config.logLevel, replica: config.replicaName })
  const point = CRASH_POINTS.find((name) => name === process.env['BROKER_TEST_CRASH_POINT'])
  if (point !== undefined) log.warn('crash_point_set', { setting: 'BROKER_TEST_CRASH_POINT' })
  const broker = await startBroker(config, {
    log,
    logLinesDropped: () => log.linesDropped(),
    wrapPorts: (ports) => (point === undefined ? ports : withCrashPoint(ports, point, die)),
  })
  const delaySeconds =
    config.shutdownListenSeconds + config.refresh.deadlineSeconds + SHUTDOWN_MARGIN_SECONDS
  let isStopping = false
  let errors = 0
  const grace = closeWithGrace(
    { delay: delaySeconds * 1000, logger: false, skip: [...STOP_SIGNALS, ...ERRORS] },
    async () => {
      await broker.stop()
      await log.flush()
      if (errors > 0) process.exit(1)
    },
  )
  function stop(): void {
    if (isStopping) return
    isStopping = true
    grace.close()
  }
  for (const name of STOP_SIGNALS) {
    process.on(name, (signal: string) => {
      if (isStopping) log.info('shutdown_already_running', { signal })
      else log.info('signal_received', { signal })
      stop()
    })
  }
  for (const name of ERRORS) {
    process.on(name, (error: unknown) => {
      errors += 1
      if (!isStopping) log.error('unexpected_error', { error })
      // Where a line cannot be written, that is an error as well, and so on.
      else if (errors < SHUTDOWN_ERRORS_MAX) log.error('shutdown_error', { error })
      stop()
    })
  }
}

/** Ends the process as a power cut would: nothing is flushed, no handler runs. */
function die(): never {
  process.kill(process.pid, 'SIGKILL')
  throw new Error('the process outlived SIGKILL')
}

/** Prints a line for each thing that it looks at; exit code 1 when one is wrong. */
async function examineAll(): Promise<void> {
  const tell = ({ level, about, text }: Finding): void => {
    if (level === 'wrong') process.exitCode = 1
    print(`${level.padEnd(LEVEL_CHARACTERS)}  ${about.padEnd(ABOUT_CHARACTERS)}  ${text}`)
  }
  let config: Config
  try {
    config = readConfig(process.env)
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    for (const text of error.problems) tell({ level: 'wrong', about: 'settings', text })
    return
  }
  tell({ level: 'ok', about: 'settings', text: 'all of them can be used' })
  // What it finds it says itself, in words for a person.
  const destination = { write: () => undefined }
  const log = createLog({ level: 'error', replica: config.replicaName, destination })
  await examine({ clock: systemClock, log }, config, tell)
}

async function migrateOnce(): Promise<void> {
  await withDatabase(async (database) => {
    const { applied } = await migrate(database)
    print(applied.length === 0 ? 'The schema is current.' : `Applied: ${applied.join(', ')}`)
  })
}

async function acceptDatabaseOnce(): Promise<void> {
  await withDatabase(async (database, config) => {
    await acceptDatabase(database)
    await recordAsOperator(database, config, { action: 'database_accepted', actor: 'operator' })
    print('Accepted. Restart the replicas; they refresh again.')
  })
}

/** Puts what a command has done on record, in a chain of its own. */
async function recordAsOperator(
  database: Database,
  config: Config,
  event: AuditEvent,
): Promise<void> {
  const log = createLog({ level: config.logLevel, replica: config.replicaName })
  const audit = createAudit(
    { clock: systemClock, log, auditEvents: createAuditStore(database) },
    createChainKeys(config.encryptionKeys, await readDeploymentId(database)),
    { replica: config.replicaName, boot: randomUUID() },
  )
  audit.record(event)
  await audit.close()
}

async function verifyAuditRecord(): Promise<void> {
  await withDatabase(async (database, config) => {
    const keys = createChainKeys(config.encryptionKeys, await readDeploymentId(database))
    const { events, chains, faults, remarks } = await verifyAudit(createAuditStore(database), keys)
    for (const remark of remarks) print(`note: ${remark}`)
    for (const fault of faults) print(`broken: ${fault}`)
    const size = `${events} events in ${chains} ${chains === 1 ? 'chain' : 'chains'}`
    print(faults.length === 0 ? `${size}, unbroken` : `${size}, ${faults.length} broken`)
    if (faults.length > 0) process.exitCode = 1
  })
}

async function findTokenUses(): Promise<void> {
  const input = await readText(process.stdin)
  await withDatabase(async (database) => {
    const uses = await findToken(createAuditStore(database), input)
    for (const use of uses) print(describeUse(use))
    if (uses.length > 0) return
    print('The audit record has nothing of it.')
    process.exitCode = 1
  })
}

async function withDatabase(
  work: (database: Database, config: Config) => Promise<void>,
): Promise<void> {
  const config = readConfig(process.env)
  if (config.databaseUrl === undefined) throw new Error('Set DATABASE_URL to the database.')
  const log = createLog({ level: config.logLevel, replica: config.replicaName })
  const database = openDatabase(
    { url: config.databaseUrl, poolMax: 1, applicationName: 'broker command' },
    log,
  )
  try {
    await work(database, config)
  } finally {
    await database.close()
  }
}

function generateKey([
  keyId = `k${new Date().toISOString().slice(0, 10).replaceAll('-', '')}`,
]: string[]): void {
  if (!/^[A-Za-z0-9_-]{1,32}$/.test(keyId)) {
    throw new Error('A key id is 1 to 32 characters of A-Z a-z 0-9 _ -.')
  }
  print(`${keyId}:${randomBytes(32).toString('base64')}`)
}

/** The key is named, so that nobody goes back to the old one with settings of the step before. */
async function rotateKeysOnce(keyId: string): Promise<void> {
  await withDatabase(async (database, config) => {
    if (config.encryptionKeys[0]?.keyId !== keyId) {
      throw new Error('The key to seal with must be the first of ENCRYPTION_KEYS.')
    }
    if ((await readSchemaState(database)) !== 'current') {
      throw new Error('The database has the schema of another version. Use that version.')
    }
    const sealer = createSealer(config.encryptionKeys, await readDeploymentId(database))
    const sealedValues = createSealedValueStore(database.db)
    const rotation = await rotateKeys({ clock: systemClock, sealer, sealedValues })
    const { counts, unreadableCounts, unreadable, leftCount } = rotation
    for (const table of SEALED_TABLES) print(`${table}: ${counts[table]} rows sealed anew`)
    for (const { user, detail } of unreadable) {
      print(`left as it is: ${user === undefined ? '' : `of user ${printable(user)}: `}${detail}`)
    }
    for (const [needed, count] of Object.entries(unreadableCounts)) {
      print(`left as they are: ${count} rows that need ${printable(needed)}`)
    }
    if (leftCount > 0) {
      print(`left: ${leftCount} rows that are locked, or that somebody seals with another key.`)
    }
    const isWhole = unreadable.length === 0 && leftCount === 0
    if (isWhole) print(`Everything in the database is sealed with ${keyId}.`)
    else process.exitCode = 1
    // What has changed nothing is no event, and may have none of the keys that the record knows.
    if (Object.values(counts).every((count) => count === 0)) return
    await recordAsOperator(database, config, {
      action: 'keys_rotated',
      actor: 'operator',
      outcome: isWhole ? 'succeeded' : 'failed',
      details: { keyId },
    })
  })
}

/** Options of each of the callers commands; one that belongs to another is refused. */
const CALLERS_OPTIONS = {
  add: ['file', 'rights', 'users', 'proxy-allow', 'expires-at', 'another-key'],
  list: ['file'],
  check: ['file', 'caller', 'right', 'user', 'call'],
} as const

async function callers(action: string | undefined, rest: string[]): Promise<void> {
  if (action !== 'add' && action !== 'list' && action !== 'check') throw new UsageError()
  const { values, positionals } = parseArgs({
    args: rest,
    allowPositionals: true,
    options: {
      file: { type: 'string' },
      rights: { type: 'string' },
      users: { type: 'string' },
      'proxy-allow': { type: 'string' },
      'expires-at': { type: 'string' },
      'another-key': { type: 'boolean' },
      caller: { type: 'string' },
      right: { type: 'string' },
      user: { type: 'string' },
      call: { type: 'string' },
    },
  })
  const stranger = Object.keys(values).find(
    (name) => !CALLERS_OPTIONS[action].some((known) => known === name),
  )
  if (stranger !== undefined) throw new Error(`callers ${action} has no option --${stranger}.`)
  if (positionals.length !== (action === 'add' ? 1 : 0)) throw new UsageError()
  const file = values.file ?? process.env['CALLERS_FILE']
  if (file === undefined) throw new Error('Set CALLERS_FILE, or give --file.')
  if (action === 'add') return addToCallers(file, positionals[0] ?? '', values)
  const entries = parseCallers(
    await readFile(file, 'utf8').catch(() => {
      throw new Error('CALLERS_FILE cannot be read.')
    }),
  )
  if (action === 'list') await listCallers(entries)
  else checkCallers(entries, values)
}

interface AddOptions {
  rights?: string
  users?: string
  'proxy-allow'?: string
  'expires-at'?: string
  'another-key'?: boolean
}

async function addToCallers(file: string, name: string, options: AddOptions): Promise<void> {
  const { rights, users, 'proxy-allow': proxyAllow, 'expires-at': expiry } = options
  const list = (text: string): string[] => text.split(',').map((part) => part.trim())
  const expiresAt = expiry === undefined ? undefined : new Date(expiry)
  if (expiresAt !== undefined && !(expiresAt.getTime() > Date.now())) {
    throw new Error('--expires-at must be a time to come, such as 2027-01-01T00:00:00Z.')
  }
  if (options['another-key'] === true) {
    if (rights !== undefined || users !== undefined || proxyAllow !== undefined) {
      throw new Error('--another-key leaves rights, users and calls as they are.')
    }
    const { key } = await addKey(file, name, expiresAt)
    print(`Another API key of ${name}, shown once:\n${key}`)
    return
  }
  const { key } = await addCaller(file, name, {
    rights: list(rights ?? 'token:read'),
    users: users === undefined ? [] : list(users),
    ...(proxyAllow === undefined ? {} : { proxyAllow: list(proxyAllow) }),
    ...(expiresAt === undefined ? {} : { expiresAt }),
  })
  print(`API key of ${name}, shown once:\n${key}`)
}

/** Prints a line for each caller. When its credentials were used is known where the database is. */
async function listCallers(entries: readonly CallerEntry[]): Promise<void> {
  const { DATABASE_URL: url, DATABASE_URL_FILE: file } = process.env
  if (url === undefined && file === undefined) {
    for (const entry of entries) print(`${lineOf(entry)}\tlast used: unknown without DATABASE_URL`)
    return
  }
  await withDatabase(async ({ db }) => {
    const uses = await createCredentialUseStore(db).list()
    const lastUse = (kind: Credential['kind'], name: string): string => {
      const use = uses.find((one) => one.kind === kind && one.name === name)
      return use?.lastUsedAt.toISOString() ?? 'never'
    }
    for (const entry of entries) {
      const keys = entry.apiKeys.map(({ id }) => `key ${id} ${lastUse('api_key', id)}`)
      const jwts = entry.jwts.length === 0 ? [] : [`jwt ${lastUse('jwt', entry.name)}`]
      print(`${lineOf(entry)}\tlast used: ${[...keys, ...jwts].join(', ')}`)
    }
  })
}

/** Name, rights, users, and the credentials, each key with its end. */
function lineOf({ name, rights, users, apiKeys, jwts }: CallerEntry): string {
  const keys = apiKeys.map(({ id, expiresAt }) =>
    expiresAt === undefined
      ? `key ${id}`
      : `key ${id} ${expiresAt > new Date() ? 'until' : 'expired'} ${expiresAt.toISOString()}`,
  )
  const credentials = [...keys, ...jwts.map(({ issuer }) => `jwt of ${issuer}`)]
  return [name, [...rights].join(','), users.join(','), credentials.join(', ')].join('\t')
}

/** Without a question, that the file can be used; with one, the answer, and exit code 1 for a refusal. */
function checkCallers(
  entries: readonly CallerEntry[],
  question: { caller?: string; right?: string; user?: string; call?: string },
): void {
  const { caller, right, user, call } = question
  if (caller === undefined) {
    if (right !== undefined || user !== undefined || call !== undefined) {
      throw new Error('Say with --caller whom the question is about.')
    }
    print(`The file can be used. Callers: ${entries.length}.`)
    return
  }
  const { allowed, reason } = checkCaller(entries, { caller, right, user, call })
  print(`${allowed ? 'allowed' : 'refused'}: ${reason}`)
  if (!allowed) process.exitCode = 1
}

/** What an operator can act on. A database that is away at the start says little by itself, so its code goes along. */
function sentenceOf(error: unknown): string {
  if (error instanceof BrokerError && error.code === 'temporarily_unavailable') {
    return `The database of DATABASE_URL cannot be reached (${deepestCodeOf(error)}).`
  }
  return error instanceof Error ? error.message : 'failed'
}

class UsageError extends Error {}

function print(line: string): void {
  process.stdout.write(`${line}\n`)
}

async function run([command, ...rest]: string[]): Promise<void> {
  switch (command) {
    case 'serve':
      return serve()
    case 'doctor':
      if (rest.length !== 0) throw new UsageError()
      return examineAll()
    case 'migrate':
      return migrateOnce()
    case 'accept-database':
      return acceptDatabaseOnce()
    case 'audit':
      if (rest.length !== 1 || rest[0] !== 'verify') throw new UsageError()
      return verifyAuditRecord()
    case 'tokens':
      // Nothing more: an argument can be read by everybody on the machine.
      if (rest.length !== 1 || rest[0] !== 'find') throw new UsageError()
      return findTokenUses()
    case 'keys':
      if (rest[0] === 'generate') return generateKey(rest.slice(1))
      if (rest.length !== 2 || rest[0] !== 'rotate') throw new UsageError()
      return rotateKeysOnce(rest[1] ?? '')
    case 'callers':
      return callers(rest[0], rest.slice(1))
    case 'openapi':
      print((await renderOpenApi()).trimEnd())
      return
    case 'help':
    case '--help':
      print(USAGE)
      return
    default:
      throw new UsageError()
  }
}

try {
  await run(process.argv.slice(2))
} catch (error) {
  process.exitCode = error instanceof UsageError ? 2 : 1
  if (error instanceof UsageError) process.stderr.write(USAGE)
  else if (error instanceof ConfigError) process.stderr.write(`${error.message}\n`)
  else process.stderr.write(`broker: ${sentenceOf(error)}\n`)
}
