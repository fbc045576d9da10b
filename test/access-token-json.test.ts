// The text of a token answer, which is put together and not serialized.

import t from 'tap'
import type { FreshToken } from '../src/access-token.ts'
import { fingerprintOf } from '../src/grant.ts'
import { accessTokenJson, createAccessTokenJson } from '../src/http/access-token-json.ts'

function tokenOf(accessToken: string, scope = ''): FreshToken {
  return {
    accessToken,
    expiresInSeconds: 540,
    expiresAt: new Date('2026-11-23T12:09:00Z'),
    scope,
    fingerprint: fingerprintOf(accessToken),
  }
}

function membersOf(token: FreshToken): object {
  return {
    access_token: token.accessToken,
    token_type: 'Bearer',
    expires_in: token.expiresInSeconds,
    expires_at: token.expiresAt.toISOString(),
    scope: token.scope,
    fingerprint: token.fingerprint,
  }
}

t.test(
  'the text reads back as what was written and is ASCII, however odd token and scope are',
  async (t) => {
    const jsonOf = createAccessTokenJson()
    const odd = ['"', '\\', '\n', '\u0000', '\u2028', '</script>', 'å 発行', '\ud83d', '","x":"']
    for (const [index, text] of ['', ...odd, odd.join('')].entries()) {
      const token = tokenOf(`token${text}`, text)
      for (const time of ['first', 'second', 'third']) {
        const json = jsonOf(token)
        t.same(JSON.parse(json), membersOf(token), `text ${index}, ${time} time`)
        t.match(json, /^[\x20-\x7e]+$/, 'so that its characters are its bytes')
      }
      t.equal(accessTokenJson(token), jsonOf(token), `text ${index}, written once`)
    }
  },
)

t.test('the seconds that are left are those of each answer', async (t) => {
  const jsonOf = createAccessTokenJson()
  const token = tokenOf('token')
  const seconds = [540, 539, 538, 1].map((expiresInSeconds) => {
    const answer = JSON.parse(jsonOf({ ...token, expiresInSeconds })) as { expires_in: number }
    return answer.expires_in
  })
  t.same(seconds, [540, 539, 538, 1])
})

t.test('the same token with another scope or end is written anew', async (t) => {
  const jsonOf = createAccessTokenJson()
  const token = tokenOf('token', 'one')
  const changed = [
    { ...token, scope: 'two' },
    { ...token, expiresAt: new Date('2026-11-23T12:10:00Z') },
  ]
  for (const other of changed) {
    for (let i = 0; i < 3; i += 1) jsonOf(token)
    for (let i = 0; i < 3; i += 1) t.equal(jsonOf(other), JSON.stringify(membersOf(other)))
  }
})

t.test('more tokens than are kept are all written right', async (t) => {
  const jsonOf = createAccessTokenJson()
  const hot = tokenOf('asked for all the time')
  for (let i = 0; i < 12_000; i += 1) {
    const token = tokenOf(`token ${i}`)
    if (jsonOf(token) !== JSON.stringify(membersOf(token))) t.fail(`token ${i}`)
    if (jsonOf(hot) !== JSON.stringify(membersOf(hot))) t.fail(`the hot one after ${i}`)
  }
})
