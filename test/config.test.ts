// Settings: all problems at once, never a value in a message, URLs byte for byte, and times that fit together.

import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { inspect } from 'node:util'
import t, { type Test } from 'tap'
import { parse } from 'yaml'
import { ConfigError, readConfig, type Config } from '../src/config.ts'
import { EXAMPLE_ENCRYPTION_KEY } from '../src/setting-values.ts'
import { SETTINGS, settingsMarkdown, type Setting } from '../src/settings.ts'

type Environment = Record<string, string | undefined>

const KEY = randomBytes(32).toString('base64')
const CANARY = 'canary-value-7c1'

const minimal: Environment = {
  ENCRYPTION_KEYS: `k1:${KEY}`,
  PAGERO_CLIENT_ID: 'client',
  PAGERO_CLIENT_SECRET: 'client-secret',
  PAGERO_REDIRECT_URI: 'https://urltoclient:4443',
}

function read(changes: Environment = {}): Config {
  return readConfig({ ...minimal, ...changes }, () => {
    throw new Error('no files here')
  })
}

function problemsOf(changes: Environment): readonly string[] {
  try {
    read(changes)
  } catch (error) {
    if (error instanceof ConfigError) return error.problems
    throw error
  }
  return []
}

function accepts(t: Test, name: string, texts: readonly string[], others: Environment = {}): void {
  for (const text of texts)
    t.strictSame(problemsOf({ ...others, [name]: text }), [], `${name} takes ${text}`)
}

/** Every text is refused, with one problem, which names the variable and does not repeat the text. */
function refuses(t: Test, name: string, texts: readonly string[], wanted?: RegExp): void {
  for (const text of texts) {
    const problems = problemsOf({ [name]: text })
    t.equal(problems.length, 1, `${name} refuses ${inspect(text)}`)
    t.ok(problems[0]?.startsWith(`${name} `), problems[0] as string)
    if (wanted !== undefined) t.match(problems[0], wanted)
    if (text.trim().length > 8) t.notOk(problems[0]?.includes(text), 'without saying it')
  }
}

t.test('four settings are enough, and the others have the documented defaults', async (t) => {
  const config = read()
  t.match(config, {
    databaseUrl: undefined,
    migrateAtStart: true,
    allowUnsafeDatabase: false,
    allowPrivateUpstreams: false,
    pagero: {
      clientId: 'client',
      clientSecretNext: undefined,
      clientAuth: 'client_secret_basic',
      redirectUri: 'https://urltoclient:4443',
      authorizeUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-authorize',
      tokenUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-token',
      revokeUrl: 'https://sso.pageroonline.com/oauth/v2/oauth-revoke',
      apiUrl: 'https://api.pageroonline.com',
      pkce: 'off',
      scope: 'all openid',
      issuer: undefined,
      jwksUrl: undefined,
    },
    refresh: {
      deadlineSeconds: 45,
      leaseSeconds: 60,
      aheadSeconds: 120,
      defaultMinTtlSeconds: 30,
      graceSeconds: undefined,
      concurrency: 20,
    },
    publicUrl: 'https://urltoclient:4443',
    public: { host: '0.0.0.0', port: 3000 },
    internal: { host: '0.0.0.0', port: 3001 },
    callersFile: undefined,
    allowedOrigins: [],
    trustedProxies: [],
    spoolDir: './data/spool',
    refreshTokenLifetime: 'P3Y',
    sessions: { idleSeconds: 3600, absoluteSeconds: 43_200 },
    subjectClaim: 'sub',
    tokenCacheTrustMs: 1000,
    staleLimitSeconds: 60,
    replicaName: hostname(),
    logLevel: 'info',
    traces: undefined,
    auditRetentionDays: 400,
    shutdownListenSeconds: 5,
    overloadDelayMs: 200,
    proxy: {
      connectTimeoutMs: 3000,
      headersTimeoutMs: 60_000,
      connections: 64,
      connectionsPerUser: 32,
      waitingMax: 256,
    },
  })
  t.equal(config.pagero.clientSecret.reveal(), 'client-secret')
})

