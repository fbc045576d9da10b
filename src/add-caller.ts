// A new caller in CALLERS_FILE, or a second key of one, and that API key. The key is shown once, by whoever asked; the file gets its hash.
// The file is replaced whole, so that a broker that reads it meanwhile sees the old one or the new one.

import { createHash, randomBytes, randomInt, randomUUID } from 'node:crypto'
import { open, readFile, realpath, rename, rm, stat } from 'node:fs/promises'
import { type CallerEntry, parseCallers } from './callers-file.ts'

/** 36^8 ids. Two keys with the same one are refused when the file is read. */
const KEY_ID_LENGTH = 8
const KEY_ID_ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789'
/** 256 bits, which nobody guesses: hence neither salt nor a slow hash. */
const KEY_SECRET_BYTES = 32

export interface NewApiKey {
  /** `pgb_<id>_<secret>`: a secret, to be shown once. */
  key: string
  /** What the file holds of it. */
  entry: { id: string; sha256: string; expires_at?: string }
}

export interface CallerOptions {
  rights: readonly string[]
  users: readonly string[]
  /** Every path when not given. */
  proxyAllow?: readonly string[]
  /** Never when not given. */
  expiresAt?: Date
}

/** Makes an API key of 256 random bits. The id has no `_`, so the secret, which may, begins behind the second. */
export function createApiKey(expiresAt?: Date): NewApiKey {
  const id = Array.from(
    { length: KEY_ID_LENGTH },
    () => KEY_ID_ALPHABET[randomInt(KEY_ID_ALPHABET.length)],
  ).join('')
  const key = `pgb_${id}_${randomBytes(KEY_SECRET_BYTES).toString('base64url')}`
  const sha256 = createHash('sha256').update(key, 'utf8').digest('hex')
  return {
    key,
    entry: { id, sha256, ...(expiresAt && { expires_at: expiresAt.toISOString() }) },
  }
}

/**
 * Adds a caller with a new API key to the file, which is made with mode 0600 when it is missing.
 *
 * A running broker takes the caller up within a second. Two additions at once may lose one of the two.
 *
 * @throws CallersFileError when the file, or what would be added, cannot be used
 * @throws Error with a sentence for the operator when the name is taken
 */
export async function addCaller(
  file: string,
  name: string,
  options: CallerOptions,
): Promise<NewApiKey> {
  const { path, text, mode } = await readOrBegin(file)
  const earlier: CallerEntry[] = parseCallers(text)
  if (earlier.some((caller) => caller.name === name)) {
    throw new Error(
      'CALLERS_FILE has a caller of this name already. Choose another name, or add a key to it with --another-key.',
    )
  }
  const { callers } = JSON.parse(text) as { callers: unknown[] }
  const added = createApiKey(options.expiresAt)
  const changed = {
    callers: [
      ...callers,
      {
        name,
        api_keys: [added.entry],
        rights: options.rights,
        users: options.users,
        ...(options.proxyAllow && { proxy_allow: options.proxyAllow }),
      },
    ],
  }
  const changedText = `${JSON.stringify(changed, null, 2)}\n`
  parseCallers(changedText)
  await replaceFile(path, changedText, mode)
  return added
}

/**
 * Adds a key to a caller that is there, for changing keys without a gap: two may be active at a time.
 *
 * @throws CallersFileError when the file cannot be used, or would have three active keys of this caller
 * @throws Error with a sentence for the operator when there is no such caller
 */
export async function addKey(file: string, name: string, expiresAt?: Date): Promise<NewApiKey> {
  const { path, text, mode } = await readOrBegin(file)
  parseCallers(text)
  const changed = JSON.parse(text) as { callers: Array<{ name: string; api_keys?: unknown[] }> }
  const caller = changed.callers.find((one) => one.name === name)
  if (caller === undefined) {
    throw new Error('CALLERS_FILE has no caller of this name. Without --another-key it is added.')
  }
  const added = createApiKey(expiresAt)
  caller.api_keys = [...(caller.api_keys ?? []), added.entry]
  const changedText = `${JSON.stringify(changed, null, 2)}\n`
  parseCallers(changedText)
  await replaceFile(path, changedText, mode)
  return added
}

/** The file behind any symbolic link, with the mode it keeps; or the beginning of one. */
async function readOrBegin(file: string): Promise<{ path: string; text: string; mode: number }> {
  try {
    const path = await realpath(file)
    const { mode } = await stat(path)
    return { path, text: await readFile(path, 'utf8'), mode: mode & 0o777 }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    return { path: file, text: '{"callers": []}', mode: 0o600 }
  }
}

async function replaceFile(path: string, text: string, mode: number): Promise<void> {
  const temporary = `${path}.${randomUUID()}.tmp`
  try {
    const file = await open(temporary, 'wx', 0o600)
    try {
      await file.writeFile(text)
      // Set apart from creation, where the umask would take bits away.
      await file.chmod(mode)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(temporary, path)
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  }
}
