// A rotation step by step, in virtual time: what is called in which order, what a caller is told and when, and what
// becomes of the row when any one call fails. The simulation has the same engine meet everything at once.

import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { fingerprintOf, type Grant, grantSealContext } from '../src/grant.ts'
import type { LiveToken } from '../src/live-token.ts'
import { createRefresher } from '../src/refresh.ts'
import { EPOCH_MS } from './support/simulation/life.ts'
import { SETTINGS, setVirtualCore } from './support/virtual-core.ts'

const BROKER_1 = { replica: 'broker-1', boot: 'boot-1' }
const REFUSED = { kind: 'refused', httpStatus: 400 } as const
const IN_DOUBT = { kind: 'in_doubt', reason: 'deadline' } as const
const UNREACHABLE = {
  kind: 'not_processed',
  reason: 'econnrefused',
  unreachable: true,
} as const
const REJECTED = { kind: 'rejected_client', httpStatus: 401, error: 'invalid_client' } as const

/** A refresher, and alice's grant whose access token has run out. */
function setUp(changes: { settings?: Partial<typeof SETTINGS>; held?: boolean } = {}) {
  const core = setVirtualCore()
  const { held = false } = changes
  const settings = { ...SETTINGS, ...changes.settings }
  const refresher = createRefresher(core.ports, settings, { ...core.identity, held })
  const alice = core.connect('alice')
  const { user } = alice
  const refresh = (grant = core.grantOf(user)) =>
    core.outcomeOf<LiveToken>(refresher.refresh(grant, 'expiry'))
  const change = (row: Partial<Grant>, of = user) => {
    core.database.grants.set(of, { ...core.grantOf(of), ...row })
  }
  /** Another replica arms the row. */
  const armElsewhere = (attemptId = 'elsewhere') => {
    core.database.heartbeat(BROKER_1.replica, BROKER_1.boot)
    const { loginId, generation } = core.grantOf(user)
    return core.database.arm({
      ...{ user, loginId, generation, attemptId, ...BROKER_1, cause: 'expiry', leaseSeconds: 60 },
      tokenDigest: Buffer.alloc(0),
    })
  }
  const inSeconds = (seconds: number) =>
    new Date(core.grantOf(user).readAt.getTime() + seconds * 1000)
  const tokens = () => core.presented.map(({ token }) => token)
  const attempts = () => [...core.database.attempts.values()]
  return {
    ...core,
    refresher,
    alice,
    user,
    refresh,
    change,
    armElsewhere,
    inSeconds,
    tokens,
    attempts,
  }
}

const unavailable = (retryAfterSeconds: number) => ({
  code: 'temporarily_unavailable',
  extensions: { retryAfterSeconds },
})

// ── A rotation that succeeds ─────────────────────────────────────────────────────────────────────

t.test('a rotation arms, presents, spools, stores, and then serves', async (t) => {
  const { refresh, calls, presented, attempts, storedTokenOf, user, grantOf, scheduler } = setUp()
  const token = await refresh()
  t.strictSame(calls, ['arm', 'write', 'store'])
  // It is armed from the first millisecond on: there the limits begin, and the life of the token.
  t.strictSame(presented, [
    { token: 'alice-rt', limits: { sendBeforeMs: 5_000, deadlineMs: 45_000 } },
  ])
  t.match(token, { accessToken: 'at-1', generation: 2, lifeSeconds: 600, expiresAtMs: 600_000 })
  t.equal(storedTokenOf(user), 'rt-1')
  t.match(attempts(), [
    { cause: 'expiry', generation: 1, replica: 'broker-0', boot: 'boot-0', outcome: 'granted' },
  ])
  t.match(grantOf(user), { phase: 'idle', state: 'active', generation: 2 })
  t.ok(scheduler.nowMs() < 60)
})

t.test('what an attempt took is counted from its arming', async (t) => {
  const { refresh, pass, disk, answers, ends } = setUp()
  await pass(10)
  answers.push({ ...UNREACHABLE, httpStatus: 503 })
  await refresh()
  await pass(3)
  t.match(ends, [{ httpStatus: 503, durationMs: 51, outcome: 'not_processed' }])
  await refresh()
  t.equal(Math.round([...disk.values()][0]?.durationMs ?? 0), 51)
})

t.test('the lease that is asked for is the one of the settings', async (t) => {
  const { refresher, alice, grantOf, user, pass, inSeconds } = setUp()
  void refresher.refresh(alice, 'expiry')
  await pass(0.001)
  t.equal(grantOf(user).phase, 'armed')
  t.strictSame(grantOf(user).leaseUntil, inSeconds(60))
})

t.test('whoever asks meanwhile joins, and nothing is left when it has ended', async (t) => {
  const { refresher, alice, user, pass, presented, outcomeOf } = setUp()
  t.equal(refresher.join(user), undefined)
  const first = refresher.refresh(alice, 'expiry')
  t.equal(refresher.refresh(alice, 'ahead'), first)
  t.equal(refresher.join(user), first)
  t.equal(refresher.inFlight(), 1)
  await outcomeOf(first)
  await pass(0)
  t.equal(presented.length, 1)
  t.equal(refresher.join(user), undefined)
  t.equal(refresher.inFlight(), 0)
})

t.test('without an access token in the answer the successor is kept all the same', async (t) => {
  const { refresh, answers, storedTokenOf, user, refresher, pass } = setUp()
  answers.push({
    kind: 'granted',
    httpStatus: 200,
    tokens: {
      ...{ accessToken: undefined, refreshToken: 'rt-only', expiresInSeconds: 600, scope: '' },
      idToken: undefined,
    },
  })
  t.match(await refresh(), unavailable(1))
  t.equal(storedTokenOf(user), 'rt-only')
  await pass(0)
  t.equal(refresher.inFlight(), 0)
})

// ── Who may not refresh ──────────────────────────────────────────────────────────────────────────

t.test('a copy of a database presents nothing', async (t) => {
  const { refresh, calls } = setUp({ held: true })
  t.match(await refresh(), unavailable(60))
  t.strictSame(calls, [])
})

t.test('a grant that is closed, dead, emptied or at rest is not armed', async (t) => {
  for (const [changes, problem] of [
    [{ state: 'revoked' }, { code: 'grant_not_found' }],
    [{ state: 'reauthentication_required' }, { code: 'reauthentication_required' }],
    [{ refreshTokenSealed: null }, { code: 'grant_not_found' }],
  ] as const) {
    const { refresh, change, calls } = setUp()
    change(changes)
    t.match(await refresh(), problem)
    t.strictSame(calls, [])
  }
  const { refresh, change, calls, inSeconds, user, grantOf } = setUp()
  change({ nextRetryAt: inSeconds(7), attemptId: 'the-last' })
  t.match(await refresh(), {
    ...unavailable(7),
    extensions: { retryAfterSeconds: 7, attemptId: 'the-last' },
  })
  change({ nextRetryAt: inSeconds(7), attemptId: null })
  t.notOk('attemptId' in ((await refresh()) as BrokerError).extensions)
  t.strictSame(calls, [])
  change({ nextRetryAt: grantOf(user).readAt })
  t.match(await refresh(), { accessToken: 'at-1' })
})

