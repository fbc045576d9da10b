// The stand-in for Pagero that the other tests and the demo rely on: it prints what Pagero prints, and is strict.

import { randomBytes } from 'node:crypto'
import { rm } from 'node:fs/promises'
import { request as httpRequest } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createRemoteJWKSet, jwtVerify } from 'jose'
import * as oauth from 'oauth4webapi'
import t, { type Test } from 'tap'
import { startApi } from '../demo/look-alike/api.ts'
import {
  type AuthorizationServerOptions,
  type LookAlike,
  startAuthorizationServer,
} from '../demo/look-alike/authorization-server.ts'
import { type CookieJar, logIn } from '../demo/look-alike/log-in.ts'

/** Pagero's own example: no path, no trailing slash. */
const REDIRECT_URI = 'https://urltoclient:4443'
const CLIENT_ID = 'acme-erp'
/** Characters that Basic and a form encode differently. */
const CLIENT_SECRET = 's:cr%t+/= with space'
const http = { [oauth.allowInsecureRequests]: true } as const

async function start(
  test: Test,
  options: Partial<AuthorizationServerOptions> = {},
): Promise<LookAlike> {
  const lookAlike = await startAuthorizationServer({
    clientId: CLIENT_ID,
    clientSecret: CLIENT_SECRET,
    redirectUris: [REDIRECT_URI, 'http://localhost:3000/auth/callback'],
    ...options,
  })
  test.teardown(() => lookAlike.stop())
  return lookAlike
}

function serverOf(lookAlike: LookAlike): oauth.AuthorizationServer {
  return {
    issuer: lookAlike.issuer,
    authorization_endpoint: lookAlike.authorizeUrl,
    token_endpoint: lookAlike.tokenUrl,
    revocation_endpoint: lookAlike.revokeUrl,
    authorization_response_iss_parameter_supported: true,
  }
}

const client: oauth.Client = { client_id: CLIENT_ID }
const basic = oauth.ClientSecretBasic(CLIENT_SECRET)
const post = oauth.ClientSecretPost(CLIENT_SECRET)

function authorizeUrlOf(lookAlike: LookAlike, parameters: Record<string, string> = {}): string {
  const query = new URLSearchParams({
    response_type: 'code',
    client_id: CLIENT_ID,
    redirect_uri: REDIRECT_URI,
    scope: 'all openid',
    state: 'exampleState',
    ...parameters,
  })
  return `${lookAlike.authorizeUrl}?${query.toString()}`
}

/** Logs in and redeems the code; the raw answer is what the tests look at. */
async function redeem(
  lookAlike: LookAlike,
  { subject = 'alice', auth = basic, verifier = oauth.nopkce as string | typeof oauth.nopkce } = {},
): Promise<{ response: Response; answer: Record<string, string> }> {
  const parameters: Record<string, string> = { nonce: 'example-nonce' }
  if (typeof verifier === 'string') {
    parameters['code_challenge'] = await oauth.calculatePKCECodeChallenge(verifier)
    parameters['code_challenge_method'] = 'S256'
  }
  const callback = new URL(await logIn(authorizeUrlOf(lookAlike, parameters), subject))
  const as = serverOf(lookAlike)
  const response = await oauth.authorizationCodeGrantRequest(
    as,
    client,
    auth,
    oauth.validateAuthResponse(as, client, callback, 'exampleState'),
    REDIRECT_URI,
    verifier,
    http,
  )
  return { response, answer: (await response.clone().json()) as Record<string, string> }
}

async function refresh(
  lookAlike: LookAlike,
  refreshToken: string | undefined,
): Promise<{ status: number; answer: Record<string, string> }> {
  const response = await oauth.refreshTokenGrantRequest(
    serverOf(lookAlike),
    client,
    post,
    refreshToken ?? '',
    http,
  )
  return { status: response.status, answer: (await response.json()) as Record<string, string> }
}

