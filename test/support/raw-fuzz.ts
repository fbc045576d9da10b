// The corpus, mutated: requests that nobody has thought of, over raw sockets, at both listeners of a real process. What
// reaches the upstream is told apart by the access token, which no client can choose, and must be a request that was sent.

import { RAW_CORPUS, bytesOf } from './raw-corpus.ts'
import type { RawBroker } from './raw-broker.ts'
import { exchange } from './raw-client.ts'
import type { UpstreamCall } from './upstream.ts'

/** A request that has not been whole for so long is given up by its client. */
const QUIET_MS = 250
/** Requests on one connection, one behind the other. */
const REQUESTS_MAX = 4
/** Longer bytes only make the run slow; limits have cases of their own. */
const BYTES_MAX = 4_000
const LANES = 16
/** Two minutes of them at the least: on a machine with too much to do a call may come late. */
const RECENT_MAX = 400

const PIECES = [
  '\r\n',
  '\n',
  '\r',
  '\0',
  ' ',
  '\t',
  ':',
  ';',
  ',',
  '/',
  '//',
  '/..',
  '/%2e%2e',
  '%2f',
  '%25',
  '\\',
  '#',
  '?',
  '@',
  '\u00ff',
  '0',
  'Transfer-Encoding: chunked\r\n',
  'Content-Length: 7\r\n',
  'Host: evil.example\r\n',
  'Connection: close\r\n',
  'Connection: authorization\r\n',
  'Upgrade: h2c\r\n',
  'Expect: 100-continue\r\n',
  '0\r\n\r\n',
  'GET {prefix}/b HTTP/1.1\r\nHost: b\r\n{who}\r\n\r\n',
]

/** A generator of numbers that a seed repeats (mulberry32): below `max`, whole. */
function numbersOf(seed: number): (max: number) => number {
  let state = seed >>> 0
  return (max) => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) % max
  }
}

/** Without HEAD: where an answer ends depends on it, and what a mutation asks for is not known. */
const TEXTS = RAW_CORPUS.map(({ bytes }) => bytes).filter(
  (bytes) => bytes.length <= BYTES_MAX && !bytes.includes('HEAD'),
)

/** One request of the corpus, changed in no, one or several places. */
function mutate(number: (max: number) => number): string {
  let text = TEXTS[number(TEXTS.length)] ?? ''
  for (let changes = number(4); changes > 0; changes -= 1) {
    const at = number(text.length + 1)
    const until = Math.min(text.length, at + number(12))
    const other = TEXTS[number(TEXTS.length)] ?? ''
    switch (number(6)) {
      case 0:
        text = text.slice(0, at) + (PIECES[number(PIECES.length)] ?? '') + text.slice(at)
        break
      case 1:
        text = text.slice(0, at) + text.slice(until)
        break
      case 2:
        text = text.slice(0, at) + String.fromCharCode(number(256)) + text.slice(at + 1)
        break
      case 3:
        text = text.slice(0, until) + text.slice(at)
        break
      case 4:
        text = text.slice(0, at) + other.slice(number(other.length + 1))
        break
      default: {
        // Two lines change places.
        const lines = text.split('\r\n')
        const [a, b] = [number(lines.length), number(lines.length)]
        ;[lines[a], lines[b]] = [lines[b] ?? '', lines[a] ?? '']
        text = lines.join('\r\n')
      }
    }
  }
  return text.slice(0, BYTES_MAX)
}

export interface FuzzFigures {
  requests: number
  perSecond: number
  /** Requests that reached the upstream. */
  calls: number
  /** Answers by status. */
  statuses: Record<string, number>
  /** What must not be; empty when all is well. Each with what was sent. */
  faults: string[]
}

/**
 * Sends so many requests, or for so long, whichever ends first. `onProgress` is called every few thousand.
 * @returns the figures, with a fault for each answer or call that must not be
 */
