// What an answer of the token endpoint means: lenient where a token could be lost, strict where a grant could die.

import t from 'tap'
import type { TokenOutcome } from '../src/grant.ts'
import type { SendResult } from '../src/send-once.ts'
import { readRetryAfter, readTokenAnswer } from '../src/token-answer.ts'

type Headers = Extract<SendResult, { kind: 'answered' }>['headers']

const answer = (status: number, body: unknown, headers: Headers = {}): TokenOutcome =>
  readTokenAnswer({
    kind: 'answered',
    status,
    headers,
    body: typeof body === 'string' ? body : JSON.stringify(body),
  })

const cut = (status: number | undefined, partialBody: string): TokenOutcome =>
  readTokenAnswer({ kind: 'unknown', reason: 'econnreset', status, partialBody })

const WHOLE = {
  access_token: 'at',
  refresh_token: 'rt',
  expires_in: 600,
  scope: 'all',
  id_token: 'id',
  token_type: 'bearer',
}
const TOKENS = {
  accessToken: 'at',
  refreshToken: 'rt',
  expiresInSeconds: 600,
  scope: 'all',
  idToken: 'id',
}
const granted = (changes: object = {}, httpStatus = 200) => ({
  kind: 'granted',
  tokens: { ...TOKENS, ...changes },
  httpStatus,
})

t.test('a whole answer is read whole, with any status of success', async (t) => {
  for (const status of [200, 201, 299]) t.strictSame(answer(status, WHOLE), granted({}, status))
  const short = JSON.stringify({ ...WHOLE, expires_in: 300 })
  const markedAnswer = answer(200, `\uFEFF${short}`)
  t.strictSame(markedAnswer, granted({ expiresInSeconds: 300 }), 'behind a byte order mark')
})

t.test('one odd member costs nothing but itself', async (t) => {
  const odd: Array<readonly [changes: object, tokens: object]> = [
    [{ access_token: 1 }, { accessToken: undefined }],
    [{ access_token: '' }, { accessToken: undefined }],
    [{ refresh_token: null }, { refreshToken: undefined }],
    [{ refresh_token: '' }, { refreshToken: undefined }],
    [{ scope: ['all'] }, { scope: '' }],
    [{ scope: undefined }, { scope: '' }],
    [{ id_token: {} }, { idToken: undefined }],
    [{ id_token: '' }, { idToken: undefined }],
    [{ expires_in: 300 }, { expiresInSeconds: 300 }],
    [{ expires_in: '300' }, { expiresInSeconds: 300 }],
    [{ expires_in: 86_400 }, { expiresInSeconds: 86_400 }],
    [{ expires_in: 1e9 }, { expiresInSeconds: 86_400 }],
    [{ expires_in: 0 }, {}],
    [{ expires_in: -1 }, {}],
    [{ expires_in: '' }, {}],
    [{ expires_in: ' ' }, {}],
    [{ expires_in: 'soon' }, {}],
    [{ expires_in: '1e999' }, {}],
    [{ expires_in: null }, {}],
    [{ expires_in: [300] }, {}],
    [{ expires_in: true }, {}],
  ]
  for (const [changes, tokens] of odd) {
    t.strictSame(answer(200, { ...WHOLE, ...changes }), granted(tokens), JSON.stringify(changes))
  }
})

t.test('a broken body gives the tokens that came through whole', async (t) => {
  const text = JSON.stringify({ ...WHOLE, expires_in: 300 })
  t.strictSame(answer(200, `${text} trailing`), granted(), 'and the documented life')
  t.strictSame(answer(200, `\uFEFF${text}}`), granted())
  t.strictSame(
    answer(200, '{"access_token" : "a\\u0074", "refresh_token":\n"r\\"t", "scope":"a'),
    granted({ refreshToken: 'r"t', scope: '', idToken: undefined }),
  )
  t.match(
    answer(200, '{"access_token":"bad \\x escape","refresh_token":"rt"'),
    { kind: 'granted', tokens: { accessToken: undefined, refreshToken: 'rt' } },
    'a text that is none is left out',
  )
})

