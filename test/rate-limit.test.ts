// Rate limits: what a bucket lets through, whose it is, what counts as one address, and that nobody pays for another's storm.

import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { createRateLimits, networkOf, type RateLimiter } from '../src/rate-limit.ts'
import { buildListeners, type InternalListener } from './support/internal-listener.ts'
import { keepingLog } from './support/keeping-log.ts'

/** One request, and the next after a hundred seconds: no machine is so slow that a test would meet it. */
const SLOW = 0.01
const OFF = { perCaller: 0, perUser: 0, perAddress: 0 }

/** What is in use: without a collection the answer would tell of garbage. */
function heapBytes(): number {
  setFlagsFromString('--expose-gc')
  runInNewContext('gc')()
  return process.memoryUsage().heapUsed
}

function createLimiter(perCaller: number) {
  let nowMs = 0
  const log = keepingLog()
  const { caller } = createRateLimits(
    { clock: { monotonicMs: () => nowMs }, log },
    { ...OFF, perCaller },
  )
  return { limiter: caller, log, pass: (ms: number) => void (nowMs += ms) }
}

/** Undefined when it passes, and the seconds to wait when not. */
function admit(limiter: RateLimiter, key: string): number | undefined {
  try {
    limiter.admit(key)
    return undefined
  } catch (error) {
    if (!(error instanceof BrokerError) || error.code !== 'rate_limited') throw error
    return error.extensions.retryAfterSeconds
  }
}

function burst(limiter: RateLimiter, key: string, count: number): number {
  let passed = 0
  for (let i = 0; i < count; i += 1) if (admit(limiter, key) === undefined) passed += 1
  return passed
}

t.test(
  'five seconds’ worth passes at once, then what the rate allows, and no key pays for another',
  async (t) => {
    const { limiter, log, pass } = createLimiter(10)
    t.equal(burst(limiter, 'a', 1_000), 50)
    t.equal(admit(limiter, 'a'), 1)
    t.equal(burst(limiter, 'b', 10), 10)
    pass(99)
    t.equal(admit(limiter, 'a'), 1, 'refused requests have not been counted')
    pass(2)
    t.equal(admit(limiter, 'a'), undefined)
    t.equal(admit(limiter, 'a'), 1)
    pass(1_000)
    t.equal(burst(limiter, 'a', 100), 10)
    pass(3_600_000)
    t.equal(burst(limiter, 'a', 100), 50, 'never more than the bucket holds')
    t.match(
      log.events.filter(({ event }) => event === 'rate_limited'),
      [{ caller: 'a' }, { caller: 'a' }],
      'a flood is told once in a while',
    )
  },
)

t.test(
  'after the seconds of Retry-After the next request passes, also under one a second',
  async (t) => {
    for (const perSecond of [0.1, 0.7, 3, 250]) {
      const { limiter, pass } = createLimiter(perSecond)
      t.equal(burst(limiter, 'a', 5_000), Math.max(1, Math.floor(perSecond * 5)), String(perSecond))
      const seconds = admit(limiter, 'a') ?? 0
      t.ok(seconds >= 1 && Number.isInteger(seconds))
      pass(seconds * 1000)
      t.equal(admit(limiter, 'a'), undefined, `after ${seconds} s`)
    }
  },
)

t.test('checking counts nothing, and refuses where nothing is left', async (t) => {
  const { limiter } = createLimiter(1)
  for (let i = 0; i < 100; i += 1) limiter.check('a')
  t.equal(burst(limiter, 'a', 100), 5)
  t.throws(() => limiter.check('a'), { code: 'rate_limited' })
  limiter.check('b')
})

t.test('no limit is none, and a million keys are not kept', async (t) => {
  const off = createLimiter(0)
  t.equal(burst(off.limiter, 'a', 100_000), 100_000)
  const { limiter } = createLimiter(1)
  const before = heapBytes()
  for (let i = 0; i < 1_000_000; i += 1) limiter.admit(`key-${i}`)
  const grownMiB = (heapBytes() - before) / 2 ** 20
  t.ok(grownMiB < 100, `${grownMiB} MiB, where a million would take several hundred`)
  limiter.admit('still in use')
})

t.test('whose bucket is full again is forgotten soon, and nobody else is', async (t) => {
  const { limiter, pass } = createLimiter(10)
  t.equal(burst(limiter, 'a', 100), 50)
  for (let i = 0; i < 5_000; i += 1) limiter.admit(`key-${i}`)
  t.equal(admit(limiter, 'a'), 1, 'it has been used up, however many others come')
  const before = heapBytes()
  for (let i = 0; i < 45_000; i += 1) {
    pass(100)
    limiter.admit(`another-${i}`)
  }
  const grownMiB = (heapBytes() - before) / 2 ** 20
  t.ok(grownMiB < 3, `${grownMiB} MiB, where 45,000 take seven`)
  limiter.admit('still in use')
})