t.test('The code flow', async (t) => {
  const lookAlike = await start(t)

  for (const [way, auth] of [
    ['Basic', basic],
    ['body', post],
  ] as const) {
    for (const verifier of [oauth.nopkce, oauth.generateRandomCodeVerifier()] as const) {
      const pkce = typeof verifier === 'string' ? 'with' : 'without'
      await t.test(`grants with ${way} credentials ${pkce} PKCE`, async (t) => {
        const { response } = await redeem(lookAlike, { auth, verifier })
        const tokens = await oauth.processAuthorizationCodeResponse(
          serverOf(lookAlike),
          client,
          response,
          { expectedNonce: 'example-nonce' },
        )
        t.equal(oauth.getValidatedIdTokenClaims(tokens)?.sub, 'alice')
        t.equal(tokens.expires_in, 600)
      })
    }
  }

  await t.test('prints the answer as Pagero does', async (t) => {
    const { response, answer } = await redeem(lookAlike)
    t.equal(response.status, 200)
    t.strictSame(Object.keys(answer), [
      'access_token',
      'refresh_token',
      'claims',
      'id_token',
      'scope',
      'token_type',
      'expires_in',
    ])
    t.match(answer, { claims: 'publicid', scope: /^$/, token_type: 'bearer', expires_in: 600 })
    t.match(answer['access_token'], /^eyJ/, 'a JWT, as in the newest edition')
  })

  await t.test(
    'gives no ID token, and still a refresh token, without the scope openid',
    async (t) => {
      for (const scope of ['all', undefined]) {
        const query = new URL(authorizeUrlOf(lookAlike))
        if (scope === undefined) query.searchParams.delete('scope')
        else query.searchParams.set('scope', scope)
        const code = new URL(await logIn(query.href, 'bob')).searchParams.get('code') ?? ''
        const { status, answer } = await present(lookAlike, {
          grant_type: 'authorization_code',
          code,
          redirect_uri: REDIRECT_URI,
        })
        t.equal(status, 200)
        t.equal(answer['id_token'], undefined)
        t.type(answer['refresh_token'], 'string')
      }
    },
  )

  await t.test('signs with a key that it publishes', async (t) => {
    const { answer } = await redeem(lookAlike)
    const keys = createRemoteJWKSet(new URL(lookAlike.jwksUrl))
    const { payload } = await jwtVerify(answer['id_token'] ?? '', keys, {
      issuer: lookAlike.issuer,
      audience: CLIENT_ID,
    })
    t.equal(payload['nonce'], 'example-nonce')
  })

  await t.test('refuses a code verifier that is not the one of the challenge', async (t) => {
    const code_challenge = await oauth.calculatePKCECodeChallenge('a'.repeat(43))
    const url = authorizeUrlOf(lookAlike, { code_challenge, code_challenge_method: 'S256' })
    const code = new URL(await logIn(url, 'alice')).searchParams.get('code') ?? ''
    const form = { grant_type: 'authorization_code', code, redirect_uri: REDIRECT_URI }
    t.match(await present(lookAlike, { ...form, code_verifier: 'b'.repeat(43) }), {
      status: 400,
      answer: { error: 'invalid_grant' },
    })
  })

  await t.test('refuses wrong client credentials as invalid_client', async (t) => {
    const form = { grant_type: 'refresh_token', refresh_token: 'any', client_secret: 'wrong' }
    t.match(await present(lookAlike, form), { status: 401, answer: { error: 'invalid_client' } })
  })

  await t.test('redeems a code once, and its second use ends the login', async (t) => {
    const code = new URL(await logIn(authorizeUrlOf(lookAlike), 'alice')).searchParams.get('code')
    const form = { grant_type: 'authorization_code', code: code ?? '', redirect_uri: REDIRECT_URI }
    const first = await present(lookAlike, form)
    t.equal(first.status, 200)
    t.match(await present(lookAlike, form), { status: 400, answer: { error: 'invalid_grant' } })
    t.equal((await refresh(lookAlike, first.answer['refresh_token'])).status, 400)
  })
})

/** A bare token request: what oauth4webapi would not send. */
async function present(
  lookAlike: LookAlike,
  form: Record<string, string>,
): Promise<{ status: number; answer: Record<string, string> }> {
  const response = await fetch(lookAlike.tokenUrl, {
    method: 'POST',
    body: new URLSearchParams({
      client_id: CLIENT_ID,
      client_secret: CLIENT_SECRET,
      ...form,
    }),
  })
  return { status: response.status, answer: (await response.json()) as Record<string, string> }
}

