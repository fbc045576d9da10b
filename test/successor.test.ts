// From an answer to what is spooled, stored and served: places, lives and what stays when a part of the answer is missing.

import t from 'tap'
import { fingerprintOf, type Grant, grantSealContext, type TokenSet } from '../src/grant.ts'
import { openLiveToken, reauthenticationRequired, refuseDead } from '../src/live-token.ts'
import { createSealer } from '../src/seal.ts'
import { sealSuccessor } from '../src/successor.ts'

const sealer = createSealer([{ keyId: 'k1', key: Buffer.alloc(32, 7) }], 'a deployment')
const GRANT = {
  user: 'acme-alice',
  loginId: '8c5fb1d6-0b7e-4a39-9a5c-3f9e0f4f8d10',
  generation: 7,
} as Grant
const ATTEMPT = {
  attemptId: '4f1d8a32-52a6-4a0e-8a5b-6a4b1f5f0d11',
  refreshToken: 'old-rt',
  armedAt: new Date('2026-11-20T10:00:00.000Z'),
  armingAtMs: 90_000,
}
const TOKENS: TokenSet = {
  accessToken: 'at',
  refreshToken: 'new-rt',
  expiresInSeconds: 600,
  scope: 'all',
  idToken: undefined,
}

const sealed = (tokens: Partial<TokenSet> = {}) =>
  sealSuccessor(
    sealer,
    GRANT,
    ATTEMPT,
    { kind: 'granted', tokens: { ...TOKENS, ...tokens }, httpStatus: 201 },
    12.5,
  )
const place = { user: GRANT.user, loginId: GRANT.loginId, generation: 8 }
const refreshTokenOf = ({ successor }: ReturnType<typeof sealed>) =>
  sealer.open(grantSealContext('refresh_token_sealed', place), successor.refreshTokenSealed)

t.test('a successor is sealed for the next generation, and lives from the arming on', async (t) => {
  const both = sealed()
  const { successor, token } = both
  const { refreshTokenSealed: _opaque, accessToken, ...plain } = successor
  t.strictSame(plain, {
    ...place,
    attemptId: ATTEMPT.attemptId,
    keyId: 'k1',
    scope: 'all',
    httpStatus: 201,
    durationMs: 12.5,
  })
  t.equal(refreshTokenOf(both), 'new-rt')
  t.equal(
    sealer.open(
      grantSealContext('access_token_sealed', place),
      accessToken?.sealed ?? Buffer.alloc(0),
    ),
    'at',
  )
  const expiresAt = new Date('2026-11-20T10:10:00.000Z')
  t.match(accessToken, {
    requestedAt: ATTEMPT.armedAt,
    expiresAt,
    fingerprint: fingerprintOf('at'),
  })
  t.strictSame(token, {
    loginId: GRANT.loginId,
    generation: 8,
    accessToken: 'at',
    fingerprint: fingerprintOf('at'),
    scope: 'all',
    expiresAtEpochMs: expiresAt.getTime(),
    lifeSeconds: 600,
    expiresAtMs: 690_000,
  })
})

t.test('without a new refresh token the old one stays, as RFC 6749 section 6 has it', async (t) => {
  t.equal(refreshTokenOf(sealed({ refreshToken: undefined })), 'old-rt')
})

t.test('without an access token there is none to serve and none to store', async (t) => {
  const both = sealed({ accessToken: undefined })
  t.equal(both.token, undefined)
  t.equal(both.successor.accessToken, null)
  t.equal(refreshTokenOf(both), 'new-rt')
})

// ── Serving it again from the row ────────────────────────────────────────────────────────────────

const stored = (changes: Partial<Grant> = {}): Grant => ({
  ...GRANT,
  generation: 8,
  state: 'active',
  stateReason: null,
  scope: 'all',
  accessToken: sealed().successor.accessToken,
  readAt: new Date('2026-11-20T10:04:00.000Z'),
  ...changes,
})

t.test('what was stored is served with the life that is left of it', async (t) => {
  t.strictSame(openLiveToken(sealer, stored(), 5_000), {
    loginId: GRANT.loginId,
    generation: 8,
    accessToken: 'at',
    fingerprint: fingerprintOf('at'),
    scope: 'all',
    expiresAtEpochMs: Date.parse('2026-11-20T10:10:00.000Z'),
    lifeSeconds: 600,
    expiresAtMs: 365_000,
  })
})

t.test('a token that is not there, or has run out, is not opened', async (t) => {
  t.equal(openLiveToken(sealer, stored({ accessToken: null }), 0), undefined)
  for (const [readAt, isLive] of [
    ['2026-11-20T10:09:59.999Z', true],
    ['2026-11-20T10:10:00.000Z', false],
    ['2026-11-20T10:10:00.001Z', false],
  ] as const) {
    const token = openLiveToken(sealer, stored({ readAt: new Date(readAt) }), 0)
    t.equal(token !== undefined, isLive, readAt)
  }
})

t.test(
  'a token that stands in another place, or under another fingerprint, reaches nobody',
  async (t) => {
    const { accessToken } = stored()
    if (accessToken === null) throw new Error('It was just sealed.')
    const refused = { code: 'integrity_failure' }
    t.throws(() => openLiveToken(sealer, stored({ generation: 9 }), 0), refused)
    const fingerprint = fingerprintOf('another')
    const moved = stored({ accessToken: { ...accessToken, fingerprint } })
    t.throws(() => openLiveToken(sealer, moved, 0), {
      ...refused,
      detail: /access_token_fingerprint/,
    })
  },
)

t.test('only a grant that is active, or doubted, is served', async (t) => {
  const refuse = (state: Grant['state'], stateReason: string | null = null) =>
    refuseDead({ state, stateReason })
  t.doesNotThrow(() => refuse('active'))
  t.doesNotThrow(() => refuse('suspect'))
  t.throws(() => refuse('revoked'), { code: 'grant_not_found' })
  const dead = { code: 'reauthentication_required' }
  t.throws(() => refuse('reauthentication_required', 'rotation_lost'), {
    ...dead,
    extensions: { cause: 'rotation_lost' },
  })
  t.throws(() => refuse('reauthentication_required'), {
    ...dead,
    extensions: { cause: 'revoked_or_expired' },
  })
  t.strictSame(reauthenticationRequired('lifetime_over').extensions, { cause: 'lifetime_over' })
})
