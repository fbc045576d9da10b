// The commands about callers: `callers add`, `list` and `check`.

import { readFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { addCaller, addKey } from './add-caller.ts'
import { type CallerEntry, parseCallers } from './callers-file.ts'
import { checkCaller } from './check-caller.ts'
import { withDatabase } from './commands.ts'
import { createCredentialUseStore } from './postgres/credential-use-store.ts'
import type { Credential } from './record-stores.ts'
import { type Terminal, UsageError } from './terminal.ts'

/** Options of each of the callers commands; one that belongs to another is refused. */
const CALLERS_OPTIONS = {
  add: ['file', 'rights', 'users', 'proxy-allow', 'expires-at', 'another-key'],
  list: ['file'],
  check: ['file', 'caller', 'right', 'user', 'call'],
} as const

/** Does one of the callers commands. Throws `UsageError` where it is none. */
export async function runCallersCommand(
  terminal: Terminal,
  action: string | undefined,
  rest: string[],
): Promise<void> {
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
  const file = values.file ?? terminal.environment['CALLERS_FILE']
  if (file === undefined) throw new Error('Set CALLERS_FILE, or give --file.')
  if (action === 'add') return addToCallers(terminal, file, positionals[0] ?? '', values)
  const entries = parseCallers(
    await readFile(file, 'utf8').catch(() => {
      throw new Error('CALLERS_FILE cannot be read.')
    }),
  )
  if (action === 'list') await listCallers(terminal, entries)
  else checkCallers(terminal, entries, values)
}

interface AddOptions {
  rights?: string
  users?: string
  'proxy-allow'?: string
  'expires-at'?: string
  'another-key'?: boolean
}

async function addToCallers(
  terminal: Terminal,
  file: string,
  name: string,
  options: AddOptions,
): Promise<void> {
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
    terminal.print(`Another API key of ${name}, shown once:\n${key}`)
    return
  }
  const { key } = await addCaller(file, name, {
    rights: list(rights ?? 'token:read'),
    users: users === undefined ? [] : list(users),
    ...(proxyAllow === undefined ? {} : { proxyAllow: list(proxyAllow) }),
    ...(expiresAt === undefined ? {} : { expiresAt }),
  })
  terminal.print(`API key of ${name}, shown once:\n${key}`)
}

/** Prints a line for each caller. When its credentials were used is known where the database is. */
async function listCallers(terminal: Terminal, entries: readonly CallerEntry[]): Promise<void> {
  const { DATABASE_URL: url, DATABASE_URL_FILE: file } = terminal.environment
  if (url === undefined && file === undefined) {
    for (const entry of entries)
      terminal.print(`${lineOf(entry)}\tlast used: unknown without DATABASE_URL`)
    return
  }
  await withDatabase(terminal, async ({ db }) => {
    const uses = await createCredentialUseStore(db).list()
    const lastUse = (kind: Credential['kind'], name: string): string => {
      const use = uses.find((one) => one.kind === kind && one.name === name)
      return use?.lastUsedAt.toISOString() ?? 'never'
    }
    for (const entry of entries) {
      const keys = entry.apiKeys.map(({ id }) => `key ${id} ${lastUse('api_key', id)}`)
      const jwts = entry.jwts.length === 0 ? [] : [`jwt ${lastUse('jwt', entry.name)}`]
      terminal.print(`${lineOf(entry)}\tlast used: ${[...keys, ...jwts].join(', ')}`)
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
  terminal: Terminal,
  entries: readonly CallerEntry[],
  question: { caller?: string; right?: string; user?: string; call?: string },
): void {
  const { caller, right, user, call } = question
  if (caller === undefined) {
    if (right !== undefined || user !== undefined || call !== undefined) {
      throw new Error('Say with --caller whom the question is about.')
    }
    terminal.print(`The file can be used. Callers: ${entries.length}.`)
    return
  }
  const { allowed, reason } = checkCaller(entries, { caller, right, user, call })
  terminal.print(`${allowed ? 'allowed' : 'refused'}: ${reason}`)
  if (!allowed) terminal.answerNo()
}
