// A real process whose event loop does not keep up: what is refused, what is answered all the same, and when that is over.

import t from 'tap'
import { Pool, request } from 'undici'
import { createShare } from '../src/http/overload.ts'
import { createTestDatabase } from './support/database.ts'
import { setFleet, until } from './support/fleet.ts'
import { startRawBroker } from './support/raw-broker.ts'

const BUSY_LOOP = import.meta.resolve('./support/busy-loop.ts')
const APPLICATION = 'https://app.example'
/** On a machine with ten times more to do than it can. */
const LIMIT_MS = 30_000
/** Refusals are told of no more often. */
const NOTE_INTERVAL_MS = 10_000
/** Statements that may wait for a connection, and requests that are more than that. */
const WAITING_MAX = 1_000
const ASKED = 1_300

/** Asks until it is refused, and says how often it was not. */
async function refused<Answer extends { status: number }>(
  ask: () => Promise<Answer>,
): Promise<Answer & { admitted: number }> {
  const endMs = performance.now() + LIMIT_MS
  for (let admitted = 0; performance.now() < endMs; admitted += 1) {
    const answer = await ask()
    if (answer.status === 503) return Object.assign(answer, { admitted })
  }
  throw new Error('Not in time: a refusal')
}

t.test('the share shrinks while ticks are late, and grows when they are not', (t) => {
  const share = createShare()
  const note = (...late: boolean[]) => {
    for (const isLate of late) share.note(isLate)
    return Math.round(share.now() * 1000) / 1000
  }
  t.equal(note(true, true), 1, 'a collection of garbage is late once')
  t.equal(note(false, true, true, false), 1)
  t.equal(note(true, true, true), 0.7)
  t.equal(note(true), 0.49)
  t.equal(note(false), 0.54)
  t.equal(note(true, true), 0.54)
  t.equal(note(...Array.from({ length: 50 }, () => true)), 0.1, 'something is always done')
  t.equal(note(...Array.from({ length: 17 }, () => false)), 0.95)
  t.equal(note(false, false), 1)
  t.end()
})

