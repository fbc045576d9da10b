// What passes the forwarder in the head of a request and of an answer, seen on the wire on both sides.

import * as fc from 'fast-check'
import t from 'tap'
import { BrokerError } from '../src/errors.ts'
import { PSEUDONYM, requestText, sendRaw, startProxy } from './support/proxy.ts'
import { answer, startUpstream } from './support/upstream.ts'

t.test('path and query reach the upstream byte for byte', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  // Without a 0 or an f, so that no %25 begins an escape which is refused.
  const bytes = fc.string({
    unit: fc.constantFrom(..."abz19-_~!$&'()*+,=:@".split(''), '%20', '%2B', '%C3%A9', '%25'),
    minLength: 1,
    maxLength: 12,
  })
  const targets = fc
    .tuple(fc.array(bytes, { minLength: 1, maxLength: 4 }), fc.boolean(), fc.option(bytes))
    .map(([segments, slash, query]) => {
      const path = `/${segments.join('/')}${slash ? '/' : ''}`
      return query === null ? path : `${path}?${query}//..;&a=1&a=2,3[]`
    })
  await fc.assert(
    fc.asyncProperty(targets, async (target) => {
      const { status } = await sendRaw(proxy.port, requestText(`GET /api${target}`))
      return status === 200 && upstream.calls.at(-1)?.line === `GET ${target} HTTP/1.1`
    }),
    { numRuns: 200 },
  )
  const long = `/${'a'.repeat(8_000)}`
  t.equal((await sendRaw(proxy.port, requestText(`GET /api${long}`))).status, 200)
  t.equal(upstream.calls.at(-1)?.target, long)
})

t.test('a target that could leave the API is refused, and nothing is called', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  for (const target of [
    '/api//evil.example/a',
    '/api/http://evil.example/a',
    '/api/../health',
    '/api/%2e%2e/health',
    '/api/..%2fhealth',
    '/api/..\\health',
    '/api/..;/health',
    '/api/%252e%252e%252f',
    '/api/a%00',
    '/api/a#b',
    '/api/%zz',
    '/api/%ff',
    '/%61pi/a',
    'http://evil.example/api/a',
    '//evil.example/api/a',
  ]) {
    const answered = await sendRaw(proxy.port, requestText(`GET ${target}`))
    t.ok([400, 404].includes(answered.status), `${target}: ${answered.status}`)
    t.same(answered.values('content-type'), ['application/problem+json; charset=utf-8'], target)
  }
  t.equal((await sendRaw(proxy.port, requestText(`GET /api/${'a'.repeat(9_000)}`))).status, 414)
  t.equal(upstream.connections(), 0)
})

t.test('request fields pass by the list, and the broker adds one token and its Via', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url, tokens: ['the-token'] })
  const dropped = [
    'Authorization',
    'Cookie',
    'X-Api-Key',
    'X-CSRF',
    'X-Forwarded-For',
    'X-Forwarded-Host',
    'X-Forwarded-Proto',
    'Forwarded',
    'X-Real-Ip',
    'X-Original-Url',
    'X-Rewrite-Url',
    'X-HTTP-Method-Override',
    'X-Request-Id',
    'Proxy-Authorization',
    'Proxy-Connection',
    'Keep-Alive',
    'TE',
    'Trailer',
    'Upgrade',
    'Max-Forwards',
    'Origin',
    'Referer',
    'User-Agent',
    'Sec-Fetch-Site',
    'Traceparent',
    'Accept_Language',
    'Content_Type',
    'X-Anything',
  ]
  const { status } = await sendRaw(
    proxy.port,
    requestText('GET /api/a', [
      ...dropped.map((name) => `${name}: canary`),
      'ACCEPT: application/json, application/pdf;q=0.5',
      'Accept: image/png',
      'accept-language: sv , en;q=0.5',
      'Accept-Encoding: gzip',
      'If-None-Match: "a", W/"b"',
      'If-Modified-Since: Mon, 23 Nov 2026 10:00:00 GMT',
      'Prefer: respond-async',
      'Range: bytes=0-9',
      'Via: 1.1 office-proxy',
    ]),
  )
  t.equal(status, 200)
  t.strictSame(upstream.calls[0]?.fields, [
    ['host', `127.0.0.1:${upstream.port}`],
    ['connection', 'keep-alive'],
    ['accept', 'application/json, application/pdf;q=0.5, image/png'],
    ['accept-language', 'sv , en;q=0.5'],
    ['accept-encoding', 'gzip'],
    ['if-none-match', '"a", W/"b"'],
    ['if-modified-since', 'Mon, 23 Nov 2026 10:00:00 GMT'],
    ['prefer', 'respond-async'],
    ['range', 'bytes=0-9'],
    ['via', `1.1 ${PSEUDONYM}`],
    ['authorization', 'Bearer the-token'],
  ])
})