t.test('an address is itself, an IPv4 address in IPv6 is that, and a /64 is one', async (t) => {
  for (const [address, wanted] of [
    ['192.0.2.1', '192.0.2.1'],
    ['::ffff:192.0.2.1', '192.0.2.1'],
    ['::FFFF:192.0.2.1', '192.0.2.1'],
    ['::ffff:c000:201', '192.0.2.1'],
    ['0:0:0:0:0:ffff:c000:0201', '192.0.2.1'],
    ['2001:db8:1:2:3:4:5:6', '2001:db8:1:2::/64'],
    ['2001:db8:1:2::1', '2001:db8:1:2::/64'],
    ['2001:0db8:0001:0002::', '2001:db8:1:2::/64'],
    ['2001:db8::1', '2001:db8:0:0::/64'],
    ['::1', '0:0:0:0::/64'],
    ['fe80::1%eth0', 'fe80:0:0:0::/64'],
    ['64:ff9b::192.0.2.1', '64:ff9b:0:0::/64'],
    ['unknown', 'unknown'],
    ['', 'unknown'],
    ['x'.repeat(1_000), 'unknown'],
  ] as const) {
    t.equal(networkOf(address), wanted, address.slice(0, 40))
  }
})

const CALLERS = {
  busy: { rights: ['token:read', 'proxy:call'], users: ['acme-*'] },
  calm: { rights: ['token:read', 'proxy:call'], users: ['*'] },
} as const

type Answer = { status: number; code: unknown; retryAfter: unknown }

/** Asks for a user's token, or makes a call for him. */
async function ask(
  { internalApp, credentials }: InternalListener,
  caller: keyof typeof CALLERS | 'nobody',
  path: string,
  extra: { remoteAddress?: string; headers?: Record<string, string> } = {},
): Promise<Answer> {
  const wrong = { authorization: `Bearer pgb_zzzz_${'A'.repeat(43)}` }
  const response = await internalApp.inject({
    url: `/v1/users/${path}`,
    ...(extra.remoteAddress === undefined ? {} : { remoteAddress: extra.remoteAddress }),
    headers: { ...(caller === 'nobody' ? wrong : credentials[caller]), ...extra.headers },
  })
  const { code } = response.json() as { code: unknown }
  return { status: response.statusCode, code, retryAfter: response.headers['retry-after'] }
}

async function askTimes(times: number, once: () => Promise<Answer>): Promise<Answer[]> {
  const answers: Answer[] = []
  for (let i = 0; i < times; i += 1) answers.push(await once())
  return answers
}

const statuses = (answers: readonly Answer[]): number[] => answers.map(({ status }) => status)
const LIMITED = { status: 429, code: 'rate_limited', retryAfter: /^[1-9]\d*$/ }

t.test('a caller beyond its limit is told when to come again, and others are served', async (t) => {
  const listener = await buildListeners(t, {
    callers: CALLERS,
    rateLimits: { ...OFF, perCaller: SLOW },
  })
  const alice = await listener.scene.connect(listener.engine, 'acme-alice')
  const answers = await askTimes(5, () => ask(listener, 'busy', `${alice}/access-token`))
  t.same(statuses(answers), [200, 429, 429, 429, 429])
  t.match(answers[4], LIMITED)
  t.equal((await ask(listener, 'calm', `${alice}/access-token`)).status, 200)
  t.equal(listener.scene.refreshes().length, 0)
  t.equal((await ask(listener, 'busy', `${alice}/pagero/document/v1/x`)).status, 429)
  t.equal(listener.api.record.length, 0, 'nothing of it reached Pagero')
})

t.test('one user’s storm stops at that user, from whatever caller it comes', async (t) => {
  const listener = await buildListeners(t, {
    callers: CALLERS,
    rateLimits: { ...OFF, perUser: SLOW },
  })
  const { scene, engine } = listener
  await scene.connect(engine, 'acme-alice')
  await scene.connect(engine, 'acme-bob')
  const storm = await askTimes(4, () => ask(listener, 'busy', 'acme-alice/access-token'))
  t.same(statuses(storm), [200, 429, 429, 429])
  t.match(await ask(listener, 'calm', 'acme-alice/access-token'), LIMITED)
  t.equal((await ask(listener, 'busy', 'acme-bob/access-token')).status, 200)
  t.equal((await scene.grantOf(engine, 'acme-alice' as never)).state, 'active')
})

