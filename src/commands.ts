// The commands of an operator, but for those about callers: what each does, and what it prints.
// They reach the process by its terminal alone, and are loaded when one is asked for: a broker that serves needs none.

import { randomBytes, randomUUID } from 'node:crypto'
import { createAudit } from './audit.ts'
import { verifyAudit } from './audit-check.ts'
import type { AuditEvent } from './audit-event.ts'
import { systemClock } from './clock.ts'
import { type Config, ConfigError, readConfig } from './config.ts'
import { examine, type Finding } from './doctor.ts'
import { describeUse, findToken } from './find-token.ts'
import { rotateKeys, SEALED_TABLES } from './key-rotation.ts'
import { createLog, printable } from './log.ts'
import { createAuditStore } from './postgres/audit-store.ts'
import { type Database, openDatabase } from './postgres/database.ts'
import { acceptDatabase, readDeploymentId } from './postgres/deployment.ts'
import { migrate, readSchemaState } from './postgres/migrate.ts'
import { createSealedValueStore } from './postgres/sealed-value-store.ts'
import { createChainKeys, createSealer } from './seal.ts'
import type { Terminal } from './terminal.ts'

/** Columns of what the doctor says. */
const LEVEL_CHARACTERS = 5
const ABOUT_CHARACTERS = 10

/** Prints a line for each thing that it looks at; exit code 1 when one is wrong. */
export async function examineAll(terminal: Terminal): Promise<void> {
  const tell = ({ level, about, text }: Finding): void => {
    if (level === 'wrong') terminal.answerNo()
    terminal.print(`${level.padEnd(LEVEL_CHARACTERS)}  ${about.padEnd(ABOUT_CHARACTERS)}  ${text}`)
  }
  let config: Config
  try {
    config = readConfig(terminal.environment)
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

export async function migrateOnce(terminal: Terminal): Promise<void> {
  await withDatabase(terminal, async (database) => {
    const { applied } = await migrate(database)
    terminal.print(
      applied.length === 0 ? 'The schema is current.' : `Applied: ${applied.join(', ')}`,
    )
  })
}

export async function acceptDatabaseOnce(terminal: Terminal): Promise<void> {
  await withDatabase(terminal, async (database, config) => {
    await acceptDatabase(database)
    await recordAsOperator(database, config, { action: 'database_accepted', actor: 'operator' })
    terminal.print('Accepted. Restart the replicas; they refresh again.')
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

export async function verifyAuditRecord(terminal: Terminal): Promise<void> {
  await withDatabase(terminal, async (database, config) => {
    const keys = createChainKeys(config.encryptionKeys, await readDeploymentId(database))
    const { events, chains, faults, remarks } = await verifyAudit(createAuditStore(database), keys)
    for (const remark of remarks) terminal.print(`note: ${remark}`)
    for (const fault of faults) terminal.print(`broken: ${fault}`)
    const size = `${events} events in ${chains} ${chains === 1 ? 'chain' : 'chains'}`
    terminal.print(faults.length === 0 ? `${size}, unbroken` : `${size}, ${faults.length} broken`)
    if (faults.length > 0) terminal.answerNo()
  })
}

export async function findTokenUses(terminal: Terminal): Promise<void> {
  const input = await terminal.readInput()
  await withDatabase(terminal, async (database) => {
    const uses = await findToken(createAuditStore(database), input)
    for (const use of uses) terminal.print(describeUse(use))
    if (uses.length > 0) return
    terminal.print('The audit record has nothing of it.')
    terminal.answerNo()
  })
}

export async function withDatabase(
  terminal: Terminal,
  work: (database: Database, config: Config) => Promise<void>,
): Promise<void> {
  const config = readConfig(terminal.environment)
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

/** Prints an entry for ENCRYPTION_KEYS. */
export function generateKey(
  terminal: Terminal,
  keyId = `k${new Date().toISOString().slice(0, 10).replaceAll('-', '')}`,
): void {
  if (!/^[A-Za-z0-9_-]{1,32}$/.test(keyId)) {
    throw new Error('A key id is 1 to 32 characters of A-Z a-z 0-9 _ -.')
  }
  terminal.print(`${keyId}:${randomBytes(32).toString('base64')}`)
}

/** The key is named, so that nobody goes back to the old one with settings of the step before. */
export async function rotateKeysOnce(terminal: Terminal, keyId: string): Promise<void> {
  await withDatabase(terminal, async (database, config) => {
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
    for (const table of SEALED_TABLES) terminal.print(`${table}: ${counts[table]} rows sealed anew`)
    for (const { user, detail } of unreadable) {
      terminal.print(
        `left as it is: ${user === undefined ? '' : `of user ${printable(user)}: `}${detail}`,
      )
    }
    for (const [needed, count] of Object.entries(unreadableCounts)) {
      terminal.print(`left as they are: ${count} rows that need ${printable(needed)}`)
    }
    if (leftCount > 0) {
      terminal.print(
        `left: ${leftCount} rows that are locked, or that somebody seals with another key.`,
      )
    }
    const isWhole = unreadable.length === 0 && leftCount === 0
    if (isWhole) terminal.print(`Everything in the database is sealed with ${keyId}.`)
    else terminal.answerNo()
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
