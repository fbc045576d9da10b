// What a process may believe of a grant without asking, and for how long.

import { randomUUID } from 'node:crypto'
import t, { type Test } from 'tap'
import { BrokerError } from '../src/errors.ts'
import { fingerprintOf, type UserKey } from '../src/grant.ts'
import { createTokenCache, type TokenCache } from '../src/token-cache.ts'
import { silentLog } from './support/database.ts'
import { standingClock, type StoredGrants, storedGrants } from './support/stored-grants.ts'

const ALICE = 'alice' as UserKey
const BOB = 'bob' as UserKey
const CAROL = 'carol' as UserKey
const TRUST_MS = 1_000
const STALE_LIMIT_SECONDS = 60

interface Setting extends StoredGrants {
  clock: ReturnType<typeof standingClock>
  cache: TokenCache
  /** Users that the database was asked for, in the order of asking. */
  asked: string[]
  /** While it is true, PostgreSQL does not answer. */
  line: { isDown: boolean }
  tokenOf: (user: UserKey) => Promise<string | undefined>
}

async function setUp(t: Test, options: { tokenCacheMax?: number } = {}): Promise<Setting> {
  const stored = await storedGrants(t)
  const clock = standingClock()
  const asked: string[] = []
  const line = { isDown: false }
  const grants = {
    ...stored.grants,
    async findMany(users: readonly UserKey[]) {
      asked.push(...users)
      if (line.isDown) throw new BrokerError('temporarily_unavailable', 'The line is down.')
      return stored.grants.findMany(users)
    },
  }
  const cache = createTokenCache(
    { clock, log: silentLog, sealer: stored.sealer, grants },
    { tokenCacheTrustMs: TRUST_MS, staleLimitSeconds: STALE_LIMIT_SECONDS, ...options },
  )
  const tokenOf = async (user: UserKey) => (await cache.read(user)).token?.accessToken
  return { ...stored, clock, cache, asked, line, tokenOf }
}

t.test('a token is served from memory for as long as the trust lasts, and no longer', async (t) => {
  const { clock, add, asked, cache, tokenOf } = await setUp(t)
  await add(ALICE, 'token of alice')
  t.equal(cache.useTrusted(ALICE), undefined, 'nothing is known before the first read')
  t.equal(await tokenOf(ALICE), 'token of alice')
  clock.pass(TRUST_MS)
  t.equal(cache.useTrusted(ALICE)?.accessToken, 'token of alice')
  t.equal(await tokenOf(ALICE), 'token of alice')
  t.same(asked, ['alice'])
  clock.pass(1)
  t.equal(cache.useTrusted(ALICE), undefined)
  t.equal(await tokenOf(ALICE), 'token of alice')
  t.same(asked, ['alice', 'alice'])
})

t.test('a disconnect on another replica holds here when the trust is over', async (t) => {
  const { clock, add, grants, tokenOf } = await setUp(t)
  await add(ALICE, 'token of alice')
  await tokenOf(ALICE)
  t.ok(await grants.close(ALICE, 1, undefined))
  clock.pass(TRUST_MS)
  t.equal(await tokenOf(ALICE), 'token of alice', 'known until then')
  clock.pass(1)
  await t.rejects(tokenOf(ALICE), { code: 'grant_not_found' })
  await t.rejects(tokenOf(ALICE), { code: 'grant_not_found' }, 'and ever after')
})

t.test('without the database, known tokens are served up to the stale limit', async (t) => {
  const { clock, add, line, tokenOf } = await setUp(t)
  await add(ALICE, 'token of alice')
  await add(BOB, 'token of bob')
  await tokenOf(ALICE)
  line.isDown = true
  await t.rejects(tokenOf(BOB), { code: 'temporarily_unavailable' }, 'one that is not known')
  clock.pass(STALE_LIMIT_SECONDS * 1000)
  t.equal(await tokenOf(ALICE), 'token of alice')
  clock.pass(1)
  await t.rejects(tokenOf(ALICE), { code: 'temporarily_unavailable' })
  line.isDown = false
  t.equal(await tokenOf(ALICE), 'token of alice')
  t.equal(await tokenOf(BOB), 'token of bob')
})

t.test('a successor that is only spooled is not given up for the older row', async (t) => {
  const { clock, add, cache, tokenOf } = await setUp(t)
  const { loginId } = await add(ALICE, 'first token')
  await tokenOf(ALICE)
  const successor = {
    loginId,
    generation: 2,
    accessToken: 'second token',
    fingerprint: fingerprintOf('second token'),
    scope: '',
    lifeSeconds: 600,
    expiresAtMs: 600_000,
    expiresAtEpochMs: Date.now() + 600_000,
  }
  cache.keepToken(ALICE, successor)
  clock.pass(TRUST_MS + 1)
  t.equal(await tokenOf(ALICE), 'second token', 'the row still holds the first')
  cache.keepToken(ALICE, { ...successor, generation: 1, accessToken: 'first token' })
  t.equal(await tokenOf(ALICE), 'second token', 'nor for an older token that comes late')
})

