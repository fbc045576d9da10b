// JWTs of callers: which pass, how each forgery is refused, where keys come from, and how long anything is remembered.

import { createHmac } from 'node:crypto'
import { rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import * as jose from 'jose'
import t, { type Test } from 'tap'
import { CallersFileError } from '../src/callers-file.ts'
import { type Callers, createCallers, parseCallers } from '../src/callers.ts'
import { systemClock } from '../src/clock.ts'
import { BrokerError } from '../src/errors.ts'
import type { LogFields } from '../src/ports.ts'
import type { Credential } from '../src/record-stores.ts'
import { noUses } from './support/no-uses.ts'
import { silentLog } from './support/silent-log.ts'
import {
  AUDIENCE,
  createIssuerKey,
  ISSUER,
  type IssuerKey,
  joinToken,
  publishKeys,
  publishKeysOverTls,
  signToken,
  SUBJECT,
} from './support/token-issuer.ts'

const key = await createIssuerKey('one')
const stranger = await createIssuerKey('one')

/** An entry of the callers file. */
function jwtEntry(changes: Record<string, unknown> = {}): Record<string, unknown> {
  return { issuer: ISSUER, audience: AUDIENCE, subject: SUBJECT, ...changes }
}

function callerOf(name: string, ...jwt: object[]): Record<string, unknown> {
  return { name, jwt, rights: ['token:read'], users: ['acme-*'] }
}

const fileOf = (...callers: object[]): string => JSON.stringify({ callers })

interface Setting {
  callers: Callers
  file: string
  /** Moves the clocks on. */
  pass(seconds: number): void
  now(): Date
  /** The caller's name, or the code of the refusal. */
  ask(token: string): Promise<string>
  lines: Array<{ event: string; fields: LogFields | undefined }>
  /** The uses that were noted. */
  uses: Credential[]
}

async function setUp(t: Test, text: (directory: string) => string): Promise<Setting> {
  const directory = t.testdir()
  const file = join(directory, 'callers.json')
  await writeFile(join(directory, 'keys.json'), keySet(key))
  await writeFile(file, text(directory))
  let passedMs = 0
  const lines: Setting['lines'] = []
  const uses: Credential[] = []
  const record = (event: string, fields?: LogFields): void => void lines.push({ event, fields })
  const now = (): Date => new Date(Date.now() + passedMs)
  const callers = await createCallers(file, {
    log: { ...silentLog, info: record, warn: record, error: record },
    clock: { ...systemClock, now, monotonicMs: () => performance.now() + passedMs },
    credentialUses: { ...noUses, note: async (used) => void uses.push(...used) },
  })
  t.teardown(() => callers.close())
  return {
    callers,
    file,
    lines,
    uses,
    now,
    pass: (seconds) => void (passedMs += seconds * 1000),
    async ask(token) {
      try {
        return (await callers.authenticate(`Bearer ${token}`)).name
      } catch (error) {
        if (!(error instanceof BrokerError)) throw error
        if (error.code === 'caller_unauthenticated')
          t.equal(error.detail, 'The token is not valid.')
        return error.code
      }
    },
  }
}

const keySet = (...keys: IssuerKey[]): string =>
  JSON.stringify({ keys: keys.map(({ publicJwk }) => publicJwk) })

const withKeyFile = (directory: string): string =>
  fileOf(callerOf('sync', jwtEntry({ jwks_file: join(directory, 'keys.json') })))

async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = Date.now() + 10_000
  while (!(await condition()) && Date.now() < deadline)
    await new Promise((resolve) => setTimeout(resolve, 20))
}

const REFUSED = 'caller_unauthenticated'

t.test(
  'a token of the issuer for this audience is the caller whose subject it names',
  async (t) => {
    const { ask, callers } = await setUp(t, withKeyFile)
    t.equal(await ask(await signToken(key)), 'sync')
    for (const typ of [undefined, 'jwt', 'at+jwt', 'application/at+jwt']) {
      t.equal(await ask(await signToken(key, { header: { typ } })), 'sync', String(typ))
    }
    t.equal(await ask(await signToken(key, { claims: { aud: AUDIENCE } })), 'sync', 'aud as a text')
    t.equal(await ask(await signToken(key, { claims: { aud: ['x', AUDIENCE] } })), 'sync')
    t.equal(await ask(await signToken(key, { header: { kid: undefined } })), 'sync', 'the only key')
    const token = await signToken(key)
    await callers.authenticate(`Bearer ${token}`)
    t.notOk(
      callers.authenticate(`bearer ${token}`) instanceof Promise,
      'known by now, without waiting',
    )
  },
)

