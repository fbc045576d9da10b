// The corpus once more, through Debian's nginx and HAProxy before both listeners, on connections that they share among
// their clients. What the broker refuses by itself reaches the API through neither, what is legal arrives as it does
// directly, and nothing becomes two requests. Where a front reads a request in its own way, it is named here.

import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { createTestDatabase } from './support/database.ts'
import { freePorts } from './support/free-ports.ts'
import { hasHaproxy, startHaproxy } from './support/haproxy.ts'
import { hasNginx, startNginx } from './support/nginx.ts'
import { type RawBroker, type Seat, startRawBroker } from './support/raw-broker.ts'
import { exchange } from './support/raw-client.ts'
import { bytesOf, RAW_CORPUS, type RawCase } from './support/raw-corpus.ts'
import type { UpstreamCall } from './support/upstream.ts'

const LANES = 24
/** How long the fronts wait for the rest of a request, and the client for theirs. */
const FRONT_PATIENCE_SECONDS = 5
const QUIET_MS = 20_000

/** Where a front does not pass on what it was sent, by the names of the cases. The broker gets one plain request, or none. */
interface Readings {
  /** Refused by the broker, but understood by the front, which writes anew what it has understood: one request. */
  understood: readonly string[]
  /** The same, where the front finds the end of the body before the bytes behind it: those are a request of their own. */
  endsEarlier: readonly string[]
  /** Legal, and refused by the front. */
  refused: readonly string[]
  /** Legal, and passed on with other fields. */
  otherFields: readonly string[]
}

interface Front {
  name: string
  isInstalled: boolean
  readings: Readings
  /** Starts it before these ports of the broker; resolves with its own for each. */
  start(t: Test, brokerPorts: readonly number[]): Promise<number[]>
}

/** Both take a line feed alone for the end of a line, as RFC 9112 section 2.2 allows, and know chunks that only they would. */
const BARE_LINE_FEEDS = [
  'a line feed alone in the value',
  'line feeds alone end the lines',
  'line feeds alone end the head',
  'chunks: a last chunk that ends with a line feed',
  'chunks: a size that ends with a line feed',
  'chunks: a size with a space behind it',
  'chunks: an extension that ends with a line feed',
  'chunks: an extension with NUL',
  'chunks: an extension of 20 KiB',
  'chunks: data that ends with a line feed',
]

const nginx: Front = {
  name: 'nginx',
  isInstalled: hasNginx,
  readings: {
    understood: [
      ...BARE_LINE_FEEDS,
      'HTTP/1.2',
      'a version of two digits',
      'a space behind the version',
      'absolute form',
      'absolute form of another host',
      'absolute form of another scheme',
      'a scheme in capitals',
      // Lines that it cannot read it leaves out, trailers among them.
      'no colon',
      'a byte beyond ASCII in the name',
      'a parenthesis in the name',
      'a quote in the name',
      'a slash in the name',
      'an at sign in the name',
      'chunks: a trailer with NUL',
      'chunks: a trailer with a space before its colon',
      'chunks: trailers of 20 KiB',
      // Expectations it answers itself.
      'an expectation that nobody knows',
      'an expectation behind a known one',
      'chunked in capitals',
    ],
    endsEarlier: ['a coding behind a line feed'],
    refused: ['an empty Host', 'another protocol', 'spaces around a length'],
    otherFields: [
      // It speaks HTTP/1.1 to the broker, and takes no field out for Connection.
      'HTTP/1.0 with keep-alive',
      'a field that Connection names',
      'fields that two Connection lines name',
    ],
  },
  async start(t, brokerPorts) {
    const ports = await freePorts(brokerPorts.length)
    const servers = brokerPorts.map(
      (brokerPort, index) => `
        upstream broker-${index} { server 127.0.0.1:${brokerPort}; keepalive 16; }
        server {
          listen 127.0.0.1:${ports[index]};
          location / {
            proxy_pass http://broker-${index};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_request_buffering off;
          }
        }`,
    )
    const http = `
      access_log off;
      client_header_timeout ${FRONT_PATIENCE_SECONDS}s;
      client_body_timeout ${FRONT_PATIENCE_SECONDS}s;
      large_client_header_buffers 4 32k;
      ${servers.join('')}`
    await startNginx(t, { http, port: ports[0] ?? 0 })
    return ports
  },
}

const haproxy: Front = {
  name: 'HAProxy',
  isInstalled: hasHaproxy,
  readings: {
    understood: [
      ...BARE_LINE_FEEDS,
      'HTTP/1.2',
      'HTTP/2.0',
      'a tabulator before the version',
      'a tabulator behind the method',
      'the same Host twice',
      'a line that is folded',
      'a line that is folded with a tabulator',
      // As RFC 9112 section 6.3 allows: the length is taken out, and the connection ends behind the answer.
      'length and chunks',
      'chunks and length',
      'a length of 0 and chunks',
    ],
    endsEarlier: [
      'a coding behind a line feed',
      'a coding that is folded',
      // As RFC 9112 section 6.3 allows, too: one length, said twice.
      'the same length twice',
      'a list of lengths',
    ],
    // It takes 100 fields.
    refused: ['another protocol', '200 fields, and an allowed one behind them'],
    otherFields: [],
  },
  async start(t, brokerPorts) {
    const ports = await freePorts(brokerPorts.length)
    const configuration = `
global
  maxconn 500
  tune.bufsize 32768
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client ${FRONT_PATIENCE_SECONDS}s
  timeout http-request ${FRONT_PATIENCE_SECONDS}s
  timeout server 30s
${brokerPorts
  .map(
    (brokerPort, index) => `
listen broker-${index}
  bind 127.0.0.1:${ports[index]}
  server broker 127.0.0.1:${brokerPort}`,
  )
  .join('\n')}
`
    await startHaproxy(t, { configuration, port: ports[0] ?? 0 })
    return ports
  },
}