t.test('The redirects', async (t) => {
  const lookAlike = await start(t)

  await t.test('carry code, state and iss in the order of Pagero’s example', async (t) => {
    const callback = await logIn(authorizeUrlOf(lookAlike), 'alice')
    t.match(callback, /^https:\/\/urltoclient:4443\/\?code=[^&]+&state=exampleState&iss=[^&]+$/)
    t.equal(new URL(callback).searchParams.get('iss'), lookAlike.issuer)
  })

  await t.test('hold the redirect URI to its bytes', async (t) => {
    const slashed = authorizeUrlOf(lookAlike, { redirect_uri: `${REDIRECT_URI}/` })
    const response = await fetch(slashed, { redirect: 'manual' })
    t.equal(response.status, 400, 'a trailing slash is another URI at the authorize endpoint')
    t.equal(response.headers.get('location'), null)

    const code = new URL(await logIn(authorizeUrlOf(lookAlike), 'alice')).searchParams.get('code')
    const form = { grant_type: 'authorization_code', code: code ?? '' }
    t.equal((await present(lookAlike, { ...form, redirect_uri: `${REDIRECT_URI}/` })).status, 400)
    t.match(lookAlike.record.at(-1), {
      endpoint: 'token',
      form: { redirect_uri: `${REDIRECT_URI}/` },
      status: 400,
      answered: true,
    })
  })

  await t.test('bring access_denied when the user refuses', async (t) => {
    const callback = new URL(await logIn(authorizeUrlOf(lookAlike), undefined))
    t.equal(callback.searchParams.get('error'), 'access_denied')
    t.equal(callback.searchParams.get('state'), 'exampleState')
    t.equal(callback.searchParams.get('iss'), lookAlike.issuer)
    t.equal(callback.searchParams.get('code'), null)
  })

  await t.test('are silent in a live session, unless prompt=login asks again', async (t) => {
    const cookies: CookieJar = new Map()
    const formsSent = () =>
      lookAlike.record.filter(({ endpoint, method }) => endpoint === 'login' && method === 'POST')
        .length
    await logIn(authorizeUrlOf(lookAlike), 'alice', cookies)
    const before = formsSent()
    const silent = new URL(await logIn(authorizeUrlOf(lookAlike), 'bob', cookies))
    t.equal(formsSent(), before)
    t.equal(await subjectOf(lookAlike, silent), 'alice')

    const prompted = authorizeUrlOf(lookAlike, { prompt: 'login' })
    const asked = new URL(await logIn(prompted, 'bob', cookies))
    t.equal(formsSent(), before + 1)
    t.equal(await subjectOf(lookAlike, asked), 'bob')
  })

  await t.test('record the query of the authorization request as sent', async (t) => {
    const url = authorizeUrlOf(lookAlike, { state: 'a b+c' })
    await logIn(url, 'alice')
    const { rawTarget } =
      lookAlike.record.findLast(({ endpoint }) => endpoint === 'authorize') ?? {}
    t.equal(rawTarget, url.slice(lookAlike.origin.length))
  })
})

async function subjectOf(lookAlike: LookAlike, callback: URL): Promise<string | undefined> {
  const { answer } = await present(lookAlike, {
    grant_type: 'authorization_code',
    code: callback.searchParams.get('code') ?? '',
    redirect_uri: REDIRECT_URI,
  })
  return (await lookAlike.isActive(answer['access_token'] ?? ''))?.subject
}

