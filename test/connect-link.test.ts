// Connect links from the backend's first call to the confirmed grant, over both listeners, and what somebody may try
// with them. Whatever it is, each test looks at whose tokens are served to whom.

import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { logIn } from '../demo/look-alike/log-in.ts'
import { BrokerError } from '../src/errors.ts'
import type { UserKey } from '../src/grant.ts'
import { withParameter } from '../src/return-to.ts'
import { EVERY_EVENT } from './support/audit.ts'
import { type Browser, createBrowser } from './support/browser.ts'
import { APPLICATION, buildListeners, type InternalListener } from './support/internal-listener.ts'

const RETURN_TO = `${APPLICATION}/settings?tab=pagero#top`
const RIGHTS = ['grant:manage', 'grant:read', 'token:read', 'proxy:call', 'ops:read']

const CONNECTING = /^(?:connect_link_|grant_confirmed|confirmation_refused|login_completed)/

interface Application extends InternalListener {
  browser(): Browser
  /** Calls the internal listener as the application's backend. */
  call(method: 'GET' | 'POST' | 'DELETE', path: string, body?: object): Promise<Answered>
  /** Makes a link for the user and returns its path. */
  link(user: string, options?: object): Promise<string>
  /** Opens a link and logs in at Pagero as `subject`; returns where the callback led. */
  follow(browser: Browser, link: string, subject: string): Promise<Followed>
  confirm(user: string, confirmation: string): Promise<Answered>
  /** Whose access token the user is served. */
  servedSubject(user: string): Promise<string | undefined>
  events(name: string): object[]
  /** What is on record of connecting this user: action, kind and name of the actor, outcome; the oldest first. */
  recorded(user: string): Promise<Array<readonly [string, string, string | null, string]>>
  countOf(table: string): Promise<number>
}
interface Answered {
  status: number
  body: Record<string, unknown>
}
interface Followed {
  status: number
  location: string
  confirmation: string
  body: string
}

async function start(
  t: Test,
  options: Partial<Parameters<typeof buildListeners>[1]> = {},
): Promise<Application> {
  const listeners = await buildListeners(t, {
    callers: { erp: { rights: RIGHTS, users: ['*'] }, other: { rights: RIGHTS, users: ['eve*'] } },
    ...options,
  })
  const { scene, engine, publicApp, internalApp, credentials } = listeners
  await publicApp.listen({ host: '127.0.0.1', port: 0 })
  const { port } = publicApp.server.address() as AddressInfo

  const call: Application['call'] = async (method, path, body) => {
    const answer = await internalApp.inject({
      method,
      url: `/v1/users/${path}`,
      headers: credentials['erp'] ?? {},
      ...(body === undefined ? {} : { payload: body }),
    })
    const isJson = String(answer.headers['content-type']).includes('json')
    return {
      status: answer.statusCode,
      body: isJson ? (answer.json() as Record<string, unknown>) : {},
    }
  }
  return {
    ...listeners,
    call,
    browser: () => createBrowser(`http://127.0.0.1:${port}`),
    async link(user, more = {}) {
      const { status, body } = await call('POST', `${user}/connect-links`, {
        return_to: RETURN_TO,
        ...more,
      })
      if (status !== 201) throw new Error(JSON.stringify(body))
      return new URL(String(body['url'])).pathname
    },
    async follow(browser, link, subject) {
      const opened = await browser.open(link, 'cross-site')
      if (opened.status !== 302) throw new Error(`${opened.status}: ${opened.body}`)
      const callback = new URL(
        await logIn(String(opened.headers.location), subject, browser.pageroCookies),
      )
      const answer = await browser.open(callback.pathname + callback.search, 'cross-site')
      const location = String(answer.headers.location ?? '')
      return {
        status: answer.status,
        location,
        confirmation: URL.parse(location)?.searchParams.get('confirmation') ?? '',
        body: answer.body,
      }
    },
    confirm: (user, confirmation) => call('POST', `${user}/grant/confirm`, { confirmation }),
    async servedSubject(user) {
      const { body } = await call('GET', `${user}/access-token`)
      return (await scene.lookAlike.isActive(String(body['access_token'])))?.subject
    },
    async recorded(user) {
      await engine.audit.flush()
      const rows = await engine.ports.auditEvents.list({ ...EVERY_EVENT, user: user as UserKey })
      return rows
        .filter(({ action }) => CONNECTING.test(action))
        .toReversed()
        .map((row) => [row.action, row.actorKind, row.actorName, row.outcome] as const)
    },
    events: (name) => engine.log.events.filter(({ event }) => event === name),
    async countOf(table) {
      const { rows } = await scene.database.pool.query(`select 1 from ${table}`)
      return rows.length
    },
  }
}