t.test('the use of a JWT is noted under the name of its caller, once a minute', async (t) => {
  const { ask, uses, pass } = await setUp(t, withKeyFile)
  t.equal(await ask(await signToken(key, { claims: { sub: 'another' } })), REFUSED)
  t.equal(await ask(await signToken(key)), 'sync')
  t.equal(await ask(await signToken(key)), 'sync')
  await until(() => uses.length > 0)
  t.same(uses, [{ kind: 'jwt', name: 'sync' }])
  pass(60)
  t.equal(await ask(await signToken(key)), 'sync')
  await until(() => uses.length > 1)
  t.equal(uses.length, 2)
})

t.test('each of the allowed algorithms passes with its own key', async (t) => {
  const keys = await Promise.all(
    ['RS256', 'PS384', 'ES256', 'ES384', 'ES512', 'EdDSA'].map((algorithm) =>
      createIssuerKey(`key-${algorithm}`, algorithm),
    ),
  )
  const { ask, file } = await setUp(t, withKeyFile)
  await writeFile(join(file, '../keys.json'), keySet(...keys))
  const [first] = keys as [IssuerKey]
  const token = await signToken(first)
  await until(async () => (await ask(token)) === 'sync')
  for (const one of keys) t.equal(await ask(await signToken(one)), 'sync', one.algorithm)
})

t.test('claims tell callers of one issuer apart', async (t) => {
  const keys = { jwks_file: 'keys.json', subject: undefined }
  const { ask } = await setUp(t, () =>
    fileOf(
      callerOf('a', jwtEntry({ ...keys, claims: { azp: 'a', internal: true } })),
      callerOf('b', jwtEntry({ ...keys, claims: { azp: 'b', level: 3 } })),
    ),
  )
  const named = async (claims: object): Promise<string> =>
    ask(await signToken(key, { claims: { ...claims } }))
  t.equal(await named({ azp: 'a', internal: true }), 'a')
  t.equal(await named({ azp: 'b', level: 3 }), 'b')
  for (const claims of [
    {},
    { azp: 'a' },
    { azp: 'a', internal: 'true' },
    { azp: ['a'], internal: true },
    { azp: 'b', level: '3' },
    { azp: 'A', internal: true },
  ]) {
    t.equal(await named(claims), REFUSED, JSON.stringify(claims))
  }
})