t.test('a Config is frozen all the way down and prints no secret', async (t) => {
  const url = 'postgres://broker:database-password@db/broker'
  const config = read({ DATABASE_URL: url, PAGERO_CLIENT_SECRET_NEXT: 'next-secret' })
  t.throws(() => (config.pagero.scope = 'x'), TypeError)
  t.throws(() => (config.refresh.leaseSeconds = 1), TypeError)
  t.throws(() => (config.trustedProxies as string[]).push('x'), TypeError)
  t.equal(config.databaseUrl?.reveal(), url)
  t.equal(config.pagero.clientSecretNext?.reveal(), 'next-secret')
  t.notMatch(inspect(config, { depth: 9 }) + JSON.stringify(config), /-secret|-password/)
})

t.test('all problems are told at once, one on a line', async (t) => {
  const error = t.throws(() =>
    readConfig({
      PAGERO_CLIENT_ID: ' ',
      PUBLIC_PORT: '70000',
      LOG_LEVEL: 'loud',
      SESSION_IDLE_SECONDS: '50000',
      ENCRYPTION_KEYS: 'k1:short,k1',
      ALLOWED_ORIGINS: 'https://a.example/,https://B.example',
      HEARTBEAT_SECONDS: '10',
    }),
  ) as ConfigError
  t.type(error, ConfigError)
  const wanted = [
    'PAGERO_CLIENT_ID is empty.',
    'PAGERO_CLIENT_SECRET is required: Secret of that client.',
    'PAGERO_REDIRECT_URI is required: Redirect URI exactly as registered',
    'PUBLIC_PORT must be a whole number from 0 to 65535, in digits alone.',
    'LOG_LEVEL must be trace or debug or info or warn or error.',
    'SESSION_IDLE_SECONDS must be at most SESSION_ABSOLUTE_SECONDS.',
    'ENCRYPTION_KEYS entry 1 must be exactly 32 bytes in base64 after its colon.',
    'ENCRYPTION_KEYS entry 2 must begin with a key id of 1 to 32 of A-Z a-z 0-9 _ - and a colon.',
    'ALLOWED_ORIGINS entry 1 must be an origin',
    'ALLOWED_ORIGINS entry 2 must be an origin',
    'HEARTBEAT_STALE_SECONDS must be more than twice HEARTBEAT_SECONDS.',
  ]
  t.equal(error.problems.length, wanted.length)
  for (const problem of wanted)
    t.ok(
      error.problems.some((one) => one.startsWith(problem)),
      problem,
    )
  t.equal(error.message.split('\n').length, wanted.length + 1)
})

t.test('no value of any setting ever stands in a message', async (t) => {
  for (const { name } of SETTINGS) {
    // A value that every reader but those of free text refuses; those get one with a control character.
    const problems = problemsOf({ [name]: `${CANARY}\u0000/?# @` })
    t.ok(problems.length > 0, name)
    t.notMatch(problems.join('\n'), CANARY, name)
  }
})

t.test('every setting in the table is read, and nothing else is', async (t) => {
  const asked = new Set<string>()
  const env = new Proxy(minimal, {
    get(target, name) {
      asked.add(String(name))
      return Reflect.get(target, name) as string | undefined
    },
  })
  readConfig(env)
  const names = SETTINGS.map(({ name }) => name)
  const withFiles = [...names, ...names.map((name) => `${name}_FILE`)]
  t.strictSame(
    [...asked].filter((name) => !withFiles.includes(name)),
    [],
  )
  t.strictSame(
    names.filter((name) => !asked.has(name)),
    [],
  )
  t.equal(new Set(names).size, names.length, 'no name is there twice')
})

t.test('the Markdown table has one row for each setting, with its default', async (t) => {
  const rows = settingsMarkdown().trimEnd().split('\n')
  t.equal(rows.length, SETTINGS.length + 2)
  for (const [index, setting] of SETTINGS.entries()) {
    const { default: fallback, required }: Setting = setting
    const shown = required ? 'required' : fallback === undefined ? '' : `\`${fallback}\``
    t.ok(rows[index + 2]?.startsWith(`| \`${setting.name}\` | ${shown} | `), setting.name)
    t.equal(rows[index + 2]?.split(' | ').length, 3, 'and no stray column')
  }
})

