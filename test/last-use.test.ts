// When a grant was used last: to the minute, and never in the way.

import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { createApiKey } from '../src/add-caller.ts'
import { createCallers } from '../src/callers.ts'
import type { UserKey } from '../src/grant.ts'
import { createLastUse, type Noted } from '../src/last-use.ts'
import { createCredentialUseStore } from '../src/postgres/credential-use-store.ts'
import { createTestDatabase, silentLog } from './support/database.ts'
import { startProgram } from './support/program.ts'
import { standingClock, storedGrants } from './support/stored-grants.ts'

const userOf = (number: number) => `user-${number}` as UserKey

async function setUp(t: Test) {
  const stored = await storedGrants(t)
  const clock = standingClock()
  const batches: number[] = []
  const note = createLastUse<UserKey>({ clock, log: silentLog }, async (users) => {
    await stored.grants.touch(users)
    batches.push(users.length)
  })
  return {
    ...stored,
    clock,
    batches,
    note,
    async lastUsed(user: UserKey) {
      return (await stored.grants.find(user))?.lastUsedAt ?? undefined
    },
    /** Lets the pause end, and waits for the statement after it. */
    async written(count: number) {
      clock.pass(1_000)
      while (batches.length < count) await delay(1)
    },
  }
}

t.test('uses of many grants are written by one statement, each once a minute', async (t) => {
  const { add, clock, batches, note, lastUsed, written } = await setUp(t)
  const noted: Noted[] = [{}, {}, {}]
  for (const index of noted.keys()) await add(userOf(index), 'token')
  const useAll = () => noted.forEach((one, index) => note(userOf(index), one))
  useAll()
  useAll()
  await written(1)
  t.same(batches, [3])
  t.ok(await lastUsed(userOf(2)))
  clock.pass(58_999)
  useAll()
  clock.pass(1)
  useAll()
  await written(2)
  t.same(batches, [3, 3])
})

t.test('a statement has 500 grants at most, and the rest follow', async (t) => {
  const { batches, note, written } = await setUp(t)
  for (let i = 0; i < 1_100; i += 1) note(userOf(i), {})
  for (let count = 1; count <= 3; count += 1) await written(count)
  t.same(batches, [500, 500, 100])
})

t.test('a row that somebody works on is passed over', async (t) => {
  const { add, database, grants, lastUsed } = await setUp(t)
  await add(userOf(0), 'token')
  await add(userOf(1), 'token')
  const client = await database.pool.connect()
  try {
    await client.query('begin')
    await client.query('select 1 from grants where user_id = $1 for update', [userOf(0)])
    await grants.touch([userOf(0), userOf(1)])
    t.equal(await lastUsed(userOf(0)), undefined)
    t.ok(await lastUsed(userOf(1)))
  } finally {
    await client.query('rollback')
    client.release()
  }
})

t.test('a failure is only told to the log, and the next use is noted', async (t) => {
  const clock = standingClock()
  let fails = true
  let written = 0
  const note = createLastUse<UserKey>({ clock, log: silentLog }, async () => {
    if (fails) throw new Error('the database is away')
    written += 1
  })
  note(userOf(0), {})
  clock.pass(1_000)
  await delay(5)
  fails = false
  note(userOf(0), {})
  clock.pass(1_000)
  await delay(5)
  t.equal(written, 1)
})

/** A callers file with one caller and two keys, over a database that notes their use. */
async function setUpCallers(t: Test) {
  const { database, url } = await createTestDatabase(t)
  const clock = standingClock()
  const uses = createCredentialUseStore(database.db)
  const batches: number[] = []
  const keys = [createApiKey(), createApiKey()] as const
  const file = join(t.testdir(), 'callers.json')
  const caller = {
    name: 'sync',
    api_keys: keys.map(({ entry }) => entry),
    rights: ['token:read'],
    users: ['*'],
  }
  await writeFile(file, JSON.stringify({ callers: [caller] }), { mode: 0o600 })
  const callers = await createCallers(file, {
    clock,
    log: silentLog,
    credentialUses: {
      ...uses,
      async note(credentials) {
        await uses.note(credentials)
        batches.push(credentials.length)
      },
    },
  })
  t.teardown(() => callers.close())
  return {
    url,
    file,
    uses,
    batches,
    clock,
    keys,
    use: (key: string) => callers.recognize(`Bearer ${key}`)?.name,
    async written(count: number) {
      clock.pass(1_000)
      while (batches.length < count) await delay(1)
    },
  }
}

t.test('the use of an API key is noted once a minute, and a wrong one is no use', async (t) => {
  const { keys, use, uses, batches, clock, written } = await setUpCallers(t)
  const [{ key, entry }, other] = keys
  t.equal(use(`${other.key.slice(0, -1)}~`), undefined)
  for (let count = 0; count < 3; count += 1) t.equal(use(key), 'sync')
  await written(1)
  t.match(await uses.list(), [{ kind: 'api_key', name: entry.id, lastUsedAt: Date }])
  t.equal((await uses.list()).length, 1, 'the other key has not been used')
  clock.pass(58_999)
  use(key)
  clock.pass(1_001)
  use(key)
  use(other.key)
  await written(2)
  t.same(batches, [1, 2])
})

t.test(
  'an earlier instant never replaces a later one, and a batch may name one twice',
  async (t) => {
    const { database } = await createTestDatabase(t)
    const store = createCredentialUseStore(database.db)
    const credential = { kind: 'jwt', name: 'sync' } as const
    await store.note([credential, { ...credential }])
    await database.pool.query(`update credential_uses set last_used_at = '2099-01-01T00:00:00Z'`)
    await store.note([credential])
    t.same(await store.list(), [{ ...credential, lastUsedAt: new Date('2099-01-01T00:00:00Z') }])
  },
)

t.test('the list of callers shows when each key was used last', async (t) => {
  const { url, file, keys, uses } = await setUpCallers(t)
  const [{ entry: used }, { entry: unused }] = keys
  await uses.note([{ kind: 'api_key', name: used.id }])
  const program = startProgram(t, ['src/main.ts', 'callers', 'list', '--file', file], {
    DATABASE_URL: url,
    PAGERO_CLIENT_ID: 'client',
    PAGERO_CLIENT_SECRET: 'a secret',
    PAGERO_REDIRECT_URI: 'http://localhost:3000',
    ENCRYPTION_KEYS: `k1:${randomBytes(32).toString('base64')}`,
  })
  t.equal(await program.exited, 0, program.output())
  const [, shown = ''] = program.output().trim().split('\tlast used: ')
  t.match(shown, new RegExp(`^key ${used.id} 2\\d{3}-\\S+Z, key ${unused.id} never$`))
})
