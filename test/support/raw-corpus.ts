// Requests as no well-behaved client sends them, and legal ones that careless proxies break: bytes, what the broker says,
// and what reaches the upstream; nothing does that is not said to. `{prefix}` stands for the path of the API's root at
// the listener, `{who}` for the field lines that say who calls, `{cookie}` for a browser's session.

export interface RawCase {
  what: string
  bytes: string
  status: number
  /** The fault comes when the head has gone up: the upstream may have begun with it, and never sees an end. */
  begun?: true
  /** The request line that the upstream gets. */
  line?: string
  /** Fields that the upstream gets, by lower-case name; undefined = it must not get it. */
  fields?: Readonly<Record<string, string | undefined>>
  /** The body that the upstream gets, without its framing. */
  body?: string
  /** The listener at which it means something. */
  only?: 'public' | 'internal'
}

const HOST = 'Host: broker.example'

/** A request with a right Host and a user, and whatever else. */
function request(line: string, fields: readonly string[] = [], body = ''): string {
  return `${[line, HOST, '{who}', ...fields].join('\r\n')}\r\n\r\n${body}`
}

/** Nothing but these lines. */
function bare(...lines: readonly string[]): string {
  return `${lines.join('\r\n')}\r\n\r\n`
}

function refused(status: number, cases: Readonly<Record<string, string>>): RawCase[] {
  return Object.entries(cases).map(([what, bytes]) => ({ what, bytes, status }))
}

// ── Targets ──────────────────────────────────────────────────────────────────────────────────────

/** Other readings of a path, behind the prefix. */
const PATHS_REFUSED = [
  '',
  '//',
  '//evil.example/a',
  '///evil.example/a',
  '/http://evil.example/a',
  '/https://169.254.169.254/latest/meta-data/',
  '/a//b',
  '/a//',
  '/.',
  '/..',
  '/./a',
  '/../livez',
  '/../../livez',
  '/a/..',
  '/a/.',
  '/a/./b',
  '/a/../b',
  '/%2e',
  '/%2e/a',
  '/%2e%2e',
  '/%2e%2e/livez',
  '/%2E%2E/livez',
  '/.%2e/livez',
  '/%2e./livez',
  '/a/%2e%2e/%2e%2e/livez',
  '/..%2flivez',
  '/..%2Flivez',
  '/%2e%2e%2flivez',
  '/a%2fb',
  '/a%2Fb',
  '/%2f%2fevil.example/a',
  '/%2fevil.example/a',
  '/..%5clivez',
  '/%2e%2e%5c%2e%2e%5clivez',
  '/a%5cb',
  '/a%5Cb',
  '/..;/livez',
  '/..;a=b/livez',
  '/a;b',
  '/a;v=1/b',
  '/;/a',
  '/a%3bb',
  '/a%3Bb',
  '/%252e%252e/livez',
  '/%252e%252e%252flivez',
  '/%252E%252E/livez',
  '/%2e%252e/livez',
  '/..%252flivez',
  '/a%252fb',
  '/a%252Fb',
  '/a%255cb',
  '/a%253bb',
  '/a%00',
  '/a%00b',
  '/%00/a',
  '/a%2500b',
  '/a%',
  '/a%2',
  '/a%zz',
  '/a%u002f',
  '/%c0%ae%c0%ae/livez',
  '/%c0%afa',
  '/%e0%80%ae%e0%80%ae/livez',
  '/%ff',
  '/a%80b',
  '/a%ed%a0%80b',
  '/a"b',
  '/a<b>',
  '/a[b]',
  '/a{b}',
  '/a|b',
  '/a^b',
  '/a`b',
  '/a#b',
  '/#',
  '/a%2e%2e/../b',
  '/a?b#c',
  '/a?#',
  '/a?b"c',
  '/a?b<c',
  '/a?b>c',
  '/@evil.example/../a',
  '/a/%2e%2e',
  '/a/%2e%2e/',
  '/a/..%00/b',
  '/a/%2e%2e;/b',
]

/** Bytes in a target that llhttp or the broker refuses, before or at routing. */
const TARGET_BYTES_REFUSED: Readonly<Record<string, string>> = {
  'a backslash': '/a\\b',
  'dots and a backslash': '/..\\livez',
  'a backslash in the query': '/a?b=\\c',
  'a tabulator': '/a\tb',
  'a space': '/a b',
  'two spaces and more': '/a  b  c',
  NUL: '/a\0b',
  'a control byte': '/a\u0001b',
  DEL: '/a\u007fb',
  'a byte beyond ASCII': '/a\u00e9b',
  'UTF-8': '/\u00c3\u00a9',
  'a byte beyond ASCII in the query': '/a?b=\u00e9',
  'a carriage return': '/a\rb',
  'NUL in the query': '/a?b=\0',
}