t.test('NAME_FILE names a file that holds the value, without its last newline', async (t) => {
  const directory = t.testdir({
    secret: 'from-file\n',
    keys: `k1:${KEY}\nk2:${randomBytes(32).toString('base64url')}\r\n`,
  })
  const files = {
    ...minimal,
    PAGERO_CLIENT_SECRET: undefined,
    PAGERO_CLIENT_SECRET_FILE: join(directory, 'secret'),
    ENCRYPTION_KEYS: undefined,
    ENCRYPTION_KEYS_FILE: join(directory, 'keys'),
  }
  const config = readConfig(files)
  t.equal(config.pagero.clientSecret.reveal(), 'from-file')
  t.strictSame(
    config.encryptionKeys.map(({ keyId }) => keyId),
    ['k1', 'k2'],
  )
  t.equal(readConfig(files, (path) => readFileSync(path, 'utf8')).pagero.clientId, 'client')
  t.equal(
    readConfig(files, (path) =>
      path.endsWith('keys') ? `k1:${KEY}` : 'one-newline\r\n',
    ).pagero.clientSecret.reveal(),
    'one-newline',
  )
})

t.test(
  'a variable and its file both set, or a file that cannot be read, are problems',
  async (t) => {
    t.strictSame(problemsOf({ PAGERO_CLIENT_SECRET_FILE: `/${CANARY}` }), [
      'PAGERO_CLIENT_SECRET and PAGERO_CLIENT_SECRET_FILE are both set; set one of them.',
    ])
    t.strictSame(problemsOf({ DATABASE_URL_FILE: `/${CANARY}` }), [
      'DATABASE_URL_FILE must name a file that can be read.',
    ])
    t.strictSame(problemsOf({ REFRESH_LEASE_SECONDS_FILE: `/${CANARY}` }), [
      'REFRESH_LEASE_SECONDS_FILE must name a file that can be read.',
    ])
  },
)

t.test('the redirect URI stays byte for byte as it was written', async (t) => {
  for (const uri of [
    'https://urltoclient:4443',
    'https://urltoclient:4443/',
    'https://UrlToClient:443/Callback/~user:a',
    'https://client.example/api-callback',
    'https://client.example/auth/login/',
    'http://localhost:3000',
    'http://127.0.0.1:3000/callback',
    'http://127.8.9.10/callback',
    'http://[::1]:3000/callback',
  ]) {
    t.equal(read({ PAGERO_REDIRECT_URI: uri }).pagero.redirectUri, uri)
  }
  refuses(t, 'PAGERO_REDIRECT_URI', [
    'http://urltoclient:4443',
    'http://localhost.example/callback',
    'http://127.0.0.1.example/callback',
    'http://0.0.0.0/callback',
    'https://client.example/callback?x=1',
    'https://client.example/callback?',
    'https://client.example/callback#',
    'https://user:password@client.example/',
    'https://@client.example/',
    'https:client.example',
    'https:///client.example',
    'HTTPS://client.example',
    ' https://client.example',
    'https://client.example\\@evil.example/',
    'https://client.example/a b',
    'https://client.example/\tx',
    'https://client.example:99999/',
    'ftp://client.example/',
    'client.example',
  ])
})

t.test('a redirect URI at which no callback could arrive is refused', async (t) => {
  const client = 'https://client.example'
  refuses(t, 'PAGERO_REDIRECT_URI', [`${client}/call%20back`, `${client}/c*`, `${client}/{c}`], /%/)
  const { paths } = parse(readFileSync(join(import.meta.dirname, '../openapi.yaml'), 'utf8')) as {
    paths: Record<string, { get?: { tags: string[] } }>
  }
  const own = Object.keys(paths)
    .filter((path) => /^\/(?:auth|api|livez)/.test(path) && path !== '/auth/callback')
    .map((path) => client + path.replace(/\{\w+\}/, 'document'))
  t.ok(own.length >= 5)
  refuses(t, 'PAGERO_REDIRECT_URI', [...own, `${client}/api`, `${client}/api/`], /serves itself/)
})

