// From the outbox to the receiver: signed, at least once, those of one user in their order, whatever the receiver does.

import { setTimeout as delay } from 'node:timers/promises'
import fc from 'fast-check'
import { Webhook } from 'standardwebhooks'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import type { OutboxStore } from '../src/record-stores.ts'
import { createOutboxStore } from '../src/postgres/outbox-store.ts'
import type { QueueWorker } from '../src/queue.ts'
import { Secret } from '../src/secret.ts'
import { createWebhookSender, webhookSignature } from '../src/webhook.ts'
import { createTestDatabase } from './support/database.ts'
import { keepingLog } from './support/keeping-log.ts'
import { setFleet, until } from './support/fleet.ts'
import { startWebhookReceiver, type WebhookReceiver } from './support/webhook-receiver.ts'

/** More than any of these takes on a busy machine. */
const LIMIT_MS = 30_000
/** Faults that an event meets at most where they are drawn by chance. */
const FAULTS_MAX = 5
const LONG = process.env['SOAK'] === '1'
/** How long the receiver stays away in the long form. A pause between two attempts may be as long again by then. */
const OUTAGE_MS = LONG ? 600_000 : 0

interface Post {
  receiver: WebhookReceiver
  outbox: OutboxStore
  log: ReturnType<typeof keepingLog>
  /** Writes an event of each user named, in this order. */
  happen(...users: string[]): Promise<void>
  query<T>(statement: string): Promise<T[]>
  sender(options?: { secrets?: readonly Secret[]; timeoutSeconds?: number }): QueueWorker
  /** Waits until nothing is pending. */
  drained(limitMs?: number): Promise<void>
}

async function setPost(t: Test): Promise<Post> {
  const { database } = await createTestDatabase(t)
  const receiver = await startWebhookReceiver(t)
  const outbox = createOutboxStore(database)
  const log = keepingLog()
  let told = 0
  const query = async <T>(statement: string) => (await database.pool.query(statement)).rows as T[]
  return {
    receiver,
    outbox,
    log,
    query,
    async happen(...users) {
      for (const user of users) {
        // The generation numbers the events, so that the receiver can tell their order.
        await database.pool.query(
          `insert into outbox (user_id, type, grant_state, generation, expires_at)
           values ($1, 'grant.connected', 'active', $2, now())`,
          [user, (told += 1)],
        )
      }
    },
    sender({ secrets = [new Secret(receiver.secret)], timeoutSeconds = 5 } = {}) {
      const sender = createWebhookSender(
        { clock: systemClock, log, outbox },
        {
          url: receiver.url,
          publicUrl: 'https://broker.example',
          secrets,
          timeoutSeconds,
          backoffSeconds: 0.05,
        },
      )
      t.teardown(() => sender.stop())
      return sender
    },
    drained: (limitMs = LIMIT_MS) =>
      until(
        async () => (await query("select 1 from outbox where state = 'pending'")).length === 0,
        limitMs,
        'an empty outbox',
      ),
  }
}

/** Generations that a user's accepted events had, in the order of their arrival. */
function heardOf(receiver: WebhookReceiver, user: string): number[] {
  return receiver.accepted
    .filter(({ data }) => data.user === user)
    .map(({ data }) => data.generation)
}

function inOrder(numbers: readonly number[]): number[] {
  return [...new Set(numbers)].toSorted((a, b) => a - b)
}

t.test('a signature is that of the published test vector, one for each secret', (t) => {
  const id = 'msg_p5jXN8AQM9LWM0D4loKWxJek'
  const body = '{"test": 2432232314}'
  const message = { id, timestampSeconds: 1_614_265_330, body }
  const secret = new Secret('whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw')
  const wanted = 'v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE='
  t.equal(webhookSignature([secret], message), wanted)
  const next = new Secret(`whsec_${Buffer.alloc(32, 'next').toString('base64')}`)
  const both = webhookSignature([next, secret], message).split(' ')
  t.equal(both.length, 2)
  t.equal(both[1], wanted)
  t.end()
})