t.test('a field that Connection names is dropped, but not what the broker adds', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url, tokens: ['the-token'] })
  await sendRaw(
    proxy.port,
    'POST /api/a HTTP/1.1\r\nHost: a\r\nConnection: close, Prefer , authorization, via\r\n' +
      'Connection: content-length, host\r\nPrefer: canary\r\nContent-Length: 3\r\n\r\nabc',
  )
  const [call] = upstream.calls
  t.same(call?.values('prefer'), [])
  t.same(call?.values('authorization'), ['Bearer the-token'])
  t.same(call?.values('via'), [`1.1 ${PSEUDONYM}`])
  t.same(call?.values('content-length'), ['3'])
  t.same(call?.values('host'), [`127.0.0.1:${upstream.port}`])
  t.equal(String(await call?.body), 'abc')
})

t.test('a field that may stand once is refused when it stands twice', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  for (const [name, value] of [
    ['If-Modified-Since', 'Mon, 23 Nov 2026 10:00:00 GMT'],
    ['Range', 'bytes=0-1'],
    ['If-Range', '"a"'],
    ['Content-Type', 'text/plain'],
  ] as const) {
    const answered = await sendRaw(
      proxy.port,
      requestText('GET /api/a', [`${name}: ${value}`, `${name}: ${value}`]),
    )
    t.equal(answered.status, 400, name)
    t.match(answered.body, '"code":"request_invalid"', name)
    t.same(answered.values('proxy-status'), [`${PSEUDONYM}; error=http_request_error`], name)
  }
  t.equal(upstream.calls.length, 0)
})

t.test('a request that has passed this broker already is a loop', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  for (const via of [
    `1.1 ${PSEUDONYM}`,
    `HTTP/1.1 ${PSEUDONYM.toUpperCase()} (comment)`,
    `1.0 office, 1.1 ${PSEUDONYM}, 1.1 edge`,
  ]) {
    const answered = await sendRaw(proxy.port, requestText('GET /api/a', [`Via: ${via}`]))
    t.equal(answered.status, 508, via)
    t.same(answered.values('proxy-status'), [`${PSEUDONYM}; error=proxy_loop_detected`])
  }
  t.equal(upstream.calls.length, 0)
  const other = await sendRaw(proxy.port, requestText('GET /api/a', [`Via: 1.1 not-${PSEUDONYM}`]))
  t.equal(other.status, 200)
})

t.test('answer fields pass by the list; what could act on the browser does not', async (t) => {
  const dropped = [
    'Set-Cookie',
    'Set-Cookie2',
    'Access-Control-Allow-Origin',
    'Access-Control-Allow-Credentials',
    'Clear-Site-Data',
    'Strict-Transport-Security',
    'Alt-Svc',
    'Service-Worker-Allowed',
    'Refresh',
    'Link',
    'NEL',
    'Report-To',
    'Authentication-Info',
    'WWW-Authenticate',
    'Authorization',
    'Server',
    'X-Powered-By',
    'Keep-Alive',
    'Proxy-Authenticate',
    'Upgrade',
    'Via',
    'Content-Location',
    'Cache-Control',
    'Expires',
    'Vary',
    'Content-Security-Policy',
    'Proxy-Status',
    'X-Frame-Options',
    'X-Anything',
  ]
  const upstream = await startUpstream(t, (call) =>
    answer(call, 207, '{}', [
      ...dropped.map((name) => `${name}: canary`),
      'Connection: X-Correlation-Id',
      'X-Correlation-Id: canary',
      'Content-Type: application/json',
      'Content-Type: text/html;canary',
      'Content-Disposition: attachment; filename="\u00e5.pdf"',
      'ETag: W/"7"',
      'Last-Modified: Mon, 23 Nov 2026 10:00:00 GMT',
      'Date: Mon, 23 Nov 2026 10:00:01 GMT',
      'Retry-After: 7',
      'Allow: GET',
      'Allow: PUT',
      'X-Request-Id: r-1',
    ]),
  )
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const answered = await sendRaw(proxy.port, requestText('GET /api/a'))
  t.equal(answered.status, 207)
  t.notMatch(JSON.stringify(answered.fields), 'canary')
  t.strictSame(answered.fields, [
    ['content-type', 'application/json'],
    ['content-disposition', 'attachment; filename="\u00e5.pdf"'],
    ['etag', 'W/"7"'],
    ['last-modified', 'Mon, 23 Nov 2026 10:00:00 GMT'],
    ['date', 'Mon, 23 Nov 2026 10:00:01 GMT'],
    ['retry-after', '7'],
    ['allow', 'GET, PUT'],
    ['x-request-id', 'r-1'],
    ['content-length', '2'],
    ['referrer-policy', 'no-referrer'],
    ['cross-origin-resource-policy', 'same-origin'],
    ['cross-origin-opener-policy', 'same-origin'],
    [
      'content-security-policy',
      "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    ],
    ['cache-control', 'private, no-store'],
    ['x-content-type-options', 'nosniff'],
    ['proxy-status', `${PSEUDONYM}; received-status=207`],
    ['connection', 'close'],
  ])
  t.equal(answered.body, '{}')
})

t.test('content that a browser may run is sandboxed, other content is not', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    const type = Buffer.from(call.target.slice(1), 'base64url').toString('latin1')
    answer(call, 200, 'x', type === 'none' ? [] : [`Content-Type: ${type}`])
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const isSandboxed = async (type: string) => {
    const path = Buffer.from(type, 'latin1').toString('base64url')
    const answered = await sendRaw(proxy.port, requestText(`GET /api/${path}`))
    const policies = answered.values('content-security-policy')
    t.equal(policies.length, 1, type)
    return policies[0]?.startsWith("sandbox; default-src 'none'")
  }
  for (const type of [
    'text/html',
    'Text/HTML;charset=utf-8',
    'application/xhtml+xml',
    'image/svg+xml',
    'text/xml',
    'application/xml',
    'application/atom+xml',
    'multipart/x-mixed-replace',
    'none',
  ]) {
    t.equal(await isSandboxed(type), true, type)
  }
  for (const type of [
    'application/json',
    'application/pdf;name="a.xml"',
    'image/png',
    'text/plain',
    'multipart/form-data; boundary="html"',
  ]) {
    t.equal(await isSandboxed(type), false, type)
  }
})