t.test('a sealed token that was moved leaves no trace', async (t) => {
  const { refresh, change, calls } = setUp()
  change({ loginId: 'another-login' })
  t.match(await refresh(), { code: 'integrity_failure' })
  t.strictSame(calls, [])
})

// ── Waiting for another replica ──────────────────────────────────────────────────────────────────

t.test('another’s rotation is awaited, ever more slowly, and its token served', async (t) => {
  const { refresher, alice, armElsewhere, pass, database, calls, outcomeOf, user, ...core } =
    setUp()
  const { ports, successorOf, presented } = core
  armElsewhere()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(5)
  const reads = calls.filter((name) => name === 'find').length
  t.ok(reads >= 11 && reads <= 16, `${reads} reads in five seconds`)
  const place = { user, loginId: alice.loginId, generation: 2 }
  database.store({
    ...successorOf(user, 'elsewhere'),
    accessToken: {
      sealed: ports.sealer.seal(grantSealContext('access_token_sealed', place), 'at-elsewhere'),
      requestedAt: database.find(user)?.readAt ?? new Date(),
      expiresAt: new Date((database.find(user)?.readAt.getTime() ?? 0) + 600_000),
      fingerprint: fingerprintOf('at-elsewhere'),
    },
  })
  const token = (await outcomeOf(waiting)) as LiveToken
  t.match(token, { accessToken: 'at-elsewhere', generation: 2 })
  t.ok(token.expiresAtMs <= 605_600 && token.expiresAtMs > 604_000, 'its life is not overrated')
  t.equal(presented.length, 0)
})

t.test('the wait ends when callers have lost patience', async (t) => {
  const { refresh, armElsewhere, scheduler, presented } = setUp()
  armElsewhere()
  t.match(await refresh(), unavailable(2))
  t.ok(scheduler.nowMs() >= 10_000 && scheduler.nowMs() < 11_000, `${scheduler.nowMs()} ms`)
  t.equal(presented.length, 0)
})

t.test('an armed row that is with nobody is soon told of', async (t) => {
  const { refresh, armElsewhere, database, user, pass, scheduler } = setUp()
  armElsewhere()
  const end = { outcome: 'in_doubt' as const, httpStatus: null, durationMs: 1, counts: false }
  database.disarm({ ...end, user, attemptId: 'elsewhere', retryInSeconds: 1, stayArmed: true })
  await pass(1.1)
  const askedAtMs = scheduler.nowMs()
  t.match(await refresh(), unavailable(2), 'its owner waits for its breaker')
  const tookMs = scheduler.nowMs() - askedAtMs
  t.ok(tookMs >= 300 && tookMs < 800, `${tookMs} ms`)
})

t.test('but not one whose attempt is under way, after another that failed', async (t) => {
  const { refresh, armElsewhere, database, user, pass, scheduler } = setUp()
  armElsewhere('before')
  const end = { outcome: 'not_processed' as const, httpStatus: 503, durationMs: 1, counts: false }
  database.disarm({ ...end, user, attemptId: 'before', retryInSeconds: 1, stayArmed: false })
  await pass(1.1)
  armElsewhere()
  const askedAtMs = scheduler.nowMs()
  t.match(await refresh(), unavailable(2))
  t.ok(scheduler.nowMs() - askedAtMs >= 10_000, 'for as long as callers have patience')
})

t.test('pauses of the wait begin short', async (t) => {
  const { refresher, alice, armElsewhere, pass, calls } = setUp()
  armElsewhere()
  void refresher.refresh(alice, 'expiry')
  await pass(0.03)
  t.strictSame(calls, ['arm'])
  await pass(0.035)
  t.strictSame(calls.slice(0, 2), ['arm', 'find'])
})

t.test('what another has stored without a token that lives is asked for again', async (t) => {
  const { refresher, alice, armElsewhere, pass, database, outcomeOf, user, successorOf } = setUp()
  armElsewhere()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(1)
  database.store(successorOf(user, 'elsewhere'))
  t.match(await outcomeOf(waiting), unavailable(1))
})

t.test('a grant that is taken away, closed or condemned meanwhile is told so', async (t) => {
  for (const [end, problem] of [
    ['gone', { code: 'grant_not_found' }],
    ['revoked', { code: 'grant_not_found' }],
    ['reauthentication_required', { code: 'reauthentication_required' }],
  ] as const) {
    const { refresher, alice, armElsewhere, pass, database, outcomeOf, user, change } = setUp()
    armElsewhere()
    const waiting = refresher.refresh(alice, 'expiry')
    await pass(1)
    if (end === 'gone') database.grants.delete(user)
    else change({ state: end })
    t.match(await outcomeOf(waiting), problem, end)
  }
})

t.test(
  'a login that replaces the grant meanwhile is served, whatever its generation',
  async (t) => {
    const { refresher, alice, armElsewhere, pass, database, outcomeOf, user, connect } = setUp()
    armElsewhere()
    const waiting = refresher.refresh(alice, 'expiry')
    await pass(1)
    database.grants.delete(user)
    connect('alice', { lifeSeconds: 300, loginId: 'another' })
    t.match(await outcomeOf(waiting), {
      accessToken: 'alice-at',
      loginId: 'another',
      generation: 1,
    })
  },
)

t.test('one that has died by then is not served', async (t) => {
  const { refresher, alice, armElsewhere, pass, change, outcomeOf, database, user, connect } =
    setUp()
  armElsewhere()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(1)
  database.grants.delete(user)
  connect('alice', { lifeSeconds: 300, loginId: 'another' })
  change({ state: 'reauthentication_required', stateReason: 'revoked_or_expired' })
  t.match(await outcomeOf(waiting), { code: 'reauthentication_required' })
})

// ── Writing the intent ───────────────────────────────────────────────────────────────────────────

t.test('without an intent nothing is presented, and a late one is taken back', async (t) => {
  for (const fault of ['lost', 'unconfirmed'] as const) {
    const { refresh, faults, presented, pass, grantOf, user, calls, attempts } = setUp()
    faults.set('arm', [fault])
    t.match(await refresh(), { code: 'temporarily_unavailable' })
    await pass(1)
    t.equal(grantOf(user).phase, 'idle', fault)
    if (fault === 'unconfirmed') t.match(attempts(), [{ outcome: 'not_processed' }])
    t.match(grantOf(user), { failureCount: 0 })
    t.strictSame(calls, ['arm', 'disarm'])
    await pass(58)
    t.equal(calls.length, 2)
    await pass(2)
    t.strictSame(calls, ['arm', 'disarm', 'disarm'], 'once more when nothing can be on its way')
    t.equal(presented.length, 0)
    t.match(await refresh(), { accessToken: 'at-1' }, 'and it is free for the next')
  }
})

t.test('what the database has refused is not taken back', async (t) => {
  const { refresh, faults, presented, pass, grantOf, user, calls } = setUp()
  faults.set('arm', ['refused'])
  t.match(await refresh(), { code: 'temporarily_unavailable' })
  await pass(100)
  t.strictSame(calls, ['arm'])
  t.equal(presented.length, 0)
  t.equal(grantOf(user).phase, 'idle')
})