t.test('a receiver that knows either of two secrets takes the message', async (t) => {
  const post = await setPost(t)
  const next = new Secret(`whsec_${Buffer.from('the secret that comes next').toString('base64')}`)
  await post.happen('acme-1')
  await post.sender({ secrets: [new Secret(post.receiver.secret), next] }).runOnce()
  const [request] = post.receiver.requests
  t.equal(post.receiver.accepted.length, 1)
  t.doesNotThrow(() =>
    new Webhook(next.reveal()).verify(
      request?.body ?? '',
      request?.headers as Record<string, string>,
    ),
  )
  t.match(request?.headers, {
    'content-type': 'application/json',
    'user-agent': 'pagero-token-broker',
  })
  t.match(request?.headers['webhook-id'], /^[0-9a-f-]{36}$/)
})

t.test('after an outage of the receiver every event arrives, once and in order', async (t) => {
  t.setTimeout(4 * OUTAGE_MS + 10 * LIMIT_MS)
  const post = await setPost(t)
  const senders = [post.sender(), post.sender()]
  for (const sender of senders) sender.start()
  await post.receiver.stop()
  const users = ['acme-1', 'acme-2', 'acme-3']
  for (let round = 0; round < 4; round += 1) await post.happen(...users)
  await until(
    () => post.log.events.filter(({ event }) => event === 'webhook_failed').length > 8,
    LIMIT_MS,
    'failures',
  )
  await delay(OUTAGE_MS)
  await post.receiver.start()
  await post.drained(2 * OUTAGE_MS + LIMIT_MS)
  for (const user of users) {
    const heard = heardOf(post.receiver, user)
    t.equal(heard.length, 4, user)
    t.strictSame(heard, inOrder(heard), user)
  }
  t.strictSame(post.receiver.forged, [])
})

t.test('whatever is not a 2xx is tried again, and nobody else hears of it', async (t) => {
  const post = await setPost(t)
  const elsewhere = await startWebhookReceiver(t)
  const replies = [
    { status: 500 },
    'reset',
    { status: 302, headers: { location: elsewhere.url } },
    { status: 307, headers: { location: elsewhere.url } },
    'hang',
    { status: 404 },
    { status: 204 },
  ] as const
  post.receiver.answer = (event, { count }) =>
    event.data.user === 'acme-1' ? replies[count - 1] : undefined
  await post.happen('acme-1', 'acme-1', 'acme-2')
  const sender = post.sender({ timeoutSeconds: 1 })
  sender.start()
  await until(() => heardOf(post.receiver, 'acme-2').length === 1, LIMIT_MS, 'the other user')
  await post.drained()
  t.strictSame(heardOf(post.receiver, 'acme-1'), [1, 2])
  const first = post.receiver.requests.filter(({ id }) => id === post.receiver.requests[0]?.id)
  t.equal(first.length, replies.length, 'each attempt has the id of the first')
  t.equal(new Set(first.map(({ body }) => body)).size, 1, 'and the same body')
  t.equal(elsewhere.requests.length, 0)
  t.strictSame(
    post.log.events
      .filter(({ event, eventId }) => event === 'webhook_failed' && eventId === first[0]?.id)
      .map(({ reason }) => reason),
    ['http_500', 'econnreset', 'http_302', 'http_307', 'deadline', 'http_404'],
  )
})

t.test('a body that does not end neither fails a 2xx nor is read to its end', async (t) => {
  const post = await setPost(t)
  post.receiver.answer = () => ({ status: 200, body: 'x'.repeat(2_000_000) })
  await post.happen('acme-1')
  await post.sender().runOnce()
  t.equal((await post.query('select 1 from outbox')).length, 0)
})