function exchanges({ scene }: Application): number {
  return scene.lookAlike.record.filter(({ form }) => form['grant_type'] === 'authorization_code')
    .length
}

/** Waits until the look-alike was told to forget this many refresh tokens. */
async function revoked(t: Test, { scene }: Application, count: number): Promise<string[]> {
  const tokens = () =>
    scene.lookAlike.record
      .filter(({ endpoint, status }) => endpoint === 'revoke' && status === 200)
      .map(({ form }) => form['token'] ?? '')
  const patientUntil = performance.now() + 15_000
  while (tokens().length < count && performance.now() < patientUntil) {
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  t.equal(tokens().length, count, 'refresh tokens revoked at Pagero')
  return tokens()
}

t.test(
  'a link, a login, a confirmation: the grant is served, and its session begins',
  async (t) => {
    const app = await start(t)
    const browser = app.browser()
    const made = await app.call('POST', 'acme-1/connect-links', { return_to: RETURN_TO })
    t.equal(made.status, 201)
    t.match(made.body['url'], /^http:\/\/localhost:3000\/auth\/connect\/[A-Za-z0-9_-]{43}$/)
    const inSeconds = (Date.parse(String(made.body['expires_at'])) - Date.now()) / 1000
    t.ok(inSeconds > 500 && inSeconds <= 601, `${inSeconds} s`)

    const back = await app.follow(browser, new URL(String(made.body['url'])).pathname, 'alice')
    t.equal(back.status, 303)
    t.equal(
      back.location,
      `${APPLICATION}/settings?tab=pagero&confirmation=${back.confirmation}#top`,
    )
    t.notOk(browser.cookies.has('__Host-broker-session'), 'no session before the confirmation')

    const waiting = await app.call('GET', 'acme-1/grant')
    t.match(waiting, {
      status: 200,
      body: { state: 'pending_confirmation', generation: 0, pagero: { subject: 'alice' } },
    })
    for (const path of ['access-token', 'pagero/document/v1/documents']) {
      t.match(await app.call('GET', `acme-1/${path}`), {
        status: 409,
        body: { code: 'confirmation_pending' },
      })
    }
    const listed = await app.internalApp.inject({
      url: '/v1/grants',
      headers: app.credentials['erp'] ?? {},
    })
    t.same(listed.json().items, [], 'what waits is no grant yet')

    const confirmed = await app.confirm('acme-1', back.confirmation)
    t.match(confirmed, { status: 200, body: { user: 'acme-1', state: 'active', generation: 1 } })
    t.equal(await app.servedSubject('acme-1'), 'alice')

    const session = new URL(String(confirmed.body['session_url'])).pathname
    const stranger = app.browser()
    await stranger.open('/auth/login')
    t.equal((await stranger.open(session, 'cross-site')).status, 400, 'not in another browser')
    for (const headers of [{ 'sec-purpose': 'prefetch' }, { 'sec-fetch-dest': 'image' }]) {
      t.equal((await browser.send(session, { headers })).status, 403)
    }
    const started = await browser.open(session, 'cross-site')
    t.equal(started.status, 303)
    t.equal(started.headers.location, RETURN_TO)
    t.match((await browser.fetch('/auth/session')).json(), {
      user: 'acme-1',
      grant: { state: 'active' },
    })
    t.equal((await browser.open(session, 'cross-site')).status, 400, 'once')
    t.equal((await app.call('GET', 'acme-1/pagero/document/v1/documents')).status, 200)
    for (const name of ['connect_link_made', 'connect_link_opened', 'grant_confirmed']) {
      t.match(app.events(name), [{ user: 'acme-1' }], name)
    }
  },
)

t.test(
  'a link that is sent to a victim never serves her grant to the one who sent it',
  async (t) => {
    const app = await start(t)
    // Without the confirmation it does: this is what the confirmation is for.
    await app.follow(app.browser(), await app.link('mallory', { confirm: false }), 'victim')
    t.equal(await app.servedSubject('mallory'), 'victim', 'confirm: false')
    t.equal((await app.call('DELETE', 'mallory/grant')).status, 204)
    await revoked(t, app, 1)

    const back = await app.follow(app.browser(), await app.link('mallory'), 'victim')
    t.equal(await app.servedSubject('mallory'), undefined)
    // The application knows who came back, and asks for her.
    const answer = await app.confirm('vera', back.confirmation)
    t.match(answer, { status: 400, body: { code: 'login_transaction_invalid' } })
    t.match(app.events('confirmation_refused'), [{ user: 'vera', caller: 'erp' }])
    t.equal(await app.servedSubject('mallory'), undefined)
    t.equal(await app.servedSubject('vera'), undefined)
    await app.scene.database.pool.query('update pending_grants set expires_at = clock_timestamp()')
    t.equal((await app.confirm('mallory', back.confirmation)).status, 400, 'not after its time')
    t.equal(await app.engine.ports.pendingGrants.sweep(), 1)
    await revoked(t, app, 2)
    t.equal(await app.servedSubject('mallory'), undefined)
  },
)

t.test('a confirmation of another user is refused, logged, and not used up', async (t) => {
  const app = await start(t)
  const first = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  await app.confirm('acme-1', first.confirmation)
  const { scene, engine } = app
  const kept = await scene.storedRefreshToken(engine, 'acme-1' as UserKey)
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.equal(await app.servedSubject('acme-1'), 'alice', 'the older grant serves meanwhile')

  const refused = await app.internalApp.inject({
    method: 'POST',
    url: '/v1/users/eve-1/grant/confirm',
    headers: app.credentials['other'] ?? {},
    payload: { confirmation: back.confirmation },
  })
  const unknown = await app.confirm('eve-1', 'x'.repeat(43))
  t.equal(refused.statusCode, 400)
  const { instance: _one, ...said } = refused.json() as Record<string, unknown>
  const { instance: _two, ...saidOfNone } = unknown.body
  t.same(said, saidOfNone, 'the same answer as for a confirmation that never was')
  t.match(app.events('confirmation_refused')[0], {
    level: 'warn',
    user: 'eve-1',
    caller: 'other',
    reason: 'it is of another user',
  })
  t.strictSame(await app.recorded('eve-1'), [
    ['confirmation_refused', 'caller', 'other', 'refused'],
    ['confirmation_refused', 'caller', 'erp', 'refused'],
  ])
  t.equal(await scene.storedRefreshToken(engine, 'acme-1' as UserKey), kept)
  t.equal(await app.servedSubject('acme-1'), 'alice')

  t.match(await app.confirm('acme-1', back.confirmation), { status: 200, body: { generation: 2 } })
  t.same(await revoked(t, app, 1), [kept], 'the older token, and nothing else')
  t.equal(await app.servedSubject('acme-1'), 'alice')
})

t.test('a confirmation may be repeated after a lost answer, and has one effect', async (t) => {
  const app = await start(t)
  const browser = app.browser()
  const back = await app.follow(browser, await app.link('acme-1'), 'alice')
  const answers = await Promise.all(
    Array.from({ length: 6 }, () => app.confirm('acme-1', back.confirmation)),
  )
  const later = await app.confirm('acme-1', back.confirmation)
  for (const { status, body } of [...answers, later]) {
    t.equal(status, 200)
    t.match(body, { generation: 1, state: 'active' })
  }
  const addresses = new Set(answers.map(({ body }) => body['session_url']))
  t.equal(addresses.size, 6, 'each answer has an address of its own that works')
  t.equal(await app.countOf('revocations'), 0)
  t.equal(app.events('grant_confirmed').length, 1)
  t.equal(await app.servedSubject('acme-1'), 'alice')

  await app.scene.database.pool.query('update pending_grants set expires_at = clock_timestamp()')
  t.equal((await app.confirm('acme-1', back.confirmation)).status, 400, 'for ten minutes')
  t.equal(await app.engine.ports.pendingGrants.sweep(), 1)
  t.equal(await app.countOf('revocations'), 0, 'a confirmed one leaves nothing to revoke')
  t.equal(await app.servedSubject('acme-1'), 'alice')
})

t.test('a link works once, in whatever hands and on whatever replica', async (t) => {
  const app = await start(t)
  const link = await app.link('acme-1')
  for (const ask of [
    { method: 'HEAD' },
    { method: 'POST' },
    { headers: { 'sec-purpose': 'prefetch' } },
    { headers: { 'sec-fetch-dest': 'iframe', 'sec-fetch-mode': 'navigate' } },
    { headers: { 'sec-fetch-dest': 'image', 'sec-fetch-mode': 'no-cors' } },
  ]) {
    t.ok([403, 405].includes((await app.browser().send(link, ask)).status), JSON.stringify(ask))
  }
  t.equal(await app.countOf('login_transactions'), 0, 'none of these used it up')
  const opened = await Promise.all(
    Array.from({ length: 10 }, () => app.browser().open(link, 'cross-site')),
  )
  t.equal(opened.filter(({ status }) => status === 302).length, 1)
  t.equal(await app.countOf('login_transactions'), 1)
  const [late] = opened.filter(({ status }) => status !== 302)
  t.equal(late?.status, 400)
  t.match(late?.body, /opened before, and works once.*go on there/)
  t.match(late?.body, /href="https:\/\/app\.example\/settings\?tab=pagero#top">Back to the app/)
  t.notMatch(late?.body, /auth\/login/, 'a login would make another user')

  const old = await app.link('acme-1')
  await app.scene.database.pool.query(
    'update connect_links set expires_at = clock_timestamp() where used_at is null',
  )
  t.match((await app.browser().open(old)).body, /too old/)
  t.match((await app.browser().open(`/auth/connect/${'x'.repeat(43)}`)).body, /not known/)
  t.match((await app.browser().open('/auth/connect/x')).body, /no link that the broker has made/)
  t.equal(await app.countOf('login_transactions'), 1)
  t.equal(await app.engine.ports.connectLinks.sweep(), 0, 'kept to explain it')
  await app.scene.database.pool.query(
    `update connect_links set expires_at = clock_timestamp() - interval '1 day'`,
  )
  t.equal(await app.engine.ports.connectLinks.sweep(), 2)
})

t.test('one callback ten times at once presents one code and leaves one to confirm', async (t) => {
  const app = await start(t)
  const browser = app.browser()
  const opened = await browser.open(await app.link('acme-1'), 'cross-site')
  const callback = new URL(await logIn(String(opened.headers.location), 'alice'))
  const target = callback.pathname + callback.search
  t.equal((await app.browser().open(target, 'cross-site')).status, 400, 'not in another browser')
  const answers = await Promise.all(
    Array.from({ length: 10 }, () => browser.open(target, 'cross-site')),
  )
  t.equal(answers.filter(({ status }) => status === 303).length, 1)
  t.equal(exchanges(app), 1)
  t.equal(await app.countOf('pending_grants'), 1)
})

t.test(
  'another Pagero account is refused, the older grant serves, the new token is revoked',
  async (t) => {
    for (const confirm of [true, false]) {
      const app = await start(t)
      const { scene, engine } = app
      const user = 'acme-1' as UserKey
      await app.follow(app.browser(), await app.link(user, { confirm: false }), 'alice')
      const kept = await scene.storedRefreshToken(engine, user)
      const browser = app.browser()
      const back = await app.follow(browser, await app.link(user, { confirm }), 'bob')
      t.equal(back.status, 409, `confirm: ${confirm}`)
      t.match(back.body, /connected to another Pagero account, which is kept/)
      t.match(back.body, /Back to the application/)
      t.notOk(browser.cookies.has('__Host-broker-session'))
      t.equal(await scene.storedRefreshToken(engine, user), kept)
      const [gone] = await revoked(t, app, 1)
      t.not(gone, kept)
      t.equal(await app.servedSubject(user), 'alice')
      t.match(app.events('login_refused').at(-1), { code: 'account_mismatch' })

      const allowed = await app.link(user, { confirm: false, allow_account_change: true })
      t.equal((await app.follow(app.browser(), allowed, 'bob')).status, 303)
      t.equal(await app.servedSubject(user), 'bob')
      t.same((await revoked(t, app, 2)).at(-1), kept)
    }
  },
)

t.test('the account is looked at again when the connection is confirmed', async (t) => {
  const app = await start(t)
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'bob')
  await app.scene.connect(app.engine, 'acme-1', 'alice')
  const answer = await app.confirm('acme-1', back.confirmation)
  t.match(answer, { status: 409, body: { code: 'account_mismatch' } })
  t.equal(await app.servedSubject('acme-1'), 'alice')
  t.match(app.events('confirmation_refused'), [{ user: 'acme-1', caller: 'erp' }])
  await revoked(t, app, 1)
  t.equal(await app.countOf('pending_grants'), 0)
})