t.test('a broken body without a refresh token does not say that the old one stays', async (t) => {
  const unreadable = { kind: 'in_doubt', reason: 'unreadable', httpStatus: 200 }
  // An answer that ends with its connection is whole to HTTP wherever that was cut.
  for (const body of [
    '{"access_token":"at"',
    '{"access_token":"at","refresh_token":"r',
    '{"access_token":"at","refresh_token":"bad \\x escape"}',
    '{"access_token":"at","expires_in":600,}',
  ]) {
    t.strictSame(answer(200, body), unreadable, body)
  }
  t.match(
    answer(200, '{"access_token":"at","refresh_token":null}'),
    { kind: 'granted', tokens: { accessToken: 'at', refreshToken: undefined } },
    'a whole one does',
  )
})

t.test('what cannot be kept keeps no token from being so', async (t) => {
  t.strictSame(
    answer(200, JSON.stringify({ ...WHOLE, access_token: '\ud800x' })),
    granted({ accessToken: undefined }),
  )
  for (const unreadable of ['"\\ud800"', '7', '{}', 'true']) {
    t.match(answer(200, `{"access_token":"at","refresh_token":${unreadable}}`), {
      kind: 'in_doubt',
      reason: 'unreadable',
    })
  }
  for (const scope of ['a\u0000b', 'a"b', 'a\\b', 'ä', 'a\nb', 7]) {
    t.strictSame(answer(200, { ...WHOLE, scope }), granted({ scope: '' }))
  }
  const all = String.fromCharCode(0x20, 0x21, 0x23, 0x5b, 0x5d, 0x7e)
  t.strictSame(answer(200, { ...WHOLE, scope: all }), granted({ scope: all }))
})

t.test('a refusal behind a byte order mark is one', async (t) => {
  t.strictSame(answer(400, '\uFEFF{"error":"invalid_grant"}'), { kind: 'refused', httpStatus: 400 })
})

t.test('a success without any token is in doubt', async (t) => {
  const unreadable = { kind: 'in_doubt', reason: 'unreadable', httpStatus: 200 }
  const bodies = ['', '<html>', 'null', '[]', '"at"', '7', '{}', '{"access_token":"a', [WHOLE]]
  for (const body of bodies) t.strictSame(answer(200, body), unreadable, JSON.stringify(body))
  t.strictSame(answer(200, { error: 'invalid_grant' }), unreadable, 'a success refuses nothing')
})

t.test('one of the two tokens is a success', async (t) => {
  t.match(answer(200, { access_token: 'at' }), { kind: 'granted', tokens: { accessToken: 'at' } })
  t.match(answer(200, { refresh_token: 'rt' }), { kind: 'granted', tokens: { refreshToken: 'rt' } })
})

t.test('a connection that broke behind the refresh token has brought it', async (t) => {
  const text = JSON.stringify(WHOLE)
  const upTo = (part: string) => text.slice(0, text.indexOf(part))
  t.strictSame(cut(200, upTo('"id_token"')), {
    ...granted({ idToken: undefined }),
  })
  t.strictSame(cut(201, text), granted({}, 201))
})

t.test('a connection that broke before it leaves all in doubt', async (t) => {
  const inDoubt = { kind: 'in_doubt', reason: 'econnreset' }
  t.strictSame(cut(undefined, ''), inDoubt)
  t.strictSame(cut(undefined, JSON.stringify(WHOLE)), inDoubt, 'without a head nothing counts')
  t.strictSame(cut(200, '{"access_token":"at","refresh_token":"r'), { ...inDoubt, httpStatus: 200 })
  t.strictSame(cut(200, ''), { ...inDoubt, httpStatus: 200 })
  t.strictSame(cut(400, '{"error":"invalid_grant"}'), { ...inDoubt, httpStatus: 400 })
  t.strictSame(cut(502, JSON.stringify(WHOLE)), { ...inDoubt, httpStatus: 502 })
})

t.test('what was never sent was not processed, and the server is out of reach', async (t) => {
  t.strictSame(readTokenAnswer({ kind: 'not_sent', reason: 'econnrefused' }), {
    kind: 'not_processed',
    reason: 'econnrefused',
    unreachable: true,
  })
})