t.test('every forgery is refused in the same words, and leads nowhere', async (t) => {
  const lure = await publishKeys(t, [stranger])
  const rsa = await createIssuerKey('rsa', 'RS256')
  const { ask, callers, file, now } = await setUp(t, withKeyFile)
  await writeFile(join(file, '../keys.json'), keySet(key, rsa))
  const good = await signToken(rsa)
  await until(async () => (await ask(good)) === 'sync')

  const seconds = Math.floor(now().getTime() / 1000)
  const claims = { iss: ISSUER, aud: AUDIENCE, sub: SUBJECT, iat: seconds, exp: seconds + 600 }
  const publicPem = await jose.exportSPKI((await jose.importJWK(rsa.publicJwk)) as jose.CryptoKey)
  const hmac = (secret: string, header: object): string => {
    const signed = joinToken(header, claims).slice(0, -1)
    return `${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`
  }
  const [head, body, signature] = good.split('.') as [string, string, string]
  const changed = Buffer.from(JSON.stringify({ ...claims, sub: SUBJECT, extra: 1 })).toString(
    'base64url',
  )
  const x5c = [Buffer.from('certificate').toString('base64')]
  const forgeries: Record<string, string | Promise<string>> = {
    'no algorithm': joinToken({ alg: 'none' }, claims),
    'no algorithm, in capitals': joinToken({ alg: 'NONE', kid: 'one' }, claims, 'AA'),
    'an HMAC with the public key': hmac(publicPem, { alg: 'HS256', kid: 'rsa', typ: 'JWT' }),
    'an HMAC with the modulus': hmac(String(rsa.publicJwk.n), { alg: 'HS256', kid: 'rsa' }),
    "another's key under the same id": signToken(stranger),
    'an unknown key id': signToken({ ...key, kid: 'two' }),
    'a key id that is a path': signToken({ ...key, kid: '../../../../dev/null' }),
    'a key id that is no text': signToken(key, { header: { kid: 7 } }),
    'the key in its header': signToken(stranger, {
      header: { jwk: stranger.publicJwk, kid: undefined },
    }),
    'a URL of keys in its header': signToken(stranger, { header: { jku: lure.url } }),
    'a URL of certificates': signToken(stranger, { header: { x5u: lure.url } }),
    'certificates in its header': signToken(stranger, { header: { x5c } }),
    'a critical header': signToken(key, { header: { crit: ['x-thing'], 'x-thing': 1 } }),
    'another type': signToken(key, { header: { typ: 'dpop+jwt' } }),
    'a type that is no text': signToken(key, { header: { typ: 1 } }),
    'another audience': signToken(key, { claims: { aud: 'other' } }),
    'an audience that begins alike': signToken(key, { claims: { aud: `${AUDIENCE}-2` } }),
    'no audience': signToken(key, { claims: { aud: undefined } }),
    'another issuer': signToken(key, { claims: { iss: `${ISSUER}/` } }),
    'no issuer': signToken(key, { claims: { iss: undefined } }),
    'another subject': signToken(key, { claims: { sub: 'system:serviceaccount:erp:other' } }),
    'a list of subjects': signToken(key, { claims: { sub: [SUBJECT] } }),
    'no subject': signToken(key, { claims: { sub: undefined } }),
    'no expiry': signToken(key, { claims: { exp: undefined } }),
    'an expiry that is a text': signToken(key, { claims: { exp: String(seconds + 600) } }),
    expired: signToken(key, { claims: { iat: seconds - 700, exp: seconds - 11 } }),
    'not valid yet': signToken(key, { claims: { nbf: seconds + 30 } }),
    'issued in the future': signToken(key, { claims: { iat: seconds + 30 } }),
    'no time of issue': signToken(key, { claims: { iat: undefined } }),
    'a life of more than a day': signToken(key, {
      claims: { iat: seconds, exp: seconds + 86_401 },
    }),
    'bound to a key': signToken(key, { claims: { cnf: { jkt: 'x' } } }),
    'changed claims': `${head}.${changed}.${signature}`,
    'no signature': `${head}.${body}.`,
    'a cut signature': good.slice(0, -4),
    'five parts': `${good}.x.y`,
    'two parts': `${head}.${body}`,
    'no JSON': `${Buffer.from('x').toString('base64url')}.${body}.${signature}`,
    'claims that are a list': `${head}.${Buffer.from('[]').toString('base64url')}.${signature}`,
  }
  for (const [what, forgery] of Object.entries(forgeries)) {
    const token = await forgery
    // With five parts or two it is not taken for a token, and told so like a wrong key.
    if (token.split('.').length === 3) t.equal(await ask(token), REFUSED, what)
    else t.throws(() => callers.authenticate(`Bearer ${token}`), { code: REFUSED }, what)
  }
  t.same(lure.requests, [], 'no URL of a token was asked')
  t.equal(await ask(good), 'sync', 'and the good one still passes')
})

t.test('a token passes until ten seconds after its expiry, and is forgotten at it', async (t) => {
  const { ask, callers, pass } = await setUp(t, withKeyFile)
  const token = await signToken(key, { claims: { exp: Math.floor(Date.now() / 1000) + 30 } })
  t.equal(await ask(token), 'sync')
  pass(25)
  t.notOk(callers.authenticate(`Bearer ${token}`) instanceof Promise)
  pass(8)
  t.ok(callers.authenticate(`Bearer ${token}`) instanceof Promise, 'its signature is checked again')
  t.equal(await ask(token), 'sync', 'within the leeway')
  pass(10)
  t.equal(await ask(token), REFUSED)
})