t.test('Retry-After is kept, up to an hour', async (t) => {
  const post = await setPost(t)
  for (const [header, least, most] of [
    ['120', 110, 121],
    ['999999', 3_590, 3_601],
    ['soon', 0, 1],
    ['-5', 0, 1],
  ] as const) {
    post.receiver.answer = () => ({ status: 503, headers: { 'retry-after': header } })
    await post.query('delete from outbox')
    await post.happen('acme-1')
    await post.sender().runOnce()
    const [row] = await post.query<{ wait: number }>(
      'select extract(epoch from next_attempt_at - clock_timestamp())::float8 as wait from outbox',
    )
    const wait = row?.wait ?? NaN
    t.ok(wait > least - 1 && wait < most, `${header}: ${wait} s`)
  }
})

t.test('410 ends an event at once, three days end it too, and later ones follow', async (t) => {
  const post = await setPost(t)
  post.receiver.answer = ({ data }) =>
    data.generation === 1 ? { status: 410 } : data.generation === 2 ? { status: 500 } : undefined
  await post.happen('acme-1', 'acme-1', 'acme-1')
  const sender = post.sender()
  await sender.runOnce()
  t.match(await post.query('select state, last_failure from outbox order by position limit 1'), [
    { state: 'dead', last_failure: 'http_410' },
  ])
  await post.query(
    "update outbox set give_up_at = now() + interval '10 milliseconds' where generation = 2",
  )
  // Too old before it could be tried: the sweep sees to it.
  await delay(50)
  t.equal(await sender.runOnce(), 0)
  t.equal(await post.outbox.sweep(), 1)
  t.equal(await sender.runOnce(), 1)
  t.strictSame(heardOf(post.receiver, 'acme-1'), [3])

  await post.happen('acme-1')
  post.receiver.answer = () => ({ status: 500 })
  // The next pause would be some hours.
  await post.query(
    "update outbox set attempt_count = 20, give_up_at = now() + interval '20 minutes' where generation = 4",
  )
  t.equal(await sender.runOnce(), 1)
  t.equal(post.log.events.filter(({ event }) => event === 'webhook_dead').length, 2)
  t.strictSame(
    (await post.query<{ generation: string }>("select generation from outbox where state = 'dead'"))
      .length,
    3,
  )
  t.equal(await post.outbox.sweep(), 0)
  await post.query("update outbox set give_up_at = now() - interval '31 days'")
  t.equal(await post.outbox.sweep(), 3, 'a month later it is forgotten')
})

t.test(
  'what a lost replica had taken is delivered after its lease, under the same id',
  async (t) => {
    const post = await setPost(t)
    await post.happen('acme-1', 'acme-1')
    const [lost, ...others] = await post.outbox.take(10, 1)
    t.equal(others.length, 0, 'the next event of the user waits')
    t.strictSame(await post.outbox.take(10, 1), [], 'as long as the lease')
    const sender = post.sender()
    sender.start()
    await post.drained()
    t.equal(post.receiver.accepted[0]?.id, lost?.eventId)
    t.strictSame(heardOf(post.receiver, 'acme-1'), [1, 2])
  },
)

t.test('stopping waits for what is being delivered and begins nothing more', async (t) => {
  const post = await setPost(t)
  post.receiver.answer = () => ({ afterMs: 300 })
  await post.happen('acme-1', 'acme-1')
  const sender = post.sender()
  sender.start()
  await until(() => post.receiver.requests.length === 1, LIMIT_MS, 'a request')
  await sender.stop()
  t.equal(post.receiver.accepted.length, 1)
  t.equal((await post.query('select 1 from outbox')).length, 1)
  sender.start()
  await post.drained()
  t.strictSame(heardOf(post.receiver, 'acme-1'), [1, 2])
})

