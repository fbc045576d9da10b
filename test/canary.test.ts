// Every secret that existed during a whole life of a broker, looked for in all that the broker wrote, stored and
// answered: a real process at the most talkative log level, with people, services and a good many errors.

import { randomBytes } from 'node:crypto'
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { type CanaryBroker, type Person, startCanaryBroker } from './support/canary-broker.ts'
import { sendRaw } from './support/proxy.ts'
import { type Canary, findCanaries, formsOf, type Haystack } from './support/secret-scan.ts'

/** Where some secrets must be, because a browser carries them. Everything else is a leak, wherever it is. */
const RIGHTFUL_PLACES: Readonly<Record<string, string>> = {
  state: 'browser: redirects to the login',
  nonce: 'browser: redirects to the login',
  cookie: 'browser: Set-Cookie',
}

t.test('the scanner finds a planted secret in every form, and nothing else', async (t) => {
  const token = `${randomBytes(24).toString('base64url')}/+"\\%é&=`
  const key = randomBytes(32)
  const canaries: Canary[] = [
    { kind: 'token', value: token },
    { kind: 'key', value: key },
  ]
  const text = JSON.stringify({ a: token })
  const plantings: Record<string, string | Buffer> = {
    raw: `a ${token} b`,
    'URL-encoded': `?a=${encodeURIComponent(token)}&b`,
    'form-encoded': new URLSearchParams({ a: token }).toString(),
    'JSON-escaped': text,
    'JSON within JSON': JSON.stringify({ text }),
    hex: `\\x${Buffer.from(`a${token}b`).toString('hex').toUpperCase()}`,
    beginning: `a ${token.slice(0, 12)}… b`,
  }
  const plants = (form: string, content: string | Buffer) => {
    const found = findCanaries(canaries, [{ name: 'here', content }])
    t.ok(
      found.some((finding) => finding.form === form && finding.kind === 'token'),
      form,
    )
  }
  for (const [form, content] of Object.entries(plantings)) plants(form, content)
  for (const before of ['', 'a', 'ab', 'abc']) {
    const around = Buffer.concat([Buffer.from(before), Buffer.from(token), Buffer.from('z')])
    plants('base64', `Basic ${around.toString('base64')}`)
    plants('base64url', `Basic ${around.toString('base64url')}`)
  }
  for (const form of ['latin1', 'hex', 'base64', 'base64url'] as const) {
    const content = Buffer.from(`key ${key.toString(form)}`, 'latin1')
    t.match(findCanaries(canaries, [{ name: 'here', content }]), [{ kind: 'key' }], form)
  }
  const opaque = [{ kind: 'opaque', value: key.toString('base64url') }]
  const decoded = findCanaries(opaque, [{ name: 'here', content: key }])
  t.match(decoded, [{ form: 'decoded' }], 'the bytes that an opaque token stands for')
  const others = [{ name: 'here', content: `${randomBytes(99).toString('hex')} token key` }]
  t.strictSame(findCanaries(canaries, others), [])
  t.ok(
    formsOf(token).every(([, needle]) => needle.length >= 12),
    'no form is short enough to turn up by chance',
  )
})