t.test(
  'a link needs no name of the Pagero account, but cannot replace a known one blindly',
  async (t) => {
    const app = await start(t)
    const nameless = () =>
      app.scene.lookAlike.faults.push({
        endpoint: 'token',
        kind: 'mutate',
        change: (answer) => ({ ...answer, id_token: undefined, access_token: 'opaque' }),
      })
    nameless()
    t.equal(
      (await app.follow(app.browser(), await app.link('acme-1', { confirm: false }), 'alice'))
        .status,
      303,
    )
    t.match(await app.call('GET', 'acme-1/grant'), {
      body: { state: 'active', pagero: { issuer: null, subject: null } },
    })
    t.equal(
      (await app.follow(app.browser(), await app.link('acme-1', { confirm: false }), 'alice'))
        .status,
      303,
    )
    t.match(await app.call('GET', 'acme-1/grant'), { body: { pagero: { subject: 'alice' } } })
    nameless()
    const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
    t.equal(back.status, 409)
    t.match(back.body, /did not say which account/)
    t.equal(await app.servedSubject('acme-1'), 'alice')
  },
)

t.test('of two that wait for one user the newer counts, and the older is revoked', async (t) => {
  const app = await start(t)
  const first = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  const second = await app.follow(app.browser(), await app.link('acme-1'), 'bob')
  await revoked(t, app, 1)
  t.equal((await app.confirm('acme-1', first.confirmation)).status, 400)
  t.equal((await app.confirm('acme-1', second.confirmation)).status, 200)
  t.equal(await app.servedSubject('acme-1'), 'bob')

  const links = await Promise.all(Array.from({ length: 5 }, () => app.link('acme-2')))
  const backs = await Promise.all(links.map((link) => app.follow(app.browser(), link, 'carol')))
  t.ok(backs.every(({ status }) => status === 303))
  const { rows } = await app.scene.database.pool.query(
    `select 1 from pending_grants where user_id = 'acme-2'`,
  )
  t.equal(rows.length, 1, 'five at once leave one')
  await revoked(t, app, 5)
  const answers = await Promise.all(backs.map((one) => app.confirm('acme-2', one.confirmation)))
  t.equal(answers.filter(({ status }) => status === 200).length, 1)
  t.equal(await app.servedSubject('acme-2'), 'carol')
})