t.test(
  'a process that does not keep up refuses most of what costs work, until it does',
  async (t) => {
    const { url } = await createTestDatabase(t)
    const { fleet, replica, upstream, seat } = await startRawBroker(t, {
      databaseUrl: url,
      env: {
        NODE_OPTIONS: `--import=${BUSY_LOOP}`,
        TOKEN_CACHE_TRUST_MS: '50',
        OVERLOAD_DELAY_MS: '200',
        ALLOWED_ORIGINS: APPLICATION,
      },
    })
    const [, internal] = await seat('alice')
    const before = await fleet.row('alice')
    const readGrant = () => replica.call('GET', '/v1/users/alice/grant')
    t.equal((await readGrant()).status, 200)

    const beganMs = performance.now()
    replica.signal('SIGWINCH')
    // Of each kind some are done meanwhile, and most are not.
    t.match((await refused(readGrant)).body, { code: 'temporarily_unavailable', retry_after: 1 })
    const calls = upstream.calls.length
    const proxied = await refused(() =>
      fetch(`${replica.origin}${internal?.prefix}/a`, {
        headers: { authorization: replica.authorization },
      }),
    )
    t.match(proxied.headers.get('proxy-status'), /; error=/)
    t.equal(upstream.calls.length - calls, proxied.admitted, 'what is refused is not called')
    const ofGateways = await refused(() =>
      fetch(`${replica.origin}/v1/forward-auth`, {
        // Whose token is not in memory.
        headers: { authorization: replica.authorization, 'x-broker-user': 'nobody' },
      }),
    )
    t.equal(ofGateways.headers.get('x-broker-problem'), 'temporarily_unavailable')
    const ofBrowsers = await refused(() => fetch(`${replica.publicOrigin}/auth/session`))
    t.equal(ofBrowsers.headers.get('retry-after'), '1')
    const ofPages = await refused(() =>
      fetch(`${replica.publicOrigin}/api/document/v1/documents`, {
        headers: { origin: APPLICATION, 'x-csrf': '1' },
      }),
    )
    t.equal(ofPages.headers.get('access-control-allow-origin'), APPLICATION, 'its page may read it')
    t.match(ofPages.headers.get('proxy-status'), /; error=/)
    // Not `fetch`, which says of itself that it is no navigation.
    const ofPersons = await refused(async () => {
      const answer = await request(`${replica.publicOrigin}/auth/callback?code=c&state=s`)
      return { ...answer, status: answer.statusCode, text: await answer.body.text() }
    })
    t.equal(ofPersons.headers['retry-after'], '1')
    t.match(ofPersons.headers['content-type'], /^text\/html/)
    t.match(ofPersons.text, /<h1>/)
    for (let i = 0; i < 3; i += 1) {
      t.equal((await replica.token('alice')).status, 200, 'a token at hand is given out')
      t.equal((await replica.call('GET', '/livez')).status, 200)
      t.equal((await fetch(`${replica.origin}/metrics`)).status, 200)
    }
    t.hasProp((await replica.ready()).body, 'checks', 'probes are answered, whatever they say')
    await refused(readGrant)

    replica.signal('SIGWINCH')
    const isItself = async () => {
      for (let i = 0; i < 20; i += 1) if ((await readGrant()).status !== 200) return false
      return true
    }
    await until(isItself, LIMIT_MS, 'the end of it')
    // The share grows back to the whole in steps.
    const call = async () => (await replica.call('GET', `${internal?.prefix}/a`)).status === 200
    await until(call, LIMIT_MS, 'a proxied call')
    const metrics = await (await fetch(`${replica.origin}/metrics`)).text()
    t.match(metrics, /^pagero_broker_requests_shed_total [1-9]/m)
    // Calls of services are refused before the router, pages by the route.
    t.match(
      metrics,
      /^pagero_broker_http_requests_total\{listener="internal",.*route="\(none\)",status="503"\} [1-9]/m,
    )
    t.match(
      metrics,
      /^pagero_broker_http_requests_total\{listener="public",.*status="503"\} [1-9]/m,
    )
    const notes = replica.log.filter(({ event }) => event === 'requests_shed')
    const notesMax = 1 + (performance.now() - beganMs) / NOTE_INTERVAL_MS
    t.ok(notes.length >= 1 && notes.length <= notesMax, `told ${notes.length} times, not for each`)
    t.match(notes[0], { count: Number })
    t.strictSame(
      replica.log.filter(({ event, route }) => event === 'request_answered' && route !== '/readyz'),
      [],
    )
    t.equal(
      replica.log.filter(({ event }) => event === 'login_refused').length,
      ofPersons.admitted,
      'that the login is none is told of those that were admitted alone',
    )
    t.strictSame(await fleet.row('alice'), before, 'the grant is as it was')
  },
)

t.test(
  'while statements pile up before PostgreSQL, what would wait behind them is refused',
  async (t) => {
    const { url } = await createTestDatabase(t)
    const fleet = await setFleet({ url, test: t })
    // Late it is on any machine that others use too; that is another subject.
    const replica = await fleet.add({ env: { OVERLOAD_DELAY_MS: '60000' } })
    await fleet.connect(['alice'])
    const connections = new Pool(replica.origin, { connections: ASKED, pipelining: 1 })
    t.teardown(() => connections.destroy())
    const readGrant = async () => {
      const answer = await connections.request({
        method: 'GET',
        path: '/v1/users/alice/grant',
        headers: { authorization: replica.authorization },
      })
      return { status: answer.statusCode, text: await answer.body.text() }
    }
    const isShed = ({ text }: { text: string }) => text.includes('more to do than it can')

    const locker = await fleet.database.pool.connect()
    let isLocked = true
    t.teardown(() => {
      if (isLocked) locker.release(true)
    })
    await locker.query('begin; lock table grants in access exclusive mode')
    const answers: Array<{ status: number; text: string }> = []
    const asking = Array.from({ length: ASKED }, async () => {
      answers.push(await readGrant())
    })
    await until(() => answers.some(isShed), LIMIT_MS, 'a refusal')
    t.equal((await replica.call('GET', '/livez')).status, 200)
    await locker.query('commit')
    locker.release()
    isLocked = false
    await Promise.all(asking)
    t.ok(
      answers.filter(isShed).length <= ASKED - WAITING_MAX,
      'those before them are not refused for it',
    )
    // On a machine that others use too, some wait for longer than a request waits for a connection.
    t.ok(
      answers.some(({ status }) => status === 200),
      'but answered',
    )
    t.equal((await readGrant()).status, 200)
  },
)