t.test('endpoints may carry a query, the API and the public URL are origins', async (t) => {
  for (const name of [
    'PAGERO_AUTHORIZE_URL',
    'PAGERO_TOKEN_URL',
    'PAGERO_REVOKE_URL',
    'PAGERO_JWKS_URL',
  ]) {
    accepts(t, name, ['https://sso.example/x?tenant=1', 'http://localhost:9000/token'])
    refuses(t, name, ['http://sso.example/x', 'https://sso.example/x#y', 'https://u@sso.example/x'])
  }
  t.equal(read({ PAGERO_TOKEN_URL: 'https://SSO.example' }).pagero.tokenUrl, 'https://SSO.example')
  accepts(t, 'PAGERO_ISSUER', ['https://sso.example/oauth/v2/oauth-anonymous'])
  refuses(t, 'PAGERO_ISSUER', ['https://sso.example/?x', 'sso.example.com'])
  const notOrigins = [
    'https://api.example/',
    'https://API.example',
    'https://api.example:443',
    'https://api.example/v1',
    'http://api.example',
  ]
  for (const name of ['PAGERO_API_URL', 'PUBLIC_URL']) {
    for (const host of ['https://api.example', 'http://localhost']) {
      const others = { PAGERO_REDIRECT_URI: `${host}/callback` }
      accepts(t, name, [host, `${host}:8443`], others)
    }
    refuses(t, name, notOrigins, /no trailing slash/)
  }
  t.equal(
    read({ PAGERO_REDIRECT_URI: 'https://Host.example/cb' }).publicUrl,
    'https://host.example',
  )
  t.equal(read({ PUBLIC_URL: 'https://urltoclient' }).publicUrl, 'https://urltoclient')
})

t.test('the database URL is a PostgreSQL one', async (t) => {
  accepts(t, 'DATABASE_URL', [
    'postgres://u:p@host/db',
    'postgresql://host:6432/db?sslmode=verify-full',
  ])
  refuses(t, 'DATABASE_URL', [
    'mysql://user:pw@host/db',
    'host=/tmp dbname=x',
    'postgres://a b/db',
    '',
  ])
})

t.test('numbers are digits within their bounds', async (t) => {
  const never = [
    '30s',
    '-1',
    '1e9',
    '',
    ' ',
    ' 5',
    '5 ',
    '+5',
    '0x10',
    '5,5',
    '.5',
    '5.',
    'NaN',
    'Infinity',
    '٣',
  ]
  refuses(t, 'PUBLIC_PORT', [...never, '1.5', '65536'])
  accepts(t, 'PUBLIC_PORT', ['0', '1', '65535'])
  refuses(t, 'ANTI_ENTROPY_SECONDS', [...never, '0', '0.049', '3600.001', '1.0001'])
  accepts(t, 'ANTI_ENTROPY_SECONDS', ['0.05', '0.5', '3600'])
  t.equal(read({ ANTI_ENTROPY_SECONDS: '0.25' }).refresh.antiEntropySeconds, 0.25)
  refuses(t, 'CALLER_WAIT_SECONDS', ['30.001', '31'])
  accepts(t, 'CALLER_WAIT_SECONDS', ['0', '30'])
  refuses(t, 'REFRESH_CONCURRENCY', ['0', '1001'])
  refuses(t, 'PROXY_REQUEST_BYTES_MAX', ['1GiB', '1099511627777'])
  accepts(t, 'PROXY_REQUEST_BYTES_MAX', ['0', '1099511627776'])
})

t.test('an empty variable is a problem, but an empty scope is one that is not sent', async (t) => {
  for (const { name } of SETTINGS) {
    const problems = problemsOf({ [name]: '' })
    if (name === 'PAGERO_SCOPE') t.strictSame(problems, [])
    else t.match(problems, [new RegExp(`^${name} is empty\\.`)], name)
  }
  t.equal(read({ PAGERO_SCOPE: '' }).pagero.scope, '')
})