t.test('disconnecting ends what waits, and beats a confirmation at the same time', async (t) => {
  const app = await start(t)
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.equal((await app.call('DELETE', 'acme-1/grant')).status, 204)
  t.equal((await app.call('DELETE', 'acme-1/grant')).status, 404)
  t.equal((await app.confirm('acme-1', back.confirmation)).status, 400)
  t.match(await app.call('GET', 'acme-1/access-token'), { status: 404 })
  await revoked(t, app, 1)

  for (let round = 1; round <= 5; round += 1) {
    const { confirmation } = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
    const [gone] = await Promise.all([
      app.call('DELETE', 'acme-1/grant'),
      app.confirm('acme-1', confirmation),
    ])
    t.equal(gone.status, 204)
    t.equal(await app.servedSubject('acme-1'), undefined)
    t.equal((await app.confirm('acme-1', confirmation)).status, 400)
    await revoked(t, app, 1 + round)
  }
})

t.test('a confirmation beats a refresh in flight, whose late answer is revoked', async (t) => {
  const app = await start(t)
  const { scene, engine } = app
  const user = 'acme-1' as UserKey
  await app.follow(app.browser(), await app.link(user, { confirm: false }), 'alice')
  const back = await app.follow(app.browser(), await app.link(user), 'alice')
  await scene.expire(user)
  const gate = Promise.withResolvers<void>()
  scene.lookAlike.faults.push({
    endpoint: 'token',
    grantType: 'refresh_token',
    kind: 'delay',
    when: 'after',
    until: gate.promise,
  })
  const refreshed = engine.accessTokens.fresh(user).catch((error: unknown) => error)
  while (scene.refreshes().length === 0) await new Promise((resolve) => setTimeout(resolve, 10))
  t.equal((await app.confirm(user, back.confirmation)).status, 200)
  const confirmed = await scene.storedRefreshToken(engine, user)
  gate.resolve()
  await refreshed
  const tokens = await revoked(t, app, 2)
  t.notOk(tokens.includes(confirmed))
  t.equal(await scene.storedRefreshToken(engine, user), confirmed)
  t.ok(await scene.lookAlike.acceptsRefreshToken(confirmed))
  t.equal(await app.servedSubject(user), 'alice')
})

