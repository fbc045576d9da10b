// `broker doctor`: what it says of each thing that can be amiss, on real servers, and that it changes nothing.

import { randomBytes, randomUUID } from 'node:crypto'
import { readdir, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import type { Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { readConfig } from '../src/config.ts'
import { examine, type Finding } from '../src/doctor.ts'
import { claimDatabase } from '../src/postgres/deployment.ts'
import { openDatabase } from '../src/postgres/database.ts'
import { Secret } from '../src/secret.ts'
import { createEmptyDatabase, createTestDatabase, silentLog } from './support/database.ts'
import { startProgram } from './support/program.ts'

const KEY = randomBytes(32).toString('base64')

/** A server that takes connections and says nothing. */
async function startMute(test: Test): Promise<number> {
  const server = createServer((socket) => socket.on('error', () => undefined).resume())
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  test.teardown(() => new Promise((resolve) => server.close(resolve)))
  const address = server.address()
  return typeof address === 'object' && address !== null ? address.port : 0
}

async function setUp(test: Test, databaseUrl?: string) {
  const { url } = databaseUrl === undefined ? await createTestDatabase(test) : { url: databaseUrl }
  const port = await startMute(test)
  const directory = test.testdir({ spool: {}, 'callers.json': '{"callers":[]}' })
  const env = {
    DATABASE_URL: url,
    ENCRYPTION_KEYS: `k1:${KEY}`,
    PAGERO_CLIENT_ID: 'nordvik',
    PAGERO_CLIENT_SECRET: 'a-secret-of-the-client',
    PAGERO_REDIRECT_URI: 'http://localhost:3000/auth/callback',
    PAGERO_AUTHORIZE_URL: `http://localhost:${port}/authorize`,
    PAGERO_TOKEN_URL: `http://localhost:${port}/token`,
    PAGERO_REVOKE_URL: `http://localhost:${port}/revoke`,
    PAGERO_API_URL: `http://localhost:${port}`,
    PAGERO_PKCE: 'S256',
    PAGERO_ISSUER: 'https://issuer.example',
    CALLERS_FILE: join(directory, 'callers.json'),
    SPOOL_DIR: join(directory, 'spool'),
  }
  const database = openDatabase(
    { url: new Secret(url), poolMax: 2, applicationName: 'broker test' },
    silentLog,
  )
  test.teardown(() => database.close())
  return {
    port,
    directory,
    env,
    database,
    /** What is said with some settings changed, or left out. */
    async findings(
      changes: Readonly<Record<string, string | undefined>> = {},
      clock: { now(): Date } = systemClock,
    ): Promise<Finding[]> {
      const told: Finding[] = []
      const config = readConfig({ ...env, ...changes })
      await examine({ clock, log: silentLog }, config, (finding) => told.push(finding))
      return told
    },
  }
}

/** What is said about one thing. */
function about(findings: readonly Finding[], what: string): Array<[Finding['level'], string]> {
  return findings.filter((one) => one.about === what).map(({ level, text }) => [level, text])
}

t.test('where all is well it says so of each thing, and changes nothing', async (t) => {
  const { findings, database, directory, port } = await setUp(t)
  await claimDatabase(database)
  const read = async () =>
    (await database.pool.query('select to_jsonb(d) as row from deployment d')).rows
  const before = await read()
  t.strictSame(
    (await findings()).map(({ level, about: what, text }) => `${level} ${what}: ${text}`),
    [
      'ok callers: 0 in CALLERS_FILE',
      `ok database: PostgreSQL ${(await database.pool.query<{ v: string }>("select current_setting('server_version') as v")).rows[0]?.v}, takes writes`,
      'wrong durability: A commit may be forgotten, and a token with it: turn on fsync, full_page_writes, synchronous_commit.',
      'ok clock: within 5 s of that of PostgreSQL',
      'ok migrations: the schema is current',
      'ok deployment: this is the database that the broker has worked in',
      'ok keys: what grants need is there; k1 seals',
      'ok spool: SPOOL_DIR takes entries; it has 0 files',
      `ok pagero: http://localhost:${port} answers`,
    ],
  )
  t.strictSame(await read(), before)
  t.strictSame(await readdir(join(directory, 'spool')), [])
})

t.test(
  'the collector of traces, where there is one, and without it the broker works',
  async (t) => {
    const { findings, port } = await setUp(t)
    const of = async (endpoint: string) =>
      about(await findings({ OTEL_EXPORTER_OTLP_ENDPOINT: endpoint }), 'traces')
    t.strictSame(await of(`http://127.0.0.1:${port}/base`), [
      ['ok', `http://127.0.0.1:${port} answers`],
    ])
    t.strictSame(await of('http://127.0.0.1:9'), [
      [
        'note',
        'http://127.0.0.1:9 does not answer (ECONNREFUSED): traces are lost meanwhile. See OTEL_EXPORTER_OTLP_ENDPOINT.',
      ],
    ])
    t.match(await of(`https://127.0.0.1:${port}`), [['note', /does not answer/]])
  },
)

t.test('the database: away, empty, newer, read-only, a copy, or of other keys', async (t) => {
  const { findings, database } = await setUp(t)
  const query = (text: string, values: unknown[] = []) => database.pool.query(text, values)

  const away = await findings({ DATABASE_URL: 'postgres://broker@127.0.0.1:9/broker' })
  t.strictSame(about(away, 'database'), [
    ['wrong', 'It cannot be reached, or refuses (ECONNREFUSED). See DATABASE_URL.'],
  ])
  t.strictSame(about(away, 'migrations'), [], 'what depends on it is not looked at')
  t.equal(about(away, 'spool').length, 1, 'and the rest is')
  const none = await findings({ DATABASE_URL: undefined })
  t.match(about(none, 'database'), [['note', /a PostgreSQL of its own/]])
  const unknown = new URL(database.pool.options.connectionString ?? '')
  unknown.pathname = '/not_there'
  t.match(about(await findings({ DATABASE_URL: unknown.href }), 'database'), [
    ['wrong', /refuses \(3D000\)/],
  ])

  t.strictSame(about(await findings(), 'deployment'), [
    ['note', 'no broker has worked in this database yet'],
  ])
  t.equal(await claimDatabase(database), 'ours', 'which it has left so')
  await query(`update deployment set database_identity = 'another/1'`)
  t.match(about(await findings(), 'deployment'), [['wrong', /run: broker accept-database$/]])

  await query(
    `insert into grants (user_id, login_id, generation, refresh_token_sealed, key_id,
       authenticated_at, rotated_at, rolling_expires_at, absolute_expires_at)
     values ('alice', $1, 1, '\\x0001', 'k0', now(), now(), now(), now())`,
    [randomUUID()],
  )
  t.match(about(await findings(), 'keys'), [
    ['wrong', /a key that stored grants are sealed with is missing or wrong/],
    ['note', /^Grants are sealed with k0 too\. .*run: broker keys rotate$/],
  ])

  const readOnly = new URL(database.pool.options.connectionString ?? '')
  readOnly.searchParams.set('options', '-c default_transaction_read_only=on')
  t.match(about(await findings({ DATABASE_URL: readOnly.href }), 'database'), [
    ['wrong', /takes no writes/],
  ])

  const empty = await createEmptyDatabase(t)
  t.match(about(await findings({ DATABASE_URL: empty.url }), 'migrations'), [
    ['note', /the next start applies them/],
  ])
  const byHand = { DATABASE_URL: empty.url, MIGRATE_AT_START: 'false' }
  const unmigrated = await findings(byHand)
  t.match(about(unmigrated, 'migrations'), [['wrong', /Run: broker migrate$/]])
  t.strictSame(about(unmigrated, 'keys'), [])
  await query(`insert into schema_migrations (name) values ('9999_of_tomorrow')`)
  t.match(about(await findings(), 'migrations'), [['wrong', /newer version/]])
})

t.test('a clock that is off', async (t) => {
  const { findings } = await setUp(t)
  for (const [offMs, expected] of [
    [4_000, /^within/],
    [-4_000, /^within/],
    [7_000, /^This machine's clock is [67]\.\d s ahead of that of PostgreSQL\./],
    [-7_000, /^This machine's clock is [67]\.\d s behind that of PostgreSQL\./],
  ] as const) {
    const clock = { now: () => new Date(Date.now() + offMs) }
    const [finding] = about(await findings({}, clock), 'clock')
    t.match(finding?.[1], expected)
    t.equal(finding?.[0], Math.abs(offMs) > 5_000 ? 'wrong' : 'ok')
  }
})

t.test('the spool: not there yet, with damaged files, or no directory', async (t) => {
  const { findings, directory } = await setUp(t)
  const spool = (name: string) => ({ SPOOL_DIR: join(directory, name) })
  t.match(about(await findings(spool('new/below')), 'spool'), [['note', /made at the start/]])
  await writeFile(join(directory, 'spool', 'a.json.unreadable'), 'x')
  await writeFile(join(directory, 'spool', `${randomUUID()}.json`), 'x')
  t.match(about(await findings(), 'spool'), [
    ['ok', /it has 1 files$/],
    ['note', /^1 damaged/],
  ])
  t.match(about(await findings(spool('callers.json')), 'spool'), [
    ['wrong', /^SPOOL_DIR takes no entries \(ENOTDIR\)/],
  ])
  t.match(about(await findings(spool('callers.json/below')), 'spool'), [['wrong', /ENOTDIR/]])
})

t.test('hosts that do not answer, and those that are asked', async (t) => {
  const { findings, port } = await setUp(t)
  const found = await findings({
    PAGERO_AUTHORIZE_URL: 'http://localhost:9/authorize',
    PAGERO_REVOKE_URL: `https://localhost:${port}/revoke`,
    PAGERO_JWKS_URL: 'https://pagero.invalid/keys',
  })
  const said = about(found, 'pagero').map(([level, text]) => `${level} ${text}`)
  t.match(said.toSorted(), [
    `ok http://localhost:${port} answers`,
    'wrong http://localhost:9 does not answer (ECONNREFUSED). See PAGERO_AUTHORIZE_URL.',
    `wrong https://localhost:${port} does not answer (ETIMEDOUT). See PAGERO_REVOKE_URL.`,
    /^wrong https:\/\/pagero\.invalid does not answer \((?:ENOTFOUND|EAI_AGAIN)\)\. See PAGERO_JWKS_URL\.$/,
  ])
})

t.test('callers and choices', async (t) => {
  const { findings, directory } = await setUp(t)
  const file = (name: string) => ({ CALLERS_FILE: join(directory, name) })
  t.match(about(await findings({ CALLERS_FILE: undefined }), 'callers'), [['note', /not set/]])
  t.match(about(await findings(file('none.json')), 'callers'), [['wrong', /ENOENT/]])
  await writeFile(join(directory, 'bad.json'), '{"callers":[{"name":"x"}]}')
  t.match(about(await findings(file('bad.json')), 'callers'), [['wrong', /./]])
  const found = await findings({
    PAGERO_PKCE: undefined,
    PAGERO_ISSUER: undefined,
    ALLOW_UNSAFE_DATABASE: 'true',
  })
  t.match(about(found, 'pkce'), [['note', /PAGERO_PKCE=S256/]])
  t.match(about(found, 'issuer'), [['note', /PAGERO_ISSUER/]])
  t.match(about(found, 'durability'), [
    ['note', /^A commit may be forgotten/],
    ['note', /ALLOW_UNSAFE_DATABASE/],
  ])
})

t.test('the command tells all settings that are wrong, and ends with 1 for what is', async (t) => {
  const { env } = await setUp(t)
  const run = async (changes: Readonly<Record<string, string>>, ...more: string[]) => {
    const program = startProgram(t, ['src/main.ts', 'doctor', ...more], { ...env, ...changes })
    return { code: await program.exited, output: program.output() }
  }
  const unset = await run({ PAGERO_CLIENT_ID: '', PAGERO_PKCE: 'S512' })
  t.equal(unset.code, 1)
  t.match(unset.output, /^wrong  settings    PAGERO_CLIENT_ID/m)
  t.match(unset.output, /^wrong  settings    PAGERO_PKCE/m)
  const whole = await run({})
  t.equal(whole.code, 1, 'commits may be forgotten in the database of the tests')
  t.match(whole.output, /^ok     settings    all of them can be used\nok     callers     0 in/)
  t.strictSame(whole.output.match(/^wrong.*$/gm)?.length, 1)
  t.notMatch(whole.output, /a-secret-of-the-client/)
  t.notMatch(whole.output, KEY)
  t.equal((await run({ ALLOW_UNSAFE_DATABASE: 'true' })).code, 0, 'a note is nothing wrong')
  t.equal((await run({}, 'more')).code, 2)
})