t.test('words and texts are taken as documented and not otherwise', async (t) => {
  accepts(t, 'PAGERO_CLIENT_AUTH', ['client_secret_post', 'client_secret_basic'])
  refuses(t, 'PAGERO_CLIENT_AUTH', ['none', 'Client_secret_post'])
  accepts(t, 'PAGERO_PKCE', ['off', 'S256'])
  refuses(t, 'PAGERO_PKCE', ['s256', 'plain', 'on'])
  accepts(t, 'PAGERO_SCOPE', ['all', 'a:b c.d'])
  refuses(t, 'PAGERO_SCOPE', ['a  b', ' a', 'a"b', 'a\nb', ' '])
  refuses(t, 'PAGERO_CLIENT_SECRET', [' leading-space', 'trailing-space ', 'line\nbreak', 'ümlaut'])
  accepts(t, 'PAGERO_CLIENT_SECRET', ['x', 'with space inside', '!"#$%&~'])
  accepts(t, 'MIGRATE_AT_START', ['true', 'false'])
  refuses(t, 'MIGRATE_AT_START', ['yes', '0', 'TRUE'])
  t.equal(read({ MIGRATE_AT_START: 'false' }).migrateAtStart, false)
  accepts(t, 'REFRESH_TOKEN_LIFETIME', ['P3Y', 'P1Y6M', 'P90D', 'P1Y2M3D', 'P0Y1D'])
  refuses(t, 'REFRESH_TOKEN_LIFETIME', [
    'P',
    'P0Y',
    'P0D',
    '3Y',
    'P1W',
    'PT1H',
    'P-3Y',
    'P3YT1H',
    'P1D1Y',
    'p3y',
  ])
  accepts(t, 'REPLICA_NAME', ['broker-0', 'a.b_c'])
  refuses(t, 'REPLICA_NAME', ['a b', 'a/b', 'x'.repeat(129)])
  accepts(t, 'PUBLIC_HOST', ['127.0.0.1', '::', '::1', 'localhost', 'broker.internal'])
  refuses(t, 'PUBLIC_HOST', ['a b', 'http://x', '-x'])
  refuses(t, 'SUBJECT_CLAIM', ['a b', 'x'.repeat(129)])
  accepts(t, 'CALLERS_FILE', ['/etc/broker/callers.json'])
  t.equal(readConfig({ ...minimal, CALLERS_FILE: '/a', CALLERS_FILE_FILE: '/b' }).callersFile, '/a')
})

t.test('lists name the entry that is wrong, and take none twice', async (t) => {
  t.strictSame(
    read({ ALLOWED_ORIGINS: 'https://a.example, https://b.example:8443' }).allowedOrigins,
    ['https://a.example', 'https://b.example:8443'],
  )
  refuses(
    t,
    'ALLOWED_ORIGINS',
    ['https://a.example,', 'https://a.example,*', 'null'],
    /entry [12] must/,
  )
  refuses(t, 'ALLOWED_ORIGINS', ['https://a.example,https://a.example'], /entry 2 is there twice/)
  const many = Array.from({ length: 101 }, (_, index) => `https://a${index}.example`).join(',')
  refuses(t, 'ALLOWED_ORIGINS', [many], /at most 100/)
  t.strictSame(read({ TRUSTED_PROXIES: '10.0.0.0/8,::1, fd00::/8,192.0.2.7' }).trustedProxies, [
    '10.0.0.0/8',
    '::1',
    'fd00::/8',
    '192.0.2.7',
  ])
  refuses(t, 'TRUSTED_PROXIES', [
    '0.0.0.0/0',
    '::/0',
    '10.0.0.0/33',
    '::/129',
    '10.0.0.0/08',
    '10.0.0.0/8/8',
    '10.0.0',
    'loopback',
    '10.0.0.0/',
    '*',
    'fe80::1%eth0',
  ])
})

function entry(bytes: Buffer): string {
  return `k1:${bytes.toString('base64')}`
}