t.test(
  'an issuer that cannot be reached is no reason to refuse, and its keys are kept',
  async (t) => {
    const endpoint = await publishKeys(t, [key])
    const { ask, callers, pass, lines, now } = await setUp(t, () =>
      fileOf(callerOf('sync', jwtEntry({ jwks_uri: endpoint.url }))),
    )
    t.equal(await ask(await signToken(key)), 'sync')
    t.equal(endpoint.requests.length, 1)
    t.same(callers.warnings(), {})
    const answers: Array<[number, unknown, Record<string, string>?]> = [
      [503, ''],
      [302, '', { location: 'http://127.0.0.1:9/' }],
      [200, '{'],
      [200, { keys: [] }],
      [200, { keys: [{ ...key.publicJwk, d: 'x' }] }],
      [200, { keys: [{ kty: 'oct', k: 'AAAA', kid: 'one' }] }],
      [200, 'x'.repeat(300_000)],
    ]
    for (const [index, [status, body, headers]] of answers.entries()) {
      endpoint.answer(status, body, headers)
      pass(601)
      t.equal(await ask(await signToken(key, { at: now() })), 'sync')
      await until(() => endpoint.requests.length === index + 2)
      await until(() => callers.warnings()['caller_keys'] !== undefined)
      t.match(callers.warnings()['caller_keys'], /^a jwks_uri \S+/, `${status} ${index}`)
      t.equal(await ask(await signToken(key, { at: now() })), 'sync')
    }
    t.equal(lines.filter(({ event }) => event === 'caller_keys_unavailable').length, answers.length)
    endpoint.answer(200, keySet(key))
    pass(601)
    await ask(await signToken(key, { at: now() }))
    await until(() => Object.keys(callers.warnings()).length === 0)
    t.same(callers.warnings(), {})
  },
)

t.test(
  'unknown key ids cost one request in thirty seconds, and a new key is found by one',
  async (t) => {
    const endpoint = await publishKeys(t, [key])
    const { ask, pass, now } = await setUp(t, () =>
      fileOf(callerOf('sync', jwtEntry({ jwks_uri: endpoint.url }))),
    )
    t.equal(await ask(await signToken(key)), 'sync')
    const flood = async (): Promise<void> => {
      const tokens = Array.from({ length: 50 }, (_, index) =>
        signToken({ ...stranger, kid: `unknown-${index}` }, { at: now() }),
      )
      const answers = await Promise.all(tokens.map(async (token) => ask(await token)))
      t.same([...new Set(answers)], [REFUSED])
    }
    await flood()
    t.equal(endpoint.requests.length, 1, 'the first was thirty seconds ago at most')
    pass(31)
    await flood()
    await flood()
    t.equal(endpoint.requests.length, 2)
    const next = await createIssuerKey('next')
    endpoint.answer(200, keySet(key, next))
    const token = await signToken(next, { at: now() })
    t.equal(await ask(token), REFUSED, 'not asked again yet')
    pass(31)
    t.equal(await ask(token), 'sync')
    t.equal(endpoint.requests.length, 3)
    endpoint.answer(200, keySet(next))
    const withdrawn = await signToken(key, { at: now() })
    t.equal(await ask(withdrawn), 'sync')
    pass(590)
    t.equal(await ask(await signToken(next, { at: now() })), 'sync')
    pass(11)
    await ask(await signToken(next, { at: now() }))
    await until(async () => (await ask(withdrawn)) === REFUSED)
    t.equal(await ask(withdrawn), REFUSED, 'a withdrawn key ends, with what was verified by it')
  },
)

t.test(
  'while no keys have been had, a token cannot be judged; a stranger is refused all the same',
  async (t) => {
    const endpoint = await publishKeys(t, [key])
    endpoint.answer(500, '')
    const { ask, pass, now } = await setUp(t, () =>
      fileOf(callerOf('sync', jwtEntry({ jwks_uri: endpoint.url }))),
    )
    t.equal(await ask(await signToken(key)), 'temporarily_unavailable')
    t.equal(await ask(await signToken(key, { claims: { iss: 'https://other' } })), REFUSED)
    t.equal(endpoint.requests.length, 1)
    endpoint.answer(200, keySet(key))
    pass(31)
    t.equal(await ask(await signToken(key, { at: now() })), 'sync')
  },
)