t.test('while an intent is being taken back no other is written', async (t) => {
  const { refresh, refresher, alice, faults, outcomeOf, calls, pass, presented } = setUp()
  faults.set('arm', ['unconfirmed'])
  faults.set(
    'disarm',
    Array.from({ length: 14 }, () => 'lost' as const),
  )
  t.match(await refresh(), { code: 'temporarily_unavailable' })
  t.match(await outcomeOf(refresher.refresh(alice, 'expiry')), unavailable(2))
  t.notOk(calls.slice(1).includes('arm'), 'however many ask')
  const tries = calls.filter((name) => name === 'disarm').length
  t.ok(tries > 4 && tries < 14, 'one comes back to it')
  await pass(20)
  t.equal(presented.length, 0)
  t.match(await refresh(), { accessToken: 'at-1' }, 'who asks when it is done is served')
  await pass(100)
  t.equal(calls.filter((name) => name === 'arm').length, 2)
})

t.test('a take-over that is taken back is come back to by itself', async (t) => {
  const { refresh, armElsewhere, database, identity, pass, faults, presented, grantOf, user } =
    setUp()
  armElsewhere()
  // The owner stays away, and its lease is over.
  for (let seconds = 0; seconds < 70; seconds += 5) {
    database.heartbeat(identity.replica, identity.boot)
    await pass(5)
  }
  database.heartbeat(identity.replica, identity.boot)
  faults.set('arm', ['unconfirmed'])
  t.match(await refresh(), { code: 'temporarily_unavailable' })
  await pass(59)
  t.equal(presented.length, 0)
  await pass(3)
  t.equal(presented.length, 1)
  t.match(grantOf(user), { phase: 'idle', generation: 2 })
})

t.test('a stop ends the wait for a late intent', async (t) => {
  const { refresh, refresher, faults, pass, calls, outcomeOf } = setUp()
  faults.set('arm', ['lost'])
  await refresh()
  await outcomeOf(refresher.stop())
  await pass(100)
  t.strictSame(calls, ['arm', 'disarm'])
})

t.test('an intent that was written to a server that is gone is not acted on', async (t) => {
  const { refresher, alice, outcomeOf, presented, pass, grantOf, user } = setUp()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0)
  await outcomeOf(refresher.restore())
  t.match(await outcomeOf(waiting), unavailable(1))
  await pass(1)
  t.equal(presented.length, 0)
  t.equal(grantOf(user).phase, 'idle')
})

t.test(
  'no more are under way than there are slots; the next begins when one is spooled',
  async (t) => {
    const { refresher, connect, presented, pass, faults, tokens } = setUp({
      settings: { concurrency: 2 },
    })
    faults.set('store', ['lost', 'lost', 'lost', 'lost'])
    for (const name of ['a', 'b', 'c', 'd']) void refresher.refresh(connect(name), 'expiry')
    await pass(0.04)
    t.strictSame(tokens(), ['a-rt', 'b-rt'])
    await pass(0.02)
    t.equal(presented.length, 4, 'though nothing is stored yet')
    t.equal(refresher.inFlight(), 4)
    await pass(60)
    t.equal(refresher.inFlight(), 0)
  },
)

t.test('without the spool a slot is kept until the row has the successor', async (t) => {
  const { refresher, connect, tokens, pass, faults } = setUp({ settings: { concurrency: 1 } })
  faults.set('write', ['lost'])
  faults.set('store', ['lost', 'lost'])
  void refresher.refresh(connect('a'), 'expiry')
  void refresher.refresh(connect('b'), 'expiry')
  await pass(0.09)
  t.strictSame(tokens(), ['a-rt'])
  await pass(1)
  t.strictSame(tokens(), ['a-rt', 'b-rt'])
})

t.test('a failed rotation gives its slot back', async (t) => {
  const { refresher, connect, tokens, pass, faults, answers } = setUp({
    settings: { concurrency: 1 },
  })
  faults.set('arm', ['lost'])
  answers.push({ ...UNREACHABLE, afterMs: 10 })
  for (const name of ['a', 'b', 'c']) void refresher.refresh(connect(name), 'expiry')
  await pass(1)
  t.strictSame(tokens(), ['b-rt', 'c-rt'])
})

t.test('who would wait too long for a turn is told so at once, and nothing is armed', async (t) => {
  const { refresher, connect, answers, attempts, outcomeOf, pass, tokens, grantOf } = setUp({
    settings: { concurrency: 1 },
  })
  answers.push({ ...IN_DOUBT, afterMs: 40_000 })
  void refresher.refresh(connect('first'), 'expiry')
  await pass(0.01)
  t.equal(refresher.isIdle(), false)
  // Each of them is taken for 200 ms: half of what a caller waits.
  for (let i = 1; i < 25; i += 1) void refresher.refresh(connect(`waiting-${i}`), 'expiry')
  const last = connect('last')
  refresher.requireRoom()
  void refresher.refresh(connect('waiting-25'), 'expiry')
  t.throws(() => refresher.requireRoom(), unavailable(2))
  t.match(await outcomeOf(refresher.refresh(last, 'expiry')), unavailable(2))
  t.match(await outcomeOf(refresher.refresh(last, 'keep_alive')), unavailable(2))
  t.strictSame(
    attempts().map(({ user }) => user),
    ['first'],
  )
  t.match(grantOf(last.user), { phase: 'idle', generation: 1 }, 'it is as it was')
  // What may be spent already has its turn all the same.
  void refresher.refresh(connect('in-doubt'), 'recovery')
  await pass(60)
  t.ok(tokens().includes('in-doubt-rt'))
  t.notOk(tokens().includes('last-rt'))
  t.equal(refresher.isIdle(), true)
  refresher.requireRoom()
})

// ── The successor is kept ────────────────────────────────────────────────────────────────────────

t.test('once it is spooled it is served, though the database is away', async (t) => {
  const { refresh, faults, storedTokenOf, user, pass, calls, refresher, disk, events } = setUp()
  faults.set('store', ['lost', 'lost', 'lost', 'lost', 'lost', 'lost', 'lost', 'lost'])
  t.match(await refresh(), { accessToken: 'at-1' })
  t.equal(storedTokenOf(user), 'alice-rt')
  t.equal(disk.size, 1)
  t.equal(refresher.inFlight(), 1)
  await pass(1)
  const stores = () => calls.filter((name) => name === 'store').length
  t.ok(stores() >= 4 && stores() <= 6, `${stores()} tries in a second`)
  t.ok(events().includes('grant_store_failed'))
  await pass(8)
  t.equal(storedTokenOf(user), 'rt-1')
  t.equal(refresher.inFlight(), 0)
})

t.test('it is stored for as long as that takes, each two seconds', async (t) => {
  const { refresh, faults, storedTokenOf, user, pass, calls } = setUp()
  faults.set(
    'store',
    Array.from({ length: 100 }, () => 'lost' as const),
  )
  await refresh()
  await pass(20)
  const before = calls.length
  await pass(100)
  const tries = calls.length - before
  t.ok(tries >= 42 && tries <= 62, `${tries} tries in a hundred seconds`)
  await pass(200)
  t.equal(storedTokenOf(user), 'rt-1')
})