t.test('a connection whose access token has run out is confirmed and refreshed', async (t) => {
  const app = await start(t)
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  await app.scene.database.pool.query(
    `update pending_grants set
       access_token_requested_at = access_token_requested_at - interval '11 minutes',
       access_token_expires_at = access_token_expires_at - interval '11 minutes'`,
  )
  t.equal((await app.confirm('acme-1', back.confirmation)).status, 200)
  t.equal(app.scene.refreshes().length, 0, 'not used while it waits')
  t.equal(await app.servedSubject('acme-1'), 'alice')
  t.equal(app.scene.refreshes().length, 1)
})

t.test('a pending row that was changed or moved confirms nothing', async (t) => {
  const app = await start(t)
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  const { pool } = app.scene.database
  await pool.query(`update pending_grants set user_id = 'mallory'`)
  t.match(await app.confirm('mallory', back.confirmation), {
    status: 500,
    body: { code: 'integrity_failure' },
  })
  t.equal(await app.servedSubject('mallory'), undefined)
  await pool.query(`update pending_grants set user_id = 'acme-1', refresh_token_sealed =
    set_byte(refresh_token_sealed, 40, get_byte(refresh_token_sealed, 40) # 1)`)
  t.match(await app.confirm('acme-1', back.confirmation), { status: 500 })
  t.equal(await app.countOf('grants'), 0)
  await pool.query('update pending_grants set expires_at = clock_timestamp()')
  t.equal(await app.engine.ports.pendingGrants.sweep(), 1)
  await revoked(t, app, 1)
})

