// The corpus over raw sockets, before a real process: each request alone, and between two others on a connection that is
// kept. Looked at from both sides: what the client is told, and what the upstream gets, to the byte.

import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { createTestDatabase } from './support/database.ts'
import { exchange } from './support/raw-client.ts'
import { bytesOf, RAW_CORPUS, type RawCase } from './support/raw-corpus.ts'
import { type RawBroker, type Seat, startRawBroker } from './support/raw-broker.ts'
import type { UpstreamCall } from './support/upstream.ts'

/** Longer than any answer takes on a machine with ten times more to do than it can. */
const QUIET_MS = 20_000
const LANES = 6

/** A request of ours; the last one ends the connection. */
function mark(place: 'before' | 'after', { prefix, who }: Seat): Buffer {
  const last = place === 'after' ? 'Connection: close\r\n' : ''
  return Buffer.from(
    `GET ${prefix}/${place} HTTP/1.1\r\nHost: broker.example\r\n${who}\r\n${last}\r\n`,
    'latin1',
  )
}

/** What both sides have seen of a case; compared as a whole. */
interface Seen {
  statuses: number[]
  closed: boolean
  bytesLeft: number
  calls: string[]
  fields: Record<string, string[]>
  body: string | undefined
  faults: string[]
}

/** Sends the case between two requests of ours, or before one. */
async function look(raw: RawCase, seat: Seat, upstream: RawBroker['upstream'], pipelined: boolean) {
  const before = upstream.calls.length
  const method = /^[A-Z]+/.exec(raw.bytes.trimStart())?.[0] ?? 'GET'
  const { answers, closed, rest } = await exchange(
    seat.port,
    Buffer.concat([
      ...(pipelined ? [mark('before', seat)] : []),
      bytesOf(raw, seat),
      mark('after', seat),
    ]),
    {
      methods: [...(pipelined ? ['GET'] : []), method],
      answersMax: Number.POSITIVE_INFINITY,
      quietMs: QUIET_MS,
    },
  )
  const calls = upstream.calls
    .slice(before)
    .filter((call) => call.values('authorization').includes(`Bearer ${seat.accessToken}`))
  if (raw.begun === true) await endOfBegun(calls)
  const call = raw.line === undefined ? undefined : calls[pipelined ? 1 : 0]
  const names = Object.keys(raw.fields ?? {})
  const seen: Seen = {
    statuses: answers.map(({ status }) => status),
    closed,
    bytesLeft: rest.length,
    calls: calls.map(({ line }) => line),
    fields: Object.fromEntries(names.map((name) => [name, call?.values(name) ?? ['no call']])),
    body: raw.body === undefined ? undefined : (await call?.body)?.toString('latin1'),
    faults: calls.flatMap(faultsOf),
  }
  return seen
}

/** Takes out calls that were begun and broken off. One that ends as if it were whole stays, and so does a hanging one. */
async function endOfBegun(calls: UpstreamCall[]): Promise<void> {
  const at = calls.findIndex(({ line }) => line === 'POST /a HTTP/1.1')
  const call = calls[at]
  if (call === undefined) return
  const end = await Promise.race([
    call.body.then(() => 'whole'),
    call.closed.then(() => 'broken off'),
    delay(QUIET_MS, 'hanging', { ref: false }),
  ])
  if (end === 'broken off') calls.splice(at, 1)
}

/** What must never be in a request of the broker's. */
function faultsOf(call: UpstreamCall): string[] {
  const faults: string[] = []
  const names = call.fields.map(([name]) => name)
  if (new Set(names).size < names.length) faults.push(`a name twice: ${names.join()}`)
  if (!names.includes('authorization')) faults.push('no credential')
  if (!names.includes('host')) faults.push('no host')
  if (names.includes('content-length') && names.includes('transfer-encoding')) {
    faults.push('two framings')
  }
  return faults
}

/** What must have been seen, if `goesOn` tells whether the connection serves the request behind the case. */
function wanted(raw: RawCase, pipelined: boolean, goesOn: boolean): Seen {
  const around = (before: string, own: string[], after: string) => [
    ...(pipelined ? [before] : []),
    ...own,
    ...(goesOn ? [after] : []),
  ]
  // What cannot be read ends the connection; behind another request it does so without a word of its own.
  const silent = pipelined && raw.line === undefined && !goesOn
  return {
    statuses: around('200', silent ? [] : [String(raw.status)], '200').map(Number),
    closed: true,
    bytesLeft: 0,
    calls: around(
      'GET /before HTTP/1.1',
      raw.line === undefined ? [] : [raw.line],
      'GET /after HTTP/1.1',
    ),
    fields: Object.fromEntries(
      Object.entries(raw.fields ?? {}).map(([name, value]) => [
        name,
        value === undefined ? [] : [value],
      ]),
    ),
    body: raw.body,
    faults: [],
  }
}

function compare(t: Test, raw: RawCase, seat: Seat, pipelined: boolean, seen: Seen): void {
  const name = `${seat.listener}, ${pipelined ? 'pipelined' : 'alone'}: ${raw.what}`
  const own = seen.statuses.slice(pipelined ? 1 : 0)
  const want = wanted(raw, pipelined, own.length > 1)
  // A refusal that is known only after the head is told behind an answer too.
  if (want.statuses.length === 1 && own.length === 1 && pipelined) want.statuses.push(raw.status)
  t.strictSame(seen, want, name)
}

t.test('the corpus is as long as it says, and says nothing twice', (t) => {
  t.ok(RAW_CORPUS.length >= 300, `${RAW_CORPUS.length} cases`)
  const names = RAW_CORPUS.map(({ what }) => what)
  t.strictSame(
    names.filter((name, index) => names.indexOf(name) !== index),
    [],
  )
  t.end()
})

t.test('every request has its answer, and only what is legal reaches the upstream', async (t) => {
  const { url } = await createTestDatabase(t)
  const broker = await startRawBroker(t, { databaseUrl: url })
  const work = RAW_CORPUS.values()
  await Promise.all(
    Array.from({ length: LANES }, async (_, lane) => {
      const seats = await broker.seat(`lane-${lane}`)
      for (const raw of work) {
        for (const seat of seats) {
          if (raw.only !== undefined && raw.only !== seat.listener) continue
          for (const pipelined of [false, true]) {
            compare(t, raw, seat, pipelined, await look(raw, seat, broker.upstream, pipelined))
          }
        }
      }
    }),
  )
  t.equal(broker.replica.log.filter(({ event }) => event === 'request_failed').length, 0)
})