t.test('what is not spooled is served only when it is stored', async (t) => {
  const { refresher, alice, faults, outcomeOf, scheduler, storedTokenOf, user, log } = setUp()
  faults.set('write', ['lost'])
  faults.set('store', ['lost', 'lost', 'lost'])
  t.match(await outcomeOf(refresher.refresh(alice, 'expiry')), { accessToken: 'at-1' })
  t.equal(storedTokenOf(user), 'rt-1')
  t.ok(scheduler.nowMs() > 300)
  t.match(
    log.events.find(({ event }) => event === 'spool_write_failed'),
    { level: 'error', user },
  )
})

t.test('after a spool that failed nothing is armed until one can be written', async (t) => {
  const { refresh, faults, calls, connect, refresher, outcomeOf, presented } = setUp()
  faults.set('write', ['lost'])
  await refresh()
  calls.length = 0
  faults.set('checkWritable', ['lost'])
  const next = connect('b')
  t.match(await outcomeOf(refresher.refresh(next, 'expiry')), unavailable(5))
  t.strictSame(calls, ['checkWritable'])
  t.match(await outcomeOf(refresher.refresh(next, 'expiry')), { accessToken: 'at-2' })
  t.match(await outcomeOf(refresher.refresh(connect('c'), 'expiry')), { accessToken: 'at-3' })
  t.equal(calls.filter((name) => name === 'checkWritable').length, 2, 'not asked again')
  t.equal(presented.length, 3)
})

t.test('while the spool is nearly full nothing is armed', async (t) => {
  const { refresher, alice, outcomeOf, server, calls, presented, grantOf, user } = setUp()
  const before = grantOf(user)
  server.spoolHasRoom = false
  t.match(await outcomeOf(refresher.refresh(alice, 'expiry')), unavailable(5))
  t.strictSame(calls, ['checkWritable'])
  t.strictSame({ ...grantOf(user), readAt: before.readAt }, before)
  server.spoolHasRoom = true
  t.match(await outcomeOf(refresher.refresh(alice, 'expiry')), { accessToken: 'at-1' })
  t.equal(presented.length, 1)
})

t.test('a successor of a grant that was closed meanwhile is revoked', async (t) => {
  const { refresher, alice, outcomeOf, pass, database, user, disk, attempts } = setUp()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0.01)
  database.close(user, 1, undefined)
  t.match(await outcomeOf(waiting), unavailable(1))
  await pass(1)
  t.match([...database.revocations.values()], [{ user }])
  t.equal(disk.size, 0)
  t.match(attempts(), [{ outcome: 'granted' }])
})

t.test('its revocation is queued for as long as that takes', async (t) => {
  const { refresher, alice, pass, database, user, faults, events } = setUp()
  void refresher.refresh(alice, 'expiry')
  await pass(0.01)
  database.close(user, 1, undefined)
  faults.set('add', ['lost', 'lost'])
  await pass(0.07)
  t.equal(database.revocations.size, 0)
  await pass(2)
  t.equal(database.revocations.size, 1)
  t.ok(events().includes('revocation_store_failed'))
})

// ── A database that has gone back ────────────────────────────────────────────────────────────────

t.test('a row that has lost the newest token is not armed while the spool keeps it', async (t) => {
  const { refresh, database, scheduler, calls, presented } = setUp()
  const putBack = database.snapshot()
  await refresh()
  putBack()
  calls.length = 0
  t.match(await refresh(), unavailable(5))
  // It was spooled 52 ms after the start, and is kept for two minutes; reading the row once more takes one.
  await scheduler.run({ untilMs: 120_051 })
  t.match(await refresh(), unavailable(5))
  t.strictSame(calls, ['find', 'find'])
  await scheduler.run({ untilMs: 120_053 })
  t.match(await refresh(), { generation: 2 }, 'beyond that nobody has it any more')
  t.equal(presented.length, 2)
})

t.test('the rotation of another changes nothing about that', async (t) => {
  const { refresh, database, connect, refresher, outcomeOf } = setUp()
  const other = connect('b')
  const putBack = database.snapshot()
  await refresh()
  await outcomeOf(refresher.refresh(other, 'expiry'))
  putBack()
  t.match(await refresh(), unavailable(5))
})

t.test('a row that was read just before a newer token was stored is read once more', async (t) => {
  const { refresh, refresher, alice, outcomeOf, calls, presented, log } = setUp()
  await refresh()
  calls.length = 0
  t.match(await outcomeOf(refresher.refresh(alice, 'expiry')), {
    accessToken: 'at-1',
    generation: 2,
  })
  t.strictSame(calls, ['find'])
  t.equal(presented.length, 1)
  t.notOk(log.events.some(({ event }) => event === 'grant_went_back'))
})

t.test('a login after it is no step back', async (t) => {
  const { refresh, database, connect, user } = setUp()
  await refresh()
  database.grants.delete(user)
  connect('alice', { loginId: 'another' })
  t.match(await refresh(), { loginId: 'another', generation: 2 })
})

t.test(
  'who has given way to another comes back when that one has left the row behind',
  async (t) => {
    const { refresh, answers, change, inSeconds, pass, presented, user, grantOf, storedTokenOf } =
      setUp()
    answers.push(IN_DOUBT)
    await refresh()
    await pass(1)
    // Another replica takes the attempt over, and dies when it has taken its own back.
    change({ owner: 'broker-1', ownerBoot: 'boot-1', nextRetryAt: inSeconds(0) })
    await pass(50)
    t.equal(presented.length, 1, 'it is left to that one')
    change({ phase: 'idle' })
    await pass(61)
    t.equal(presented.length, 2)
    t.equal(storedTokenOf(user), 'rt-2')
    t.match(grantOf(user), { phase: 'idle', generation: 2 })
    await pass(120)
    t.equal(presented.length, 2, 'and that is that')
  },
)

t.test('and takes over when that one has died with the row armed', async (t) => {
  const { refresh, answers, change, inSeconds, pass, presented, user, storedTokenOf, database } =
    setUp()
  const alive = async (seconds: number) => {
    for (let past = 0; past < seconds; past += 5) {
      database.heartbeat('broker-0', 'boot-0')
      await pass(5)
    }
  }
  answers.push(IN_DOUBT)
  await refresh()
  await pass(1)
  database.heartbeat(BROKER_1.replica, BROKER_1.boot)
  change({
    ...{ owner: BROKER_1.replica, ownerBoot: BROKER_1.boot },
    ...{ nextRetryAt: inSeconds(0), leaseUntil: inSeconds(60) },
  })
  await alive(55)
  t.equal(presented.length, 1, 'it is left to that one')
  await alive(120)
  t.equal(presented.length, 2, 'nobody else asks')
  t.equal(storedTokenOf(user), 'rt-2')
})