t.test('a process that dies before the row is written loses only that login', async (t) => {
  const reached = Promise.withResolvers<void>()
  const dead = Promise.withResolvers<void>()
  const app = await start(t)
  const { ports } = app.engine
  await app.follow(app.browser(), await app.link('acme-1', { confirm: false }), 'alice')
  const { place } = ports.pendingGrants
  // Nothing more is heard of it, as of a process that is gone.
  ports.pendingGrants.place = () => {
    reached.resolve()
    return dead.promise
  }
  const lost = app.follow(app.browser(), await app.link('acme-1'), 'alice')
  await reached.promise
  ports.pendingGrants.place = place
  t.equal(await app.countOf('pending_grants'), 0)
  t.equal(await app.servedSubject('acme-1'), 'alice')
  const again = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.match(await app.confirm('acme-1', again.confirmation), { status: 200, body: { generation: 2 } })
  t.equal(await app.servedSubject('acme-1'), 'alice')
  // The test ends with the request that it kept waiting.
  dead.reject(new Error('The process is gone.'))
  t.equal((await lost).status, 500)
})

t.test('a stored connection whose answer is lost is stored once', async (t) => {
  const app = await start(t)
  const { pendingGrants } = app.engine.ports
  const { place } = pendingGrants
  let answersLost = 0
  pendingGrants.place = async (...pending) => {
    await place(...pending)
    answersLost += 1
    throw new BrokerError('temporarily_unavailable', 'The answer was lost.')
  }
  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.equal(answersLost, 1, 'it is looked for, and not stored again')
  t.equal(await app.countOf('revocations'), 0)
  t.equal((await app.confirm('acme-1', back.confirmation)).status, 200)
  t.equal(await app.servedSubject('acme-1'), 'alice')
})

