// Where the broker connects to: a name that is turned to an address of this network gets neither a call nor a token.
// The resolver is the test's, the sockets are real.

import { randomBytes } from 'node:crypto'
import type { LookupFunction } from 'node:net'
import { mock } from 'node:test'
import { generateKeyPair, SignJWT } from 'jose'
import t from 'tap'
import { systemClock } from '../src/clock.ts'
import { createAuthorizationServer } from '../src/pagero.ts'
import { CONNECTION_LIFE_MS, createUpstreamLookup } from '../src/upstream-address.ts'
import { pageroSettingsOf } from './support/pagero-settings.ts'
import { requestText, sendRaw, startProxy } from './support/proxy.ts'
import { silentLog } from './support/silent-log.ts'
import { answer, startUpstream } from './support/upstream.ts'

/** A resolver that answers every name with these addresses, until they are changed. */
function resolverOf(...addresses: string[]): { resolve: LookupFunction; addresses: string[] } {
  return {
    addresses,
    resolve: (_hostname, _options, callback) =>
      callback(
        null,
        addresses.map((address) => ({ address, family: address.includes(':') ? 6 : 4 })),
      ),
  }
}

function lookUp(lookup: LookupFunction, hostname: string, all = true): Promise<string> {
  return new Promise((resolve) => {
    lookup(hostname, { all }, (error, found) => {
      if (error !== null) resolve(String(error.code))
      else resolve(typeof found === 'string' ? found : found.map(({ address }) => address).join())
    })
  })
}

const PUBLIC = [
  '93.184.215.14',
  '172.15.0.1',
  '172.32.0.1',
  '2606:4700::1111',
  '64:ff9b::5db8:d70e',
]
const PRIVATE = [
  '10.0.0.1',
  '100.64.0.1',
  '127.0.0.1',
  '127.255.255.254',
  '172.16.0.1',
  '172.31.255.255',
  '192.168.1.1',
  '::1',
  '::7f00:1',
  '::ffff:10.0.0.1',
  '::ffff:7f00:1',
  '64:ff9b::a00:1',
  'fc00::1',
  'fdff::1',
]
const IMPOSSIBLE = [
  '0.0.0.0',
  '100.100.100.200',
  '168.63.129.16',
  '169.254.169.254',
  '192.0.0.1',
  '198.18.0.1',
  '224.0.0.1',
  '240.0.0.1',
  '255.255.255.255',
  '::',
  '::ffff:169.254.169.254',
  '64:ff9b::a9fe:a9fe',
  '2001:db8::1',
  '2002:a00:1::',
  'fd00:ec2::254',
  'fe80::1',
  'fe80::1%eth0',
  'ff02::1',
]

t.test('addresses of private networks are refused unless they are allowed', async (t) => {
  const outcome = (address: string, allowPrivate: boolean, hostname = 'api.example') =>
    lookUp(createUpstreamLookup({ allowPrivate, ...resolverOf(address) }), hostname)
  for (const address of PUBLIC) {
    t.equal(await outcome(address, false), address)
    t.equal(await outcome(address, false, 'localhost'), 'ADDRESS_REFUSED', `localhost: ${address}`)
  }
  for (const address of PRIVATE) {
    t.equal(await outcome(address, false), 'ADDRESS_REFUSED', address)
    t.equal(await outcome(address, true), address, `${address}, allowed`)
  }
  for (const address of IMPOSSIBLE) {
    t.equal(await outcome(address, false), 'ADDRESS_REFUSED', address)
    t.equal(await outcome(address, true), 'ADDRESS_REFUSED', `${address}, private ones allowed`)
    t.equal(await outcome(address, true, 'localhost'), 'ADDRESS_REFUSED', `localhost: ${address}`)
  }
  t.equal(await outcome('127.0.0.1', false, 'localhost'), '127.0.0.1')
  t.equal(await outcome('::1', false, 'localhost'), '::1')
})