t.test('encryption keys are 32 random bytes under ids of their own', async (t) => {
  const second = randomBytes(32)
  const config = read({
    ENCRYPTION_KEYS: ` k1:${KEY} ,\n\nkey_2-b:${second.toString('base64url')}\n`,
  })
  t.strictSame(
    config.encryptionKeys.map(({ keyId, key }) => [keyId, Buffer.from(key).toString('base64')]),
    [
      ['k1', KEY],
      ['key_2-b', second.toString('base64')],
    ],
  )
  refuses(
    t,
    'ENCRYPTION_KEYS',
    [
      entry(randomBytes(31)),
      entry(randomBytes(33)),
      `k1:${KEY}=`,
      `k1: ${KEY}`,
      `k1:${'*'.repeat(43)}`,
      'k1:',
    ],
    /entry 1 must be exactly 32 bytes/,
  )
  refuses(
    t,
    'ENCRYPTION_KEYS',
    [KEY, `:${KEY}`, `a b:${KEY}`, `${'k'.repeat(33)}:${KEY}`],
    /key id/,
  )
  refuses(t, 'ENCRYPTION_KEYS', [entry(Buffer.alloc(32)), entry(Buffer.alloc(32, 7))], /random/)
  refuses(t, 'ENCRYPTION_KEYS', [`k1:${EXAMPLE_ENCRYPTION_KEY}`], /the example/)
  refuses(
    t,
    'ENCRYPTION_KEYS',
    [`k1:${KEY},k1:${second.toString('base64')}`],
    /entry 2 must not repeat the key id/,
  )
  refuses(t, 'ENCRYPTION_KEYS', [`k1:${KEY},k2:${KEY}`], /entry 2 must not repeat the key of/)
  refuses(
    t,
    'ENCRYPTION_KEYS',
    [
      ',',
      Array.from({ length: 33 }, (_, i) => `k${i}:${randomBytes(32).toString('base64')}`).join(),
    ],
    /1 to 32 entries/,
  )
  t.equal(
    Buffer.from(EXAMPLE_ENCRYPTION_KEY, 'base64').length,
    32,
    'the example would do otherwise',
  )
})