t.test('Refresh tokens', async (t) => {
  for (const accessTokenFormat of ['jwt', 'opaque'] as const) {
    const lookAlike = await start(t, { accessTokenFormat })

    await t.test(`work once; their reuse ends the login (${accessTokenFormat})`, async (t) => {
      const { answer: first } = await redeem(lookAlike)
      const { answer: other } = await redeem(lookAlike)
      const second = await refresh(lookAlike, first['refresh_token'])
      t.equal(second.status, 200)
      t.match(second.answer, { claims: 'publicid', scope: /^$/, token_type: 'bearer' })
      t.not(second.answer['refresh_token'], first['refresh_token'])
      t.equal(await lookAlike.acceptsRefreshToken(first['refresh_token'] ?? ''), false)
      t.equal(await lookAlike.acceptsRefreshToken(second.answer['refresh_token'] ?? ''), true)
      t.match(await lookAlike.isActive(second.answer['access_token'] ?? ''), { subject: 'alice' })

      const reused = await refresh(lookAlike, first['refresh_token'])
      t.match(reused, { status: 400, answer: { error: 'invalid_grant' } })
      t.match(await refresh(lookAlike, second.answer['refresh_token']), {
        status: 400,
        answer: { error: 'invalid_grant' },
      })
      t.equal(await lookAlike.isActive(second.answer['access_token'] ?? ''), undefined)
      t.equal((await refresh(lookAlike, other['refresh_token'])).status, 200, 'another login lives')
    })
  }

  const lookAlike = await start(t)

  await t.test('presented five times at once are granted once', async (t) => {
    const { answer } = await redeem(lookAlike)
    const outcomes = await Promise.all(
      Array.from({ length: 5 }, () => refresh(lookAlike, answer['refresh_token'])),
    )
    const granted = outcomes.filter(({ status }) => status === 200)
    const refused = outcomes.filter(({ answer: { error } }) => error === 'invalid_grant')
    t.equal(granted.length, 1)
    t.equal(refused.length, 4)
  })

  await t.test('are counted in the record by login and generation', async (t) => {
    const { answer } = await redeem(lookAlike)
    const redeemed = lookAlike.record.at(-1)?.spent
    t.equal(redeemed?.generation, 0)
    const second = await refresh(lookAlike, answer['refresh_token'])
    t.strictSame(lookAlike.record.at(-1)?.spent, { grantId: redeemed?.grantId, generation: 1 })
    await refresh(lookAlike, second.answer['refresh_token'])
    t.strictSame(lookAlike.record.at(-1)?.spent, { grantId: redeemed?.grantId, generation: 2 })
  })

  await t.test('are revoked with an empty 200, with all that hangs on them', async (t) => {
    const { answer } = await redeem(lookAlike)
    const response = await oauth.revocationRequest(
      serverOf(lookAlike),
      client,
      basic,
      answer['refresh_token'] ?? '',
      http,
    )
    t.equal(response.status, 200)
    t.equal(await response.text(), '')
    t.equal((await refresh(lookAlike, answer['refresh_token'])).status, 400)
    t.equal(await lookAlike.isActive(answer['access_token'] ?? ''), undefined)
    const again = await oauth.revocationRequest(serverOf(lookAlike), client, basic, 'unknown', http)
    t.equal(again.status, 200, 'an unknown token is no error')
  })

  await t.test('end when Pagero revokes the login by itself', async (t) => {
    const { answer } = await redeem(lookAlike)
    await lookAlike.revokeLogin(answer['refresh_token'] ?? '')
    t.equal((await refresh(lookAlike, answer['refresh_token'])).status, 400)
    t.equal(await lookAlike.isActive(answer['access_token'] ?? ''), undefined)
  })

  await t.test(
    'outlast a restart with a state file, as does the memory of spent ones',
    async (t) => {
      const stateFile = join(tmpdir(), `look-alike-${randomBytes(8).toString('hex')}.json`)
      t.teardown(() => rm(stateFile, { force: true }))
      const before = await start(t, { stateFile })
      const { answer: first } = await redeem(before)
      const { answer: second } = await refresh(before, first['refresh_token'])
      await before.stop()

      const after = await start(t, { stateFile })
      t.match(await after.isActive(second['access_token'] ?? ''), { subject: 'alice' })
      const third = await refresh(after, second['refresh_token'])
      t.equal(third.status, 200)
      t.equal(
        (await refresh(after, first['refresh_token'])).status,
        400,
        'spent before the restart',
      )
      t.equal(
        (await refresh(after, third.answer['refresh_token'])).status,
        400,
        'so the login ended',
      )
    },
  )
})

