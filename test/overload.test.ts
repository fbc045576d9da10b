// A real process whose event loop does not keep up: what is refused, what is answered all the same, and when that is over.

import t from 'tap'
import { request } from 'undici'
import { createTestDatabase } from './support/database.ts'
import { until } from './support/fleet.ts'
import { startRawBroker } from './support/raw-broker.ts'

const BUSY_LOOP = import.meta.resolve('./support/busy-loop.ts')
const APPLICATION = 'https://app.example'
/** On a machine with ten times more to do than it can. */
const LIMIT_MS = 30_000

t.test('a process that does not keep up refuses what costs work, until it does', async (t) => {
  const { url } = await createTestDatabase(t)
  const { fleet, replica, upstream, seat } = await startRawBroker(t, {
    databaseUrl: url,
    env: {
      NODE_OPTIONS: `--import=${BUSY_LOOP}`,
      TOKEN_CACHE_TRUST_MS: '60000',
      OVERLOAD_DELAY_MS: '200',
      ALLOWED_ORIGINS: APPLICATION,
    },
  })
  const [, internal] = await seat('alice')
  const before = await fleet.row('alice')
  const readGrant = () => replica.call('GET', '/v1/users/alice/grant')
  t.equal((await readGrant()).status, 200)

  replica.signal('SIGWINCH')
  await until(async () => (await readGrant()).status === 503, LIMIT_MS, 'a refusal')
  t.match((await readGrant()).body, { code: 'temporarily_unavailable', retry_after: 1 })
  t.equal((await replica.call('GET', `${internal?.prefix}/a`)).status, 503)
  const ofBrowsers = await fetch(`${replica.publicOrigin}/auth/session`)
  t.equal(ofBrowsers.status, 503)
  t.equal(ofBrowsers.headers.get('retry-after'), '1')
  const ofPages = await fetch(`${replica.publicOrigin}/api/document/v1/documents`, {
    headers: { origin: APPLICATION, 'x-csrf': '1' },
  })
  t.equal(ofPages.status, 503)
  t.equal(ofPages.headers.get('access-control-allow-origin'), APPLICATION, 'its page may read it')
  t.match(ofPages.headers.get('proxy-status'), /; error=/)
  // Not `fetch`, which says of itself that it is no navigation.
  const ofPersons = await request(`${replica.publicOrigin}/auth/callback?code=c&state=s`)
  t.equal(ofPersons.statusCode, 503)
  t.equal(ofPersons.headers['retry-after'], '1')
  t.match(ofPersons.headers['content-type'], /^text\/html/)
  t.match(await ofPersons.body.text(), /<h1>/)
  t.equal((await replica.token('alice')).status, 200, 'a token at hand is given out')
  t.equal((await replica.call('GET', '/livez')).status, 200)
  t.hasProp((await replica.ready()).body, 'checks', 'probes are answered, whatever they say')
  t.equal(upstream.calls.length, 0)
  t.equal((await readGrant()).status, 503, 'and it was so all the while')

  replica.signal('SIGWINCH')
  await until(async () => (await readGrant()).status === 200, LIMIT_MS, 'the end of it')
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
})