t.test(
  'no secret leaves the broker for a log, a trace, a table, the spool or an answer',
  async (t) => {
    const broker = await startCanaryBroker(t)
    const alice = await broker.logIn('alice')
    await readAndForward(t, broker, alice)
    await refuseCallbacks(t, broker, alice)
    await sendRubbish(t, broker, alice)
    await failRefreshes(t, broker)
    await importTokens(t, broker)
    await broker.loseDatabaseConnections()
    t.ok(await until(async () => broker.program.output().includes('"database_connection_lost"')))
    t.ok(await until(async () => (await broker.ask('/readyz')).status === 200))
    // Its verifier is sealed in the table now, and told to the authorization server later.
    const unfinished = await broker.beginLogin('alice', alice.browser)
    const midway = await broker.dumpTables('midway')
    t.equal((await unfinished.finish()).status, 303)
    await endAccess(t, broker, alice)
    t.match(await broker.ask('/metrics'), { status: 200, body: /^pagero_broker_/m })
    const end = await broker.dumpTables('at the end')
    const spool = await readFolder(broker.spoolDir)
    broker.program.signal('SIGTERM')
    t.equal(await broker.program.exited, 0)

    const events = readEvents(broker.program.output())
    for (const event of EVENTS) t.ok(events.has(event), `the log has ${event}`)
    const tables = [...midway, ...end]
    for (const table of TABLES) {
      t.ok(
        tables.some(
          ({ name, content }) => name.startsWith(`table ${table} `) && content.length > 0,
        ),
        `rows of ${table} are searched`,
      )
    }
    t.ok(spool.length > 0, 'files of the spool are searched')
    const { spans, requests } = broker.collector
    for (const name of ['POST /oauth/v2/oauth-token', 'GET /auth/callback', 'GET /api/*', 'GET'])
      t.ok(
        spans.some((span) => span.name === name),
        `there is a span ${name}`,
      )

    const canaries = broker.canaries()
    for (const kind of KINDS) {
      t.ok(
        canaries.some((canary) => canary.kind === kind),
        `there was a ${kind}`,
      )
    }
    const haystacks: Haystack[] = [
      { name: 'log', content: broker.program.output() },
      { name: 'traces', content: requests.map(({ body }) => body).join('\n') },
      ...tables,
      ...spool,
      ...broker.browserTraffic(),
      ...broker.serviceAnswers(),
    ]
    const found = findCanaries(canaries, haystacks)
    t.strictSame(
      found.filter(({ kind, haystack }) => RIGHTFUL_PLACES[kind] !== haystack),
      [],
      `${canaries.length} secrets are nowhere in ${haystacks.length} places`,
    )
    for (const [kind, haystack] of Object.entries(RIGHTFUL_PLACES)) {
      t.match(
        found.filter((finding) => finding.kind === kind && finding.form === 'raw'),
        [{ haystack }],
        `the ${kind} is found where it belongs`,
      )
    }
  },
)

/** What must have been there, or the search has proved nothing. */
const KINDS = [
  'access token',
  'refresh token',
  'imported token',
  'ID token',
  'authorization code',
  'PKCE verifier',
  'state',
  'nonce',
  'cookie',
  'API key',
  'wrong API key',
  'client secret',
  'client authentication',
  'encryption key',
  'database password',
]
const TABLES = [
  'grants',
  'refresh_attempts',
  'imports',
  'login_transactions',
  'sessions',
  'revocations',
  'audit_events',
]
/** One or more for each kind of error that is provoked. */
const EVENTS = [
  'breaker_opened',
  'broker_started',
  'caller_unauthenticated',
  'database_connection_lost',
  'forward_failed',
  'grant_condemned',
  'grant_disconnected',
  'login_completed',
  'login_refused',
  'refresh_attempt_finished',
  'request_answered',
  'revocation_failed',
]

/** Pages and services that are served, by an API that tells the token back wherever it can. */
async function readAndForward(t: Test, broker: CanaryBroker, alice: Person): Promise<void> {
  const { browser } = alice
  t.match((await browser.fetch('/auth/session')).json(), { user: 'pagero:alice' })
  t.equal((await browser.fetch('/api/document/v1/documents')).status, 200)
  t.equal((await browser.fetch('/api/echo-in-fields')).status, 200)
  t.equal((await browser.fetch('/api/refuse')).status, 401)
  t.equal((await browser.fetch('/api/reset')).status, 502)
  t.equal((await browser.fetch('/api/refuse', { method: 'POST', body: 'a=b' })).status, 401)
  for (const [path, status] of [
    ['access-token', 200],
    ['grant', 200],
    ['refresh-attempts', 200],
    ['pagero/document/v1/documents', 200],
    ['pagero/echo-in-fields', 200],
    ['pagero/refuse', 401],
    ['pagero/reset', 502],
  ] as const) {
    t.equal((await broker.ask(`/v1/users/pagero:alice/${path}`)).status, status, path)
  }
  for (const path of ['/livez', '/readyz', '/docs', '/openapi.yaml', '/openapi.json']) {
    t.equal((await broker.ask(path)).status, 200, path)
  }
}

