// A real process whose event loop does not keep up: what is refused, what is answered all the same, and when that is over.

import t from 'tap'
import { Pool, request } from 'undici'
import { createTestDatabase } from './support/database.ts'
import { setFleet, until } from './support/fleet.ts'
import { startRawBroker } from './support/raw-broker.ts'

const BUSY_LOOP = import.meta.resolve('./support/busy-loop.ts')
const APPLICATION = 'https://app.example'
/** On a machine with ten times more to do than it can. */
const LIMIT_MS = 30_000
/** Statements that may wait for a connection, and requests that are more than that. */
const WAITING_MAX = 1_000
const ASKED = 1_300

/** Asks until it is refused. */
async function refused<Answer extends { status: number }>(
  ask: () => Promise<Answer>,
): Promise<Answer> {
  let answer: Answer | undefined
  await until(async () => (answer = await ask()).status === 503, LIMIT_MS, 'a refusal')
  if (answer === undefined) throw new Error('It was asked.')
  return answer
}

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
    t.ok(upstream.calls.length - calls < 20, 'what is refused is not called')
    for (let i = 0; i < 3; i += 1) {
      t.equal((await replica.token('alice')).status, 200, 'a token at hand is given out')
      t.equal((await replica.call('GET', '/livez')).status, 200)
    }
    t.hasProp((await replica.ready()).body, 'checks', 'probes are answered, whatever they say')
    await refused(readGrant)

    replica.signal('SIGWINCH')
    const isItself = async () => {
      for (let i = 0; i < 20; i += 1) if ((await readGrant()).status !== 200) return false
      return true
    }
    await until(isItself, LIMIT_MS, 'the end of it')
    t.equal((await replica.call('GET', `${internal?.prefix}/a`)).status, 200)
    t.match(
      replica.log.filter(({ event }) => event === 'requests_shed'),
      [{ count: Number }],
      'which is told once, not for each',
    )
    t.strictSame(
      replica.log.filter(
        ({ event, route }) =>
          (event === 'request_answered' && route !== '/readyz') || event === 'login_refused',
      ),
      [],
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
    await locker.query('begin; lock table grants in access exclusive mode')
    const answers: Array<{ status: number; text: string }> = []
    const asking = Array.from({ length: ASKED }, async () => {
      answers.push(await readGrant())
    })
    await until(() => answers.some(isShed), LIMIT_MS, 'a refusal')
    t.equal((await replica.call('GET', '/livez')).status, 200)
    await locker.query('commit')
    locker.release()
    await Promise.all(asking)
    t.ok(
      answers.filter(isShed).length <= ASKED - WAITING_MAX,
      'those before them are not refused for it',
    )
    t.strictSame(
      [...new Set(answers.filter((answer) => !isShed(answer)).map(({ status }) => status))],
      [200],
      'but answered',
    )
    t.equal((await readGrant()).status, 200)
  },
)
