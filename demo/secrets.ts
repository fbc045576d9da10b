// Secrets of the demonstration: made at the first run, kept for the next ones, readable by this user alone.
// Without the same keys, what an earlier run has stored could not be opened.

import { createHash, randomBytes } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

export interface DemoSecrets {
  /** As ENCRYPTION_KEYS takes it. */
  encryptionKeys: string
  clientSecret: string
  /** The key of the one caller of the internal listener. */
  apiKey: string
}

/** 256 random bits, as every secret here. */
const SECRET_BYTES = 32
const CALLER_KEY_ID = 'demo'

/** Files in the folder of the demonstration. */
export function filesIn(directory: string) {
  return {
    secrets: join(directory, 'demo.json'),
    callers: join(directory, 'callers.json'),
    /** For curl: the Authorization header of the caller, so that no key stands in a command. */
    callerHeader: join(directory, 'caller.header'),
    lookAlike: join(directory, 'look-alike.json'),
    postgres: join(directory, 'postgres'),
    spool: join(directory, 'spool'),
    log: join(directory, 'broker.log'),
  }
}

export type DemoFiles = ReturnType<typeof filesIn>

/** Reads the secrets, or makes them; the files that are derived from them are written each time. */
export function readOrMakeSecrets(directory: string, files: DemoFiles): DemoSecrets {
  mkdirSync(directory, { recursive: true })
  const secrets = existsSync(files.secrets)
    ? (JSON.parse(readFileSync(files.secrets, 'utf8')) as DemoSecrets)
    : {
        encryptionKeys: `demo-1:${randomBytes(SECRET_BYTES).toString('base64')}`,
        clientSecret: randomBytes(SECRET_BYTES).toString('base64url'),
        apiKey: `pgb_${CALLER_KEY_ID}_${randomBytes(SECRET_BYTES).toString('base64url')}`,
      }
  writePrivately(files.secrets, JSON.stringify(secrets, null, 2))
  writePrivately(files.callers, JSON.stringify(callersOf(secrets), null, 2))
  writePrivately(files.callerHeader, `Authorization: Bearer ${secrets.apiKey}\n`)
  return secrets
}

function callersOf({ apiKey }: DemoSecrets): object {
  return {
    callers: [
      {
        name: 'demo',
        api_keys: [
          {
            id: CALLER_KEY_ID,
            sha256: createHash('sha256').update(apiKey).digest('hex'),
            expires_at: '2099-01-01T00:00:00Z',
          },
        ],
        rights: ['token:read', 'proxy:call', 'grant:read', 'grant:manage', 'ops:read'],
        users: ['*'],
      },
    ],
  }
}

function writePrivately(path: string, text: string): void {
  writeFileSync(path, text, { mode: 0o600 })
}