t.test('Faults', async (t) => {
  const lookAlike = await start(t)

  await t.test('answer a status without consuming the token', async (t) => {
    const { answer } = await redeem(lookAlike)
    lookAlike.faults.push({
      endpoint: 'token',
      grantType: 'refresh_token',
      kind: 'status',
      status: 503,
      headers: { 'retry-after': '7' },
      body: { error: 'temporarily_unavailable' },
      times: 2,
    })
    for (const attempt of [1, 2]) {
      t.match(
        await refresh(lookAlike, answer['refresh_token']),
        { status: 503, answer: { error: 'temporarily_unavailable' } },
        `attempt ${attempt}`,
      )
    }
    t.match(lookAlike.record.at(-1), { fault: 'status', spent: undefined })
    t.equal((await refresh(lookAlike, answer['refresh_token'])).status, 200)
  })

  await t.test('reset the connection before or after consuming', async (t) => {
    const { answer } = await redeem(lookAlike)
    const token = answer['refresh_token'] ?? ''
    lookAlike.faults.push({ endpoint: 'token', kind: 'reset_before' })
    await t.rejects(refresh(lookAlike, token))
    t.equal(await lookAlike.acceptsRefreshToken(token), true)

    lookAlike.faults.push({ endpoint: 'token', kind: 'reset_after' })
    await t.rejects(refresh(lookAlike, token))
    t.equal(await lookAlike.acceptsRefreshToken(token), false)
    t.match(lookAlike.record.at(-1), { answered: false, spent: { generation: 1 } })
  })

  await t.test('change the answer, or replace it, after consuming', async (t) => {
    const { answer } = await redeem(lookAlike)
    lookAlike.faults.push(
      {
        endpoint: 'token',
        kind: 'mutate',
        change: (printed) => ({ ...printed, refresh_token: undefined, expires_in: '600' }),
      },
      { endpoint: 'token', kind: 'raw_body', body: '{"access_tok' },
    )
    const changed = await refresh(lookAlike, answer['refresh_token'])
    t.equal(changed.answer['refresh_token'], undefined)
    t.equal(changed.answer['expires_in'], '600')

    const { answer: another } = await redeem(lookAlike).catch(() => ({ answer: undefined }))
    t.equal(another, undefined, 'the cut body is not JSON')
    t.match(lookAlike.record.at(-1), { status: 200, fault: 'raw_body', spent: { generation: 0 } })
  })

  await t.test('hold a request before or after it consumes', async (t) => {
    for (const when of ['before', 'after'] as const) {
      const { answer } = await redeem(lookAlike)
      const token = answer['refresh_token'] ?? ''
      const gate = Promise.withResolvers<void>()
      lookAlike.faults.push({ endpoint: 'token', kind: 'delay', when, until: gate.promise })
      const pending = refresh(lookAlike, token)
      while (lookAlike.faults.length > 0) await new Promise(setImmediate)
      if (when === 'after') {
        while (await lookAlike.acceptsRefreshToken(token)) await new Promise(setImmediate)
      }
      t.equal(await lookAlike.acceptsRefreshToken(token), when === 'before')
      gate.resolve()
      t.equal((await pending).status, 200)
    }
    lookAlike.faults.push({ endpoint: 'revoke', kind: 'delay', when: 'before', ms: 40 })
    await oauth.revocationRequest(serverOf(lookAlike), client, basic, 'unknown', http)
    const { at = 0, endedAt = 0 } = lookAlike.record.at(-1) ?? {}
    t.ok(endedAt - at >= 39, 'a delay in milliseconds')
  })

  await t.test('meant for one endpoint or grant type spare the others', async (t) => {
    const fault = { endpoint: 'token', grantType: 'refresh_token', kind: 'reset_before' } as const
    lookAlike.faults.push(fault)
    const { answer, response } = await redeem(lookAlike)
    t.equal(response.status, 200)
    t.strictSame(lookAlike.faults, [fault])
    await t.rejects(refresh(lookAlike, answer['refresh_token']))
    t.strictSame(lookAlike.faults, [])
  })
})