t.test('an API server that wants a token and has a CA of its own is asked with both', async (t) => {
  const endpoint = await publishKeysOverTls(t, [key])
  const tokenFile = join(t.testdirName, 'token')
  await writeFile(tokenFile, 'first\n')
  const entry = jwtEntry({ jwks_uri: endpoint.url, token_file: tokenFile })
  const text = (): string => fileOf(callerOf('sync', { ...entry, ca_file: endpoint.caFile }))
  const directory = `${t.testdirName}-callers`
  t.teardown(() => rm(directory, { recursive: true, force: true }))
  const settle = async (file: string): Promise<Callers> => {
    const callers = await createCallers(file, {
      clock: systemClock,
      log: silentLog,
      credentialUses: noUses,
    })
    t.teardown(() => callers.close())
    return callers
  }
  const file = join(t.testdirName, 'callers.json')
  await writeFile(file, text())
  const callers = await settle(file)
  t.equal((await callers.authenticate(`Bearer ${await signToken(key)}`)).name, 'sync')
  t.same(endpoint.requests, [{ path: '/openid/v1/jwks', authorization: 'Bearer first' }])

  const unvouched = join(t.testdirName, 'unvouched.json')
  await writeFile(unvouched, fileOf(callerOf('sync', entry)))
  const without = await settle(unvouched)
  await t.rejects(async () => without.authenticate(`Bearer ${await signToken(key)}`), {
    code: 'temporarily_unavailable',
  })
  t.equal(endpoint.requests.length, 1, 'a certificate that nobody vouches for is not spoken to')
})

t.test('a reload ends what was verified before it, and keeps keys that were fetched', async (t) => {
  const endpoint = await publishKeys(t, [key])
  const entry = jwtEntry({ jwks_uri: endpoint.url })
  const { callers, ask, file } = await setUp(t, () => fileOf(callerOf('sync', entry)))
  const token = await signToken(key)
  t.equal(await ask(token), 'sync')
  await writeFile(file, fileOf({ ...callerOf('sync', entry), rights: [] }))
  const began = performance.now()
  await until(
    async () => !callers.mayUse(await callers.authenticate(`Bearer ${token}`), 'token:read'),
  )
  t.ok(performance.now() - began < 1_500, 'a narrowed right holds at once')
  t.equal(endpoint.requests.length, 1, 'the keys are not asked for again')
  await writeFile(file, fileOf(callerOf('sync', { ...entry, subject: 'somebody else' })))
  await until(async () => (await ask(token)) === REFUSED)
  t.equal(await ask(token), REFUSED)
})

t.test(
  'a key file is followed; a broken one keeps its last keys and holds up no revocation',
  async (t) => {
    const { callers, ask, file, lines } = await setUp(t, withKeyFile)
    const keyFile = join(file, '../keys.json')
    const token = await signToken(key)
    const next = await createIssuerKey('next')
    const nextToken = await signToken(next)
    t.equal(await ask(token), 'sync')
    t.equal(await ask(nextToken), REFUSED)
    await writeFile(keyFile, keySet(next))
    await until(async () => (await ask(nextToken)) === 'sync')
    t.equal(await ask(token), REFUSED, 'what the old key signed is not remembered')

    const told = (): number => lines.filter(({ event }) => event === 'callers_file_invalid').length
    await writeFile(keyFile, '{')
    await until(() => told() === 1)
    t.equal(await ask(nextToken), 'sync')
    t.match(callers.warnings()['callers_file'], '/callers/0/jwt/0/jwks_file is not valid JSON')
    await writeFile(
      file,
      fileOf(callerOf('sync', jwtEntry({ jwks_file: 'keys.json', subject: 'x' }))),
    )
    await until(async () => (await ask(nextToken)) === REFUSED)
    t.equal(await ask(nextToken), REFUSED, 'the callers file changed all the same')
    await writeFile(keyFile, keySet(key))
    await until(() => Object.keys(callers.warnings()).length === 0)
    t.same(callers.warnings(), {})

    await writeFile(file, fileOf(callerOf('sync', jwtEntry({ jwks_file: 'missing.json' }))))
    await until(() => callers.warnings()['callers_file'] !== undefined)
    t.match(callers.warnings()['callers_file'], 'jwks_file cannot be read')
    await writeFile(join(file, '../missing.json'), keySet(key))
    await until(() => Object.keys(callers.warnings()).length === 0)
    t.equal(await ask(token), 'sync', 'a file that comes later is taken up')
  },
)

