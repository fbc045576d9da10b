// Prints how much of what reads leave behind V8's quick collections keep, in bytes a row: of statements over the database
// of DATABASE_URL, and of grants that were read together. To be run with --expose-gc, and without a test runner, whose
// looking after promises keeps more than that.

import { getHeapSpaceStatistics } from 'node:v8'
import { sql } from 'kysely'
import { systemClock } from '../../src/clock.ts'
import type { ServableGrant, UserKey } from '../../src/grant.ts'
import { createGrantReader } from '../../src/grant-reader.ts'
import { openDatabase } from '../../src/postgres/database.ts'
import { prepare } from '../../src/postgres/prepared.ts'
import { Secret } from '../../src/secret.ts'
import { silentLog } from './database.ts'

const TURNS = 1_000
const TURNS_BETWEEN = 25
const ROWS = 20

function oldBytes(): number {
  const space = getHeapSpaceStatistics().find(({ space_name: name }) => name === 'old_space')
  return space?.space_used_size ?? 0
}

async function leftBytesOf(turn: () => Promise<unknown>): Promise<number> {
  const repeat = async () => {
    for (let i = 1; i <= TURNS; i += 1) {
      await turn()
      if (i % TURNS_BETWEEN === 0) globalThis.gc?.({ type: 'minor' })
    }
  }
  await repeat()
  globalThis.gc?.()
  const beforeBytes = oldBytes()
  await repeat()
  return (oldBytes() - beforeBytes) / (TURNS * ROWS)
}

const url = new Secret(process.env['DATABASE_URL'] ?? '')
const database = openDatabase({ url, poolMax: 1, applicationName: 'short-lived' }, silentLog)
const readRows = prepare<{ count: number }>(
  database.db,
  'rows',
  (value) => sql`
    select i, 'text of ' || i as text, decode('abcdef', 'hex') as bytes
    from generate_series(1, ${value('count')}::int) i`,
)
const readGrant = createGrantReader({
  clock: systemClock,
  grants: {
    async findMany(users) {
      await new Promise((resolve) => setImmediate(resolve))
      return users.map((user) => ({ user, loginId: `login of ${user}` }) as ServableGrant)
    },
  },
})
let asked = 0
const nextUser = () => `user-${(asked += 1)}` as UserKey

const ofRows = await leftBytesOf(() => readRows({ count: ROWS }))
const ofGrants = await leftBytesOf(() =>
  Promise.all(Array.from({ length: ROWS }, () => readGrant(nextUser()))),
)
await database.close()
process.stdout.write(JSON.stringify({ ofRows, ofGrants }))