t.test('until the client is accepted ten are presented at a time', async (t) => {
  for (const [kind, accepts] of [
    ['granted', true],
    ['refused', true],
    ['unreachable', false],
  ] as const) {
    const { refresher, connect, presented, answers, pass, outcomeOf, alice } = setUp()
    const grants = Array.from({ length: 12 }, (_, n) => connect(`user-${n}`))
    if (kind === 'refused') answers.push(REFUSED)
    if (kind === 'unreachable') answers.push(UNREACHABLE)
    const first = refresher.refresh(alice, 'expiry').catch(() => undefined)
    await (kind === 'refused' ? pass(1) : outcomeOf(first))
    const before = presented.length
    for (const grant of grants) refresher.refresh(grant, 'expiry').catch(() => undefined)
    await pass(0.03)
    t.equal(presented.length - before, accepts ? 12 : 10, kind)
  }
})

t.test('a new server is told of attempts under way', async (t) => {
  const { refresher, alice, pass, database, user, outcomeOf, grantOf, calls } = setUp()
  const putBack = database.snapshot()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0.01)
  putBack()
  t.equal(grantOf(user).phase, 'idle')
  await outcomeOf(refresher.restore())
  t.match(grantOf(user), { phase: 'armed', owner: 'broker-0' })
  t.match(await outcomeOf(waiting), { accessToken: 'at-1' })
  await pass(0)
  calls.length = 0
  await outcomeOf(refresher.restore())
  t.strictSame(calls, [], 'what has ended and is spooled needs nobody to tell it')
})

t.test('a new server is told of an attempt that has ended in doubt', async (t) => {
  const { refresh, refresher, answers, database, outcomeOf, grantOf, attempts, pass, ...core } =
    setUp()
  const { user, presented, calls } = core
  const putBack = database.snapshot()
  answers.push(IN_DOUBT)
  t.match(await refresh(), { code: 'temporarily_unavailable' })
  await pass(1)
  putBack()
  t.strictSame(attempts(), [])
  t.equal(await outcomeOf(refresher.restore()), true)
  t.match(grantOf(user), { phase: 'armed', owner: 'broker-0', failureCount: 0 })
  t.match(attempts(), [{ outcome: 'in_doubt' }])
  const { nextRetryAt, readAt } = grantOf(user)
  const pauseMs = (nextRetryAt?.getTime() ?? 0) - readAt.getTime()
  t.ok(pauseMs > 3_800 && pauseMs <= 4_000, `${pauseMs} ms of its five seconds are left`)
  await pass(3)
  t.equal(presented.length, 1)
  await pass(3)
  t.equal(presented.length, 2)
  calls.length = 0
  await outcomeOf(refresher.restore())
  t.strictSame(calls, [], 'what was presented again since is in doubt no more')
})

t.test('of two that were under way nobody arms before both have an end', async (t) => {
  const { refresher, alice, pass, database, user, outcomeOf, attempts, armElsewhere } = setUp()
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0.01)
  const [own] = attempts()
  database.grants.set(user, alice)
  database.attempts.clear()
  // A replica whose attempt was taken over by this one is the first to tell of its own.
  const theirs = { user, loginId: alice.loginId, generation: 1, ...BROKER_1 }
  database.heartbeat(BROKER_1.replica, BROKER_1.boot)
  database.rearm(
    {
      ...theirs,
      attemptId: 'theirs',
      cause: 'expiry',
      leaseSeconds: 60,
      tokenDigest: Buffer.alloc(0),
    },
    new Date(EPOCH_MS),
  )
  t.equal(await outcomeOf(refresher.restore()), true)
  t.strictSame(
    new Set(attempts().map(({ attemptId }) => attemptId)),
    new Set([own?.attemptId, 'theirs']),
  )
  database.disarm({
    ...{ user, attemptId: 'theirs', outcome: 'in_doubt', httpStatus: null, durationMs: 0 },
    ...{ retryInSeconds: 0, stayArmed: true, counts: false },
  })
  t.equal(armElsewhere('again'), undefined, 'the other one is under way still')
  t.match(await outcomeOf(waiting), { accessToken: 'at-1' })
})

t.test('also of one whose process was stopped until its lease was over', async (t) => {
  const { refresh, refresher, answers, database, outcomeOf, grantOf, user, pass } = setUp()
  const putBack = database.snapshot()
  answers.push({ ...IN_DOUBT, afterMs: 70_000 })
  await refresh()
  await pass(1)
  putBack()
  t.equal(await outcomeOf(refresher.restore()), true)
  const { phase, nextRetryAt, readAt } = grantOf(user)
  t.equal(phase, 'armed')
  t.ok((nextRetryAt?.getTime() ?? 0) > readAt.getTime() + 3_500, 'and it rests as long as any')
})

t.test('of each user that is in doubt', async (t) => {
  const { refresher, answers, database, outcomeOf, grantOf, alice, connect, user, pass } = setUp()
  const others = [connect('bob'), connect('carol')]
  const putBack = database.snapshot()
  for (const grant of [alice, ...others]) {
    answers.push(IN_DOUBT)
    await outcomeOf(refresher.refresh(grant, 'expiry'))
    await pass(0.1)
  }
  putBack()
  t.equal(await outcomeOf(refresher.restore()), true)
  for (const one of [user, ...others.map((grant) => grant.user)]) {
    t.match(grantOf(one), { phase: 'armed', owner: 'broker-0' }, one)
  }
})

t.test('once more where the row has not got back the token that is in doubt', async (t) => {
  const { refresh, refresher, answers, database, disk, outcomeOf, grantOf, user, pass } = setUp()
  const putBack = database.snapshot()
  await refresh()
  const [successor] = disk.values()
  answers.push(IN_DOUBT)
  await outcomeOf(refresher.refresh(grantOf(user), 'rejected'))
  await pass(1)
  putBack()
  t.equal(await outcomeOf(refresher.restore()), false)
  t.match(grantOf(user), { phase: 'idle', generation: 1 })
  if (successor !== undefined) database.store(successor)
  t.equal(await outcomeOf(refresher.restore()), true)
  t.match(grantOf(user), { phase: 'armed', generation: 2 })
})

t.test('not once its lease is over, for another may have it then', async (t) => {
  const { refresh, refresher, answers, database, outcomeOf, pass, calls } = setUp()
  answers.push(IN_DOUBT)
  await refresh()
  database.grants.clear()
  await pass(59.9)
  calls.length = 0
  await outcomeOf(refresher.restore())
  t.strictSame(calls, ['rearm', 'disarm'])
  await pass(0.2)
  calls.length = 0
  t.equal(await outcomeOf(refresher.restore()), true)
  t.strictSame(calls, [])
})

t.test('nor of one that surely did nothing', async (t) => {
  const { refresh, refresher, answers, outcomeOf, calls, pass } = setUp()
  answers.push({ ...UNREACHABLE, afterMs: 10 })
  await refresh()
  await pass(1)
  calls.length = 0
  t.equal(await outcomeOf(refresher.restore()), true)
  t.strictSame(calls, [])
})