/** The calls that reached the upstream whole; one that was begun and broken off did not. */
async function wholeOf(calls: readonly UpstreamCall[]): Promise<UpstreamCall[]> {
  const isWhole = await Promise.all(
    calls.map((call) =>
      Promise.race([
        call.body.then(() => true),
        call.closed.then(() => false),
        delay(QUIET_MS, true, { ref: false }),
      ]),
    ),
  )
  return calls.filter((_call, index) => isWhole[index])
}

/** What both sides have seen of a case and of a request of ours behind it. */
interface Seen {
  /** Answers of the API. */
  answers: number
  /** Without ours. */
  calls: UpstreamCall[]
  /** Ours. */
  after: number
}

async function look(raw: RawCase, seat: Seat, upstream: RawBroker['upstream']): Promise<Seen> {
  const before = upstream.calls.length
  const after = `GET ${seat.prefix}/after HTTP/1.1\r\nHost: broker.example\r\n${seat.who}\r\nConnection: close\r\n\r\n`
  const method = /^[A-Z]+/.exec(raw.bytes.trimStart())?.[0] ?? 'GET'
  const { answers } = await exchange(
    seat.port,
    Buffer.concat([bytesOf(raw, seat), Buffer.from(after, 'latin1')]),
    { methods: [method], answersMax: Number.POSITIVE_INFINITY, quietMs: QUIET_MS },
  )
  const own = await wholeOf(
    upstream.calls
      .slice(before)
      .filter((call) => call.values('authorization').includes(`Bearer ${seat.accessToken}`)),
  )
  const calls = own.filter(({ line }) => line !== 'GET /after HTTP/1.1')
  return {
    answers: answers.filter(({ fields }) =>
      /received-status/.test(fields.get('proxy-status') ?? ''),
    ).length,
    calls,
    after: own.length - calls.length,
  }
}

/** The request lines that the upstream must have got for a case, ours left out. */
function linesOf({ what, line, bytes }: RawCase, { readings }: Front): string[] {
  if (readings.refused.includes(what)) return []
  const plain = `${/[A-Z]+/.exec(bytes)?.[0]} /a HTTP/1.1`
  if (readings.understood.includes(what)) return [plain]
  if (readings.endsEarlier.includes(what)) return [plain, 'GET /smuggled HTTP/1.1']
  return line === undefined ? [] : [line]
}

async function compare(t: Test, raw: RawCase, front: Front, seat: Seat, seen: Seen): Promise<void> {
  const name = `${seat.listener}: ${raw.what}`
  const { calls } = seen
  t.strictSame(
    calls.map(({ line }) => line),
    linesOf(raw, front),
    name,
  )
  t.ok(seen.after <= 1, `${name}: ours comes once at most`)
  // A request that became two would have an answer too many, and on a shared connection it would be somebody else's.
  t.equal(seen.answers, calls.length + seen.after, `${name}: to each call its answer`)
  const [call] = calls
  if (call === undefined) return
  if (raw.body !== undefined) t.equal((await call.body).toString('latin1'), raw.body, name)
  if (front.readings.otherFields.includes(raw.what)) return
  for (const [field, value] of Object.entries(raw.fields ?? {})) {
    t.strictSame(call.values(field), value === undefined ? [] : [value], `${name}: ${field}`)
  }
}

t.test('what the fronts read in their own way are cases of the corpus', (t) => {
  const names = new Set(RAW_CORPUS.map(({ what }) => what))
  for (const { name, readings } of [nginx, haproxy]) {
    const listed = Object.values(readings).flat()
    t.equal(new Set(listed).size, listed.length, name)
    t.strictSame(
      listed.filter((what) => !names.has(what)),
      [],
      name,
    )
  }
  t.end()
})

for (const front of [nginx, haproxy]) {
  t.test(
    `what is legal comes through ${front.name} as it is, and nothing as what it is not`,
    { skip: front.isInstalled ? false : `${front.name} is not installed` },
    async (t) => {
      const { url } = await createTestDatabase(t)
      const broker = await startRawBroker(t, { databaseUrl: url, env: { LOG_LEVEL: 'error' } })
      const { publicOrigin, origin } = broker.replica
      const brokerPorts = [publicOrigin, origin].map((one) => Number(new URL(one).port))
      const ports = await front.start(t, brokerPorts)
      const work = RAW_CORPUS.values()
      await Promise.all(
        Array.from({ length: LANES }, async (_, lane) => {
          const seats = await broker.seat(`lane-${lane}`)
          for (const raw of work) {
            for (const direct of seats) {
              if (raw.only !== undefined && raw.only !== direct.listener) continue
              const seat = { ...direct, port: ports[brokerPorts.indexOf(direct.port)] ?? 0 }
              await compare(t, raw, front, seat, await look(raw, seat, broker.upstream))
            }
          }
        }),
      )
    },
  )
}