/** Targets that pass byte for byte. */
const TARGETS_LEGAL = [
  '/',
  '/a',
  '/a/',
  '/document/v1/documents',
  '/document/v1/documents/',
  '/document/v1/documents/?limit=10',
  '/document/v1/documents?documentType=Invoice&documentType=PaymentReminder&showFetchedOnly=false',
  '/file/v1/files/12/fileparts?Status=AwaitingInteraction,Error',
  '/file/v1/files/12/fileparts?Status=AwaitingInteraction%2CError',
  "/a/-._~!$&'()*+,=:@/b",
  '/a+b',
  '/a%2Bb',
  '/a%2bb',
  '/a%20b',
  '/a%C3%A9b',
  '/a%c3%a9b',
  '/%F0%9F%A7%BE',
  '/100%25',
  '/a%2541',
  '/a%25%32',
  '/...',
  '/..a',
  '/a..',
  '/.a',
  '/a.',
  '/a/...%20/b',
  '/.well-known/x',
  '/a/%7e',
  '/%61',
  '/a:b',
  '/a:443/b',
  '/@evil.example/a',
  '/evil.example/a',
  '/user@evil.example',
  '/x/style.css',
  '/*',
  '/a?',
  '/a??',
  '/a?b',
  '/a?b=',
  '/a?=b',
  '/a?&&',
  '/a?b=1&b=2&b=1',
  '/a?b=//evil.example//c',
  '/a?b=http://evil.example/',
  '/a?b=/../c',
  '/a?b=%2e%2e%2f',
  '/a?b=..;c',
  '/a?b;c=d',
  '/a?b=%2B+%20',
  '/a?b=a,b,c',
  '/a?b=%00',
  '/a?b=%',
  '/a?b=%zz',
  '/a?b=%ff',
  '/a?filter[state]=x|y^z`{w}',
  "/a?b='1'",
  '/a?b=~!$*()_-.:@/?',
  '/a?access_token=x',
  `/a?${'b'.repeat(8_000)}`,
  `/${'a'.repeat(8_000)}`,
]

const targets: RawCase[] = [
  ...PATHS_REFUSED.map((path) => ({
    what: `path ${JSON.stringify(path)}`,
    bytes: request(`GET {prefix}${path} HTTP/1.1`),
    // Without a slash behind the prefix there is no such route.
    status: path === '' ? 404 : 400,
  })),
  ...Object.entries(TARGET_BYTES_REFUSED).map(([what, path]) => ({
    what: `${what} in the target`,
    bytes: request(`GET {prefix}${path} HTTP/1.1`),
    status: 400,
  })),
  ...TARGETS_LEGAL.map((target) => ({
    what: `target ${target.slice(0, 80)}`,
    bytes: request(`GET {prefix}${target} HTTP/1.1`),
    status: 200,
    line: `GET ${target} HTTP/1.1`,
  })),
  ...refused(400, {
    'absolute form': request('GET http://broker.example{prefix}/a HTTP/1.1'),
    'absolute form of another host': request('GET http://evil.example{prefix}/a HTTP/1.1'),
    'absolute form with a user': request('GET http://a@evil.example{prefix}/a HTTP/1.1'),
    'absolute form of another scheme': request('GET ftp://evil.example{prefix}/a HTTP/1.1'),
    'absolute form with TLS': request('GET https://evil.example:443/a HTTP/1.1'),
    'a scheme in capitals': request('GET HTTP://evil.example{prefix}/a HTTP/1.1'),
    'authority form of another method': request('GET evil.example:443 HTTP/1.1'),
    'asterisk form': request('OPTIONS * HTTP/1.1'),
    'asterisk form of another method': request('GET * HTTP/1.1'),
    'a target without a slash': request('GET a HTTP/1.1'),
    'a target that is a query': request('GET ?a HTTP/1.1'),
    'no target': request('GET HTTP/1.1'),
    'an empty target': request('GET  HTTP/1.1'),
    'an IPv4-mapped address': request('GET http://[::ffff:127.0.0.1]/a HTTP/1.1'),
    'a decimal address': request('GET http://2130706433/a HTTP/1.1'),
    'an octal address': request('GET http://0177.0.0.1/a HTTP/1.1'),
    'metadata as absolute form': request('GET http://169.254.169.254/latest/ HTTP/1.1'),
    'a user before the path': request('GET @evil.example{prefix}/a HTTP/1.1'),
    'a port before the path': request('GET :80{prefix}/a HTTP/1.1'),
    'a backslash before the prefix': request('GET \\{prefix}/a HTTP/1.1'),
    'a dot segment before the prefix': request('GET /.{prefix}/a#x HTTP/1.1'),
  }),
  ...refused(404, {
    'a dot segment before the prefix, unescaped': request('GET /.{prefix}/a HTTP/1.1'),
    'a climb into the prefix': request('GET /a/..{prefix}/a HTTP/1.1'),
    'an empty segment before the prefix': request('GET /{prefix}/a HTTP/1.1'),
    'an escaped slash in the place of the prefix': request('GET /x%2f{prefix}/a HTTP/1.1'),
  }),
  ...refused(414, {
    'a target beyond the limit': request(`GET {prefix}/${'a'.repeat(8_200)} HTTP/1.1`),
    'a query beyond the limit': request(`GET {prefix}/a?${'b'.repeat(8_200)} HTTP/1.1`),
  }),
  ...refused(431, {
    'a target beyond the header limit': request(`GET {prefix}/${'a'.repeat(17_000)} HTTP/1.1`),
  }),
  {
    what: 'the prefix with an escape',
    bytes: request('GET /%61pi/a HTTP/1.1'),
    status: 400,
    only: 'public',
  },
  {
    what: 'the prefix in capitals',
    bytes: request('GET /API/a HTTP/1.1'),
    status: 404,
    only: 'public',
  },
  {
    what: 'the internal prefix at the public listener',
    bytes: request('GET /v1/users/alice/pagero/a HTTP/1.1'),
    status: 404,
    only: 'public',
  },
  {
    what: 'the public prefix at the internal listener',
    bytes: request('GET /api/a HTTP/1.1'),
    status: 404,
    only: 'internal',
  },
  {
    what: 'the internal prefix with an escape',
    bytes: request('GET /v1/users/alice/p%61gero/a HTTP/1.1'),
    status: 400,
    only: 'internal',
  },
  ...['..', '.', '%2e%2e', 'a%2fb', 'a%00', 'a%20b', '%zz', 'a%2525', '"'].map((user) => ({
    what: `user ${user}`,
    bytes: request(`GET /v1/users/${user}/pagero/a HTTP/1.1`),
    status: 400,
    only: 'internal' as const,
  })),
]