t.test('only invalid_grant with a client error refuses', async (t) => {
  const refusal = { error: 'invalid_grant', error_description: 'x' }
  for (const httpStatus of [400, 401, 403, 499]) {
    t.strictSame(answer(httpStatus, refusal), { kind: 'refused', httpStatus })
  }
  for (const httpStatus of [302, 399, 500, 502]) {
    const reason = `http_${httpStatus}`
    t.strictSame(answer(httpStatus, refusal), { kind: 'in_doubt', reason, httpStatus })
  }
  t.match(answer(503, refusal), { kind: 'not_processed', reason: 'invalid_grant' })
  for (const body of ['invalid_grant', '"invalid_grant"', '{"error":["invalid_grant"]}', 'null']) {
    t.match(answer(400, body), { kind: 'not_processed', reason: 'http_400' }, body)
  }
})

t.test('a client that is rejected is no grant’s fault', async (t) => {
  for (const error of ['invalid_client', 'unauthorized_client']) {
    for (const httpStatus of [400, 401, 302]) {
      t.strictSame(answer(httpStatus, { error }), { kind: 'rejected_client', httpStatus, error })
    }
    t.match(answer(500, { error }), { kind: 'in_doubt' })
    t.match(answer(503, { error }), { kind: 'not_processed', unreachable: true })
  }
  t.strictSame(answer(401, '<html>'), {
    kind: 'rejected_client',
    httpStatus: 401,
    error: 'http_401',
  })
  t.match(answer(401, { error: 'other' }), { kind: 'rejected_client', error: 'http_401' })
})

t.test('another client error was not processed; whether the server is there is told', async (t) => {
  t.strictSame(answer(400, { error: 'invalid_scope' }), {
    kind: 'not_processed',
    reason: 'invalid_scope',
    httpStatus: 400,
    unreachable: false,
  })
  for (const status of [400, 404, 499]) {
    t.match(answer(status, '<html>'), { reason: `http_${status}`, unreachable: true })
  }
  t.match(answer(429, { error: 'slow_down' }), { reason: 'slow_down', unreachable: true })
  t.match(answer(503, { error: 'busy' }), { kind: 'not_processed', unreachable: true })
  t.match(answer(503, ''), { kind: 'not_processed', reason: 'http_503', unreachable: true })
})

t.test('everything else may have been carried out', async (t) => {
  for (const httpStatus of [100, 199, 300, 302, 399, 500, 502, 504, 599]) {
    const reason = `http_${httpStatus}`
    t.strictSame(answer(httpStatus, ''), { kind: 'in_doubt', reason, httpStatus })
  }
})

t.test('an error is one of the alphabet that RFC 6749 gives, and no longer than 64', async (t) => {
  const isError = (error: string) => 'reason' in answer(400, { error }) && reasonOf(error) === error
  const reasonOf = (error: string) => (answer(400, { error }) as { reason: string }).reason
  for (const error of ['x', 'a b!', '#[', ']~', 'x'.repeat(64)]) t.ok(isError(error), error)
  for (const error of ['', 'a"b', 'a\\b', 'a\nb', 'ä', '\x7f', '\x1f', 'x'.repeat(65)]) {
    t.equal(reasonOf(error), 'http_400', JSON.stringify(error))
  }
})

t.test('Retry-After is taken in whole seconds alone, a quarter of an hour at most', async (t) => {
  const asked = (value: string | string[]) => answer(429, '', { 'retry-after': value })
  t.match(asked('7'), { retryAfterSeconds: 7 })
  t.match(asked('900'), { retryAfterSeconds: 900 })
  t.match(asked('901'), { retryAfterSeconds: 900 })
  t.notOk('retryAfterSeconds' in asked('-1'))
  const odd = ['', '7s', 's7', '1.5', '1234567', 'Fri, 31 Dec 1999 23:59:59 GMT', ['7']]
  for (const value of odd) t.equal(readRetryAfter(value, 60), undefined, String(value))
  t.equal(readRetryAfter(undefined, 60), undefined)
  t.equal(readRetryAfter('123456', 1e6), 123_456)
  t.equal(readRetryAfter('0', 60), 0)
})