t.test('a new server is given what is in no spool', async (t) => {
  const { refresh, refresher, faults, database, outcomeOf, storedTokenOf, user, calls } = setUp()
  const putBack = database.snapshot()
  faults.set('write', ['lost'])
  await refresh()
  putBack()
  calls.length = 0
  await outcomeOf(refresher.restore())
  t.strictSame(calls, ['store'])
  t.equal(storedTokenOf(user), 'rt-1')
})

t.test('what a spool would no longer keep is forgotten', async (t) => {
  const { refresh, refresher, faults, connect, outcomeOf, pass, calls } = setUp()
  faults.set('write', ['lost'])
  await refresh()
  await pass(121)
  await outcomeOf(refresher.refresh(connect('b'), 'expiry'))
  calls.length = 0
  await outcomeOf(refresher.restore())
  t.strictSame(calls, [])
})

t.test('a new server is not told of an attempt that was refused', async (t) => {
  const { refresher, alice, answers, pass, calls, outcomeOf } = setUp()
  answers.push(REFUSED)
  void refresher.refresh(alice, 'expiry')
  await pass(1)
  await outcomeOf(refresher.restore())
  t.notOk(calls.includes('rearm'))
})

t.test('a new server that cannot be told is told by nobody’s word', async (t) => {
  const { refresher, alice, pass, faults, outcomeOf } = setUp()
  void refresher.refresh(alice, 'expiry')
  await pass(0.01)
  faults.set('rearm', ['lost'])
  t.match(await outcomeOf(refresher.restore()), { code: 'temporarily_unavailable' })
})

// ── Refusals ─────────────────────────────────────────────────────────────────────────────────────

t.test('a refusal is heard once more, some seconds later, and then believed', async (t) => {
  const { refresh, answers, tokens, attempts, grantOf, user, scheduler, log } = setUp()
  answers.push(REFUSED, REFUSED)
  t.match(await refresh(), {
    code: 'reauthentication_required',
    extensions: { cause: 'revoked_or_expired' },
  })
  t.strictSame(tokens(), ['alice-rt', 'alice-rt'])
  t.match(attempts(), [
    { cause: 'expiry', outcome: 'refused' },
    { cause: 'recovery', outcome: 'refused' },
  ])
  t.match(grantOf(user), {
    state: 'reauthentication_required',
    stateReason: 'revoked_or_expired',
    phase: 'idle',
  })
  t.ok(scheduler.nowMs() > 3_050 && scheduler.nowMs() < 3_400, `${scheduler.nowMs()} ms`)
  t.match(log.events.at(-1), { event: 'grant_condemned', user })
})

t.test('a refusal that is not repeated changes nothing', async (t) => {
  const { refresh, answers, storedTokenOf, user, grantOf } = setUp()
  answers.push(REFUSED)
  t.match(await refresh(), { accessToken: 'at-2' })
  t.equal(storedTokenOf(user), 'rt-2')
  t.match(grantOf(user), { state: 'active', failureCount: 0 })
})

t.test('between the two nobody else may present it, and it takes up no slot', async (t) => {
  const { refresher, alice, answers, pass, grantOf, user, inSeconds, connect, tokens } = setUp({
    settings: { concurrency: 1 },
  })
  answers.push(REFUSED)
  void refresher.refresh(alice, 'expiry')
  await pass(0.06)
  t.match(grantOf(user), { phase: 'armed', owner: 'broker-0', failureCount: 0 })
  const { nextRetryAt } = grantOf(user)
  t.ok(nextRetryAt !== null && nextRetryAt > inSeconds(2.9) && nextRetryAt < inSeconds(3.1))
  void refresher.refresh(connect('b'), 'expiry')
  await pass(1)
  t.strictSame(tokens(), ['alice-rt', 'b-rt'])
})

t.test(
  'a refusal after an attempt in doubt is believed, and told as a lost rotation',
  async (t) => {
    const { refresh, answers, presented, pass, user, grantOf } = setUp()
    answers.push(IN_DOUBT, REFUSED)
    t.match(await refresh(), unavailable(5))
    await pass(10)
    t.equal(presented.length, 2, 'its owner comes back by itself')
    t.match(grantOf(user), { state: 'reauthentication_required', stateReason: 'rotation_lost' })
  },
)

t.test('a refusal that a newer token has overtaken serves that', async (t) => {
  const { refresher, alice, answers, pass, database, outcomeOf, user, successorOf } = setUp()
  answers.push({ ...REFUSED, afterMs: 100 })
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0.01)
  database.store(successorOf(user, 'from-elsewhere'))
  t.match(await outcomeOf(waiting), unavailable(1))
  t.equal(database.grants.get(user)?.state, 'active')
})

t.test('a refusal that a new login has overtaken serves that', async (t) => {
  const { refresher, alice, answers, pass, database, outcomeOf, user, connect, grantOf } = setUp()
  answers.push({ ...REFUSED, afterMs: 100 })
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(0.01)
  database.grants.delete(user)
  connect('alice', { lifeSeconds: 300, loginId: 'another' })
  t.match(await outcomeOf(waiting), { accessToken: 'alice-at', loginId: 'another' })
  await pass(200)
  t.match(grantOf(user), { state: 'active', loginId: 'another', generation: 1 })
})

t.test('a refusal that is believed gives its slot back', async (t) => {
  const { refresh, refresher, answers, connect, outcomeOf } = setUp({
    settings: { concurrency: 1 },
  })
  answers.push(REFUSED, REFUSED)
  await refresh()
  t.match(await outcomeOf(refresher.refresh(connect('b'), 'expiry')), { accessToken: 'at-3' })
})

/** An attempt of long ago whose end nobody knows, and as many refusals since as are asked for. */
function inDoubtSince(core: ReturnType<typeof setUp>, refusals: number) {
  const { loginId, user } = core.alice
  const attempt = { user, loginId, generation: 1, replica: 'gone', boot: 'gone', cause: 'expiry' }
  const times = { armedAtMs: 0, finishedAtMs: null, outcome: null }
  core.database.attempts.set('doubt', { ...attempt, ...times, attemptId: 'doubt' })
  for (let i = 0; i < refusals; i += 1) {
    const refused = { armedAtMs: 1 + i, finishedAtMs: 1 + i, outcome: 'refused' } as const
    core.database.attempts.set(`no-${i}`, { ...attempt, ...refused, attemptId: `no-${i}` })
  }
  const clear = () => {
    const row = core.database.attempts.get('doubt')
    if (row !== undefined) row.outcome = 'not_processed'
  }
  return clear
}

t.test('one refusal is a verdict only while the doubt lasts, two are one anyhow', async (t) => {
  for (const [before, problem, state] of [
    [0, unavailable(1), 'active'],
    [1, { code: 'reauthentication_required' }, 'reauthentication_required'],
  ] as const) {
    const core = setUp()
    const { refresher, alice, answers, calls, scheduler, outcomeOf, grantOf, user } = core
    const clear = inDoubtSince(core, before)
    answers.push(REFUSED)
    const waiting = refresher.refresh(alice, 'expiry')
    await scheduler.run({ untilMs: 10_000, done: () => calls.at(-1) === 'condemn' })
    clear()
    t.match(await outcomeOf(waiting), problem)
    t.equal(grantOf(user).state, state)
  }
})