// ── Request lines and versions ───────────────────────────────────────────────────────────────────

const requestLines: RawCase[] = [
  ...refused(400, {
    'the preface of HTTP/2': 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    'HTTP/2.0': request('GET {prefix}/a HTTP/2.0'),
    'HTTP/0.9': request('GET {prefix}/a HTTP/0.9'),
    'HTTP/1.2': request('GET {prefix}/a HTTP/1.2'),
    'HTTP/3': request('GET {prefix}/a HTTP/3'),
    'a version of two digits': request('GET {prefix}/a HTTP/1.10'),
    'a version without a dot': request('GET {prefix}/a HTTP/11'),
    'a version in lower case': request('GET {prefix}/a http/1.1'),
    ICE: request('GET {prefix}/a ICE/1.0'),
    'no version': request('GET {prefix}/a'),
    'a tabulator before the version': request('GET {prefix}/a\tHTTP/1.1'),
    'a tabulator behind the method': request('GET\t{prefix}/a HTTP/1.1'),
    'a space behind the version': request('GET {prefix}/a HTTP/1.1 '),
    'a space before the method': request(' GET {prefix}/a HTTP/1.1'),
    'NUL before the method': request('\0GET {prefix}/a HTTP/1.1'),
    'a method in lower case': request('get {prefix}/a HTTP/1.1'),
    'a method that nobody knows': request('BREW {prefix}/a HTTP/1.1'),
    'a method with a colon': request('GET: {prefix}/a HTTP/1.1'),
    'no method': request('{prefix}/a HTTP/1.1'),
    'no HTTP': bare('hello'),
    'an answer': bare('HTTP/1.1 200 OK', 'Content-Length: 0'),
    'a TLS greeting': '\u0016\u0003\u0001\u0000\u00a5\u0001\u0000\u0000\u00a1\u0003\u0003\r\n\r\n',
    'a line end in the line': request('GET {prefix}/a\r\n HTTP/1.1'),
    'the line of PROXY before the request': `PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n${request('GET {prefix}/a HTTP/1.1')}`,
  }),
  {
    // RFC 9112 section 3 allows to read words; the target has no space in it.
    what: 'two spaces before the version',
    bytes: request('GET {prefix}/a  HTTP/1.1'),
    status: 200,
    line: 'GET /a HTTP/1.1',
  },
  {
    // For Node's parser it is HTTP/1.0 by another name.
    what: 'another protocol',
    bytes: request('GET {prefix}/a RTSP/1.0'),
    status: 200,
    line: 'GET /a HTTP/1.1',
  },
  {
    what: 'line ends before the request line',
    bytes: `\r\n\r\n${request('GET {prefix}/a HTTP/1.1')}`,
    status: 200,
    line: 'GET /a HTTP/1.1',
  },
  {
    what: 'HTTP/1.0 with keep-alive',
    bytes: request('GET {prefix}/a HTTP/1.0', ['Connection: keep-alive']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { via: '1.0 pagero-token-broker' },
  },
]

// ── Methods ──────────────────────────────────────────────────────────────────────────────────────

const OVERRIDES = ['X-HTTP-Method-Override', 'X-HTTP-Method', 'X-Method-Override', '_method']
const URL_OVERRIDES = ['X-Original-URL', 'X-Rewrite-URL', 'X-Forwarded-Prefix', 'X-Original-Method']

const methods: RawCase[] = [
  ...['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'].map((method) => ({
    what: method,
    bytes: request(`${method} {prefix}/a HTTP/1.1`),
    status: 200,
    line: `${method} /a HTTP/1.1`,
  })),
  ...['TRACE', 'PROPFIND', 'MKCOL', 'SEARCH', 'LINK', 'PURGE', 'SOURCE', 'QUERY'].map((method) => ({
    what: method,
    bytes: request(`${method} {prefix}/a HTTP/1.1`),
    status: 405,
  })),
  { what: 'OPTIONS', bytes: request('OPTIONS {prefix}/a HTTP/1.1'), status: 405 },
  {
    what: 'TRACE that may go no further',
    bytes: request('TRACE {prefix}/a HTTP/1.1', ['Max-Forwards: 0']),
    status: 405,
  },
  { what: 'CONNECT', bytes: request('CONNECT evil.example:443 HTTP/1.1'), status: 405 },
  { what: 'CONNECT of a path', bytes: request('CONNECT {prefix}/a HTTP/1.1'), status: 405 },
  ...[...OVERRIDES, ...URL_OVERRIDES].map((name) => ({
    what: `${name} changes nothing`,
    bytes: request('GET {prefix}/a HTTP/1.1', [`${name}: DELETE`]),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { [name.toLowerCase()]: undefined },
  })),
  {
    what: 'an override in the query is the query',
    bytes: request('GET {prefix}/a?_method=DELETE HTTP/1.1'),
    status: 200,
    line: 'GET /a?_method=DELETE HTTP/1.1',
  },
]

// ── Header lines ─────────────────────────────────────────────────────────────────────────────────

const get = 'GET {prefix}/a HTTP/1.1'

/** Field lines that cannot be parsed in one way only. */
const FIELD_LINES_REFUSED: Readonly<Record<string, string>> = {
  'a space before the colon': 'X-A : b',
  'a tabulator before the colon': 'X-A\t: b',
  'no name': ': b',
  'no colon': 'X-A',
  'a space in the name': 'X A: b',
  'NUL in the name': 'X\0A: b',
  'NUL in the value': 'X-A: b\0c',
  'a control byte in the value': 'X-A: b\u0001c',
  'DEL in the value': 'X-A: b\u007fc',
  'a byte beyond ASCII in the name': 'X-\u00e9: b',
  'a parenthesis in the name': 'X(A): b',
  'an at sign in the name': 'X@A: b',
  'a line that is folded': 'X-A: b\r\n c',
  'a line that is folded with a tabulator': 'X-A: b\r\n\tc',
  'a line that begins with a space': ' X-A: b',
  'a carriage return alone in the value': 'X-A: b\rX-B: c',
  'a line feed alone in the value': 'X-A: b\nX-B: c',
  'a line feed alone and an injected Host': 'X-A: b\nHost: evil.example',
  'a quote in the name': '"X-A": b',
  'a slash in the name': 'X/A: b',
}

/** Fields that are for the broker, or for nobody. */
const FIELDS_DROPPED = [
  'Forwarded: for=192.0.2.1;host=evil.example',
  'X-Forwarded-For: 192.0.2.1',
  'X-Forwarded-Host: evil.example',
  'X-Forwarded-Proto: http',
  'X-Real-IP: 192.0.2.1',
  'X-Api-Key: canary',
  'Proxy-Authorization: Basic canary',
  'Proxy-Connection: keep-alive',
  'Keep-Alive: timeout=999',
  'TE: trailers, gzip',
  'Trailer: X-A',
  'Upgrade: websocket',
  'Upgrade: h2c',
  'HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA',
  'Max-Forwards: 0',
  'Referer: https://evil.example/',
  'User-Agent: canary',
  'X_Authorization: canary',
  'Content_Length: 5',
  'Transfer_Encoding: chunked',
  'X-Request-Id: canary',
  'Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01',
  'Baggage: canary=1',
  'Cache-Control: max-age=0',
  'Pragma: no-cache',
  'From: canary@example.com',
  'Date: Tue, 15 Nov 1994 08:12:31 GMT',
  'Server: canary',
  'Set-Cookie: canary=1',
  'Via-Proxy: canary',
  'Content-Location: /b',
  'Authorization-Token: canary',
  'X-CSRF-Token: canary',
]

const headerFields: RawCase[] = [
  ...Object.entries(FIELD_LINES_REFUSED).map(([what, line]) => ({
    what,
    bytes: request(get, [line]),
    status: 400,
  })),
  ...FIELDS_DROPPED.map((line) => ({
    what: `${line} does not pass`,
    bytes: request(get, [line]),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { [line.slice(0, line.indexOf(':')).toLowerCase()]: undefined },
  })),
  {
    what: 'no Host',
    bytes: bare(get, '{who}'),
    status: 400,
  },
  { what: 'two Hosts', bytes: request(get, ['Host: evil.example']), status: 400 },
  { what: 'the same Host twice', bytes: request(get, [HOST]), status: 400 },
  { what: 'two Hosts in two cases', bytes: request(get, ['hOsT: evil.example']), status: 400 },
  {
    what: 'another Host',
    bytes: bare(get, 'Host: evil.example', '{who}'),
    status: 200,
    line: 'GET /a HTTP/1.1',
  },
  {
    what: 'an empty Host',
    bytes: bare(get, 'Host:', '{who}'),
    status: 200,
    line: 'GET /a HTTP/1.1',
  },
  {
    what: 'two Authorization fields',
    bytes: request(get, ['Authorization: Bearer a', 'authorization: Bearer b']),
    status: 400,
  },
  {
    what: "a client's own token",
    bytes: request(get, ['Authorization: Bearer evil']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    only: 'public',
  },
  ...refused(400, {
    'Content-Type twice': request(get, ['Content-Type: a/b', 'Content-Type: c/d']),
    'Range twice': request(get, ['Range: bytes=0-1', 'Range: bytes=2-3']),
    'If-Range twice': request(get, ['If-Range: "a"', 'If-Range: "b"']),
    'an expectation that nobody knows': request(get, ['Expect: miracles']),
    'an expectation behind a known one': request(get, ['Expect: 100-continue, miracles']),
  }),
  {
    what: 'lists in several lines become one',
    bytes: request(get, ['Accept: a/b', 'Prefer: x', 'accept: c/d;q=0.1', 'PREFER: y']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { accept: 'a/b, c/d;q=0.1', prefer: 'x, y' },
  },
  {
    what: 'allowed fields keep their bytes',
    bytes: request(get, [
      'ACCEPT:application/json;q="1,2"',
      'If-None-Match:  W/"a,b" , "\u00e9"\t',
      "Accept-Language: sv-SE, sv;q=0.9, *;q=0'",
    ]),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: {
      accept: 'application/json;q="1,2"',
      'if-none-match': 'W/"a,b" , "\u00e9"',
      'accept-language': "sv-SE, sv;q=0.9, *;q=0'",
    },
  },
  {
    what: 'no Content-Type at all',
    bytes: request('POST {prefix}/a HTTP/1.1', ['Content-Length: 2'], '{}'),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'content-type': undefined, 'content-length': '2' },
    body: '{}',
  },
  ...[
    'multipart/form-data; boundary="a b:c/d?e=f"',
    'multipart/form-data; boundary=----WebKitFormBoundaryABC',
    'multipart/mixed;boundary=a;charset="utf-8"',
    'application/json',
    'APPLICATION/JSON; Charset=UTF-8',
    'text/plain',
    'nonsense',
    '',
  ].map((type) => ({
    what: `Content-Type ${type}`,
    bytes: request(
      'POST {prefix}/a HTTP/1.1',
      [`Content-Type: ${type}`, 'Content-Length: 4'],
      '--a\r',
    ),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'content-type': type },
    body: '--a\r',
  })),
  {
    what: 'Via of others',
    bytes: request(get, ['Via: 1.1 vegur, 2 cache.example (x)']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { via: '1.1 pagero-token-broker' },
  },
  ...[
    'Via: 1.1 pagero-token-broker',
    'Via: 1.1 a, HTTP/1.1 Pagero-Token-Broker (c), 1.1 b',
    'vIA:\t1.0\tpagero-token-broker',
    'Via: 1.1 a\r\nVia: 1.1 pagero-token-broker',
  ].map((line) => ({
    what: `a loop: ${JSON.stringify(line)}`,
    bytes: request(get, [line]),
    status: 508,
  })),
  { what: 'one field of 17 KiB', bytes: request(get, [`X-A: ${'b'.repeat(17_000)}`]), status: 431 },
  { what: 'a name of 17 KiB', bytes: request(get, [`${'X'.repeat(17_000)}: b`]), status: 431 },
  {
    what: '2,500 fields',
    bytes: request(
      get,
      Array.from({ length: 2_500 }, (_, i) => `X-${i}: ${i}`),
    ),
    status: 431,
  },
  {
    what: '200 fields, and an allowed one behind them',
    bytes: request(get, [...Array.from({ length: 200 }, (_, i) => `X-${i}: ${i}`), 'Accept: a/b']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { accept: 'a/b', 'x-7': undefined },
  },
]

// ── Connection, upgrades, expectations ───────────────────────────────────────────────────────────

const connection: RawCase[] = [
  ...[
    'authorization',
    'Authorization, Content-Length, Via',
    'host',
    'via',
    'keep-alive, x-csrf, cookie, authorization',
    ', ,authorization,,',
  ].map((options) => ({
    what: `Connection: ${options}`,
    bytes: request(
      'POST {prefix}/a HTTP/1.1',
      [`Connection: ${options}`, 'Content-Length: 2'],
      '{}',
    ),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'content-length': '2', via: '1.1 pagero-token-broker' },
    body: '{}',
  })),
  {
    what: 'a field that Connection names',
    bytes: request(get, ['Connection: accept, X-A', 'Accept: a/b', 'X-A: b', 'Prefer: c']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { accept: undefined, 'x-a': undefined, prefer: 'c' },
  },
  {
    what: 'fields that two Connection lines name',
    bytes: request(get, ['Connection: accept', 'Accept: a', 'connection: PREFER', 'Prefer: c']),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { accept: undefined, prefer: undefined },
  },
  {
    what: 'an upgrade to h2c',
    bytes: request(get, [
      'Connection: Upgrade, HTTP2-Settings',
      'Upgrade: h2c',
      'HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA',
    ]),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { upgrade: undefined, 'http2-settings': undefined, connection: 'keep-alive' },
  },
  {
    what: 'an upgrade to a web socket',
    bytes: request(get, [
      'Connection: Upgrade',
      'Upgrade: websocket',
      'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==',
      'Sec-WebSocket-Version: 13',
    ]),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { upgrade: undefined, 'sec-websocket-key': undefined, connection: 'keep-alive' },
  },
  {
    what: 'an upgrade with a body that is a request',
    bytes: request(
      'POST {prefix}/a HTTP/1.1',
      ['Connection: Upgrade', 'Upgrade: h2c', 'Content-Length: 22'],
      'GET /evil HTTP/1.1\r\n\r\n',
    ),
    status: 200,
    line: 'POST /a HTTP/1.1',
    body: 'GET /evil HTTP/1.1\r\n\r\n',
    fields: { upgrade: undefined },
  },
]

// ── Framing ──────────────────────────────────────────────────────────────────────────────────────

const post = 'POST {prefix}/a HTTP/1.1'
const CHUNKED = 'Transfer-Encoding: chunked'

/** A request that must never become one of its own. */
const SMUGGLED = 'GET {prefix}/smuggled HTTP/1.1\r\nHost: broker.example\r\n{who}\r\n\r\n'

/** Framing fields that may be read in two ways. */
const FRAMING_REFUSED: Readonly<Record<string, readonly string[]>> = {
  'length and chunks': ['Content-Length: 4', CHUNKED],
  'chunks and length': [CHUNKED, 'Content-Length: 4'],
  'a length of 0 and chunks': ['Content-Length: 0', CHUNKED],
  'two lengths': ['Content-Length: 4', 'Content-Length: 5'],
  'the same length twice': ['Content-Length: 5', 'Content-Length: 5'],
  'a list of lengths': ['Content-Length: 5, 5'],
  'a signed length': ['Content-Length: +5'],
  'a negative length': ['Content-Length: -1'],
  'a length in hexadecimal': ['Content-Length: 0x5'],
  'a length with a fraction': ['Content-Length: 5.0'],
  'a length with an exponent': ['Content-Length: 5e0'],
  'a length with a space in it': ['Content-Length: 5 5'],
  'an empty length': ['Content-Length:'],
  'a length of no digits': ['Content-Length: five'],
  'a length with an underscore': ['Content-Length: 1_0'],
  'a length beyond 64 bits': ['Content-Length: 99999999999999999999999'],
  'a length in quotes': ['Content-Length: "5"'],
  'a length with a semicolon': ['Content-Length: 5;'],
  'a space before the colon of a length': ['Content-Length : 5'],
  xchunked: ['Transfer-Encoding: xchunked'],
  identity: ['Transfer-Encoding: identity'],
  'chunked and identity': ['Transfer-Encoding: chunked, identity'],
  'identity and chunked': ['Transfer-Encoding: identity, chunked'],
  'gzip and chunked': ['Transfer-Encoding: gzip, chunked'],
  gzip: ['Transfer-Encoding: gzip'],
  'two codings in two lines': [CHUNKED, 'Transfer-Encoding: gzip'],
  'chunked twice': ['Transfer-Encoding: chunked, chunked'],
  'chunked twice in two lines': [CHUNKED, CHUNKED],
  'chunked with a parameter': ['Transfer-Encoding: chunked;q=1'],
  'chunked in quotes': ['Transfer-Encoding: "chunked"'],
  'an empty coding': ['Transfer-Encoding:'],
  'a coding with a vertical tab': ['Transfer-Encoding: \u000bchunked'],
  'a coding that is folded': ['Transfer-Encoding:\r\n chunked'],
  'a coding with a space before its colon': ['Transfer-Encoding : chunked'],
  'a coding behind a line feed': ['X-A: b\nTransfer-Encoding: chunked'],
  'chunked with a dot': ['Transfer-Encoding: chunked.'],
  'chunked behind a comma': ['Transfer-Encoding: ,chunked'],
}

/** Bodies in chunks that may be read in two ways. */
const CHUNKS_REFUSED: Readonly<Record<string, string>> = {
  'a size of no digits': 'x\r\nabcd\r\n0\r\n\r\n',
  'an empty size': '\r\nabcd\r\n0\r\n\r\n',
  'a signed size': '+4\r\nabcd\r\n0\r\n\r\n',
  'a negative size': '-4\r\nabcd\r\n0\r\n\r\n',
  'a size with 0x': '0x4\r\nabcd\r\n0\r\n\r\n',
  'a size with a space before it': ' 4\r\nabcd\r\n0\r\n\r\n',
  'a size with a space behind it': '4 \r\nabcd\r\n0\r\n\r\n',
  'a size beyond 64 bits': '11111111111111111\r\nabcd\r\n0\r\n\r\n',
  'a size that ends with a line feed': '4\nabcd\r\n0\r\n\r\n',
  'a size that ends with a carriage return': '4\rabcd\r\n0\r\n\r\n',
  'an extension that ends with a line feed': '4;a\nabcd\r\n0\r\n\r\n',
  'data that is longer than its size': '4\r\nabcde\r\n0\r\n\r\n',
  'data that ends with a line feed': '4\r\nabcd\n0\r\n\r\n',
  'data that ends with nothing': '4\r\nabcd0\r\n\r\n',
  'a size with an underscore': '0_4\r\nabcd\r\n0\r\n\r\n',
  'a size with NUL': '4\0\r\nabcd\r\n0\r\n\r\n',
  'an extension with NUL': '4;\0\r\nabcd\r\n0\r\n\r\n',
  'a trailer with a space before its colon': '4\r\nabcd\r\n0\r\nX-A : b\r\n\r\n',
  'a trailer with NUL': '4\r\nabcd\r\n0\r\nX-A: \0\r\n\r\n',
  'a last chunk that ends with a line feed': '4\r\nabcd\r\n0\n\r\n',
  'an extension of 20 KiB': `4;${'a'.repeat(20_000)}\r\nabcd\r\n0\r\n\r\n`,
  'trailers of 20 KiB': `4\r\nabcd\r\n0\r\nX-A: ${'b'.repeat(20_000)}\r\n\r\n`,
}

/** Bodies in chunks that are one body. */
const CHUNKS_LEGAL: Readonly<Record<string, readonly [sent: string, body: string]>> = {
  'one chunk': ['4\r\nabcd\r\n0\r\n\r\n', 'abcd'],
  'several chunks': ['1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n0\r\n\r\n', 'abcd'],
  'no chunk': ['0\r\n\r\n', ''],
  'zeroes before a size': ['0004\r\nabcd\r\n000\r\n\r\n', 'abcd'],
  'a size in capitals': ['A\r\nabcdefghij\r\n0\r\n\r\n', 'abcdefghij'],
  'an extension': ['4;a=b;c="d"\r\nabcd\r\n0;e\r\n\r\n', 'abcd'],
  'trailers, which do not pass': ['4\r\nabcd\r\n0\r\nX-A: b\r\nAuthorization: c\r\n\r\n', 'abcd'],
  'a chunk that is a request': [
    '26\r\nGET /evil HTTP/1.1\r\nHost: evil.example\r\n0\r\n\r\n',
    'GET /evil HTTP/1.1\r\nHost: evil.example',
  ],
  'a chunk that looks like the last': ['7\r\n0\r\n\r\nab\r\n0\r\n\r\n', '0\r\n\r\nab'],
}

const framing: RawCase[] = [
  ...Object.entries(FRAMING_REFUSED).map(([what, lines]) => ({
    what,
    // As the chunks end, or the length does, a second request would begin.
    bytes: request(post, lines, `0\r\n\r\n${SMUGGLED}`),
    status: 400,
  })),
  ...Object.entries(CHUNKS_REFUSED).map(([what, body]) => ({
    what: `chunks: ${what}`,
    bytes: request(post, [CHUNKED], body),
    status: what.startsWith('trailers of') ? 431 : 400,
    // The parser passes on what came before its fault.
    begun: true as const,
  })),
  ...Object.entries(CHUNKS_LEGAL).map(([what, [sent, body]]) => ({
    what: `chunks: ${what}`,
    bytes: request(post, [CHUNKED], sent),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'x-a': undefined, trailer: undefined },
    body,
  })),
  {
    what: 'chunks in HTTP/1.0',
    bytes: request('POST {prefix}/a HTTP/1.0', [CHUNKED], `0\r\n\r\n${SMUGGLED}`),
    status: 400,
  },
  {
    what: 'chunked in capitals',
    bytes: request(post, ['Transfer-Encoding: CHUNKED'], '4\r\nabcd\r\n0\r\n\r\n'),
    status: 400,
  },
  ...['GET', 'HEAD', 'DELETE', 'POST', 'PUT', 'PATCH'].map((method) => ({
    what: `${method} with a body that is a request`,
    bytes: request(
      `${method} {prefix}/a HTTP/1.1`,
      ['Content-Length: 40'],
      'GET /evil HTTP/1.1\r\nHost: evil.example\r\n',
    ),
    status: 200,
    line: `${method} /a HTTP/1.1`,
    body: 'GET /evil HTTP/1.1\r\nHost: evil.example\r\n',
    fields: { 'content-length': '40' },
  })),
  {
    what: 'a length of 0',
    bytes: request(post, ['Content-Length: 0']),
    status: 200,
    line: 'POST /a HTTP/1.1',
    body: '',
  },
  {
    what: 'zeroes before a length',
    bytes: request(post, ['Content-Length: 0004'], 'abcd'),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'content-length': '4' },
    body: 'abcd',
  },
  {
    what: 'spaces around a length',
    bytes: request(post, ['Content-Length:  4\t'], 'abcd'),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { 'content-length': '4' },
    body: 'abcd',
  },
  {
    what: 'a body of all bytes',
    bytes: request(
      post,
      ['Content-Length: 256'],
      String.fromCharCode(...Array.from({ length: 256 }, (_, i) => i)),
    ),
    status: 200,
    line: 'POST /a HTTP/1.1',
    body: String.fromCharCode(...Array.from({ length: 256 }, (_, i) => i)),
  },
  {
    what: 'Expect: 100-continue with its body behind it',
    bytes: request(post, ['Expect: 100-continue', 'Content-Length: 4'], 'abcd'),
    status: 200,
    line: 'POST /a HTTP/1.1',
    fields: { expect: undefined, 'content-length': '4' },
    body: 'abcd',
  },
  {
    what: 'line feeds alone end the lines',
    bytes: request(get).replaceAll('\r\n', '\n'),
    status: 400,
  },
  {
    what: 'line feeds alone end the head',
    bytes: `${request(get).slice(0, -4)}\n\n`,
    status: 400,
  },
]

// ── Who calls ────────────────────────────────────────────────────────────────────────────────────

const SESSION = '__Host-broker-session'

const callers: RawCase[] = [
  { what: 'nobody', bytes: bare(get, HOST), status: 401, only: 'internal' },
  {
    what: 'a browser that is not logged in',
    bytes: bare(get, HOST, 'X-CSRF: 1'),
    status: 401,
    only: 'public',
  },
  {
    what: 'a session without X-CSRF',
    bytes: bare(get, HOST, 'Cookie: {cookie}'),
    status: 403,
    only: 'public',
  },
  {
    what: 'a session with another X-CSRF',
    bytes: bare(get, HOST, 'Cookie: {cookie}', 'X-CSRF: 1, 1'),
    status: 403,
    only: 'public',
  },
  ...[
    'Authorization: Bearer',
    'Authorization: Bearer pgb_fleet_',
    'Authorization: Bearer pgb_fleet_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',
    'Authorization: Basic cGdiOmE=',
    'Authorization: bearer\tpgb_fleet_A',
    `Authorization: Bearer ${'a'.repeat(4_000)}`,
    'X-Api-Key: a',
  ].map((line) => ({
    what: `credential ${line.slice(0, 60)}`,
    bytes: bare(get, HOST, line),
    status: 401,
    only: 'internal' as const,
  })),
  {
    what: 'a session at the internal listener',
    bytes: bare(get, HOST, `Cookie: ${SESSION}=AAAA`, 'X-CSRF: 1'),
    status: 401,
    only: 'internal',
  },
  {
    what: 'another cookie beside the session',
    bytes: bare(get, HOST, 'Cookie: a=b; {cookie};c=d', 'X-CSRF: 1'),
    status: 200,
    line: 'GET /a HTTP/1.1',
    fields: { cookie: undefined, 'x-csrf': undefined },
    only: 'public',
  },
  ...[
    `Cookie: ${SESSION}=`,
    `Cookie: ${SESSION}=AAAA`,
    `Cookie: ${SESSION.toUpperCase()}=AAAA`,
    `Cookie: ${SESSION}`,
    `Cookie: ${SESSION}=${'A'.repeat(8_000)}`,
    `Cookie: ${Array.from({ length: 500 }, (_, i) => `c${i}=${i}`).join('; ')}`,
  ].map((line) => ({
    what: `cookies ${line.slice(0, 60)}`,
    bytes: bare(get, HOST, line, 'X-CSRF: 1'),
    status: 401,
    only: 'public' as const,
  })),
  ...[
    ['Sec-Fetch-Site: cross-site'],
    ['Sec-Fetch-Site: same-site'],
    ['Origin: https://evil.example'],
    ['Origin: null'],
  ].map((lines) => ({
    what: `a page elsewhere: ${lines.join()}`,
    bytes: request(post, lines),
    status: 403,
    only: 'public' as const,
  })),
  {
    what: 'two session cookies in one line',
    bytes: bare(get, HOST, `Cookie: ${SESSION}=AAAA; {cookie}`, 'X-CSRF: 1'),
    status: 400,
    only: 'public',
  },
  {
    what: 'two Cookie lines',
    bytes: bare(get, HOST, `Cookie: ${SESSION}=AAAA`, 'Cookie: {cookie}', 'X-CSRF: 1'),
    status: 400,
    only: 'public',
  },
]

/** All of them. */
export const RAW_CORPUS: readonly RawCase[] = [
  ...targets,
  ...requestLines,
  ...methods,
  ...headerFields,
  ...connection,
  ...framing,
  ...callers,
]

/** The bytes of a case at a listener. */
export function bytesOf(
  { bytes }: Pick<RawCase, 'bytes'>,
  { prefix, who, cookie }: { prefix: string; who: string; cookie: string },
): Buffer {
  const filled = bytes
    .replaceAll('{prefix}', prefix)
    .replaceAll('{who}', who)
    .replaceAll('{cookie}', cookie)
  return Buffer.from(filled, 'latin1')
}