export async function fuzz(
  broker: RawBroker,
  options: { requests: number; seconds: number; seed: number; onProgress?: (sent: number) => void },
): Promise<FuzzFigures> {
  const { upstream } = broker
  const figures: FuzzFigures = { requests: 0, perSecond: 0, calls: 0, statuses: {}, faults: [] }
  const startedMs = performance.now()
  const endMs = startedMs + options.seconds * 1000
  const callsOf = new Map<string, UpstreamCall[]>()
  // The upstream keeps every call; here they are taken away and handed out by token.
  const sort = () => {
    for (const call of upstream.calls.splice(0)) {
      const [credential = ''] = call.values('authorization')
      const calls = callsOf.get(credential) ?? []
      calls.push(call)
      callsOf.set(credential, calls)
    }
  }
  const lane = async (index: number) => {
    const number = numbersOf(options.seed + index)
    const seats = await broker.seat(`fuzz-${options.seed}-${index}`)
    // A call of a client that has left may still be on its way, and is seen behind the next.
    const recent: Buffer[] = []
    let unanswered = 0
    let unansweredMax = 0
    while (figures.requests < options.requests && performance.now() < endMs) {
      const seat = seats[number(seats.length)]
      if (seat === undefined) return
      const texts = Array.from({ length: 1 + number(REQUESTS_MAX) }, () => mutate(number))
      figures.requests += texts.length
      if (figures.requests % 5_000 < texts.length) options.onProgress?.(figures.requests)
      const bytes = bytesOf({ bytes: texts.join('') }, seat)
      recent.push(bytes)
      if (recent.length > RECENT_MAX) recent.shift()
      const { answers, closed } = await exchange(seat.port, bytes, {
        methods: [],
        answersMax: Number.POSITIVE_INFINITY,
        quietMs: QUIET_MS,
      })
      sort()
      const credential = `Bearer ${seat.accessToken}`
      const calls = callsOf.get(credential) ?? []
      callsOf.delete(credential)
      figures.calls += calls.length
      let fromUpstream = 0
      for (const { status, fields } of answers) {
        figures.statuses[status] = (figures.statuses[status] ?? 0) + 1
        if (/received-status/.test(fields.get('proxy-status') ?? '')) fromUpstream += 1
        if (status === 500) figures.faults.push(`500 to ${show(bytes)}`)
      }
      if (fromUpstream > calls.length) figures.faults.push(`an answer of nobody to ${show(bytes)}`)
      // One may be under way when the broker ends a connection, and all when the client gives up.
      unanswered += calls.length - fromUpstream
      unansweredMax += closed ? 1 : texts.length
      if (unanswered > unansweredMax)
        figures.faults.push(`calls that none asked for: ${show(bytes)}`)
      for (const call of calls) {
        const fault = faultOf(call, recent)
        if (fault !== undefined) figures.faults.push(`${fault} from ${show(bytes)}`)
      }
    }
  }
  await Promise.all(Array.from({ length: LANES }, (_, index) => lane(index)))
  sort()
  for (const credential of callsOf.keys()) {
    if (!/^Bearer ./.test(credential)) figures.faults.push(`a call without a user's token`)
  }
  figures.perSecond = figures.requests / ((performance.now() - startedMs) / 1000)
  return figures
}

/** Why a call must not be: its line was not sent, or has a second reading; or its fields are not the broker's. */
function faultOf(call: UpstreamCall, sent: readonly Buffer[]): string | undefined {
  const match = /^(?:GET|HEAD|POST|PUT|PATCH|DELETE) (\/\S*) HTTP\/1\.1$/.exec(call.line)
  const target = match?.[1]
  if (target === undefined) return `line ${call.line}`
  const isSent = sent.some((bytes) => bytes.includes(target, 0, 'latin1'))
  if (!isSent) return `target ${target}`
  const path = decodeURIComponent(target.split('?')[0] ?? '')
  if (/[\\;\0]|\/\/|\/\.{1,2}(?:\/|$)/.test(path)) return `path ${path}`
  const names = call.fields.map(([name]) => name)
  if (new Set(names).size < names.length) return `names ${names.join()}`
  const stranger = names.find((name) => !PASSED.has(name))
  if (stranger !== undefined) return `field ${stranger}`
  return undefined
}

/** What the broker sends, and nothing else. */
const PASSED: ReadonlySet<string> = new Set([
  'accept',
  'accept-encoding',
  'accept-language',
  'authorization',
  'connection',
  'content-encoding',
  'content-language',
  'content-length',
  'content-type',
  'host',
  'if-match',
  'if-modified-since',
  'if-none-match',
  'if-range',
  'if-unmodified-since',
  'prefer',
  'range',
  'transfer-encoding',
  'via',
])

function show(bytes: Buffer): string {
  return JSON.stringify(bytes.toString('latin1').slice(0, 1_500))
}