t.test('a receiver that hangs for some does not hold up the others', async (t) => {
  const post = await setPost(t)
  post.receiver.answer = ({ data }) => (data.user.startsWith('stuck') ? 'hang' : undefined)
  const stuck = Array.from({ length: 7 }, (_, index) => `stuck-${index}`)
  const others = Array.from({ length: 30 }, (_, index) => `acme-${index}`)
  await post.happen(...stuck, ...others)
  const sender = post.sender({ timeoutSeconds: 20 })
  sender.start()
  await until(() => post.receiver.accepted.length === others.length, 15_000, 'the others')
  t.equal(post.receiver.requests.length, stuck.length + others.length)
  t.ok(post.receiver.atOnce() <= 8, 'at most eight at a time')
  post.receiver.answer = () => undefined
  await post.receiver.stop()
})

t.test('with any faults and three replicas each user hears all, in order', async (t) => {
  const post = await setPost(t)
  const senders = [post.sender(), post.sender(), post.sender()]
  for (const sender of senders) sender.start()
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.integer({ min: 1, max: 4 }), { minLength: 1, maxLength: 25 }),
      fc.infiniteStream(fc.integer({ min: 0, max: 9 })),
      async (events, chances) => {
        post.receiver.accepted.length = 0
        const attempts = new Map<number, number>()
        post.receiver.answer = ({ data }) => {
          const attempt = (attempts.get(data.generation) ?? 0) + 1
          attempts.set(data.generation, attempt)
          // The pauses double: what fails ten times is not there within the limit.
          if (attempt > FAULTS_MAX) return undefined
          const chance = chances.next().value ?? 9
          if (chance < 2) return { status: 503 }
          if (chance < 3) return 'reset'
          return chance < 5 ? { afterMs: chance * 3 } : undefined
        }
        // Half of them happen while the others are on their way.
        await post.happen(...events.slice(0, 12).map((user) => `user-${user}`))
        for (const sender of senders) sender.kick()
        await post.happen(...events.slice(12).map((user) => `user-${user}`))
        await post.drained()
        for (const user of new Set(events)) {
          const heard = heardOf(post.receiver, `user-${user}`)
          const wanted = events.filter((one) => one === user).length
          if (heard.length !== wanted) return false
          if (heard.some((generation, index) => generation <= (heard[index - 1] ?? 0))) return false
        }
        return true
      },
    ),
    { numRuns: 15, endOnFailure: true },
  )
  t.strictSame(post.receiver.forged, [])
})

t.test('two processes: changes are told once, and one that was killed tells again', async (t) => {
  const { url } = await createTestDatabase(t)
  const receiver = await startWebhookReceiver(t)
  const fleet = await setFleet({
    url,
    test: t,
    env: {
      WEBHOOK_URL: receiver.url,
      WEBHOOK_SECRET: receiver.secret,
      WEBHOOK_TIMEOUT_SECONDS: '1',
      WEBHOOK_BACKOFF_SECONDS: '0.1',
    },
  })
  const [one, two] = [await fleet.add(), await fleet.add()]
  const users = ['acme-1', 'acme-2', 'acme-3', 'acme-4']
  await fleet.connect(users)
  const leave = (user: string) => one.call('DELETE', `/v1/users/${user}/grant`)
  for (const user of users.slice(0, 3)) t.equal((await leave(user)).status, 204)
  await until(() => receiver.accepted.length >= 3, LIMIT_MS, 'three events')
  t.strictSame(receiver.accepted.map(({ type, data }) => `${type} ${data.user}`).toSorted(), [
    'grant.disconnected acme-1',
    'grant.disconnected acme-2',
    'grant.disconnected acme-3',
  ])
  await two.kill('SIGTERM')
  receiver.answer = () => 'hang'
  t.equal((await leave('acme-4')).status, 204)
  await until(() => receiver.requests.length === 4, LIMIT_MS, 'the fourth')
  await one.kill('SIGKILL')
  receiver.answer = () => undefined
  await two.start()
  await until(() => receiver.accepted.length === 4, LIMIT_MS, 'the fourth, from the other')
  t.equal(receiver.accepted[3]?.id, receiver.requests[3]?.id)
  t.strictSame(receiver.forged, [])
})