t.test('one refused address among several refuses the name', async (t) => {
  const { resolve } = resolverOf('93.184.215.14', '10.0.0.1')
  const lookup = createUpstreamLookup({ allowPrivate: false, resolve })
  t.equal(await lookUp(lookup, 'api.example'), 'ADDRESS_REFUSED')
  t.equal(await lookUp(lookup, 'api.example', false), 'ADDRESS_REFUSED')
  const none = createUpstreamLookup({ allowPrivate: false, ...resolverOf() })
  t.equal(await lookUp(none, 'api.example'), 'ADDRESS_REFUSED', 'an empty answer is none')
})

t.test('one address is given to whoever asks for one, and a failure as it is', async (t) => {
  const { resolve } = resolverOf('93.184.215.14', '93.184.215.15')
  const lookup = createUpstreamLookup({ allowPrivate: false, resolve })
  t.equal(await lookUp(lookup, 'api.example', false), '93.184.215.14')
  t.equal(await lookUp(lookup, 'api.example'), '93.184.215.14,93.184.215.15')
  const system = createUpstreamLookup({ allowPrivate: false })
  t.match(await lookUp(system, 'no-such-host.invalid'), /^(?:ENOTFOUND|EAI_AGAIN)$/)
})

t.test('an API whose name leads into this network gets no call', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, {
    apiUrl: `http://api.example:${upstream.port}`,
    lookup: createUpstreamLookup({ allowPrivate: false, ...resolverOf('127.0.0.1') }),
  })
  const refused = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.equal(refused.status, 502)
  t.match(refused.values('proxy-status'), [/error=destination_ip_prohibited/])
  t.equal(upstream.connections(), 0)

  const allowing = await startProxy(t, {
    apiUrl: `http://api.example:${upstream.port}`,
    lookup: createUpstreamLookup({ allowPrivate: true, ...resolverOf('127.0.0.1') }),
  })
  t.equal((await sendRaw(allowing.port, requestText('GET /api/a'))).status, 200)
})

t.test('a name that is turned while the broker runs is noticed within a minute', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const resolver = resolverOf('127.0.0.1')
  const proxy = await startProxy(t, {
    apiUrl: `http://localhost:${upstream.port}`,
    lookup: createUpstreamLookup({ allowPrivate: false, resolve: resolver.resolve }),
  })
  const call = async () => (await sendRaw(proxy.port, requestText('GET /api/a'))).status
  t.equal(await call(), 200)
  resolver.addresses.splice(0, 1, '169.254.169.254')
  t.equal(await call(), 200, 'on the connection that was there')
  t.equal(upstream.connections(), 1)

  mock.timers.enable({ apis: ['Date'], now: Date.now() + CONNECTION_LIFE_MS + 1 })
  t.teardown(() => mock.timers.reset())
  t.equal(await call(), 502, 'an old connection is not used again')
  t.equal(upstream.calls.length, 2)
  t.equal(upstream.connections(), 1)
})

t.test('codes, tokens and secrets are not posted into this network', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200, '{}'))
  const origin = `http://sso.example:${upstream.port}`
  const server = createAuthorizationServer(
    pageroSettingsOf(origin, { jwksUrl: `${origin}/jwks` }),
    {
      clock: systemClock,
      log: silentLog,
      lookup: createUpstreamLookup({ allowPrivate: false, ...resolverOf('127.0.0.1') }),
    },
  )
  const nowMs = systemClock.monotonicMs()
  t.match(await server.exchangeCode('code', undefined), { kind: 'not_processed' })
  t.match(
    await server.refresh('token', { sendBeforeMs: nowMs + 5_000, deadlineMs: nowMs + 5_000 }),
    { kind: 'not_processed' },
    'and the grant is as good as before',
  )
  t.equal(await server.revoke('token'), false, 'it is tried again later')
  const idToken = await new SignJWT({ nonce: 'n' })
    .setProtectedHeader({ alg: 'RS256', kid: 'k' })
    .setIssuedAt()
    .sign((await generateKeyPair('RS256')).privateKey)
  t.match(await server.readIdToken(idToken, { nonceHash: randomBytes(32), now: new Date() }), {
    invalid: 'its keys could not be fetched',
  })
  t.equal(upstream.connections(), 0)
})
