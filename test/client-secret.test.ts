// Two client secrets while one takes the other's place: the second is tried after `invalid_client` alone, and kept once the
// server has said that it is good. The server is the test's, over real HTTP.

import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { systemClock } from '../src/clock.ts'
import { createAuthorizationServer } from '../src/pagero.ts'
import { Secret } from '../src/secret.ts'
import { createUpstreamLookup } from '../src/upstream-address.ts'
import { keepingLog } from './support/keeping-log.ts'
import { pageroSettingsOf } from './support/pagero-settings.ts'

type Answer = readonly [status: number, body: object]

const GRANTED: Answer = [200, { access_token: 'at', refresh_token: 'rt-2', expires_in: 600 }]
const REFUSED: Answer = [400, { error: 'invalid_grant' }]
const BAD_SECRET: Answer = [401, { error: 'invalid_client' }]
const BUSY: Answer = [503, {}]
const FAULT: Answer = [500, {}]

/** A token endpoint that answers by the secret that it is given, and remembers which came. */
async function setUp(t: Test, answerTo: (secret: string) => Answer) {
  const secrets: string[] = []
  const server = createServer((request, response) => {
    const basic = request.headers.authorization?.slice('Basic '.length) ?? ''
    const secret = Buffer.from(basic, 'base64').toString().split(':')[1] ?? ''
    secrets.push(secret)
    const [status, body] = answerTo(secret)
    request.resume()
    response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const log = keepingLog()
  const authorizationServer = createAuthorizationServer(
    pageroSettingsOf(origin, {
      clientSecret: new Secret('old'),
      clientSecretNext: new Secret('new'),
    }),
    { clock: systemClock, log, lookup: createUpstreamLookup({ allowPrivate: true }) },
  )
  const refresh = () => {
    const nowMs = systemClock.monotonicMs()
    return authorizationServer.refresh('rt-1', {
      sendBeforeMs: nowMs + 5_000,
      deadlineMs: nowMs + 30_000,
    })
  }
  return { refresh, secrets, log, server }
}

t.test('the second is tried once, and then kept', async (t) => {
  for (const answer of [GRANTED, REFUSED]) {
    const { refresh, secrets, log } = await setUp(t, (secret) =>
      secret === 'new' ? answer : BAD_SECRET,
    )
    t.match(await refresh(), { kind: answer === GRANTED ? 'granted' : 'refused' })
    t.strictSame(secrets, ['old', 'new'])
    await refresh()
    t.strictSame(secrets, ['old', 'new', 'new'], 'one call more in all')
    t.match(log.events, [{ level: 'warn', event: 'client_secret_switched' }])
    t.equal(log.events.length, 1)
  }
})

t.test('what does not speak of the secret does not make it the one', async (t) => {
  for (const [answer, kind] of [
    [BUSY, 'not_processed'],
    [FAULT, 'in_doubt'],
    [BAD_SECRET, 'rejected_client'],
  ] as const) {
    let isGateway = true
    const { refresh, secrets, log } = await setUp(t, (secret) => {
      if (!isGateway) return secret === 'old' ? GRANTED : BAD_SECRET
      return secret === 'old' ? BAD_SECRET : answer
    })
    t.match(await refresh(), { kind })
    isGateway = false
    t.match(await refresh(), { kind: 'granted' })
    t.strictSame(secrets, ['old', 'new', 'old'])
    t.strictSame(log.events, [])
  }
})

t.test('only `invalid_client` brings it into play', async (t) => {
  for (const answer of [GRANTED, REFUSED, BUSY, FAULT]) {
    const { refresh, secrets } = await setUp(t, () => answer)
    await refresh()
    t.strictSame(secrets, ['old'])
  }
})

t.test('where the second is not heard at all, the refusal of the first stands', async (t) => {
  const { refresh, secrets, log, server } = await setUp(t, () => {
    server.close()
    return BAD_SECRET
  })
  t.match(await refresh(), { kind: 'rejected_client' })
  t.strictSame(secrets, ['old'])
  t.strictSame(log.events, [])
})