t.test('The API', async (t) => {
  const lookAlike = await start(t)
  const api = await startApi({ isActive: (token) => lookAlike.isActive(token), processingMs: 0 })
  t.teardown(() => api.stop())
  const { answer: own } = await redeem(lookAlike)
  const authorization = `Bearer ${own['access_token']}`
  const call = (path: string, init: CallInit = {}) =>
    fetch(api.origin + path, { ...init, headers: { authorization, ...init.headers } })

  await t.test('refuses whoever brings no live access token', async (t) => {
    const bare = await fetch(`${api.origin}/document/v1/documents`)
    t.equal(bare.status, 401)
    t.equal(bare.headers.get('www-authenticate'), 'Bearer')
    const { answer: rejected } = await redeem(lookAlike)
    const headers = { authorization: `Bearer ${rejected['access_token']}` }
    t.equal((await call('/document/v1/documents', { headers })).status, 200)
    await lookAlike.rejectAccessToken(rejected['access_token'] ?? '')
    const refused = await call('/document/v1/documents', { headers })
    t.equal(refused.status, 401)
    t.equal(refused.headers.get('www-authenticate'), 'Bearer error="invalid_token"')
  })

  await t.test('lets an access token live as long as it says', async (t) => {
    const brief = await start(t, { accessTokenLifeSeconds: 1 })
    const { answer } = await redeem(brief)
    t.equal(answer['expires_in'], 1)
    t.ok(await brief.isActive(answer['access_token'] ?? ''))
    const { at = 0 } = brief.record.at(-1) ?? {}
    while (await brief.isActive(answer['access_token'] ?? '')) await new Promise(setImmediate)
    t.ok(performance.now() - at >= 990)
  })

  await t.test('pages through the documents', async (t) => {
    const whole = await listOf(call('/document/v1/documents?limit=100'))
    t.ok(whole.items.length > 10)
    const paged: string[] = []
    for (let offset = 0; offset < whole.meta.total; offset += 7) {
      const { items, meta } = await listOf(call(`/document/v1/documents?limit=7&offset=${offset}`))
      t.match(meta, { count: items.length, limit: 7, offset, total: whole.items.length })
      paged.push(...items.map(({ id }) => id))
    }
    t.strictSame(
      paged,
      whole.items.map(({ id }) => id),
    )
    t.equal((await listOf(call('/document/v1/documents'))).meta.limit, 10)
    t.equal((await call('/document/v1/documents?limit=0')).status, 400)
  })

  await t.test('takes repeated keys and a direction as filters', async (t) => {
    const query = 'direction=Received&documentType=Invoice&documentType=PaymentReminder&limit=100'
    const { items } = await listOf(call(`/document/v1/documents?${query}`))
    const types = new Set(items.map(({ documentInfo }) => documentInfo.documentType))
    t.strictSame([...types].toSorted(), ['Invoice', 'PaymentReminder'])
    t.ok(items.every(({ documentInfo }) => documentInfo.direction === 'Received'))
    t.match(api.record.at(-1), { requestLine: `GET /document/v1/documents?${query} HTTP/1.1` })
  })

  await t.test('gives each company its own documents', async (t) => {
    const { answer } = await redeem(lookAlike, { subject: 'bob' })
    const headers = { authorization: `Bearer ${answer['access_token']}` }
    const mine = await listOf(call('/document/v1/documents'))
    const others = await listOf(call('/document/v1/documents', { headers }))
    t.ok(others.items.every(({ id }) => mine.items.every((document) => document.id !== id)))
    const stranger = await call(`/document/v1/documents/${mine.items[0]?.id}/targetdocument`, {
      headers,
    })
    t.equal(stranger.status, 404)
  })

  await t.test('hides documents that were marked as fetched', async (t) => {
    const unfetched = '/document/v1/documents?direction=Received&showFetchedOnly=false&limit=100'
    const { items, meta } = await listOf(call(unfetched))
    const body = JSON.stringify({ ids: [items[0]?.id] })
    t.equal((await call('/document/v1/documents/fetch', { method: 'POST', body })).status, 415)
    const headers = { 'content-type': 'application/json' }
    const marked = await call('/document/v1/documents/fetch', { method: 'POST', body, headers })
    t.equal(marked.status, 204)
    t.equal((await listOf(call(unfetched))).meta.total, meta.total - 1)
  })

  await t.test('gives a document as XML or PDF, by the order of Accept', async (t) => {
    const { items } = await listOf(call('/document/v1/documents'))
    const path = `/document/v1/documents/${items[0]?.id}/targetdocument`
    const xml = await call(path, { headers: { accept: 'application/json' } })
    t.equal(xml.headers.get('content-type'), 'application/xml')
    t.match(await xml.text(), /<cbc:ID>/)
    const pdf = await call(path, { headers: { accept: 'image/png, application/pdf, */*' } })
    t.equal(pdf.headers.get('content-type'), 'application/pdf')
    t.match(pdf.headers.get('content-disposition'), /^attachment; filename="[\w.-]+\.pdf"$/)
    checkPdf(t, Buffer.from(await pdf.arrayBuffer()).toString('latin1'))
    t.equal((await call(path, { headers: { accept: 'image/png' } })).status, 406)
  })

  await t.test('turns an upload into a document, and says what arrived', async (t) => {
    const form = uploadForm('invoice.xml', '1204551')
    const bytes = randomBytes(300_000)
    form.set('payload', new Blob([bytes]), 'invoice.xml')
    const created = await call('/file/v1/files', { method: 'POST', body: form })
    t.equal(created.status, 201)
    const { id } = (await created.json()) as { id: string }
    t.match(api.record.at(-1), { complete: true, status: 201 })
    t.ok((api.record.at(-1)?.bodyBytes ?? 0) > bytes.length)
    const { items } = await listOf(call(`/document/v1/documents?fileId=${id}`))
    t.match(items, [{ documentInfo: { direction: 'Sent', documentIdentifier: 'REF-1' } }])

    const stranger = uploadForm('invoice.xml', '1209874')
    t.equal((await call('/file/v1/files', { method: 'POST', body: stranger })).status, 403)
    t.equal((await call('/file/v1/files', { method: 'POST', body: 'text' })).status, 415)
    t.equal((await call('/file/v1/files')).status, 405)
    t.equal((await call('/file/v2/files')).status, 404)
  })

  await t.test('lists a part in error until it is restarted', async (t) => {
    const body = uploadForm('with-error.xml', '1204551')
    const created = await call('/file/v1/files', { method: 'POST', body })
    const { id } = (await created.json()) as { id: string }
    const parts = `/file/v1/files/${id}/fileparts?Status=AwaitingInteraction,Error`
    const { items } = (await (await call(parts)).json()) as { items: Array<{ id: string }> }
    t.match(items, [{ fileId: id, status: 'Error', error: { description: [String] } }])
    const action = { method: 'POST', body: '{"action":"Restart"}' }
    t.equal((await call(`/file/v1/fileparts/${items[0]?.id}/action`, action)).status, 204)
    t.match(await (await call(parts)).json(), { items: [], meta: { total: 0 } })
  })

  await t.test('records header fields as sent, in order and case', async (t) => {
    await new Promise<void>((resolve, reject) => {
      const headers = [
        'X-Odd-Case',
        '1',
        'x-odd-case',
        '2',
        'Host',
        'localhost',
        'Authorization',
        authorization,
      ]
      httpRequest(`${api.origin}/document/v1/documents`, { headers }, (response) => {
        response.resume().once('end', resolve)
      })
        .once('error', reject)
        .end()
    })
    const names = api.record.at(-1)?.headers.map(([name]) => name)
    t.strictSame(names?.slice(0, 2), ['X-Odd-Case', 'x-odd-case'])
  })
})