/** Settings on either side of a relation: the first set holds, the second breaks it by the smallest step. */
const RELATIONS: ReadonlyArray<{
  names: readonly [string, string]
  holds: Environment
  breaks: Environment
}> = [
  {
    names: ['REFRESH_SEND_DEADLINE_SECONDS', 'REFRESH_DEADLINE_SECONDS'],
    holds: { REFRESH_SEND_DEADLINE_SECONDS: '44.999' },
    breaks: { REFRESH_SEND_DEADLINE_SECONDS: '45' },
  },
  {
    names: ['REFRESH_LEASE_SECONDS', 'REFRESH_DEADLINE_SECONDS'],
    holds: { REFRESH_LEASE_SECONDS: '60' },
    breaks: { REFRESH_LEASE_SECONDS: '59.999' },
  },
  {
    // A third of a deadline shorter than 45 s; from there on 15 s.
    names: ['REFRESH_LEASE_SECONDS', 'REFRESH_DEADLINE_SECONDS'],
    holds: {
      REFRESH_DEADLINE_SECONDS: '0.3',
      REFRESH_SEND_DEADLINE_SECONDS: '0.1',
      REFRESH_LEASE_SECONDS: '0.4',
    },
    breaks: {
      REFRESH_DEADLINE_SECONDS: '0.3',
      REFRESH_SEND_DEADLINE_SECONDS: '0.1',
      REFRESH_LEASE_SECONDS: '0.399',
    },
  },
  {
    names: ['REFRESH_LEASE_SECONDS', 'REFRESH_DEADLINE_SECONDS'],
    holds: {
      REFRESH_DEADLINE_SECONDS: '90',
      REFRESH_LEASE_SECONDS: '105',
      REFRESH_AHEAD_SECONDS: '150',
    },
    breaks: {
      REFRESH_DEADLINE_SECONDS: '90',
      REFRESH_LEASE_SECONDS: '104.999',
      REFRESH_AHEAD_SECONDS: '150',
    },
  },
  {
    names: ['REFRESH_AHEAD_SECONDS', 'REFRESH_LEASE_SECONDS'],
    holds: { REFRESH_AHEAD_SECONDS: '105' },
    breaks: { REFRESH_AHEAD_SECONDS: '104.999' },
  },
  {
    names: ['REFRESH_AHEAD_SECONDS', 'DEFAULT_MIN_TTL_SECONDS'],
    holds: { DEFAULT_MIN_TTL_SECONDS: '45' },
    breaks: { DEFAULT_MIN_TTL_SECONDS: '45.001' },
  },
  {
    names: ['HEARTBEAT_STALE_SECONDS', 'HEARTBEAT_SECONDS'],
    holds: { HEARTBEAT_STALE_SECONDS: '10.001' },
    breaks: { HEARTBEAT_STALE_SECONDS: '10' },
  },
  {
    names: ['REFRESH_DEADLINE_SECONDS', 'REFRESH_GRACE_SECONDS'],
    holds: {
      REFRESH_GRACE_SECONDS: '60',
      REFRESH_DEADLINE_SECONDS: '20',
      REFRESH_LEASE_SECONDS: '30',
    },
    breaks: {
      REFRESH_GRACE_SECONDS: '60',
      REFRESH_DEADLINE_SECONDS: '20.001',
      REFRESH_LEASE_SECONDS: '30',
    },
  },
  {
    names: ['REFRESH_LEASE_SECONDS', 'REFRESH_GRACE_SECONDS'],
    holds: {
      REFRESH_GRACE_SECONDS: '60',
      REFRESH_DEADLINE_SECONDS: '20',
      REFRESH_LEASE_SECONDS: '30',
    },
    breaks: {
      REFRESH_GRACE_SECONDS: '60',
      REFRESH_DEADLINE_SECONDS: '20',
      REFRESH_LEASE_SECONDS: '30.001',
    },
  },
  {
    names: ['SESSION_IDLE_SECONDS', 'SESSION_ABSOLUTE_SECONDS'],
    holds: { SESSION_IDLE_SECONDS: '43200' },
    breaks: { SESSION_IDLE_SECONDS: '43200.001' },
  },
  {
    names: ['TOKEN_CACHE_TRUST_MS', 'SESSION_IDLE_SECONDS'],
    holds: { SESSION_IDLE_SECONDS: '2' },
    breaks: { SESSION_IDLE_SECONDS: '1.999' },
  },
  {
    names: ['INTERNAL_PORT', 'PUBLIC_PORT'],
    holds: { INTERNAL_PORT: '3000', INTERNAL_HOST: '127.0.0.1' },
    breaks: { INTERNAL_PORT: '3000' },
  },
  {
    names: ['PUBLIC_URL', 'PAGERO_REDIRECT_URI'],
    holds: { PUBLIC_URL: 'https://urltoclient:9443' },
    breaks: { PUBLIC_URL: 'https://www.urltoclient:4443' },
  },
  ...['CONNECT', 'HEADERS', 'IDLE'].map((which) => ({
    names: [`PROXY_${which}_TIMEOUT_MS`, 'PROXY_TOTAL_TIMEOUT_MS'] as const,
    holds: { [`PROXY_${which}_TIMEOUT_MS`]: '60000', PROXY_TOTAL_TIMEOUT_MS: '60000' },
    breaks: {
      PROXY_CONNECT_TIMEOUT_MS: '10',
      PROXY_HEADERS_TIMEOUT_MS: '10',
      PROXY_IDLE_TIMEOUT_MS: '10',
      [`PROXY_${which}_TIMEOUT_MS`]: '1001',
      PROXY_TOTAL_TIMEOUT_MS: '1000',
    },
  })),
]

t.test('settings that do not fit together are refused by a sentence that names both', async (t) => {
  for (const { names, holds, breaks } of RELATIONS) {
    t.strictSame(problemsOf(holds), [], `${names.join(', ')}: ${JSON.stringify(holds)}`)
    const problems = problemsOf(breaks)
    t.equal(problems.length, 1, JSON.stringify(breaks))
    for (const name of names) t.match(problems[0], name)
  }
})