t.test('a verdict that a late success has overtaken is told to nobody', async (t) => {
  const { refresher, alice, answers, pass, database, outcomeOf, user, successorOf, scheduler } =
    setUp()
  answers.push(REFUSED, { ...REFUSED, afterMs: 100 })
  const waiting = refresher.refresh(alice, 'expiry')
  // Between the evidence and the verdict: disarm, find, evidence, condemn follow on the answer.
  await pass(3.05)
  const untilMs = scheduler.nowMs() + 1_000
  await scheduler.run({
    untilMs,
    done: () =>
      database.attempts.size === 2 &&
      [...database.attempts.values()].every(({ outcome }) => outcome === 'refused'),
  })
  await pass(0.002)
  database.store(successorOf(user, 'late'))
  t.match(await outcomeOf(waiting), unavailable(1))
  t.equal(database.grants.get(user)?.state, 'active')
})

t.test('a grant whose second hearing another has begun is told to wait', async (t) => {
  const { refresher, alice, answers, pass, outcomeOf, change, presented } = setUp()
  answers.push(REFUSED)
  const waiting = refresher.refresh(alice, 'expiry')
  await pass(1)
  change({ owner: 'broker-1', ownerBoot: 'boot-1' })
  t.match(await outcomeOf(waiting), unavailable(2))
  t.equal(presented.length, 1)
})

t.test('a verdict that cannot be reached now is reached when the lease is over', async (t) => {
  for (const step of ['find', 'evidence']) {
    const { refresh, answers, faults, pass, presented, grantOf, user } = setUp()
    answers.push(REFUSED)
    faults.set(step, ['lost'])
    t.match(await refresh(), { code: 'temporarily_unavailable' })
    await pass(58)
    t.equal(presented.length, 1, step)
    await pass(5)
    t.equal(presented.length, 2, step)
    t.match(grantOf(user), { state: 'active', generation: 2 })
  }
})

t.test('while another’s answer may come back a refusal only casts doubt', async (t) => {
  const { refresh, answers, armElsewhere, pass, grantOf, user, calls, presented, database } =
    setUp()
  armElsewhere()
  // The owner is gone, and its lease is over: it may have got an answer all the same.
  await pass(61)
  database.heartbeat('broker-0', 'boot-0')
  await pass(8)
  database.heartbeat('broker-0', 'boot-0')
  await pass(8)
  database.heartbeat('broker-0', 'boot-0')
  answers.push(REFUSED)
  t.match(await refresh(), unavailable(15))
  t.match(grantOf(user), { state: 'suspect', phase: 'idle' })
  await pass(3)
  calls.length = 0
  t.match(await refresh(), unavailable(15))
  t.strictSame(calls, ['evidence'], 'and nothing is written')
  t.equal(presented.length, 1)
  await pass(100)
  t.match(await refresh(), { code: 'reauthentication_required' })
  t.match(grantOf(user), { state: 'reauthentication_required', stateReason: 'rotation_lost' })
  t.equal(presented.length, 1)
})

t.test('a doubt that has passed is heard again', async (t) => {
  const { refresh, change, grantOf, user, calls } = setUp()
  change({ state: 'suspect', stateReason: 'rotation_lost' })
  t.match(await refresh(), unavailable(1))
  t.strictSame(calls, ['evidence', 'condemn'])
  t.match(grantOf(user), { state: 'active', stateReason: null })
  t.match(await refresh(), { accessToken: 'at-1' })
})

// ── Failures ─────────────────────────────────────────────────────────────────────────────────────

t.test('what was not processed rests for its back-off, and is free then', async (t) => {
  const { refresh, answers, grantOf, user, pass, attempts, inSeconds } = setUp()
  answers.push(UNREACHABLE, { ...UNREACHABLE, retryAfterSeconds: 40 })
  const first = (await refresh()) as BrokerError
  const { attemptId } = attempts()[0] ?? {}
  t.match(first, unavailable(2))
  t.equal(first.extensions.attemptId, attemptId)
  await pass(0.01)
  t.match(grantOf(user), { phase: 'idle', failureCount: 1, state: 'active' })
  t.ok((grantOf(user).nextRetryAt ?? new Date(0)) <= inSeconds(2))
  t.match(attempts(), [{ outcome: 'not_processed' }])
  const early = (await refresh()) as BrokerError
  t.match(early, { code: 'temporarily_unavailable', extensions: { attemptId } })
  await pass(2)
  t.match(await refresh(), unavailable(40))
  await pass(0.01)
  t.match(grantOf(user), { failureCount: 1 }, 'the second is not its own: nobody is answered')
  await pass(40)
  t.match(await refresh(), { accessToken: 'at-3' })
})

t.test('what is in doubt stays armed, and its owner presents it again', async (t) => {
  const { refresh, answers, grantOf, user, pass, presented, attempts } = setUp()
  answers.push(IN_DOUBT, IN_DOUBT)
  t.match(await refresh(), unavailable(5))
  await pass(0.01)
  t.match(grantOf(user), { phase: 'armed', owner: 'broker-0', failureCount: 1 })
  await pass(4.9)
  t.equal(presented.length, 1)
  await pass(0.3)
  t.equal(presented.length, 2)
  await pass(10)
  t.equal(presented.length, 3)
  t.match(grantOf(user), { phase: 'idle', generation: 2 })
  t.match(attempts(), [{ cause: 'expiry' }, { cause: 'recovery' }, { cause: 'recovery' }])
  await pass(1_000)
  t.equal(presented.length, 3, 'and then no more')
})

t.test('a rejected client is the operator’s to mend, and changes no grant', async (t) => {
  const { refresh, answers, grantOf, user, pass, attempts, presented } = setUp()
  answers.push(REJECTED)
  t.match(await refresh(), {
    code: 'client_rejected_by_pagero',
    extensions: { retryAfterSeconds: 5 },
  })
  await pass(0.01)
  t.match(grantOf(user), { phase: 'idle', failureCount: 0, state: 'active' })
  t.match(attempts(), [{ outcome: 'rejected_client' }])
  await pass(3)
  t.match(await refresh(), { code: 'client_rejected_by_pagero' }, 'the breaker is open')
  t.equal(presented.length, 1)
  await pass(2)
  t.match(await refresh(), { accessToken: 'at-2' })
})

t.test('the end of an attempt is written for as long as that takes', async (t) => {
  const { refresh, answers, faults, grantOf, user, pass, refresher, events } = setUp()
  answers.push(UNREACHABLE)
  faults.set('disarm', ['lost', 'lost', 'lost'])
  t.match(await refresh(), unavailable(2), 'the caller does not wait for it')
  await pass(0.02)
  t.equal(grantOf(user).phase, 'armed')
  t.equal(refresher.inFlight(), 1)
  await pass(1)
  t.equal(grantOf(user).phase, 'idle')
  t.equal(refresher.inFlight(), 0)
  t.equal(events().filter((event) => event === 'grant_store_failed').length, 3)
})

t.test('what was not processed is not tried again before somebody asks', async (t) => {
  const { refresh, answers, pass, presented } = setUp()
  answers.push(UNREACHABLE)
  await refresh()
  await pass(1_000)
  t.equal(presented.length, 1)
})