interface CallInit extends RequestInit {
  headers?: Record<string, string>
}

interface List {
  items: Array<{ id: string; documentInfo: { documentType: string; direction: string } }>
  meta: { count: number; limit: number; offset: number; total: number }
}

async function listOf(response: Promise<Response>): Promise<List> {
  return (await (await response).json()) as List
}

function uploadForm(filename: string, sendingCompanyId: string): FormData {
  const form = new FormData()
  form.append('payload', new Blob(['<Invoice/>']), filename)
  form.append('documentType', 'Invoice')
  form.append('sendMode', 'Test')
  form.append('sendingCompanyId', sendingCompanyId)
  form.append('senderReference', 'REF-1')
  return form
}

/** Every place in the table of a PDF must be that of its object, or a viewer has to guess. */
function checkPdf(test: Test, text: string): void {
  const tableAt = Number(/startxref\n(\d+)\n%%EOF/.exec(text)?.[1])
  test.equal(text.slice(tableAt, tableAt + 4), 'xref')
  const places = [...text.slice(tableAt).matchAll(/^(\d{10}) 00000 n $/gm)].map(([, at]) =>
    Number(at),
  )
  test.equal(places.length, 6)
  places.forEach((at, index) => {
    test.ok(text.startsWith(`${index + 1} 0 obj`, at), `object ${index + 1} stands at ${at}`)
  })
  const length = Number(/\/Length (\d+)/.exec(text)?.[1])
  const streamAt = text.indexOf('stream\n') + 'stream\n'.length
  test.ok(text.startsWith('\nendstream', streamAt + length), 'the stream is as long as it says')
}
