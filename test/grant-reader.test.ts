// Reads that come together are one query: how many, how large, and what becomes of an error.

import { AsyncLocalStorage } from 'node:async_hooks'
import { setTimeout as delay } from 'node:timers/promises'
import t from 'tap'
import type { ServableGrant, UserKey } from '../src/grant.ts'
import { createGrantReader } from '../src/grant-reader.ts'
import { standingClock, storedGrants } from './support/stored-grants.ts'

const userOf = (number: number) => `user-${number}` as UserKey

t.test('many users are read by one query, and each gets its own grant', async (t) => {
  const { grants, add } = await storedGrants(t)
  for (let i = 0; i < 20; i += 1) await add(userOf(i), `token ${i}`)
  const queries: Array<readonly UserKey[]> = []
  const read = createGrantReader({
    clock: standingClock(),
    grants: {
      findMany(users) {
        queries.push(users)
        return grants.findMany(users)
      },
    },
  })
  const users = Array.from({ length: 21 }, (_, number) => userOf(number))
  // Each of them twice: two callers of one user share its row.
  const readings = await Promise.all([...users, ...users].map((user) => read(user)))
  t.same(
    queries.map(({ length }) => length),
    [21],
  )
  t.same(
    readings.map(({ grant }) => grant?.user),
    [...users.slice(0, 20), undefined, ...users.slice(0, 20), undefined],
    'the one without a grant has none',
  )
})

t.test('a query has 500 users at most, and two run at once at most', async (t) => {
  const sizes: number[] = []
  let running = 0
  let runningMost = 0
  const read = createGrantReader({
    clock: standingClock(),
    grants: {
      async findMany(users) {
        sizes.push(users.length)
        running += 1
        runningMost = Math.max(runningMost, running)
        await delay(5)
        running -= 1
        return []
      },
    },
  })
  await Promise.all(Array.from({ length: 2_001 }, (_, number) => read(userOf(number))))
  t.same(sizes, [500, 500, 500, 500, 1])
  t.equal(runningMost, 2)
})

t.test('who asks while a query is under way is given what a later one finds', async (t) => {
  const { grants, add } = await storedGrants(t)
  await add(userOf(1), 'token of before')
  const clock = standingClock()
  const found = Promise.withResolvers<void>()
  const closed = Promise.withResolvers<void>()
  let queries = 0
  const read = createGrantReader({
    clock,
    grants: {
      async findMany(users) {
        queries += 1
        const rows = await grants.findMany(users)
        found.resolve()
        await closed.promise
        return rows
      },
    },
  })
  const first = read(userOf(1))
  await found.promise
  clock.pass(100)
  await grants.close(userOf(1), 1, undefined)
  const second = read(userOf(1))
  closed.resolve()
  const [before, after] = await Promise.all([first, second])
  t.same([before.grant?.state, before.readAtMs], ['active', 0])
  t.same([after.grant?.state, after.readAtMs], ['revoked', 100])
  t.equal(queries, 2)
})

t.test('an error reaches everybody who waits for that query, and nobody else', async (t) => {
  let fails = true
  const answer: ServableGrant[] = []
  const read = createGrantReader({
    clock: standingClock(),
    grants: {
      async findMany() {
        if (fails) throw new Error('the query failed')
        return answer
      },
    },
  })
  const reads = [read(userOf(1)), read(userOf(1)), read(userOf(2))]
  for (const one of reads) await t.rejects(one, { message: 'the query failed' })
  fails = false
  t.same((await read(userOf(1))).grant, undefined, 'the next query is asked anew')
})

t.test('a reading is dated from before its query', async (t) => {
  const clock = standingClock()
  const read = createGrantReader({
    clock,
    grants: {
      async findMany() {
        clock.pass(40)
        return []
      },
    },
  })
  t.equal((await read(userOf(1))).readAtMs, 0)
})

t.test('a query belongs to the first of those that it is made for', async (t) => {
  const asking = new AsyncLocalStorage<UserKey>()
  const queries: Array<{ first: UserKey | undefined; within: UserKey | undefined }> = []
  const read = createGrantReader({
    clock: standingClock(),
    grants: {
      async findMany(users) {
        queries.push({ first: users[0], within: asking.getStore() })
        // So long that most wait for the end of one, and it is that which has the next one made.
        await delay(8)
        return []
      },
    },
  })
  const readings: Array<Promise<unknown>> = []
  for (let number = 0; number < 100; number += 1) {
    const user = userOf(number)
    readings.push(asking.run(user, () => read(user)))
    await delay(1)
  }
  await Promise.all(readings)
  t.ok(queries.length > 10, `${queries.length} queries`)
  for (const { first, within } of queries) t.equal(within, first)
})