t.test('the row of another login takes the place of whatever was known', async (t) => {
  const { clock, add, cache, tokenOf } = await setUp(t)
  await add(ALICE, 'token of the login in the row')
  cache.keepToken(ALICE, {
    loginId: randomUUID(),
    generation: 9,
    accessToken: 'token of a login that was replaced',
    fingerprint: fingerprintOf('token of a login that was replaced'),
    scope: '',
    lifeSeconds: 600,
    expiresAtMs: 600_000,
    expiresAtEpochMs: Date.now() + 600_000,
  })
  clock.pass(TRUST_MS + 1)
  t.equal(await tokenOf(ALICE), 'token of the login in the row')
})

t.test('a ciphertext that was put in the place of another is refused', async (t) => {
  const { clock, add, database, tokenOf } = await setUp(t)
  await add(ALICE, 'token of alice')
  await add(BOB, 'token of bob')
  await tokenOf(ALICE)
  const swap = () =>
    database.pool.query(
      `update grants g set access_token_sealed = other.access_token_sealed
       from grants other where g.user_id <> other.user_id`,
    )
  await swap()
  clock.pass(TRUST_MS + 1)
  await t.rejects(tokenOf(ALICE), { code: 'integrity_failure' }, 'one that is known already')
  await t.rejects(tokenOf(BOB), { code: 'integrity_failure' }, 'and one that is not')
  await swap()
  t.equal(await tokenOf(ALICE), 'token of alice')
})

t.test('a changed end of life is noticed though the ciphertext is the same', async (t) => {
  const { clock, add, cache, database } = await setUp(t)
  await add(ALICE, 'token of alice')
  const before = await cache.read(ALICE)
  await database.pool.query(
    `update grants set access_token_expires_at = access_token_expires_at - interval '300 s'`,
  )
  clock.pass(TRUST_MS + 1)
  const after = await cache.read(ALICE)
  const endedEarlierMs =
    Number(before.token?.expiresAtEpochMs) - Number(after.token?.expiresAtEpochMs)
  t.equal(endedEarlierMs, 300_000)
})

t.test('an end of life that was put too early by a stopped process is put right', async (t) => {
  const { add, grants, cache, clock } = await setUp(t)
  await add(ALICE, 'token of alice')
  const grant = await grants.find(ALICE)
  if (grant === undefined) throw new Error('no grant')
  clock.pass(90_000)
  // It looked at its clock a minute and a half before the row was read.
  const early = cache.keepRow(grant, clock.monotonicMs() - 90_000).token?.expiresAtMs ?? 0
  for (let use = 0; use < 3; use += 1) t.ok(cache.known(ALICE), 'it is in demand')
  const { token } = cache.keepRow(grant, clock.monotonicMs())
  t.equal(token?.expiresAtMs, early + 90_000)
  t.equal(cache.keepRow(grant, clock.monotonicMs() - 1).token?.expiresAtMs, early + 90_000)
})

t.test('the room of what is forgotten is used again', async (t) => {
  const { cache } = await setUp(t, { tokenCacheMax: 10 })
  const { allocUnsafeSlow } = Buffer
  const made = t.capture(Buffer, 'allocUnsafeSlow', allocUnsafeSlow)
  for (let i = 0; i < 5_000; i += 1) {
    cache.keepToken(`user-${i}` as UserKey, {
      ...{ loginId: randomUUID(), generation: 1, accessToken: 't'.repeat(900), scope: '' },
      ...{ fingerprint: fingerprintOf('t'), lifeSeconds: 600, expiresAtMs: 1, expiresAtEpochMs: 1 },
    })
  }
  const slabs = made().filter(({ args: [sizeBytes] }) => sizeBytes >= 2 ** 20)
  t.equal(slabs.length, 1)
})

t.test('what was known stays what it was, though others have its place since', async (t) => {
  const { add, cache, tokenOf } = await setUp(t, { tokenCacheMax: 1 })
  for (const user of [ALICE, BOB, CAROL]) await add(user, `token of ${user}`)
  const alice = await cache.read(ALICE)
  for (let use = 0; use < 3; use += 1) {
    t.equal(cache.useTrusted(ALICE)?.accessToken, 'token of alice')
  }
  t.equal(await tokenOf(BOB), 'token of bob')
  t.equal(alice.token?.accessToken, 'token of alice')
  t.equal(cache.useTrusted(ALICE), undefined)
  cache.noteUse(ALICE)
  t.equal(cache.useTrusted(BOB)?.accessToken, 'token of bob')
  // Where Alice's was, whose token was in demand.
  t.equal(await tokenOf(CAROL), 'token of carol')
  t.equal(cache.useTrusted(CAROL)?.accessToken, 'token of carol')
})

t.test('the least recently used grant is forgotten when there are too many', async (t) => {
  const { add, asked, tokenOf } = await setUp(t, { tokenCacheMax: 2 })
  for (const user of [ALICE, BOB, CAROL]) await add(user, `token of ${user}`)
  await tokenOf(ALICE)
  await tokenOf(BOB)
  await tokenOf(ALICE)
  await tokenOf(CAROL)
  asked.length = 0
  t.equal(await tokenOf(ALICE), 'token of alice')
  t.same(asked, [])
  t.equal(await tokenOf(BOB), 'token of bob')
  t.same(asked, ['bob'])
})