/** Callbacks that must not log anybody in, and codes that the authorization server refuses, quoting them. */
async function refuseCallbacks(t: Test, broker: CanaryBroker, alice: Person): Promise<void> {
  const { browser, callback } = alice
  const forged = broker.plant('authorization code', randomBytes(32).toString('base64url'))
  const unknown = broker.plant('forged state', randomBytes(32).toString('base64url'))
  t.equal((await browser.open(callback, 'cross-site')).status, 400, 'the same callback again')
  t.equal((await broker.newBrowser().open(callback)).status, 400, 'in another browser')
  for (const query of [
    `code=${forged}&state=${unknown}`,
    `code=${forged}&code=${forged}&state=${unknown}`,
    `code=${forged}%ZZ&state=${unknown}`,
    `error=${forged}&error_description=${forged}&state=${unknown}`,
  ]) {
    t.equal((await browser.open(`/auth/callback?${query}`, 'cross-site')).status, 400, query)
  }
  t.equal((await (await broker.beginLogin(undefined)).finish()).status, 403, 'access denied')
  for (const [status, error, answered] of [
    [400, 'invalid_grant', 502],
    [401, 'invalid_client', 503],
    [500, 'server_error', 502],
    [200, undefined, 502],
  ] as const) {
    const login = await broker.beginLogin('dave')
    broker.failNext('authorization_code', status, { error, error_description: login.callback })
    const answer = await login.finish()
    t.equal(answer.status, answered, `${status} ${error ?? 'without tokens'}`)
  }
}

/** Requests that nobody should send, each with something secret in it. */
async function sendRubbish(t: Test, broker: CanaryBroker, alice: Person): Promise<void> {
  const { browser } = alice
  const name = '__Host-broker-session'
  const session = browser.cookies.get(name)?.value ?? ''
  const forged = broker.plant('forged cookie', randomBytes(32).toString('base64url'))
  const cookie = `${name}=${session}`
  for (const [target, headers, status] of [
    ['/auth/session', { cookie: `${name}=${forged}` }, 401],
    ['/auth/session', { cookie: `${cookie}; ${cookie}` }, 400],
    ['/auth/session', { cookie, 'x-csrf': '' }, 403],
    ['/auth/session', { cookie, 'sec-fetch-site': 'cross-site' }, 403],
    [`/nowhere?code=${session}`, { cookie }, 404],
    [`/api/a%2F${session}`, { cookie }, 400],
    [`/${session}%ff`, { cookie }, 400],
  ] as const) {
    t.equal((await browser.fetch(target, { headers })).status, status, target.slice(0, 9))
  }
  for (const rubbish of [`Bad Field: ${session}\r\n`, `Field: ${session.repeat(400)}\r\n`]) {
    const head = `GET /auth/session HTTP/1.1\r\nHost: a\r\nCookie: ${cookie}\r\n${rubbish}\r\n`
    t.match((await sendRaw(broker.browserPort, head)).status, /^4(00|31)$/)
  }

  const token = broker.latest('access token')
  const wrongKey = broker.plant(
    'wrong API key',
    `pgb_key1_${randomBytes(32).toString('base64url')}`,
  )
  const path = '/v1/users/pagero:alice/access-token'
  for (const authorization of [`Bearer ${wrongKey}`, `Basic ${wrongKey}`, `Bearer ${token}`, '']) {
    t.equal((await broker.ask(path, { authorization })).status, 401)
  }
  t.equal((await broker.ask(`${path}?key=${wrongKey}`)).status, 400)
  t.equal((await broker.ask(`${path}?min_ttl=${token}`)).status, 400)
  t.equal((await broker.ask('/v1/users/pagero:alice/nowhere', { body: `"${token}"` })).status, 404)
  for (const body of [
    `{"rejected":"${token}"}`,
    `{"rejected":"${token}`,
    `{"${token}":1}`,
    `"${token}"`,
  ]) {
    t.equal((await broker.ask(path, { body })).status, 400)
  }
}