t.test('a key file that is missing, or holds a secret, fails the start', async (t) => {
  const directory = t.testdir({
    'private.json': JSON.stringify({ keys: [await jose.exportJWK(key.privateKey)] }),
    'list.json': '[]',
  })
  const start = async (jwks: string): Promise<unknown> => {
    const file = join(directory, 'callers.json')
    await writeFile(file, fileOf(callerOf('sync', jwtEntry({ jwks_file: jwks }))))
    return createCallers(file, { clock: systemClock, log: silentLog, credentialUses: noUses })
  }
  await t.rejects(start('none.json'), { message: /jwks_file cannot be read/ })
  await t.rejects(start('private.json'), { message: /jwks_file must have public keys only/ })
  await t.rejects(start('list.json'), { message: /jwks_file is no JSON Web Key Set/ })
})

t.test(
  'each fault of an entry is told with its place, and what could mean two callers is refused',
  async (t) => {
    const good = jwtEntry({ jwks_file: 'keys.json' })
    const problemsOf = (...entries: object[][]): readonly string[] => {
      try {
        parseCallers(fileOf(...entries.map((jwt, index) => callerOf(`c${index}`, ...jwt))))
      } catch (error) {
        if (error instanceof CallersFileError) return error.problems
        throw error
      }
      return []
    }
    const at = '/callers/0/jwt/0'
    const faults: Array<[Record<string, unknown>, string]> = [
      [{ issuer: undefined }, `${at}/issuer is required.`],
      [{ issuer: '' }, `${at}/issuer must be a text`],
      [{ audience: undefined }, `${at}/audience is required.`],
      [{ audience: ['x'] }, `${at}/audience must be a text`],
      [{ subject: undefined }, `${at} must have subject or claims`],
      [{ claims: {} }, `${at}/claims must have 1 to 20 members.`],
      [{ claims: { aud: 'x' } }, `${at}/claims must have no members named iss`],
      [{ claims: { azp: ['x'] } }, `${at}/claims must have texts`],
      [{ claims: [] }, `${at}/claims must be a JSON object.`],
      [{ jwks_uri: 'https://issuer.example/jwks' }, `${at} must have jwks_uri or jwks_file, one`],
      [{ jwks_file: undefined }, `${at} must have jwks_uri or jwks_file, one`],
      [{ jwks_file: undefined, jwks_uri: 'http://issuer.example/jwks' }, `${at}/jwks_uri must be`],
      [{ jwks_file: undefined, jwks_uri: 'https://a:b@issuer.example' }, `${at}/jwks_uri must be`],
      [{ ca_file: 'ca.crt' }, `${at} must have ca_file and token_file with jwks_uri only.`],
      [{ algorithms: ['none'] }, `${at} must have no members but`],
    ]
    t.same(problemsOf([good]), [])
    for (const [changes, wanted] of faults) {
      const problems = problemsOf([{ ...good, ...changes }])
      t.equal(problems.length, 1, JSON.stringify(changes))
      t.ok(problems[0]?.startsWith(wanted), `${problems[0]}`)
    }
    const twin = '/callers/1/jwt/0 must not match tokens that /callers/0/jwt/0 matches'
    t.match(problemsOf([good], [good]), [twin])
    t.match(problemsOf([good], [{ ...good, audience: 'other' }]), [twin], 'a token may have both')
    t.match(problemsOf([good], [{ ...good, subject: undefined, claims: { azp: 'x' } }]), [twin])
    t.same(problemsOf([good], [{ ...good, subject: 'other' }]), [])
    t.same(problemsOf([good], [{ ...good, issuer: 'https://other.example' }]), [])
    t.same(problemsOf([good, { ...good, audience: 'other' }]), [], 'of one caller, no matter which')
  },
)
