// Callers: default deny, keys that only their hash is known of, patterns without surprises, and a file read strictly.

import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import {
  chmod,
  open,
  readFile,
  readdir,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import * as fc from 'fast-check'
import t from 'tap'
import { addCaller, addKey, createApiKey } from '../src/add-caller.ts'
import {
  isCallPattern,
  isUserPattern,
  matchesCallPattern,
  matchesUserPattern,
} from '../src/caller-patterns.ts'
import { checkCaller } from '../src/check-caller.ts'
import { CallersFileError } from '../src/callers-file.ts'
import {
  type Caller,
  type Callers,
  createCallers,
  parseCallers,
  type Right,
} from '../src/callers.ts'
import { systemClock } from '../src/clock.ts'
import { parseUserKey, type UserKey } from '../src/grant.ts'
import type { Log, LogFields } from '../src/ports.ts'
import { noUses } from './support/no-uses.ts'

const NOW = new Date('2026-11-23T12:00:00Z')
const SECRET = 'A'.repeat(43)

interface Line {
  event: string
  fields: LogFields | undefined
}

function recording(now = NOW) {
  const lines: Line[] = []
  const record = (event: string, fields?: LogFields): void => void lines.push({ event, fields })
  const log: Log = { trace: record, debug: record, info: record, warn: record, error: record }
  const time = { now }
  const clock = { ...systemClock, now: () => time.now }
  return { lines, time, ports: { log, clock, credentialUses: noUses } }
}

const sha256 = (key: string): string => createHash('sha256').update(key).digest('hex')
const user = (text: string): UserKey => parseUserKey(text) as UserKey

function entry(changes: Record<string, unknown> = {}): Record<string, unknown> {
  return {
    name: 'invoice-sync',
    api_keys: [
      { id: 'k7f3', sha256: sha256(`pgb_k7f3_${SECRET}`), expires_at: '2027-01-01T00:00:00Z' },
    ],
    rights: ['token:read', 'proxy:call'],
    users: ['acme-*'],
    proxy_allow: ['GET /document/v1/**', 'POST /file/v1/files'],
    ...changes,
  }
}

const fileOf = (...callers: unknown[]): string => JSON.stringify({ callers })

function problemsOf(text: string): readonly string[] {
  try {
    parseCallers(text, NOW)
  } catch (error) {
    if (error instanceof CallersFileError) return error.problems
    throw error
  }
  return []
}

/** The caller of an API key, which is found at once. */
function callerOf(callers: Callers, header: string): Caller {
  const caller = callers.authenticate(header)
  if (caller instanceof Promise) throw new Error('A key needs no waiting.')
  return caller
}

async function until(condition: () => boolean): Promise<void> {
  const deadline = Date.now() + 5_000
  while (!condition() && Date.now() < deadline)
    await new Promise((resolve) => setTimeout(resolve, 20))
}

t.test('a file with every member is read whole', async (t) => {
  const [caller] = parseCallers(fileOf(entry()), NOW)
  t.strictSame(caller, {
    name: 'invoice-sync',
    rights: new Set<Right>(['token:read', 'proxy:call']),
    users: ['acme-*'],
    proxyAllow: ['GET /document/v1/**', 'POST /file/v1/files'],
    apiKeys: [
      {
        id: 'k7f3',
        sha256: createHash('sha256').update(`pgb_k7f3_${SECRET}`).digest(),
        expiresAt: new Date('2027-01-01T00:00:00Z'),
      },
    ],
    jwts: [],
  })
  t.strictSame(parseCallers('{"callers": []}'), [])
  const [openHanded] = parseCallers(fileOf(entry({ proxy_allow: undefined, users: [] })), NOW)
  t.match(openHanded, { proxyAllow: undefined, users: [] })
})

t.test('each fault is told with its place', async (t) => {
  const key = { id: 'k7f3', sha256: sha256('x') }
  const faults: ReadonlyArray<[string, string]> = [
    ['', 'The file is not valid JSON.'],
    ['[]', 'The file must be a JSON object.'],
    ['{}', '/callers is required.'],
    ['{"callers": {}}', '/callers must be a list'],
    ['{"callers": [], "x": 1}', 'The file must have no members but callers.'],
    ['{"callers": [], "__proto__": {}}', 'The file must have no members but callers.'],
    [fileOf('x'), '/callers/0 must be a JSON object.'],
    [fileOf(null), '/callers/0 must be a JSON object.'],
    [fileOf(entry({ admin: true })), '/callers/0 must have no members but'],
    [fileOf(entry({ name: undefined })), '/callers/0/name is required.'],
    [fileOf(entry({ name: 'Invoice' })), '/callers/0/name must be'],
    [fileOf(entry({ name: '-x' })), '/callers/0/name must be'],
    [fileOf(entry({ name: 'a'.repeat(65) })), '/callers/0/name must be'],
    [fileOf(entry({ name: 7 })), '/callers/0/name must be'],
    [fileOf(entry({ rights: undefined })), '/callers/0/rights is required.'],
    [fileOf(entry({ rights: 'token:read' })), '/callers/0/rights must be a list'],
    [
      fileOf(entry({ rights: ['token:read', 'token:write'] })),
      '/callers/0/rights/1 must be one of',
    ],
    [fileOf(entry({ users: undefined })), '/callers/0/users is required.'],
    [fileOf(entry({ users: ['a', 'b c'] })), '/callers/0/users/1 must be'],
    [fileOf(entry({ users: [''] })), '/callers/0/users/0 must be'],
    [
      fileOf(entry({ users: Array.from({ length: 1001 }, () => 'a') })),
      '/callers/0/users must be a list of at most 1000',
    ],
    [fileOf(entry({ proxy_allow: ['GET /**/x'] })), '/callers/0/proxy_allow/0 must be'],
    [fileOf(entry({ proxy_allow: null })), '/callers/0/proxy_allow must be a list'],
    [fileOf(entry({ api_keys: undefined })), '/callers/0 must have api_keys or jwt.'],
    [fileOf(entry({ api_keys: [] })), '/callers/0/api_keys must have a key'],
    [fileOf(entry({ api_keys: [{ ...key, id: 'K7F3' }] })), '/callers/0/api_keys/0/id must be'],
    [fileOf(entry({ api_keys: [{ ...key, id: 'a_b_' }] })), '/callers/0/api_keys/0/id must be'],
    [
      fileOf(entry({ api_keys: [{ ...key, sha256: sha256('x').toUpperCase() }] })),
      '/callers/0/api_keys/0/sha256 must be',
    ],
    [
      fileOf(entry({ api_keys: [{ ...key, sha256: sha256('x').slice(1) }] })),
      '/callers/0/api_keys/0/sha256 must be',
    ],
    [
      fileOf(entry({ api_keys: [{ ...key, note: 'x' }] })),
      '/callers/0/api_keys/0 must have no members but',
    ],
    [
      fileOf(entry({ api_keys: [{ ...key, expires_at: '2027-01-01' }] })),
      '/callers/0/api_keys/0/expires_at must be',
    ],
    [
      fileOf(entry({ api_keys: [{ ...key, expires_at: '2027-13-01T00:00:00Z' }] })),
      '/callers/0/api_keys/0/expires_at must be',
    ],
    [
      fileOf(entry({ api_keys: [{ ...key, expires_at: null }] })),
      '/callers/0/api_keys/0/expires_at must be',
    ],
    [fileOf(entry({ jwt: [] })), '/callers/0/jwt must have an entry, or be left out.'],
    [
      fileOf(entry(), entry({ api_keys: [{ ...key, id: 'k7f4' }] })),
      '/callers/1/name must not repeat',
    ],
    [fileOf(entry(), entry({ name: 'other' })), '/callers/1/api_keys/0/id must not repeat'],
    [`{"callers": [${' '.repeat(1024 * 1024)}]}`, 'The file is larger than'],
  ]
  for (const [text, wanted] of faults) {
    const problems = problemsOf(text)
    t.equal(problems.length, 1, wanted)
    t.ok(problems[0]?.startsWith(wanted), `${problems[0]}`)
  }
})

t.test('all faults are told at once, and no value with them', async (t) => {
  const key = `pgb_k7f3_${SECRET}`
  const problems = problemsOf(
    fileOf(
      {
        [key]: 1,
        name: key,
        rights: [key],
        users: [`${key} `],
        proxy_allow: [key],
        api_keys: [{ id: key, sha256: key, expires_at: key }],
      },
      { jwt: key },
    ),
  )
  t.equal(problems.length, 12)
  t.notMatch(problems.join('\n'), SECRET)
})

function keyWith(id: string, expiresAt?: string) {
  return { id, sha256: sha256(id), expires_at: expiresAt }
}

t.test('a caller has at most two keys that have not expired', async (t) => {
  const two = [keyWith('aaaa', '2027-01-01T00:00:00Z'), keyWith('bbbb')]
  const expired = keyWith('cccc', '2026-11-23T12:00:00Z')
  const living = keyWith('dddd', '2026-11-23T12:00:00.001Z')
  t.strictSame(problemsOf(fileOf(entry({ api_keys: [...two, expired] }))), [])
  t.match(problemsOf(fileOf(entry({ api_keys: [...two, living] }))), [
    /^\/callers\/0\/api_keys must have at most two/,
  ])
})

t.test('a user pattern matches as its meaning says, for any pattern and user', async (t) => {
  /** The plain definition, exponential and obvious. */
  const covers = (pattern: string, text: string): boolean => {
    if (pattern === '') return text === ''
    if (pattern[0] !== '*') return text[0] === pattern[0] && covers(pattern.slice(1), text.slice(1))
    return covers(pattern.slice(1), text) || (text !== '' && covers(pattern, text.slice(1)))
  }
  const pattern = fc.string({ unit: fc.constantFrom('a', 'b', '*'), maxLength: 8 })
  const text = fc.string({ unit: fc.constantFrom('a', 'b'), maxLength: 10 })
  let matched = 0
  fc.assert(
    fc.property(pattern, text, (p, u) => {
      if (covers(p, u)) matched += 1
      return matchesUserPattern(p, u) === covers(p, u)
    }),
    { numRuns: 20_000 },
  )
  t.ok(matched > 500, `${matched} of them match`)
})

t.test('a user pattern is compared byte for byte', async (t) => {
  t.ok(matchesUserPattern('*', 'pagero:abc'))
  t.ok(matchesUserPattern('acme-*', 'acme-'))
  for (const [pattern, text] of [
    ['acme-*', 'Acme-alice'],
    ['acme-*', 'xacme-alice'],
    ['bob', 'bobby'],
    ['a.c', 'abc'],
    ['ab*ba', 'aba'],
    ['a+', 'aa'],
  ] as const) {
    t.notOk(matchesUserPattern(pattern, text), `${pattern} ${text}`)
  }
  t.notOk(isUserPattern('a/b'))
  t.notOk(isUserPattern('a'.repeat(256)))
  t.ok(isUserPattern('pagero:*'))
})

t.test('a pattern made to be slow is not', async (t) => {
  const began = performance.now()
  for (let i = 0; i < 1000; i += 1) matchesUserPattern(`${'*a'.repeat(127)}b`, 'a'.repeat(255))
  t.ok(performance.now() - began < 1000, 'a thousand times within a second')
})

t.test('a call is allowed by method and path as they are sent', async (t) => {
  const allowed: ReadonlyArray<[string, string, string]> = [
    ['GET /document/v1/**', 'GET', '/document/v1/'],
    ['GET /document/v1/**', 'GET', '/document/v1/a/b'],
    ['POST /file/v1/files', 'POST', '/file/v1/files'],
    ['GET /**', 'GET', '/'],
  ]
  const refused: ReadonlyArray<[string, string, string]> = [
    ['GET /file/**', 'GET', '/file'],
    ['GET /file/**', 'GET', '/files'],
    ['GET /file/**', 'GET', '/File/x'],
    ['GET /file/**', 'GET', '/%66ile/x'],
    ['GET /file/**', 'HEAD', '/file/x'],
    ['GET /file/**', 'get', '/file/x'],
    ['POST /file/v1/files', 'POST', '/file/v1/files/'],
    ['POST /file/v1/files', 'POST', '/file/v1/files/1'],
    ['POST /file/v1/files', 'GET', '/file/v1/files'],
  ]
  for (const [pattern, method, path] of allowed)
    t.ok(matchesCallPattern(pattern, method, path), `${pattern} ${path}`)
  for (const [pattern, method, path] of refused)
    t.notOk(matchesCallPattern(pattern, method, path), `${pattern} ${path}`)
  for (const pattern of ['GET /a%2Fb', "PATCH /a/b(c)=d'", 'DELETE /'])
    t.ok(isCallPattern(pattern), pattern)
  for (const pattern of [
    '/x',
    'GET x',
    'GET  /x',
    'get /x',
    'TRACE /x',
    'CONNECT /x',
    '* /x',
    'GET /x?y',
    'GET /x#y',
    'GET /*',
    'GET /x/*',
    'GET /**/x',
    'GET /x/***',
    'GET /%zz',
    'GET /x ',
    'GET /x\n',
  ]) {
    t.notOk(isCallPattern(pattern), pattern)
  }
})

t.test('without a file nobody may call', async (t) => {
  const { ports } = recording()
  const callers = await createCallers(undefined, ports)
  t.throws(() => callers.authenticate(undefined), { code: 'caller_unauthenticated' })
  t.throws(() => callers.authenticate(`Bearer ${createApiKey().key}`), {
    code: 'caller_unauthenticated',
  })
  callers.close()
})

t.test('the whole key authenticates, and nothing less', async (t) => {
  const { ports } = recording()
  const mine = createApiKey()
  const other = createApiKey()
  const file = join(t.testdir(), 'callers.json')
  await writeFile(
    file,
    fileOf(entry({ api_keys: [mine.entry] }), entry({ name: 'other', api_keys: [other.entry] })),
  )
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  for (const scheme of ['Bearer', 'bearer', 'BEARER', 'Bearer  ']) {
    t.equal(callerOf(callers, `${scheme} ${mine.key}`).name, 'invoice-sync')
  }
  t.equal(callerOf(callers, `Bearer ${other.key}`).name, 'other')
  t.notMatch(JSON.stringify(callers.authenticate(`Bearer ${mine.key}`)), mine.entry.sha256)

  const [, id, secret] = /^pgb_([a-z0-9]{8})_([A-Za-z0-9_-]{43})$/.exec(mine.key) as string[]
  const details = new Set<string>()
  for (const credential of [
    mine.key.slice(0, -1),
    `${mine.key}A`,
    `${mine.key.slice(0, -1)}${mine.key.endsWith('A') ? 'B' : 'A'}`,
    `pgb_${id}_${randomBytes(32).toString('base64url')}`,
    `pgb_${id}_${other.key.slice(13)}`,
    `pgb_zzzzzzzz_${secret}`,
    `PGB_${id}_${secret}`,
    `pgb_${id}`,
    mine.entry.sha256,
    '',
    `pgb_${id}_${'A'.repeat(100_000)}`,
  ]) {
    const refusal = t.throws(() => callers.authenticate(`Bearer ${credential}`), {
      code: 'caller_unauthenticated',
    }) as unknown as { detail: string }
    details.add(refusal.detail)
  }
  t.strictSame([...details], ['The API key is not valid.'], 'all in the same words')
  for (const header of [
    undefined,
    '',
    'Bearer',
    mine.key,
    `Basic ${mine.key}`,
    `Token ${mine.key}`,
    ` Bearer ${mine.key}`,
  ]) {
    t.throws(() => callers.authenticate(header), { code: 'caller_unauthenticated' }, String(header))
  }
})

t.test('a key holds until the instant it expires', async (t) => {
  const { ports, time } = recording()
  const { key, entry: apiKey } = createApiKey(new Date('2027-01-01T00:00:00Z'))
  const file = join(t.testdir(), 'callers.json')
  await writeFile(file, fileOf(entry({ api_keys: [apiKey] })))
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  time.now = new Date('2026-12-31T23:59:59.999Z')
  t.equal(callerOf(callers, `Bearer ${key}`).name, 'invoice-sync')
  time.now = new Date('2027-01-01T00:00:00Z')
  t.throws(() => callers.authenticate(`Bearer ${key}`), { code: 'caller_unauthenticated' })
})

t.test('a caller may do what its entry says and nothing besides', async (t) => {
  const { ports } = recording()
  const { key, entry: apiKey } = createApiKey()
  const file = join(t.testdir(), 'callers.json')
  await writeFile(file, fileOf(entry({ api_keys: [apiKey], users: ['acme-*', 'bob'] })))
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  const caller = callerOf(callers, `Bearer ${key}`)
  t.ok(callers.mayUse(caller, 'token:read'))
  for (const right of ['grant:read', 'grant:manage', 'ops:read'] as const) {
    t.notOk(callers.mayUse(caller, right), right)
  }
  t.ok(callers.maySee(caller, user('acme-alice')))
  t.ok(callers.maySee(caller, user('bob')))
  t.notOk(callers.maySee(caller, user('bobby')))
  t.notOk(callers.maySee(caller, user('pagero:acme-alice')))
  t.ok(callers.mayCall(caller, 'GET', '/document/v1/x'))
  t.notOk(callers.mayCall(caller, 'POST', '/document/v1/x'))
  t.ok(callers.mayCall({ ...caller, proxyAllow: undefined }, 'DELETE', '/anything'))
  t.notOk(callers.mayCall({ ...caller, proxyAllow: [] }, 'GET', '/'))
  t.notOk(callers.maySee({ ...caller, users: [] }, user('bob')))
})

t.test(
  'a changed file holds within a second, a broken or missing one changes nothing and is told once',
  async (t) => {
    const { ports, lines } = recording()
    const first = createApiKey()
    const second = createApiKey()
    const directory = t.testdir()
    const file = join(directory, 'callers.json')
    await writeFile(file, fileOf(entry({ api_keys: [first.entry] })))
    const callers = await createCallers(file, ports)
    t.teardown(() => callers.close())
    const passes = ({ key }: { key: string }): boolean => {
      try {
        callerOf(callers, `Bearer ${key}`)
        return true
      } catch {
        return false
      }
    }

    await writeFile(join(directory, 'next'), fileOf(entry({ api_keys: [second.entry] })))
    await rename(join(directory, 'next'), file)
    const began = performance.now()
    await until(() => passes(second))
    t.ok(performance.now() - began < 1000, 'within a second')
    t.notOk(passes(first), 'and the old key is refused')
    t.match(lines.at(-1), { event: 'callers_file_loaded', fields: { count: 1 } })

    const told = (): number => lines.filter(({ event }) => event === 'callers_file_invalid').length
    await writeFile(file, fileOf(entry({ rights: [second.key] })))
    await until(() => told() === 1)
    t.match(lines.at(-1)?.fields, {
      setting: 'CALLERS_FILE',
      reason: /^\/callers\/0\/rights\/0 must be/,
    })
    t.ok(passes(second), 'the last good file is in force')
    await rm(file)
    await until(() => told() === 2)
    t.ok(passes(second))
    // Longer than two polls: each fault has been told once.
    await new Promise((resolve) => setTimeout(resolve, 1200))
    t.equal(told(), 2)
    t.notMatch(JSON.stringify(lines), second.key)

    await writeFile(file, fileOf(entry({ api_keys: [first.entry] })))
    await until(() => passes(first))
    t.ok(passes(first))
    t.notOk(passes(second))
  },
)

t.test('a file behind a symbolic link that is moved on is read anew', async (t) => {
  const { ports } = recording()
  const keys = [createApiKey(), createApiKey()]
  const directory = t.testdir()
  for (const [index, key] of keys.entries()) {
    await writeFile(join(directory, `version-${index}`), fileOf(entry({ api_keys: [key.entry] })))
  }
  const file = join(directory, 'callers.json')
  await symlink('version-0', file)
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  await symlink('version-1', join(directory, 'next'))
  await rename(join(directory, 'next'), file)
  const header = `Bearer ${keys[1]?.key}`
  let name: string | undefined
  await until(() => {
    try {
      name = callerOf(callers, header).name
    } catch {
      return false
    }
    return true
  })
  t.equal(name, 'invoice-sync')
})

t.test('a file that is mounted by itself, and has been replaced, is told of', async (t) => {
  const { ports, lines } = recording()
  const key = createApiKey()
  const directory = t.testdir()
  const file = join(directory, 'callers.json')
  await writeFile(file, fileOf(entry({ api_keys: [key.entry] })))
  // What a mount does: it keeps the file that was there, under whatever name.
  const mounted = await open(file)
  t.teardown(() => mounted.close())
  const callers = await createCallers(`/proc/self/fd/${mounted.fd}`, ports)
  t.teardown(() => callers.close())
  t.strictSame(callers.warnings(), {})
  await writeFile(join(directory, 'next'), fileOf(entry({ api_keys: [createApiKey().entry] })))
  await rename(join(directory, 'next'), file)
  await until(() => lines.some(({ event }) => event === 'callers_file_invalid'))
  t.match(callers.warnings(), { callers_file: /Mount its folder/ })
  t.equal(callerOf(callers, `Bearer ${key.key}`).name, 'invoice-sync', 'the last good one holds')
})

t.test('a file that is missing or broken fails the start', async (t) => {
  const { ports } = recording()
  const directory = t.testdir({ 'broken.json': '{' })
  await t.rejects(createCallers(join(directory, 'none.json'), ports), {
    message: 'CALLERS_FILE cannot be used:\n  The file cannot be read.',
  })
  await t.rejects(createCallers(join(directory, 'broken.json'), ports), CallersFileError)
})

t.test('new keys have 256 random bits, and their entry holds the hash alone', async (t) => {
  const made = Array.from({ length: 1000 }, () => createApiKey())
  t.equal(new Set(made.map(({ key }) => key)).size, 1000)
  for (const { key, entry: apiKey } of made.slice(0, 100)) {
    const [, id, secret] = /^pgb_([a-z0-9]{8})_([A-Za-z0-9_-]{43})$/.exec(key) as string[]
    t.strictSame(apiKey, { id, sha256: sha256(key) })
    t.equal(Buffer.from(secret as string, 'base64url').length, 32)
  }
  t.equal(createApiKey(NOW).entry.expires_at, '2026-11-23T12:00:00.000Z')
})

t.test('a caller is added to a new file and to one with others, and its key works', async (t) => {
  const { ports } = recording()
  const directory = t.testdir()
  const file = join(directory, 'callers.json')
  const options = { rights: ['token:read'], users: ['acme-*'] }
  const first = await addCaller(file, 'first', options)
  t.equal((await stat(file)).mode & 0o777, 0o600)
  const second = await addCaller(file, 'second', {
    ...options,
    proxyAllow: ['GET /file/**'],
    expiresAt: new Date('2030-01-01T00:00:00Z'),
  })
  const text = await readFile(file, 'utf8')
  t.notMatch(text, first.key.slice(13))
  t.match(parseCallers(text), [
    { name: 'first', proxyAllow: undefined },
    {
      name: 'second',
      proxyAllow: ['GET /file/**'],
      apiKeys: [{ expiresAt: new Date('2030-01-01T00:00:00Z') }],
    },
  ])
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  t.equal(callerOf(callers, `Bearer ${first.key}`).name, 'first')
  t.equal(callerOf(callers, `Bearer ${second.key}`).name, 'second')
  t.strictSame(await readdir(directory), ['callers.json'])
})

t.test('what cannot be added leaves the file as it was', async (t) => {
  const directory = t.testdir({ 'broken.json': '{"callers": [{}]}' })
  const file = join(directory, 'callers.json')
  const options = { rights: ['token:read'], users: [] }
  await addCaller(file, 'taken', options)
  const before = await readFile(file, 'utf8')
  await t.rejects(addCaller(file, 'taken', options), {
    message: /has a caller of this name already/,
  })
  await t.rejects(addCaller(file, 'Bad Name', options), {
    message: /\/callers\/1\/name must be/,
  })
  await t.rejects(addCaller(file, 'x', { ...options, rights: ['all'] }), {
    message: /\/callers\/1\/rights\/0/,
  })
  t.equal(await readFile(file, 'utf8'), before)
  await t.rejects(addCaller(join(directory, 'broken.json'), 'x', options), CallersFileError)
  t.equal(await readFile(join(directory, 'broken.json'), 'utf8'), '{"callers": [{}]}')
  t.strictSame((await readdir(directory)).toSorted(), ['broken.json', 'callers.json'])
})

t.test('a file keeps its mode and its link when a caller is added', async (t) => {
  const directory = t.testdir()
  const real = join(directory, 'real.json')
  const link = join(directory, 'link.json')
  await writeFile(real, fileOf())
  await chmod(real, 0o664)
  await symlink('real.json', link)
  await addCaller(link, 'x', { rights: [], users: [] })
  t.equal((await stat(real)).mode & 0o777, 0o664)
  t.equal(parseCallers(await readFile(real, 'utf8')).length, 1)
  t.strictSame((await readdir(directory)).toSorted(), ['link.json', 'real.json'])
})

t.test('a key that was proved a moment ago passes again, and nothing like it does', async (t) => {
  const file = join(t.testdir(), 'callers.json')
  await writeFile(file, fileOf(entry()), { mode: 0o600 })
  const { ports, time } = recording()
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  const header = `Bearer pgb_k7f3_${SECRET}`
  const likes = {
    'another character': `${header.slice(0, -1)}B`,
    'another scheme': header.replace('Bearer', 'Basic!'),
    'a shorter one': header.slice(0, -1),
    'a longer one': `${header}A`,
    'a character of two bytes': `${header.slice(0, -1)}é`,
    'a character of the same low byte': `${header.slice(0, -1)}\u0141`,
  }
  for (const round of ['first', 'second']) {
    t.equal(callers.recognize(header)?.name, 'invoice-sync', `the ${round} time`)
    for (const [what, like] of Object.entries(likes)) {
      // So that the good one is what was compared last.
      t.equal(callers.recognize(header)?.name, 'invoice-sync')
      t.equal(callers.recognize(header)?.name, 'invoice-sync')
      t.equal(callers.recognize(like), undefined, `${what}, the ${round} time`)
    }
  }
  time.now = new Date('2027-01-01T00:00:01Z')
  t.equal(callers.recognize(header), undefined, 'and not once it has expired')
})

t.test(
  'a caller gets a second key and keeps the first; a third active one is refused',
  async (t) => {
    const { ports } = recording(new Date())
    const file = join(t.testdir(), 'callers.json')
    const first = await addCaller(file, 'sync', { rights: ['token:read'], users: ['acme-*'] })
    const second = await addKey(file, 'sync', new Date(Date.now() + 60_000))
    const callers = await createCallers(file, ports)
    t.teardown(() => callers.close())
    t.equal(callerOf(callers, `Bearer ${first.key}`).name, 'sync')
    t.strictSame(
      callerOf(callers, `Bearer ${second.key}`),
      callerOf(callers, `Bearer ${first.key}`),
    )
    const before = await readFile(file, 'utf8')
    await t.rejects(addKey(file, 'sync'), { message: /must have at most two keys/ })
    await t.rejects(addKey(file, 'other'), { message: /has no caller of this name/ })
    t.equal(await readFile(file, 'utf8'), before)
  },
)

t.test('an operator is told what a caller may do, and why not', async (t) => {
  const entries = parseCallers(
    fileOf(entry(), entry({ name: 'old', api_keys: [keyWith('aaaa', '2020-01-01T00:00:00Z')] })),
  )
  const ask = (question: object) =>
    checkCaller(entries, { caller: 'invoice-sync', ...question }, NOW)
  for (const question of [
    {},
    { right: 'token:read' },
    { user: 'acme-1' },
    { call: 'GET /document/v1/x', user: 'acme-1' },
  ]) {
    t.match(ask(question), { allowed: true, reason: String }, JSON.stringify(question))
  }
  t.match(ask({ caller: 'nobody' }), { allowed: false, reason: /no caller/ })
  t.match(ask({ caller: 'old' }), { allowed: false, reason: /expired/ })
  t.match(ask({ right: 'ops:read' }), { allowed: false, reason: /the right ops:read/ })
  t.match(ask({ user: 'bob' }), { allowed: false, reason: /users/ })
  t.match(ask({ call: 'DELETE /document/v1/x' }), { allowed: false, reason: /proxy_allow/ })
  t.throws(() => ask({ right: 'all' }), { message: /--right must be one of/ })
  t.throws(() => ask({ user: 'acme-*' }), { message: /--user must be/ })
  t.throws(() => ask({ call: 'GET /x/**' }), { message: /--call must be/ })
})

t.test('wrong keys that share more with a good one take no longer to refuse', async (t) => {
  const { ports } = recording()
  const { key, entry: apiKey } = createApiKey()
  const file = join(t.testdir(), 'callers.json')
  await writeFile(file, fileOf(entry({ api_keys: [apiKey] })))
  const callers = await createCallers(file, ports)
  t.teardown(() => callers.close())
  const other = createApiKey().key
  /** A key of the right length that begins as the good one does, for so many characters. */
  const sharing = (count: number): string => {
    const wrong = `${key.slice(0, count)}${other.slice(count)}`
    return wrong === key ? `${wrong.slice(0, -1)}~` : wrong
  }
  const shares = [0, 8, 30]
  const took = shares.map((): number[] => [])
  // In turns, so that whatever slows the machine slows all alike; one round of each is not counted.
  for (let round = 0; round < 20_001; round += 1) {
    for (const [index, count] of shares.entries()) {
      // Not the known prefix, so that the id of a key that shares nothing has the form of one too.
      const header = `Bearer ${count === 0 ? other : sharing(count)}`
      const began = process.hrtime.bigint()
      try {
        callerOf(callers, header)
        t.fail('a wrong key passes')
      } catch {
        took[index]?.push(Number(process.hrtime.bigint() - began))
      }
    }
  }
  const medians = took.map((times) => times.slice(1).toSorted((a, b) => a - b)[10_000] ?? 0)
  // Medians of 20,000 differ by a few per cent here; a comparison that stops at the first difference would be told by
  // nanoseconds a character, far below what a listener's answer varies by. A third, or two microseconds, is a gradient.
  const spread = Math.max(...medians) - Math.min(...medians)
  t.ok(spread < Math.max(2_000, Math.min(...medians) / 3), `medians in ns: ${medians.join(', ')}`)
})

t.test('the command says why something is refused, by its exit code too', async (t) => {
  const file = join(t.testdir(), 'callers.json')
  const main = join(import.meta.dirname, '../src/main.ts')
  const run = async (...parameters: string[]): Promise<{ code: number; output: string }> =>
    promisify(execFile)(process.execPath, [main, 'callers', ...parameters, '--file', file]).then(
      ({ stdout }) => ({ code: 0, output: stdout }),
      ({ code, stdout, stderr }: { code: number; stdout: string; stderr: string }) => ({
        code,
        output: stdout + stderr,
      }),
    )
  t.match(await run('add', 'sync', '--users', 'acme-*'), { code: 0, output: /\npgb_/ })
  t.match(await run('add', 'sync', '--another-key', '--expires-at', '2099-01-01T00:00:00Z'), {
    code: 0,
    output: /^Another API key of sync/,
  })
  t.match(await run('list'), {
    code: 0,
    output:
      /^sync\ttoken:read\tacme-\*\tkey \w+, key \w+ until 2099\S+\tlast used: unknown without DATABASE_URL$/m,
  })
  t.match(await run('check'), { code: 0, output: 'The file can be used. Callers: 1.' })
  t.match(await run('check', '--caller', 'sync', '--user', 'acme-1'), {
    code: 0,
    output: /^allowed: /,
  })
  t.match(await run('check', '--caller', 'sync', '--user', 'bob'), {
    code: 1,
    output: /^refused: /,
  })
  for (const [wrong, message] of [
    [['add', 'sync'], /name already.*--another-key/],
    [['add', 'sync', '--another-key', '--rights', 'ops:read'], /leaves rights/],
    [['add', 'x', '--expires-at', 'tomorrow'], /--expires-at must be a time to come/],
    [['list', '--user', 'x'], /callers list has no option --user/],
    [['check', '--user', 'x'], /Say with --caller/],
  ] as const) {
    t.match(await run(...wrong), { code: 1, output: message }, wrong.join(' '))
  }
})