t.test('a connection whose answer was lost does not push out a newer one', async (t) => {
  const app = await start(t)
  const { pendingGrants } = app.engine.ports
  const { place } = pendingGrants
  let newer: Awaited<ReturnType<typeof app.follow>> | undefined
  pendingGrants.place = async (...pending) => {
    pendingGrants.place = place
    await place(...pending)
    newer = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
    throw new BrokerError('temporarily_unavailable', 'The answer was lost.')
  }
  const overtaken = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.equal(overtaken.status, 502)
  t.equal(await app.countOf('pending_grants'), 1)
  t.equal((await app.confirm('acme-1', newer?.confirmation ?? '')).status, 200)
  t.equal(await app.servedSubject('acme-1'), 'alice')
})

t.test('start_session decides about the session, and the one it replaces ends', async (t) => {
  const app = await start(t)
  const browser = app.browser()
  await app.follow(browser, await app.link('acme-1', { confirm: false }), 'alice')
  const first = browser.cookies.get('__Host-broker-session')?.value
  t.match((await browser.fetch('/auth/session')).json(), { user: 'acme-1' })

  const opened = await browser.open(await app.link('acme-2', { confirm: false }), 'same-origin')
  const callback = new URL(await logIn(String(opened.headers.location), 'bob'))
  await browser.open(callback.pathname + callback.search, 'cross-site')
  t.not(browser.cookies.get('__Host-broker-session')?.value, first)
  t.match((await browser.fetch('/auth/session')).json(), { user: 'acme-2' })
  const cookie = `__Host-broker-session=${first}`
  t.equal((await browser.fetch('/auth/session', { headers: { cookie } })).status, 401)

  const quiet = app.browser()
  const link = await app.link('acme-3', { confirm: false, start_session: false })
  t.equal((await app.follow(quiet, link, 'carol')).location, RETURN_TO)
  t.notOk(quiet.cookies.has('__Host-broker-session'))
  const back = await app.follow(quiet, await app.link('acme-3', { start_session: false }), 'carol')
  const { body } = await app.confirm('acme-3', back.confirmation)
  t.notOk('session_url' in body)
})

t.test('a session cannot begin any more once the user is disconnected', async (t) => {
  const app = await start(t)
  const browser = app.browser()
  const back = await app.follow(browser, await app.link('acme-1'), 'alice')
  const { body } = await app.confirm('acme-1', back.confirmation)
  await app.call('DELETE', 'acme-1/grant')
  const { pathname } = new URL(String(body['session_url']))
  t.equal((await browser.open(pathname, 'cross-site')).status, 400)
  t.notOk(browser.cookies.has('__Host-broker-session'))
  const { rows } = await app.scene.database.pool.query('select 1 from session_tickets')
  t.same(rows, [], 'nothing is left that could begin one')
})