/** Refreshes that go wrong in each way, the authorization server quoting what it was sent. */
async function failRefreshes(t: Test, broker: CanaryBroker): Promise<void> {
  await broker.logIn('bob')
  t.equal(await broker.renew('bob'), 200)
  const quote = () => ({ error_description: broker.latest('refresh token') })

  broker.breakNext('before')
  t.equal(await broker.renew('bob'), 503, 'the connection is reset')
  await recovers(t, broker)
  for (const [status, error] of [
    [503, 'temporarily_unavailable'],
    [401, 'invalid_client'],
    [400, 'unheard_of'],
  ] as const) {
    broker.failNext('refresh_token', status, { error, ...quote() })
    t.equal(await broker.renew('bob'), 503, error)
    await recovers(t, broker)
  }
  broker.cutNextAnswer()
  t.equal(await broker.renew('bob'), 200, 'an answer that is no JSON but holds both tokens')
  broker.failNext('refresh_token', 400, { error: 'invalid_grant', ...quote() }, 9)
  t.equal(await broker.renew('bob'), 409, 'refused, and refused again')
  broker.forgetFaults()

  await broker.logIn('carol')
  broker.breakNext('after')
  await broker.renew('carol')
  t.ok(await until(async () => (await broker.renew('carol')) === 409), 'the successor was lost')
}

/** Refresh tokens of another system: one that is worth nothing, and one whose fate stays open. */
async function importTokens(t: Test, broker: CanaryBroker): Promise<void> {
  const token = broker.plant('imported token', randomBytes(48).toString('base64url'))
  const put = (members: object) =>
    broker.ask('/v1/users/erp-7/grant', {
      method: 'PUT',
      body: JSON.stringify({
        refresh_token: token,
        obtained_at: '2026-01-02T03:04:05Z',
        ...members,
      }),
    })
  t.equal((await put({ obtained_at: token })).status, 400)
  t.equal((await put({ [token]: true })).status, 400)
  t.equal((await put({})).status, 409, 'refused')
  const other = broker.plant('imported token', randomBytes(48).toString('base64url'))
  broker.breakNext('before')
  t.equal((await put({ refresh_token: other })).status, 503, 'the connection is reset')
  t.equal((await broker.ask('/v1/grants')).status, 200)
}

/** After a fault the grant is there as before. */
async function recovers(t: Test, broker: CanaryBroker): Promise<void> {
  t.ok(await until(async () => (await broker.renew('bob')) === 200), 'and works again')
}

async function until(isSo: () => Promise<boolean>): Promise<boolean> {
  const patientUntilMs = performance.now() + 10_000
  while (performance.now() < patientUntilMs) {
    if (await isSo()) return true
    await delay(100)
  }
  return false
}

/** Ends a session and an access while the authorization server does not take the revocation. */
async function endAccess(t: Test, broker: CanaryBroker, alice: Person): Promise<void> {
  broker.refuseRevocations({ error_description: broker.latest('refresh token') })
  const again = await broker.logIn('alice', alice.browser)
  const disconnect = { method: 'POST' }
  t.equal((await again.browser.fetch('/auth/logout?disconnect=true', disconnect)).status, 204)
  t.equal((await again.browser.fetch('/auth/session')).status, 401)
  const erased = () => broker.ask('/v1/users/pagero:alice/access-token')
  t.ok(await until(async () => (await erased()).status === 404))
  t.ok(await until(async () => broker.program.output().includes('"revocation_failed"')))
}

async function readFolder(folder: string): Promise<Haystack[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true })
  return Promise.all(
    entries
      .filter((entry) => entry.isFile())
      .map(async ({ parentPath, name }) => ({
        name: 'spool',
        content: Buffer.concat([Buffer.from(`${name}\n`), await readFile(join(parentPath, name))]),
      })),
  )
}

/** Reads the log: every line is JSON and names an event. */
function readEvents(output: string): Set<unknown> {
  const lines = output.trimEnd().split('\n')
  return new Set(lines.map((line) => (JSON.parse(line) as { event: unknown }).event))
}