t.test('a refusal, and the verdict on it, are written for as long as that takes', async (t) => {
  const { refresh, answers, faults, grantOf, user, events } = setUp()
  answers.push(REFUSED, REFUSED)
  faults.set('disarm', ['lost'])
  faults.set('condemn', ['lost', 'lost'])
  t.match(await refresh(), { code: 'reauthentication_required' })
  t.equal(grantOf(user).state, 'reauthentication_required')
  t.equal(events().filter((event) => event === 'grant_store_failed').length, 3)
})

t.test('an intent is taken back for as long as that takes', async (t) => {
  const { refresh, faults, grantOf, user, pass, events } = setUp()
  faults.set('arm', ['unconfirmed'])
  faults.set('disarm', ['lost', 'lost'])
  await refresh()
  await pass(1)
  t.equal(grantOf(user).phase, 'idle')
  t.strictSame(events(), ['grant_store_failed', 'grant_store_failed'])
})

t.test('a breaker that opens while a grant waits for its turn keeps it back', async (t) => {
  const { refresher, connect, answers, outcomeOf, tokens } = setUp({ settings: { concurrency: 1 } })
  answers.push(REJECTED)
  void refresher.refresh(connect('a'), 'expiry')
  t.match(await outcomeOf(refresher.refresh(connect('b'), 'expiry')), {
    code: 'client_rejected_by_pagero',
  })
  t.strictSame(tokens(), ['a-rt'])
})

t.test('while the breaker is open nobody waits for a slot to be told so', async (t) => {
  const { refresher, connect, answers, pass, outcomeOf, scheduler } = setUp({
    settings: { concurrency: 2 },
  })
  answers.push({ ...IN_DOUBT, afterMs: 20_000 }, REJECTED, { ...REJECTED, afterMs: 20_000 })
  void refresher.refresh(connect('a'), 'expiry')
  void refresher.refresh(connect('b'), 'expiry')
  await pass(6)
  void refresher.refresh(connect('c'), 'expiry')
  await pass(1)
  const atMs = scheduler.nowMs()
  t.match(await outcomeOf(refresher.refresh(connect('d'), 'expiry')), {
    code: 'client_rejected_by_pagero',
  })
  t.equal(scheduler.nowMs(), atMs)
})

// ── Coming back ──────────────────────────────────────────────────────────────────────────────────

t.test(
  'a row that this replica has left armed is come back to, by the take-over rule',
  async (t) => {
    const { refresher, user, database, grantOf, pass, presented, attempts } = setUp()
    const { loginId, generation } = grantOf(user)
    database.arm({
      ...{ user, loginId, generation, attemptId: 'before-the-death', cause: 'expiry' },
      ...{ replica: 'broker-0', boot: 'an-earlier-boot', leaseSeconds: 60 },
      tokenDigest: Buffer.alloc(0),
    })
    await pass(16)
    database.spoolDrained('broker-0', 'boot-0', database.now())
    refresher.recover(grantOf(user))
    await pass(0.2)
    t.equal(presented.length, 1)
    t.match(grantOf(user), { phase: 'idle', generation: 2 })
    t.match(attempts()[1], { cause: 'recovery' })
  },
)

t.test('whoever comes back leaves alone what is decided, or another’s', async (t) => {
  const decided: ReadonlyArray<readonly [what: string, row: Partial<Grant>]> = [
    ['another login', { loginId: 'another' }],
    ['a later generation', { generation: 2 }],
    ['condemned', { state: 'reauthentication_required' }],
    ['closed', { state: 'revoked' }],
    [
      'armed by another',
      { phase: 'armed', owner: 'broker-1', leaseUntil: new Date(EPOCH_MS + 60_000) },
    ],
  ]
  for (const [what, row] of decided) {
    const { refresher, alice, change, pass, calls } = setUp()
    change(row)
    refresher.recover(alice)
    await pass(30)
    t.strictSame(calls, ['find'], what)
  }
  const { refresher, alice, user, database, pass, calls } = setUp()
  database.grants.delete(user)
  refresher.recover(alice)
  await pass(30)
  t.strictSame(calls, ['find'], 'gone')
})

t.test('it waits for the back-off, and goes on after an error', async (t) => {
  const { refresher, alice, change, inSeconds, pass, presented, faults, calls, log } = setUp()
  change({ nextRetryAt: inSeconds(20) })
  refresher.recover(alice)
  await pass(19.9)
  t.strictSame(calls, ['find'])
  faults.set('find', ['lost'])
  await pass(1)
  t.strictSame(calls, ['find', 'find'])
  t.match(log.events, [{ event: 'refresh_recovery_failed', user: alice.user }])
  await pass(4)
  t.equal(calls.length, 2)
  await pass(1)
  t.equal(presented.length, 1)
})

t.test('a suspect grant of its own is come back to until it is judged', async (t) => {
  const { refresher, alice, change, pass, grantOf, user } = setUp()
  change({ state: 'suspect', owner: 'broker-0' })
  refresher.recover(alice)
  await pass(20)
  t.match(grantOf(user), { state: 'active', generation: 2 })
})

t.test('of two that come back to one row the newer does', async (t) => {
  const { refresher, alice, change, inSeconds, pass, presented, calls } = setUp()
  change({ nextRetryAt: inSeconds(20) })
  refresher.recover(alice)
  await pass(1)
  refresher.recover(alice)
  await pass(1)
  t.strictSame(calls, ['find', 'find'])
  await pass(60)
  t.equal(presented.length, 1)
  t.equal(calls.filter((name) => name === 'find').length, 4, 'one of them, and once to see the end')
})

t.test('a stop ends every coming back', async (t) => {
  const { refresher, alice, change, inSeconds, pass, presented, outcomeOf, calls } = setUp()
  change({ nextRetryAt: inSeconds(20) })
  refresher.recover(alice)
  await pass(1)
  await outcomeOf(refresher.stop())
  calls.length = 0
  await pass(100)
  t.strictSame([calls, presented], [[], []])
})

// ── Stopping ─────────────────────────────────────────────────────────────────────────────────────

t.test('a stop arms nothing more, and ends when what is in flight is stored', async (t) => {
  const {
    refresher,
    alice,
    pass,
    faults,
    connect,
    outcomeOf,
    storedTokenOf,
    user,
    scheduler,
    tokens,
  } = setUp({
    settings: { concurrency: 1 },
  })
  faults.set('store', ['lost', 'lost'])
  void refresher.refresh(alice, 'expiry')
  const waiting = refresher.refresh(connect('b'), 'expiry')
  await pass(0.01)
  const stopped = refresher.stop()
  const atMs = scheduler.nowMs()
  t.match(await outcomeOf(refresher.refresh(connect('c'), 'expiry')), unavailable(1))
  t.equal(scheduler.nowMs(), atMs, 'at once')
  t.match(await outcomeOf(waiting), unavailable(1), 'not even for who waits for his turn')
  await outcomeOf(stopped)
  t.equal(storedTokenOf(user), 'rt-1')
  t.strictSame(tokens(), ['alice-rt'])
})