t.test(
  'the limit tells no user that may not be seen from one that is not there, nor is his share used up',
  async (t) => {
    const listener = await buildListeners(t, {
      callers: CALLERS,
      rateLimits: { ...OFF, perUser: SLOW },
    })
    await listener.scene.connect(listener.engine, 'carol')
    const invisible = await askTimes(4, () => ask(listener, 'busy', 'carol/access-token'))
    const absent = await askTimes(4, () => ask(listener, 'busy', 'acme-nobody/access-token'))
    t.same(statuses(invisible), [404, 429, 429, 429])
    t.same(invisible, absent)
    t.equal((await ask(listener, 'calm', 'carol/access-token')).status, 200)
  },
)

t.test(
  'wrong keys of an address are slowed, and a good key at the same address is not',
  async (t) => {
    const listener = await buildListeners(t, {
      callers: CALLERS,
      rateLimits: { ...OFF, perAddress: SLOW },
    })
    const alice = await listener.scene.connect(listener.engine, 'acme-alice')
    const path = `${alice}/access-token`
    const guess = (extra = {}) => ask(listener, 'nobody', path, extra)
    const guesses = await askTimes(5, () => guess({ remoteAddress: '192.0.2.7' }))
    t.same(statuses(guesses), [401, 429, 429, 429, 429])
    t.equal((await guess({ remoteAddress: '::ffff:192.0.2.7' })).status, 429, 'the same address')
    t.equal((await guess({ remoteAddress: '192.0.2.8' })).status, 401, 'another address')
    const spoofed = { remoteAddress: '192.0.2.7', headers: { 'x-forwarded-for': '198.51.100.1' } }
    t.equal((await guess(spoofed)).status, 429, 'who trusts no proxy believes no header')
    t.equal((await ask(listener, 'calm', path, { remoteAddress: '192.0.2.7' })).status, 200)
  },
)

t.test(
  'behind a trusted proxy the address is the one that it has seen, in either form',
  async (t) => {
    const listener = await buildListeners(t, {
      callers: CALLERS,
      rateLimits: { ...OFF, perAddress: SLOW },
      trustedProxies: ['192.0.2.1', '2001:db8::/32'],
    })
    const guess = (remoteAddress: string, forwardedFor: string) =>
      ask(listener, 'nobody', 'acme-alice/access-token', {
        remoteAddress,
        headers: { 'x-forwarded-for': forwardedFor },
      })
    t.equal((await guess('192.0.2.1', '198.51.100.1')).status, 401)
    t.equal((await guess('::ffff:192.0.2.1', '198.51.100.1')).status, 429, 'the proxy in IPv6')
    t.equal((await guess('192.0.2.1', '::ffff:198.51.100.1')).status, 429, 'the client in IPv6')
    t.equal((await guess('2001:db8::9', '198.51.100.1')).status, 429)
    t.equal((await guess('192.0.2.1', '1.2.3.4, 198.51.100.1')).status, 429, 'made up further left')
    t.equal((await guess('192.0.2.1', '198.51.100.2')).status, 401)
    t.equal((await guess('203.0.113.5', '198.51.100.9')).status, 401, 'a stranger is himself')
    t.equal((await guess('203.0.113.5', '198.51.100.10')).status, 429, 'whatever it says')
  },
)

t.test(
  'logins and calls without a session are counted by address, and cost no row beyond it',
  async (t) => {
    const { publicApp, scene } = await buildListeners(t, {
      callers: CALLERS,
      rateLimits: { ...OFF, perAddress: SLOW },
    })
    const navigation = {
      'sec-fetch-mode': 'navigate',
      'sec-fetch-dest': 'document',
      'sec-fetch-site': 'none',
    }
    const login = (remoteAddress: string) =>
      publicApp.inject({ url: '/auth/login', remoteAddress, headers: navigation })
    const answers = []
    for (let i = 0; i < 6; i += 1) answers.push(await login('192.0.2.7'))
    t.same(
      answers.map(({ statusCode }) => statusCode),
      [302, 429, 429, 429, 429, 429],
    )
    t.match(answers[5]?.headers, {
      'content-type': 'text/html; charset=utf-8',
      'retry-after': /^[1-9]\d*$/,
    })
    t.equal((await login('192.0.2.8')).statusCode, 302)
    const { rows } = await scene.database.pool.query('select 1 from login_transactions')
    t.equal(rows.length, 2)

    const fetched = (remoteAddress: string) =>
      publicApp.inject({ url: '/auth/session', remoteAddress, headers: { 'x-csrf': '1' } })
    t.match((await fetched('192.0.2.7')).json(), { code: 'rate_limited', retry_after: Number })
    t.equal((await fetched('192.0.2.9')).statusCode, 401)
    t.equal((await publicApp.inject({ url: '/livez', remoteAddress: '192.0.2.7' })).statusCode, 200)
  },
)
