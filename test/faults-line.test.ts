// What becomes of a rotation when the line to the authorization server breaks at any byte of the request or the answer.
// No token is presented twice in a hurry, and what could not be known again is reported as lost by us.

import t from 'tap'
import type { Test } from 'tap'
import { createTestDatabase } from './support/database.ts'
import { type Fleet, inParallel, setFleet, until } from './support/fleet.ts'
import { expectIntact } from './support/history.ts'

t.setTimeout(280_000)

const LONG = process.env['SOAK'] === '1'
/** No token is presented again sooner than this after an attempt in doubt. */
const SETTLE_MS = 1_000
const SETTLE = { UNKNOWN_SETTLE_SECONDS: String(SETTLE_MS / 1000) }
/** An attempt in doubt is settled within a second or two; a machine that others use too needs more. */
const RECOVERY_LIMIT_MS = 20_000

async function setFleetOf(
  t: Test,
  options: Partial<Parameters<typeof setFleet>[0]> = {},
): Promise<Fleet> {
  const { url } = await createTestDatabase(t)
  return setFleet({ url, test: t, ...options })
}

/** Pauses between presentations of one and the same token, in milliseconds from the end of one to the next. */
function pausesOf(fleet: Fleet): number[] {
  const calls = Map.groupBy(fleet.refreshes(), ({ form }) => form['refresh_token'])
  return [...calls.values()].flatMap((same) =>
    same.slice(1).map((call, i) => call.at - (same[i]?.endedAt ?? Infinity)),
  )
}

/** Waits until no grant is armed or waits for its next try. */
async function settled(fleet: Fleet, limitMs: number): Promise<void> {
  await until(
    async () => (await fleet.rows()).every(({ phase }) => phase === 'idle'),
    limitMs,
    'an end of every attempt',
  )
}

/** Length of one answer of the token endpoint on the wire. */
async function measureAnswer(fleet: Fleet): Promise<number> {
  await fleet.connect(['measured'])
  const [replica] = fleet.replicas
  const before = fleet.toServer.carried.down
  await fleet.expire(['measured'])
  await replica?.token('measured')
  return fleet.toServer.carried.down - before
}

/** Has one user after the other meet a cut at each of the offsets, and asks until the outcome is final. */
async function cutAtEach(
  fleet: Fleet,
  direction: 'up' | 'down',
  offsets: readonly number[],
): Promise<string[]> {
  const users = offsets.map((offset) => `${direction}-${offset}`)
  await fleet.connect(users)
  await fleet.expire(users)
  const [replica] = fleet.replicas
  const cuts = offsets.map((after) => ({ after, direction }))
  // Fewer at a time than open the breaker.
  await inParallel(users, 4, async (user) => {
    const cut = cuts.shift()
    if (cut !== undefined) fleet.toServer.cuts.push(cut)
    await until(
      async () => [200, 409].includes((await replica?.token(user))?.status ?? 0),
      RECOVERY_LIMIT_MS,
      `an outcome for ${user}`,
    )
  })
  return users
}

function offsetsUpTo(length: number, step: number): number[] {
  return Array.from({ length: Math.ceil(length / step) }, (_, i) => i * step)
}

t.test('an answer that is cut anywhere costs nothing where the server gives a grace', async (t) => {
  const fleet = await setFleetOf(t, { graceSeconds: 90, env: SETTLE })
  const replica = await fleet.add()
  const length = await measureAnswer(fleet)
  const users = await cutAtEach(fleet, 'down', offsetsUpTo(length, LONG ? 1 : 11))
  for (const user of users) t.equal((await replica.token(user)).status, 200, user)
  t.ok(fleet.refreshes().length > users.length * 1.5, 'most were presented again')
  t.ok(
    pausesOf(fleet).every((pauseMs) => pauseMs >= SETTLE_MS),
    'never twice in a hurry',
  )
  await expectIntact(t, fleet)
})

t.test(
  'with a strict server an answer that is cut is lost only before its token is whole',
  async (t) => {
    const fleet = await setFleetOf(t, { env: SETTLE })
    const replica = await fleet.add()
    const length = await measureAnswer(fleet)
    const users = await cutAtEach(fleet, 'down', offsetsUpTo(length, LONG ? 1 : 23))
    const rows = await fleet.rows()
    const lost = await fleet.lost()
    t.strictSame(
      rows.filter(({ state }) => state !== 'active').map(({ user }) => user),
      lost,
      'the broker knows which are lost',
    )
    t.ok(
      rows.every(({ state, reason }) => state === 'active' || reason === 'rotation_lost'),
      'and does not blame the user',
    )
    t.ok(lost.length > 0 && lost.length < users.length, 'the late cuts cost nothing')
    const calls = fleet.refreshes().length
    for (const user of lost) {
      const answer = await replica.token(user)
      t.match(answer, { status: 409, body: { cause: 'rotation_lost' } })
    }
    t.equal(fleet.refreshes().length, calls, 'the dead are not presented any more')
    const { rows: refused } = await fleet.database.pool.query<{ count: number }>(
      `select count(*) from refresh_attempts where outcome = 'refused' group by user_id, generation`,
    )
    t.equal(refused.length, lost.length)
    t.ok(
      refused.every(({ count }) => count === 1),
      'one refusal after an attempt in doubt is believed',
    )
    t.ok(
      pausesOf(fleet).every((pauseMs) => pauseMs >= SETTLE_MS),
      'never twice in a hurry',
    )
  },
)

t.test('requests that never reached the server whole cost nothing', async (t) => {
  const fleet = await setFleetOf(t)
  const replica = await fleet.add()
  await measureAnswer(fleet)
  const length = fleet.toServer.carried.up
  const users = await cutAtEach(fleet, 'up', offsetsUpTo(length, LONG ? 1 : 23))
  for (const user of users) t.equal((await replica.token(user)).status, 200, user)
  t.strictSame(await fleet.lost(), [])

  await t.test('each call has a connection of its own', async (t) => {
    const opened = fleet.toServer.opened
    for (let round = 0; round < 3; round += 1) {
      await fleet.expire(['measured'])
      t.equal((await replica.token('measured')).status, 200)
    }
    t.equal(fleet.toServer.opened - opened, 3)
  })

  await t.test('a redirect to the token endpoint itself is not followed', async (t) => {
    const before = fleet.refreshes().length
    fleet.lookAlike.faults.push({
      endpoint: 'token',
      kind: 'status',
      status: 307,
      headers: { location: fleet.lookAlike.tokenUrl },
    })
    await fleet.expire(['measured'])
    t.equal((await replica.token('measured')).status, 503)
    t.equal(fleet.refreshes().length, before + 1)
    await settled(fleet, 30_000)
  })

  await t.test('a server that returns the same refresh token keeps it', async (t) => {
    const [{ form } = { form: {} as Record<string, string> }] = fleet.refreshes().slice(-1)
    await fleet.connect(['same'])
    fleet.lookAlike.faults.push({
      endpoint: 'token',
      kind: 'status',
      status: 200,
      body: { access_token: 'at', token_type: 'Bearer', refresh_token: form['refresh_token'] },
      times: 4,
    })
    for (let round = 0; round < 4; round += 1) {
      await fleet.expire(['same'])
      t.equal((await replica.token('same')).status, 200)
    }
    const presented = fleet.refreshes().slice(-3)
    t.equal(new Set(presented.map((call) => call.form['refresh_token'])).size, 1)
    t.equal((await fleet.row('same')).generation, 5)
  })
})
