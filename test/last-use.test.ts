// When a grant was used last: to the minute, and never in the way.

import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import type { UserKey } from '../src/grant.ts'
import { createLastUse, type Noted } from '../src/last-use.ts'
import { silentLog } from './support/database.ts'
import { standingClock, storedGrants } from './support/stored-grants.ts'

const userOf = (number: number) => `user-${number}` as UserKey

async function setUp(t: Test) {
  const stored = await storedGrants(t)
  const clock = standingClock()
  const batches: number[] = []
  const note = createLastUse({
    clock,
    log: silentLog,
    grants: {
      ...stored.grants,
      async touch(users) {
        await stored.grants.touch(users)
        batches.push(users.length)
      },
    },
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
  const { grants } = await storedGrants(t)
  const note = createLastUse({
    clock,
    log: silentLog,
    grants: {
      ...grants,
      async touch() {
        if (fails) throw new Error('the database is away')
        written += 1
      },
    },
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
