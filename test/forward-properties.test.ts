// Properties of what passes through the forwarder: any target, any header field in any case, any cookies.

import * as fc from 'fast-check'
import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { answerFields, fieldOf, passedRequestFields } from '../src/forward-headers.ts'
import { readCookie } from '../src/http/session-cookie.ts'
import { requestText, sendRaw, startProxy } from './support/proxy.ts'
import { answer, startUpstream } from './support/upstream.ts'

const PASSED_UP = [
  'accept',
  'accept-encoding',
  'accept-language',
  'content-encoding',
  'content-language',
  'content-type',
  'if-match',
  'if-modified-since',
  'if-none-match',
  'if-range',
  'if-unmodified-since',
  'prefer',
  'range',
]
const DANGEROUS = [
  'authorization',
  'cookie',
  'host',
  'connection',
  'keep-alive',
  'transfer-encoding',
  'content-length',
  'upgrade',
  'te',
  'trailer',
  'expect',
  'proxy-authorization',
  'x-forwarded-for',
  'x-http-method-override',
  'set-cookie',
  'www-authenticate',
  'access-control-allow-origin',
  'clear-site-data',
  'strict-transport-security',
  'server',
  'refresh',
  'link',
]

const TOKEN = 'abcdefghijklmnopqrstuvwxyz0123456789-_.~!'
const name = fc
  .oneof(
    fc.constantFrom(...PASSED_UP),
    fc.constantFrom(...DANGEROUS),
    fc.string({ unit: fc.constantFrom(...TOKEN.split('')), minLength: 1, maxLength: 20 }),
  )
  .chain((lower) =>
    fc.array(fc.boolean(), { minLength: lower.length, maxLength: lower.length }).map((capitals) =>
      lower
        .split('')
        .map((c, i) => (capitals[i] ? c.toUpperCase() : c))
        .join(''),
    ),
  )
const value = fc.string({ unit: fc.constantFrom(...'ab ,;="/*\u00e9'.split('')), maxLength: 12 })
const rawFields = fc.array(fc.tuple(name, value), { maxLength: 12 }).map((pairs) => pairs.flat())

t.test('only listed request fields pass, once each and in lower case, with their bytes', (t) => {
  fc.assert(
    fc.property(rawFields, (raw) => {
      let passed: string[]
      try {
        passed = passedRequestFields(raw, 'broker')
      } catch (error) {
        return error instanceof BrokerError
      }
      const names = passed.filter((_, i) => i % 2 === 0)
      return (
        names.every((one) => PASSED_UP.includes(one)) &&
        new Set(names).size === names.length &&
        names.every((one) => {
          const sent = raw.filter((_, i) => i % 2 === 1 && raw[i - 1]?.toLowerCase() === one)
          return fieldOf(passed, one) === sent.join(', ')
        })
      )
    }),
    { numRuns: 2_000 },
  )
  t.pass('for 2,000 lists of fields')
  t.end()
})

/** The list as whoever reads an answer gives it on. */
function receivedOf(raw: readonly string[]): Record<string, string[]> {
  // Without a prototype: a field may have any name.
  const received = Object.create(null) as Record<string, string[]>
  for (let i = 0; i < raw.length; i += 2) {
    const lower = (raw[i] ?? '').toLowerCase()
    received[lower] = [...(received[lower] ?? []), raw[i + 1] ?? '']
  }
  return received
}

t.test('no dangerous answer field passes, whatever its case and whatever Connection says', (t) => {
  fc.assert(
    fc.property(rawFields, fc.constantFrom(200, 204, 301, 404, 500), (raw, status) => {
      const fields = answerFields(receivedOf(raw), {
        status,
        viaPseudonym: 'broker',
        requestUrl: 'https://api.example/a',
        locationPrefix: '/api',
        brokerFields: ['referrer-policy', 'no-referrer'],
      })
      const names = fields.filter((_, i) => i % 2 === 0)
      return (
        names.every((one) => one === 'content-length' || !DANGEROUS.includes(one)) &&
        new Set(names).size === names.length &&
        fieldOf(fields, 'cache-control') === 'private, no-store' &&
        fieldOf(fields, 'referrer-policy') === 'no-referrer' &&
        fieldOf(fields, 'proxy-status') === `broker; received-status=${status}`
      )
    }),
    { numRuns: 2_000 },
  )
  t.pass('for 2,000 lists of fields')
  t.end()
})

t.test('a cookie is read whole or not at all, whatever stands around it', (t) => {
  const other = fc
    .tuple(
      fc.string({ unit: fc.constantFrom(...'abS_-'.split('')), maxLength: 4 }),
      fc.string({ unit: fc.constantFrom(...'ab"= '.split('')), maxLength: 6 }),
    )
    .map(([key, text]) => `${key}=${text}`)
    .filter((pair) => !/^\s*S\s*=/.test(pair))
  fc.assert(
    fc.property(fc.array(other), fc.array(other), fc.integer({ min: 0, max: 2 }), (a, b, own) => {
      const cookie = [...a, ...Array.from({ length: own }, () => 'S=x=y'), ...b].join('; ')
      try {
        return readCookie({ cookie }, 'S') === (own === 0 ? undefined : 'x=y')
      } catch (error) {
        return own === 2 && error instanceof BrokerError
      }
    }),
    { numRuns: 2_000 },
  )
  t.pass('for 2,000 lists of cookies')
  t.end()
})

t.test('over the wire, a target arrives as it was sent, or not at all', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const unit = fc.constantFrom(
    ...'abZ09-._~!$&\'()*+,=:@/?;\\#"<>[]{}|^`%'.split(''),
    '%2B',
    '%20',
    '%2f',
    '%2e',
    '%25',
    '%C3%A9',
    '/..',
    '//',
    '\u00e9',
  )
  await fc.assert(
    fc.asyncProperty(fc.string({ unit, maxLength: 16 }), async (rest) => {
      const before = upstream.calls.length
      const { status } = await sendRaw(proxy.port, requestText(`GET /api/${rest}`))
      const calls = upstream.calls.slice(before)
      return status === 200
        ? calls.length === 1 && calls[0]?.line === `GET /${rest} HTTP/1.1`
        : status === 400 && calls.length === 0
    }),
    { numRuns: 500 },
  )
  t.pass('for 500 targets')
})
