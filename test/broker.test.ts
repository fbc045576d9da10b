// The broker put together as in production, in this process: what it says of itself at the start and while it runs.

import { randomBytes } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { type Broker, startBroker } from '../src/broker.ts'
import { readConfig } from '../src/config.ts'
import { type Scene, setScene } from './support/engine.ts'
import { keepingLog } from './support/keeping-log.ts'

const KEY = randomBytes(32).toString('base64')

async function start(
  t: Test,
  scene: Scene,
  changes: Record<string, string> = {},
): Promise<{
  broker: Broker
  log: ReturnType<typeof keepingLog>
  ready: () => Promise<Readiness>
}> {
  const spool = await mkdtemp(join(tmpdir(), 'broker-spool-'))
  t.teardown(() => rm(spool, { recursive: true, force: true }))
  const log = keepingLog()
  const config = readConfig({
    DATABASE_URL: scene.url,
    ALLOW_UNSAFE_DATABASE: 'true',
    ENCRYPTION_KEYS: `k1:${KEY}`,
    PAGERO_CLIENT_ID: scene.pagero.clientId,
    PAGERO_CLIENT_SECRET: scene.pagero.clientSecret.reveal(),
    PAGERO_REDIRECT_URI: scene.pagero.redirectUri,
    PAGERO_AUTHORIZE_URL: scene.pagero.authorizeUrl,
    PAGERO_TOKEN_URL: scene.pagero.tokenUrl,
    PAGERO_REVOKE_URL: scene.pagero.revokeUrl,
    PAGERO_API_URL: 'http://localhost:9',
    PUBLIC_HOST: '127.0.0.1',
    INTERNAL_HOST: '127.0.0.1',
    PUBLIC_PORT: '0',
    INTERNAL_PORT: '0',
    SPOOL_DIR: spool,
    SHUTDOWN_LISTEN_SECONDS: '0',
    ...changes,
  })
  const broker = await startBroker(config, { log })
  t.teardown(() => broker.stop())
  const ready = async () => {
    const response = await fetch(`http://127.0.0.1:${broker.internalPort}/readyz`)
    return (await response.json()) as Readiness
  }
  // The spool is drained a moment after the start, but in a copy of the database.
  for (;;) {
    const { checks } = await ready()
    if (checks['spool'] === 'ok' || checks['deployment'] !== 'ok') break
    await new Promise((r) => setTimeout(r, 20))
  }
  return { broker, log, ready }
}

interface Readiness {
  status: string
  checks: Record<string, string>
}

t.test('a broker with all that it needs is ready, and unready as soon as it stops', async (t) => {
  const scene = await setScene(t)
  const { broker, ready } = await start(t, scene, { SHUTDOWN_LISTEN_SECONDS: '1' })
  t.match(await ready(), { status: 'ok' })
  const stopped = broker.stop()
  t.match(await ready(), { status: 'unready', checks: { draining: 'shutting down' } })
  await stopped
  await t.rejects(ready(), 'the listeners are closed')
})

t.test(
  'a key of the right name and the wrong bytes keeps the broker unready and touches no grant',
  async (t) => {
    const scene = await setScene(t)
    const engine = await scene.startEngine()
    const user = await scene.connect(engine, 'acme-1')
    const before = await scene.grantOf(engine, user)
    const { log, ready } = await start(t, scene, { ENCRYPTION_KEYS: `test:${KEY}` })
    t.match(await ready(), {
      status: 'unready',
      checks: { keys: 'a key that stored grants are sealed with is missing or wrong' },
    })
    t.ok(
      log.events.some(
        ({ event, keyId }) => event === 'encryption_key_unusable' && keyId === 'test',
      ),
    )
    t.match(await scene.grantOf(engine, user), {
      state: 'active',
      generation: before.generation,
      refreshTokenSealed: before.refreshTokenSealed,
    })
  },
)

t.test('a key that is missing does the same; the right one beside another is fine', async (t) => {
  const scene = await setScene(t)
  await scene.connect(await scene.startEngine(), 'acme-1')
  const without = await start(t, scene)
  t.match(await without.ready(), { status: 'unready' })
  const right = Buffer.from(scene.key).toString('base64')
  const both = await start(t, scene, {
    ENCRYPTION_KEYS: `k1:${KEY},test:${right}`,
    REPLICA_NAME: 'other',
  })
  t.match(await both.ready(), { status: 'ok' })
})

t.test(
  'a schema that becomes newer while it runs leaves the broker ready; a start on it is refused',
  async (t) => {
    const scene = await setScene(t)
    const { ready } = await start(t, scene)
    await scene.database.pool.query("insert into schema_migrations (name) values ('9999_later')")
    t.match(await ready(), { status: 'ok' })
    await t.rejects(start(t, scene, { REPLICA_NAME: 'late' }), { message: /newer/ })
  },
)

t.test('a copy of the database is served unready, and spends nothing', async (t) => {
  const scene = await setScene(t)
  const engine = await scene.startEngine()
  const user = await scene.connect(engine, 'acme-1')
  await scene.expire(user)
  await scene.database.pool.query("update deployment set database_identity = 'another/1'")
  const { ready } = await start(t, scene, {
    ENCRYPTION_KEYS: `test:${Buffer.from(scene.key).toString('base64')}`,
  })
  t.match(await ready(), {
    status: 'unready',
    checks: { deployment: 'the database is a copy or was restored, and is not accepted yet' },
  })
  t.equal(scene.refreshes().length, 0)
})

t.test(
  'a database that may forget a commit keeps the broker unready unless that is allowed',
  async (t) => {
    const scene = await setScene(t)
    const { ready } = await start(t, scene, { ALLOW_UNSAFE_DATABASE: 'false' })
    t.match(await ready(), {
      status: 'unready',
      checks: {
        durability: 'commits may be forgotten: fsync, full_page_writes, synchronous_commit off',
      },
    })
  },
)

t.test('a flood of logins that nobody finished is swept to the last row', async (t) => {
  const scene = await setScene(t)
  await scene.database.pool.query(
    `insert into login_transactions (state_hash, browser_binding_hash, return_to, expires_at)
     select decode(md5('s' || n), 'hex'), decode(md5('b' || n), 'hex'), '/', now() - interval '1 s'
     from generate_series(1, 5000) n`,
  )
  await start(t, scene)
  const left = async () => {
    const { rows } = await scene.database.pool.query<{ count: number }>(
      'select count(*)::int as count from login_transactions',
    )
    return rows[0]?.count
  }
  while ((await left()) !== 0) await new Promise((r) => setTimeout(r, 20))
  t.pass('within one round')
})
