// What the look-alike remembers: a map, and with a state file the same map on disk after every change.
// Nothing is ever evicted: a spent refresh token must be known for as long as its reuse must be noticed.

import { randomBytes, generateKeyPair, type JsonWebKey } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { promisify } from 'node:util'
import type { Adapter, AdapterPayload } from 'oidc-provider'

interface Entry {
  payload: AdapterPayload
  /** Milliseconds since the epoch; null never expires. */
  expiresAtMs: number | null
}

interface State {
  signingKey: JsonWebKey
  cookieKeys: string[]
  entries: Record<string, Entry>
}

export interface Store {
  readonly signingKey: JsonWebKey
  readonly cookieKeys: string[]
  adapter(model: string): Adapter
}

/** Opens the state file, or begins a new state with fresh keys; without a file everything ends with the process. */
export async function openStore(stateFile: string | undefined): Promise<Store> {
  const state =
    stateFile !== undefined && existsSync(stateFile)
      ? (JSON.parse(readFileSync(stateFile, 'utf8')) as State)
      : { ...(await createKeys()), entries: {} }
  const now = Date.now()
  const entries = new Map(
    Object.entries(state.entries).filter(
      ([, { expiresAtMs }]) => expiresAtMs === null || expiresAtMs > now,
    ),
  )
  const { signingKey, cookieKeys } = state

  function save(): void {
    if (stateFile === undefined) return
    mkdirSync(dirname(stateFile), { recursive: true })
    const unfinished = `${stateFile}.tmp`
    const text = JSON.stringify({ signingKey, cookieKeys, entries: Object.fromEntries(entries) })
    writeFileSync(unfinished, text, { mode: 0o600 })
    renameSync(unfinished, stateFile)
  }

  save()
  return {
    signingKey,
    cookieKeys,
    adapter: (model) => createAdapter(`${model}:`, entries, save),
  }
}

function createAdapter(prefix: string, entries: Map<string, Entry>, save: () => void): Adapter {
  function findBy(member: 'uid' | 'userCode', value: string): AdapterPayload | undefined {
    for (const [key, { payload }] of entries) {
      if (key.startsWith(prefix) && payload[member] === value) return payload
    }
    return undefined
  }

  return {
    find: async (id) => entries.get(prefix + id)?.payload,
    findByUid: async (uid) => findBy('uid', uid),
    findByUserCode: async (userCode) => findBy('userCode', userCode),
    upsert: async (id, payload, expiresInSeconds: number | undefined) => {
      const expiresAtMs =
        expiresInSeconds === undefined ? null : Date.now() + expiresInSeconds * 1000
      entries.set(prefix + id, { payload, expiresAtMs })
      save()
    },
    consume: async (id) => {
      const entry = entries.get(prefix + id)
      if (entry === undefined) return
      entry.payload.consumed = Math.floor(Date.now() / 1000)
      save()
    },
    destroy: async (id) => {
      entries.delete(prefix + id)
      save()
    },
    revokeByGrantId: async (grantId) => {
      for (const [key, { payload }] of entries) {
        if (key.startsWith(prefix) && payload.grantId === grantId) entries.delete(key)
      }
      save()
    },
  }
}

/** RS256 is what OpenID Connect clients expect unless told otherwise. */
async function createKeys(): Promise<Pick<State, 'signingKey' | 'cookieKeys'>> {
  const { privateKey } = await promisify(generateKeyPair)('rsa', { modulusLength: 2048 })
  return {
    signingKey: {
      ...privateKey.export({ format: 'jwk' }),
      kid: randomBytes(5).readUIntBE(0, 5).toString(),
      use: 'sig',
      alg: 'RS256',
    },
    cookieKeys: [randomBytes(32).toString('base64url')],
  }
}