t.test(
  'a grace of 70 seconds or more bounds nothing, and any free port may be asked for twice',
  async (t) => {
    accepts(t, 'REFRESH_GRACE_SECONDS', ['70', '600'])
    t.equal(problemsOf({ REFRESH_GRACE_SECONDS: '69.999' }).length, 2)
    t.strictSame(problemsOf({ PUBLIC_PORT: '0', INTERNAL_PORT: '0' }), [])
  },
)

t.test('a number that could not be read breaks no relation besides', async (t) => {
  t.equal(problemsOf({ REFRESH_LEASE_SECONDS: 'x' }).length, 1)
  t.equal(problemsOf({ REFRESH_DEADLINE_SECONDS: 'x' }).length, 1)
  t.equal(problemsOf({ PAGERO_REDIRECT_URI: 'x', PUBLIC_URL: 'https://x.example' }).length, 1)
})

t.test('webhooks need a secret of their own kind, or two', (t) => {
  const url = { WEBHOOK_URL: 'https://app.example.com/hooks' }
  const secret = (bytes: number) => `whsec_${randomBytes(bytes).toString('base64')}`
  t.equal(read().webhooks, undefined)
  t.equal(read({ WEBHOOK_SECRET: secret(32) }).webhooks, undefined)
  t.match(problemsOf(url), [/^WEBHOOK_SECRET is required/])
  accepts(
    t,
    'WEBHOOK_SECRET',
    [secret(24), secret(64), `${secret(32)},${secret(32)}`, `${secret(32)} ${secret(32)}`],
    url,
  )
  const twice = secret(32)
  refuses(t, 'WEBHOOK_SECRET', [
    secret(23),
    secret(65),
    secret(32).slice('whsec_'.length),
    `${secret(32)},${secret(32)},${secret(32)}`,
    `${twice},${twice}`,
    `whsec_${Buffer.alloc(32).toString('base64')}`,
  ])
  refuses(t, 'WEBHOOK_URL', ['http://app.example.com/hooks', 'ftp://localhost/', 'https://a:b@c/'])
  t.end()
})

t.test('traces go to a collector, over plain HTTP too; without one there are none', async (t) => {
  t.equal(read({ OTEL_EXPORTER_OTLP_HEADERS: 'a=b', OTEL_SERVICE_NAME: 'x' }).traces, undefined)
  const { traces } = read({ OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318/base' })
  t.strictSame(traces, {
    endpoint: 'http://collector:4318/base',
    fields: undefined,
    serviceName: 'pagero-token-broker',
    sampledShare: 1,
  })
  const fields = 'x-api-key=a%20secret, x-tenant=7'
  const more = { OTEL_EXPORTER_OTLP_HEADERS: fields, OTEL_TRACES_SAMPLER_ARG: '0.05' }
  const config = read({ OTEL_EXPORTER_OTLP_ENDPOINT: 'https://otlp.example.com', ...more })
  t.match(config.traces, { sampledShare: 0.05 })
  t.equal(config.traces?.fields?.reveal(), fields)
  t.notMatch(inspect(config, { depth: 9 }) + JSON.stringify(config), /a%20secret/)
  refuses(t, 'OTEL_EXPORTER_OTLP_ENDPOINT', [
    ...['collector:4318', 'grpc://collector:4317', 'http://a:b@collector', 'http://collector?a=b'],
    ...['http://collector#a', 'http://', 'http://a b'],
  ])
  refuses(t, 'OTEL_EXPORTER_OTLP_HEADERS', [
    'x',
    'x y=1',
    'a=b,',
    '=1',
    'a=b c',
    'a=b\r\nc=d',
    'a="b"',
  ])
  refuses(t, 'OTEL_SERVICE_NAME', ['a b', 'x'.repeat(129)])
  refuses(t, 'OTEL_TRACES_SAMPLER_ARG', ['2', '-1', 'all'])
})
