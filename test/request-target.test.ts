// The target of a proxied request: what is legal passes byte for byte, what two parsers could read in two ways does not.

import * as fc from 'fast-check'
import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { readForwardTarget, TARGET_BYTES_MAX } from '../src/request-target.ts'

const API = /^\/api(?=\/)/
const USER = /^\/v1\/users\/[^/]+\/pagero(?=\/)/

const code = (rawUrl: string, prefix = API): string => {
  try {
    readForwardTarget(rawUrl, prefix)
    return 'passes'
  } catch (error) {
    return (error as BrokerError).code
  }
}

t.test(
  'the target is what follows the prefix, and the prefix is given back as it was sent',
  (t) => {
    t.strictSame(readForwardTarget('/api/file/v1/files/7?Status=Error,Other', API), {
      prefix: '/api',
      target: '/file/v1/files/7?Status=Error,Other',
      path: '/file/v1/files/7',
    })
    t.strictSame(readForwardTarget('/v1/users/a%40b/pagero/document/v1/', USER), {
      prefix: '/v1/users/a%40b/pagero',
      target: '/document/v1/',
      path: '/document/v1/',
    })
    t.end()
  },
)

t.test('calls as Pagero documents them, and odd but legal ones, pass unchanged', (t) => {
  for (const target of [
    '/',
    '/document/v1/documents',
    '/document/v1/documents/',
    '/document/v1/documents/?limit=10',
    '/document/v1/documents?documentType=Invoice&documentType=PaymentReminder&showFetchedOnly=false',
    '/file/v1/files/12/fileparts?Status=AwaitingInteraction,Error',
    "/a/-._~!$&'()*+,=:@/b",
    '/a%20b/%2B/%C3%A9',
    '/100%25',
    '/a%2541',
    '/...',
    '/..a/b../.c',
    '/a/b.',
    '/a?',
    '/a??',
    '/a?b=//x/../y;z',
    '/a?b=%',
    '/a?filter[state]=x|y^z`{w}',
  ]) {
    t.equal(readForwardTarget(`/api${target}`, API).target, target)
  }
  t.end()
})

t.test('a path that could be read in two ways is refused', (t) => {
  for (const path of [
    '//evil.example/a',
    '/http://evil.example/a',
    '/a//b',
    '/a//',
    '/..',
    '/.',
    '/../health',
    '/a/..',
    '/a/./b',
    '/%2e%2e/health',
    '/%2E./health',
    '/..%2fhealth',
    '/..%2Fhealth',
    '/a%2fb',
    '/..\\health',
    '/a%5cb',
    '/a\\b',
    '/..;/health',
    '/a;v=1',
    '/a%3bv=1',
    '/%252e%252e%252f',
    '/%252e%252e/health',
    '/%2e%252e/a',
    '/a%252fb',
    '/a%255cb',
    '/a%253bb',
    '/a%00b',
    '/a%2500b',
    '/a%',
    '/a%2',
    '/a%zz',
    '/a#b',
    '/a b',
    '/a"b',
    '/a<b',
    '/a[b]',
    '/a|b',
    '/a^b',
    '/\u00e9',
    '/a\u0000',
    '/a\t',
    '/a\r\nX: y',
    '/a\u007f',
    '/a?b#c',
    '/a?b c',
    '/a?b\\c',
    '/a?b"c',
    '/a?b<c',
    '/a?b\u00e9',
    '/a?b\r\nX: y',
    '/a?b\u0000',
  ]) {
    t.equal(code(`/api${path}`), 'request_invalid', JSON.stringify(path))
  }
  t.end()
})

t.test('the prefix counts with its raw bytes, from the first one on', (t) => {
  for (const rawUrl of [
    '/%61pi/a',
    '/ap%69/a',
    '/API/a',
    '/api',
    '/api?a=/b',
    '/apis/a',
    '//api/a',
    '/./api/a',
    'http://evil.example/api/a',
    '*',
    '',
  ]) {
    t.equal(code(rawUrl), 'request_invalid', rawUrl)
  }
  t.equal(code('/v1/users/alice/%70agero/a', USER), 'request_invalid')
  t.equal(code('/v1/users/alice%2fpagero/a', USER), 'request_invalid')
  t.end()
})

t.test('a prefix that is found further on does not count', (t) => {
  t.equal(code('/elsewhere/api/a', /\/api(?=\/)/), 'request_invalid')
  t.equal(code('/api', /^\/api/), 'request_invalid', 'nor one with no slash behind it')
  t.end()
})

t.test('the limit is on path and query together', (t) => {
  const longest = `/api/${'a'.repeat(TARGET_BYTES_MAX - 1)}`
  t.equal(code(longest), 'passes')
  t.equal(code(`${longest}a`), 'uri_too_long')
  t.equal(code(`/api/a?${'b'.repeat(TARGET_BYTES_MAX)}`), 'uri_too_long')
  t.end()
})

// Hard cases are made likely, and then judged by a second, slower reading of the rules.
const segment = fc
  .array(
    fc.constantFrom(
      ..."abzAZ09-_~!$&'()*+,=:@.".split(''),
      '%20',
      '%2B',
      '%C3%A9',
      '%25',
      '%2e',
      '%2f',
      '%5C',
      '%3b',
      '%00',
      '%252e',
      '%41',
    ),
    { minLength: 1, maxLength: 6 },
  )
  .map((parts) => parts.join(''))
const paths = fc.array(segment, { minLength: 1, maxLength: 5 }).map((all) => `/${all.join('/')}`)
const queries = fc
  .array(fc.constantFrom(...'ab1?&=/;.,:%[]{}|'.split(''), '//', '..'), { maxLength: 12 })
  .map((parts) => (parts.length === 0 ? '' : `?${parts.join('')}`))

function decode(text: string): string {
  return Buffer.from(text, 'latin1')
    .toString('latin1')
    .split(/(%[0-9a-fA-F]{2})/)
    .map((part, i) =>
      i % 2 === 1 ? String.fromCharCode(Number.parseInt(part.slice(1), 16)) : part,
    )
    .join('')
}

function isHarmless(text: string): boolean {
  const forms = [text, decode(text), decode(decode(text))]
  return forms.every((form) => {
    const segments = form.slice(1).split('/')
    return (
      segments.length === text.slice(1).split('/').length &&
      segments.every((one) => one !== '.' && one !== '..' && !/[;\\\0]/.test(one)) &&
      segments.slice(0, -1).every((one) => one !== '')
    )
  })
}

t.test('any target passes byte for byte, or has a second reading and is refused', (t) => {
  let passed = 0
  let refused = 0
  fc.assert(
    fc.property(paths, queries, (path, query) => {
      const harmless = isHarmless(path)
      if (harmless) passed += 1
      else refused += 1
      if (!harmless) return code(`/api${path}${query}`) === 'request_invalid'
      const found = readForwardTarget(`/api${path}${query}`, API)
      return found.target === path + query && found.path === path
    }),
    { numRuns: 5_000 },
  )
  t.ok(passed > 200, `${passed} passed`)
  t.ok(refused > 200, `${refused} were refused`)
  t.end()
})