t.test('a link that cannot be made as asked is refused', async (t) => {
  const app = await start(t)
  const valid = { return_to: '/done' }
  for (const [user, body] of [
    ['pagero:alice', valid],
    ['acme-1', {}],
    ['acme-1', { return_to: 'https://evil.example/' }],
    ['acme-1', { return_to: '//evil.example' }],
    ['acme-1', { return_to: `${APPLICATION}.evil.example/` }],
    ['acme-1', { return_to: '' }],
    ['acme-1', { ...valid, user: 'bob' }],
    ['acme-1', { ...valid, confirm: null }],
    ['acme-1', { ...valid, confirm: 'false' }],
    ['acme-1', { ...valid, confirm: 0 }],
    ['acme-1', { ...valid, allow_account_change: 'true' }],
    ['acme-1', { ...valid, ttl: '60' }],
    ['acme-1', { ...valid, ttl: 0 }],
    ['acme-1', { ...valid, ttl: 86_401 }],
    ['acme-1', { ...valid, ttl: 1.5 }],
  ] as const) {
    const answer = await app.call('POST', `${user}/connect-links`, body)
    t.match(answer, { status: 400, body: { code: 'request_invalid' } }, JSON.stringify(body))
  }
  t.equal(await app.countOf('connect_links'), 0)
  const invisible = await app.internalApp.inject({
    method: 'POST',
    url: '/v1/users/acme-1/connect-links',
    headers: app.credentials['other'] ?? {},
    payload: valid,
  })
  t.equal(invisible.statusCode, 404)
  for (const confirmation of ['', 'x', 'x'.repeat(44), 7]) {
    t.equal((await app.call('POST', 'acme-1/grant/confirm', { confirmation })).status, 400)
  }
})

t.test('the database holds neither ticket, confirmation nor token', async (t) => {
  const app = await start(t)
  const link = await app.link('acme-1')
  const back = await app.follow(app.browser(), link, 'alice')
  const tables = ['connect_links', 'pending_grants', 'session_tickets', 'login_transactions']
  const dump = async () => {
    const dumps = await Promise.all(
      tables.map((table) =>
        app.scene.database.pool.query(`select ${table}::text as line from ${table}`),
      ),
    )
    return JSON.stringify(dumps.map(({ rows }) => rows as unknown))
  }
  const before = await dump()
  const { body } = await app.confirm('acme-1', back.confirmation)
  const lines = before + (await dump())
  const ticket = String(body['session_url']).split('/').at(-1) ?? ''
  const token = await app.scene.storedRefreshToken(app.engine, 'acme-1' as UserKey)
  for (const secret of [link.split('/').at(-1) ?? '', back.confirmation, ticket, token]) {
    t.ok(secret.length > 30)
    t.notOk(lines.includes(secret))
    t.notOk(lines.includes(Buffer.from(secret).toString('hex')))
    t.notOk(JSON.stringify(app.engine.log.events).includes(secret))
  }
})

t.test('who must connect again is told how: a link for a user of an application', async (t) => {
  const app = await start(t)
  await app.follow(app.browser(), await app.link('acme-1', { confirm: false }), 'alice')
  await app.scene.database.pool.query(
    `update grants set state = 'reauthentication_required', state_reason = 'rotation_lost'`,
  )
  const { status, body } = await app.call('GET', 'acme-1/access-token')
  t.equal(status, 409)
  t.match(body, { code: 'reauthentication_required', cause: 'rotation_lost' })
  t.match(body['detail'], /Make a connect link/)
  t.notOk('reconnect_url' in body)

  const back = await app.follow(app.browser(), await app.link('acme-1'), 'alice')
  t.match(await app.confirm('acme-1', back.confirmation), {
    status: 200,
    body: { state: 'active' },
  })
  t.equal(await app.servedSubject('acme-1'), 'alice')
})

t.test('the confirmation is added to the query, before a fragment, and only once', (t) => {
  for (const [returnTo, expected] of [
    ['/', '/?c=1'],
    ['/a?b=2', '/a?b=2&c=1'],
    ['/a?', '/a?c=1'],
    ['/a#f', '/a?c=1#f'],
    ['/a?b=%20&b=3#f?x=#', '/a?b=%20&b=3&c=1#f?x=#'],
    ['/a?c=old&b=2&c=older', '/a?b=2&c=1'],
    ['/a?cc=2&xc=3', '/a?cc=2&xc=3&c=1'],
    ['https://app.example', 'https://app.example?c=1'],
    ['https://app.example/x?y#z', 'https://app.example/x?y&c=1#z'],
  ] as const) {
    t.equal(withParameter(returnTo, 'c', '1'), expected)
  }
  t.end()
})