t.test('a Location within the API becomes one at the broker, another is dropped', async (t) => {
  const upstream = await startUpstream(t, (call) => {
    const location = Buffer.from(call.target.slice(3), 'base64url').toString('latin1')
    answer(call, 302, '', [`Location: ${location}`])
  })
  const surfaces = [
    { listener: 'public', prefix: '/api' },
    { listener: 'internal', prefix: '/v1/users/a%6Cice/pagero' },
  ] as const
  for (const { listener, prefix } of surfaces) {
    const proxy = await startProxy(t, { apiUrl: upstream.url, listener })
    const locations = async (location: string) => {
      const target = `${prefix}/b/${Buffer.from(location, 'latin1').toString('base64url')}`
      const answered = await sendRaw(proxy.port, requestText(`GET ${target}`))
      t.equal(answered.status, 302)
      return answered.values('location')
    }
    t.same(await locations('/file/v1/files/7?a=1'), [`${prefix}/file/v1/files/7?a=1`])
    t.same(await locations('c'), [`${prefix}/b/c`])
    t.same(await locations(`${upstream.url}/x%2By#z`), [`${prefix}/x%2By#z`])
    t.same(await locations(`//127.0.0.1:${upstream.port}/x`), [`${prefix}/x`])
    t.same(await locations('../../../../x'), [`${prefix}/x`])
    for (const foreign of [
      'https://evil.example/x',
      '//evil.example/x',
      `https://127.0.0.1:${upstream.port}/x`,
      `http://127.0.0.1:${upstream.port + 1}/x`,
      'javascript:alert(1)',
      'http://[',
    ]) {
      t.same(await locations(foreign), [], foreign)
    }
  }
  t.ok(
    upstream.calls.every(({ target }) => target.startsWith('/b/')),
    'none was followed',
  )
})

/** A head without its end, for fields that a test writes itself. */
function head(line: string): string {
  return `${line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n`
}

