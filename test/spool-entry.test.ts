// One entry of the spool as text: what is written is read back the same, and what is not exactly an entry is none.

import { randomBytes } from 'node:crypto'
import t from 'tap'
import { parseUserKey, type UserKey } from '../src/grant.ts'
import type { Successor } from '../src/grant-stores.ts'
import { entryText, isAttemptId, parseEntry } from '../src/spool-entry.ts'

const ID = '4f1d8a32-52a6-4a0e-8a5b-6a4b1f5f0d11'
const ENTRY: Successor = {
  user: parseUserKey('acme-alice') as UserKey,
  loginId: '8c5fb1d6-0b7e-4a39-9a5c-3f9e0f4f8d10',
  attemptId: ID,
  generation: 8,
  refreshTokenSealed: randomBytes(90),
  keyId: 'k1',
  accessToken: {
    sealed: randomBytes(120),
    requestedAt: new Date('2026-11-20T10:00:00.000Z'),
    expiresAt: new Date('2026-11-20T10:10:00.000Z'),
    fingerprint: randomBytes(32).toString('base64url'),
  },
  scope: 'all openid',
  httpStatus: 200,
  durationMs: 12.5,
}
type Members = Record<string, unknown>
const WHOLE = JSON.parse(entryText(ENTRY)) as Members & { accessToken: Members }

const parse = (changes: Members) => parseEntry(JSON.stringify({ ...WHOLE, ...changes }))
const parseToken = (changes: Members) =>
  parse({ accessToken: { ...WHOLE.accessToken, ...changes } })

t.test('an entry comes back as it was', async (t) => {
  t.strictSame(parseEntry(entryText(ENTRY)), ENTRY)
  for (const changes of [
    { accessToken: null },
    { scope: '' },
    { generation: 0, httpStatus: 0, durationMs: 0 },
    { keyId: '\n' },
  ]) {
    t.strictSame(parseEntry(entryText({ ...ENTRY, ...changes })), { ...ENTRY, ...changes })
  }
})

t.test(
  'the text has the members that other versions look for, and no token in clear',
  async (t) => {
    t.strictSame(Object.keys(WHOLE).toSorted(), [
      ...['accessToken', 'attemptId', 'durationMs', 'generation', 'httpStatus', 'keyId', 'loginId'],
      ...['refreshTokenSealed', 'scope', 'user', 'version'],
    ])
    t.equal(WHOLE['version'], 1)
    t.equal(WHOLE['refreshTokenSealed'], ENTRY.refreshTokenSealed.toString('base64'))
    t.strictSame(WHOLE.accessToken, {
      sealed: ENTRY.accessToken?.sealed.toString('base64'),
      requestedAt: '2026-11-20T10:00:00.000Z',
      expiresAt: '2026-11-20T10:10:00.000Z',
      fingerprint: ENTRY.accessToken?.fingerprint,
    })
  },
)

t.test('an attempt id is a UUID in lower case and nothing around it', async (t) => {
  t.ok(isAttemptId(ID))
  for (const odd of ['', ID.toUpperCase(), ` ${ID}`, `${ID}x`, `../${ID}`, ID.slice(1), 'g' + ID]) {
    t.notOk(isAttemptId(odd), odd)
  }
})

t.test('a member that is not as written makes it no entry, and is named', async (t) => {
  const odd: Record<string, readonly unknown[]> = {
    version: [0, 2, '1', null],
    user: ['', 'a b', 7, null, '..'],
    loginId: ['', 'x', `${ID}0`, `0${ID}`, ID.toUpperCase(), null],
    attemptId: ['', 'x', `${ID}0`, `0${ID}`, null],
    generation: [-1, 1.5, '8', null, 2 ** 53],
    refreshTokenSealed: ['', 'a$b=', 'YQ', 'YQ==\n', 'YR==', '_-8=', null, 7],
    keyId: ['', 7, null],
    scope: [7, null],
    httpStatus: [-1, 1.5, '200', null],
    durationMs: [-1, '12', null],
  }
  for (const [member, values] of Object.entries(odd)) {
    for (const value of values) {
      const message = new RegExp(` readable ${member}\\.$`)
      t.throws(
        () => parse({ [member]: value }),
        { name: 'TypeError', message },
        JSON.stringify(value),
      )
    }
  }
  t.throws(() => parseEntry(JSON.stringify(WHOLE).replace('12.5', '1e999')), / durationMs/)
})

t.test('an access token is whole or null', async (t) => {
  const { fingerprint = '' } = ENTRY.accessToken ?? {}
  const odd: Record<string, readonly unknown[]> = {
    sealed: ['', 'a$b=', null, 7],
    requestedAt: ['', 'soon', '2026-11-20', '2026-11-20T10:00:00Z', null, 7],
    expiresAt: ['', 'soon', '2026-11-20T10:00:00.000+00:00', null],
    fingerprint: ['', 'x', `${fingerprint}x`, `x${fingerprint}`, fingerprint.slice(1), null],
  }
  for (const [member, values] of Object.entries(odd)) {
    for (const value of values) {
      const message = new RegExp(` readable ${member}\\.$`)
      t.throws(
        () => parseToken({ [member]: value }),
        { name: 'TypeError', message },
        JSON.stringify(value),
      )
    }
  }
  t.throws(() => parseToken({ fingerprint: `${fingerprint.slice(1)}+` }), / fingerprint/)
  for (const value of ['x', 7, [], {}, true]) t.throws(() => parse({ accessToken: value }))
})

t.test('exactly its members, no more, no fewer, no others', async (t) => {
  const message = / list of members\.$/
  t.throws(() => parse({ note: 'x' }), { message })
  t.throws(() => parse({ scope: undefined }), { message })
  t.throws(() => parse({ scope: undefined, note: 'x' }), { message })
  t.throws(() => parseToken({ note: 'x' }), { message })
  t.throws(() => parseToken({ sealed: undefined }), { message })
  t.throws(() => parseToken({ sealed: undefined, note: 'x' }), { message })
  for (const text of ['null', '7', '"x"', 'true']) {
    t.throws(() => parseEntry(text), { name: 'TypeError', message: / readable object\.$/ }, text)
  }
  t.throws(() => parseEntry('[]'), { message })
  t.throws(() => parseEntry(entryText(ENTRY).slice(0, -1)), SyntaxError)
  t.throws(() => parseEntry(''), SyntaxError)
})

t.test('what could not be read back is not made into a text', async (t) => {
  t.throws(() => entryText({ ...ENTRY, durationMs: Number.NaN }), TypeError)
  t.throws(() => entryText({ ...ENTRY, generation: -1 }), TypeError)
  t.throws(() => entryText({ ...ENTRY, refreshTokenSealed: Buffer.alloc(0) }), TypeError)
  t.throws(() => entryText({ ...ENTRY, user: 'a b' as UserKey }), TypeError)
  const accessToken = { ...(ENTRY.accessToken as object), expiresAt: new Date(Number.NaN) }
  t.throws(() => entryText({ ...ENTRY, accessToken } as Successor), RangeError)
})