t.test('framing is made anew, with one length or one chunked coding', async (t) => {
  const upstream = await startUpstream(t, async (call) => {
    await call.body
    answer(call, 200)
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const framing = async (text: string) => {
    const { status } = await sendRaw(proxy.port, text)
    t.equal(status, 200, text)
    const call = upstream.calls.at(-1)
    return [
      call?.values('content-length').join('|'),
      call?.values('transfer-encoding').join('|'),
      String(await call?.body),
    ]
  }
  t.same(await framing(`${head('POST /api/a')}Content-Length: 00003\r\n\r\nabc`), ['3', '', 'abc'])
  t.same(await framing(`${head('POST /api/a')}\r\n`), ['0', '', ''])
  t.same(await framing(`${head('PUT /api/a')}Content-Length: 0\r\n\r\n`), ['0', '', ''])
  t.same(await framing(`${head('GET /api/a')}\r\n`), ['', '', ''])
  t.same(await framing(`${head('HEAD /api/a')}\r\n`), ['', '', ''])
  t.same(await framing(`${head('DELETE /api/a')}Content-Length: 0\r\n\r\n`), ['', '', ''])
  t.same(await framing(`${head('DELETE /api/a')}Content-Length: 2\r\n\r\nab`), ['2', '', 'ab'])
  t.same(await framing('POST /api/a HTTP/1.0\r\nHost: a\r\nContent-Length: 2\r\n\r\nab'), [
    '2',
    '',
    'ab',
  ])
  t.same(upstream.calls.at(-1)?.values('via'), [`1.0 ${PSEUDONYM}`])
  const chunked =
    'Transfer-Encoding: chunked\r\nTrailer: X-Canary\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX-Canary: 1\r\n\r\n'
  const [length, coding, body] = await framing(`${head('PATCH /api/a')}${chunked}`)
  t.equal(body, 'abcde')
  t.ok(
    (length === '' && coding === 'chunked') || (length === '5' && coding === ''),
    'one of the two',
  )
  t.notMatch(upstream.calls.at(-1)?.received().toString() ?? '', 'X-Canary')
})

t.test('a body that holds a second request is one request to the upstream', async (t) => {
  const upstream = await startUpstream(t, async (call) => {
    await call.body
    answer(call, 200)
  })
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  const inner = 'GET /admin HTTP/1.1\r\nHost: a\r\n\r\n'
  for (const method of ['GET', 'POST', 'DELETE']) {
    const before = upstream.calls.length
    await sendRaw(
      proxy.port,
      `${method} /api/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: ${inner.length}\r\n\r\n${inner}`,
    )
    t.equal(upstream.calls.length, before + 1, method)
    t.equal(String(await upstream.calls.at(-1)?.body), inner, method)
  }
  for (const framing of [
    'Content-Length: 3\r\nTransfer-Encoding: chunked',
    'Content-Length: 3\r\nContent-Length: 4',
    'Transfer-Encoding: xchunked',
    'Transfer-Encoding: chunked, identity',
    'Content-Length: +3',
  ]) {
    const before = upstream.calls.length
    const answered = await sendRaw(
      proxy.port,
      `POST /api/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n${framing}\r\n\r\nabc`,
    )
    t.equal(answered.status, 400, framing)
    t.equal(upstream.calls.length, before, framing)
  }
})

t.test('only the six methods exist, and a method override changes nothing', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url })
  for (const method of ['OPTIONS', 'TRACE', 'PROPFIND']) {
    t.equal((await sendRaw(proxy.port, requestText(`${method} /api/a`))).status, 405, method)
  }
  t.equal(upstream.calls.length, 0)
  for (const method of ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE']) {
    t.equal((await sendRaw(proxy.port, requestText(`${method} /api/a`))).status, 200, method)
    t.equal(upstream.calls.at(-1)?.line, `${method} /a HTTP/1.1`)
  }
})

t.test('the route asks for authorization with the raw path, before anything else', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const asked: string[] = []
  const proxy = await startProxy(t, {
    apiUrl: upstream.url,
    parts: {
      async authorize(_request, { method, path }) {
        asked.push(`${method} ${path}`)
        throw new BrokerError('session_required', 'There is no session.')
      },
    },
  })
  const answered = await sendRaw(
    proxy.port,
    requestText('POST /api/a%20b?c=d', ['Content-Type: nonsense', 'Content-Length: 0']),
  )
  t.equal(answered.status, 401)
  t.match(answered.body, '"code":"session_required"')
  t.same(answered.values('proxy-status'), [`${PSEUDONYM}; error=http_request_denied`])
  t.same(asked, ['POST /a%20b'])
  t.equal(upstream.calls.length, 0)
})

t.test('a user key that is none is refused on the internal listener', async (t) => {
  const upstream = await startUpstream(t, (call) => answer(call, 200))
  const proxy = await startProxy(t, { apiUrl: upstream.url, listener: 'internal' })
  for (const user of ['a%20b', 'a%2Fb', 'a%2500', 'a'.repeat(256)]) {
    const answered = await sendRaw(proxy.port, requestText(`GET /v1/users/${user}/pagero/a`))
    t.equal(answered.status, 400, user)
  }
  t.equal(upstream.calls.length, 0)
  const answered = await sendRaw(proxy.port, requestText('GET /v1/users/%61lice/pagero/a'))
  t.equal(answered.status, 200)
  t.equal(upstream.calls[0]?.target, '/a')
})
