// The header fields that pass through the forwarder, in both directions: allow-lists, and what the broker adds.
// Flat lists in and out (name, value, name, value …), values untouched, names lower-cased and each of them once.
// A field that is not listed here does not pass. No framing is copied: whoever sends a message frames it anew.

import { BrokerError } from './errors.ts'

/** `single`: a second one is refused or dropped. `list`: several are joined with a comma (RFC 9110 section 5.3). */
type Cardinality = 'single' | 'list'

/** Content-Length is missing on purpose: framing is rebuilt. So is everything that names a caller or a credential. */
const REQUEST_FIELDS: ReadonlyMap<string, Cardinality> = new Map([
  ['accept', 'list'],
  ['accept-encoding', 'list'],
  ['accept-language', 'list'],
  ['content-encoding', 'list'],
  ['content-language', 'list'],
  ['content-type', 'single'],
  ['if-match', 'list'],
  ['if-modified-since', 'single'],
  ['if-none-match', 'list'],
  ['if-range', 'single'],
  ['if-unmodified-since', 'single'],
  ['prefer', 'list'],
  ['range', 'single'],
])

/** `location` is rewritten or dropped on its way; see {@link rewriteLocation}. */
const RESPONSE_FIELDS: ReadonlyMap<string, Cardinality> = new Map([
  ['accept-ranges', 'list'],
  ['allow', 'list'],
  ['content-disposition', 'single'],
  ['content-encoding', 'list'],
  ['content-language', 'list'],
  ['content-length', 'single'],
  ['content-range', 'single'],
  ['content-type', 'single'],
  ['date', 'single'],
  ['etag', 'single'],
  ['last-modified', 'single'],
  ['location', 'single'],
  ['preference-applied', 'list'],
  ['retry-after', 'single'],
  ['warning', 'list'],
  ['x-correlation-id', 'single'],
  ['x-request-id', 'single'],
])

/** Media types that a browser may run: HTML, SVG, every XML, and the multipart that can hold them. */
const ACTIVE_MEDIA_TYPE = /html|xml|svg|x-mixed-replace/i

/** For those: opened as a page, it has no origin, no script, no form and no frame around it. */
const ACTIVE_CONTENT_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"

/** Fields that the forwarder sets itself on every answer, whatever list it is given. */
const OWN_RESPONSE_FIELDS: ReadonlySet<string> = new Set([
  'cache-control',
  'content-security-policy',
  'proxy-status',
  'x-content-type-options',
])

/**
 * Returns the fields of a request that are passed on. Those that the client names in `Connection` are for the broker
 * alone and fall away first, so that they cannot touch what the broker adds afterwards (RFC 9110 section 7.6.1).
 *
 * @throws BrokerError `loop_detected` when the request has passed `viaPseudonym` already (section 7.6.3),
 *   `request_invalid` when a field stands twice that may stand once
 */
export function passedRequestFields(raw: readonly string[], viaPseudonym: string): string[] {
  const named: string[] = []
  const passed: string[] = []
  const repeated: string[] = []
  for (let i = 0; i < raw.length; i += 2) {
    const name = (raw[i] ?? '').toLowerCase()
    const value = raw[i + 1] ?? ''
    if (name === 'connection') named.push(...connectionOptions(value))
    else if (name === 'via') refuseLoop(value, viaPseudonym)
    const cardinality = REQUEST_FIELDS.get(name)
    if (cardinality !== undefined && !add(passed, name, value, cardinality)) repeated.push(name)
  }
  const wrong = repeated.find((name) => !named.includes(name))
  if (wrong !== undefined) {
    throw new BrokerError('request_invalid', `Send ${wrong} once.`, {
      errors: [{ pointer: `headers/${wrong}`, detail: 'must not be repeated' }],
    })
  }
  return named.length === 0 ? passed : without(passed, named)
}

/** What an answer's fields depend on besides the answer. */
export interface AnswerContext {
  status: number
  viaPseudonym: string
  /** URL that was asked for: what a relative Location is relative to. */
  requestUrl: string
  /** Path that stands for the API's root at the broker, without a slash at its end. */
  locationPrefix: string
  /** Fields that the broker adds to every answer of the route, flat. Their names are lower-case. */
  brokerFields: readonly string[]
}

/** Fields of an answer as they were received, by lower-case name; several values where a field stood several times. */
export type ReceivedFields = Readonly<Record<string, string | string[] | undefined>>

/** Returns the fields of an answer for the client: those passed on, the route's, and the forwarder's own. */
export function answerFields(received: ReceivedFields, context: AnswerContext): string[] {
  const named = connectionOptions([received['connection'] ?? ''].flat().join())
  const fields: string[] = []
  for (const [name, values] of Object.entries(received)) {
    const cardinality = RESPONSE_FIELDS.get(name)
    if (cardinality === undefined || values === undefined || named.includes(name)) continue
    // RFC 9110 section 8.6 forbids it with a 204, and some servers send it all the same.
    if (name === 'content-length' && context.status === 204) continue
    const value = typeof values === 'string' ? values : joined(values, cardinality)
    const passed = name === 'location' ? rewriteLocation(value, context) : value
    if (passed !== undefined) fields.push(name, passed)
  }
  const active = isActiveContent(fieldOf(fields, 'content-type'))
  addBrokerFields(fields, context.brokerFields, active)
  fields.push('cache-control', 'private, no-store', 'x-content-type-options', 'nosniff')
  fields.push('proxy-status', `${context.viaPseudonym}; received-status=${context.status}`)
  return fields
}

/** The value of a field in a flat list with lower-case names. */
export function fieldOf(fields: readonly string[], name: string): string | undefined {
  for (let i = 0; i < fields.length; i += 2) if (fields[i] === name) return fields[i + 1]
  return undefined
}

function addBrokerFields(fields: string[], added: readonly string[], active: boolean): void {
  let policy = active ? ACTIVE_CONTENT_POLICY : undefined
  for (let i = 0; i < added.length; i += 2) {
    const name = added[i] ?? ''
    if (!OWN_RESPONSE_FIELDS.has(name)) fields.push(name, added[i + 1] ?? '')
    else if (name === 'content-security-policy') policy ??= added[i + 1]
  }
  if (policy !== undefined) fields.push('content-security-policy', policy)
}

/** An answer without a media type counts as active: who opens it might guess one. */
function isActiveContent(contentType: string | undefined): boolean {
  if (contentType === undefined) return true
  const parametersAt = contentType.indexOf(';')
  return ACTIVE_MEDIA_TYPE.test(
    parametersAt === -1 ? contentType : contentType.slice(0, parametersAt),
  )
}

/**
 * Returns the Location as a path at the broker if it stays within the API, else undefined: nobody is sent to another
 * host by an answer of ours, and a client that follows it comes back through the broker.
 */
function rewriteLocation(location: string, context: AnswerContext): string | undefined {
  if (!URL.canParse(location, context.requestUrl)) return undefined
  const url = new URL(location, context.requestUrl)
  if (url.origin !== new URL(context.requestUrl).origin) return undefined
  return `${context.locationPrefix}${url.pathname}${url.search}${url.hash}`
}

/** Adds a field, or joins it to its elder; false when it may stand only once. */
function add(fields: string[], name: string, value: string, cardinality: Cardinality): boolean {
  for (let i = 0; i < fields.length; i += 2) {
    if (fields[i] !== name) continue
    if (cardinality === 'single') return false
    fields[i + 1] = `${fields[i + 1]}, ${value}`
    return true
  }
  fields.push(name, value)
  return true
}

/** Of several values of a field that may stand once, the first counts. */
function joined(values: readonly string[], cardinality: Cardinality): string {
  return cardinality === 'single' ? (values[0] ?? '') : values.join(', ')
}

function without(fields: readonly string[], named: readonly string[]): string[] {
  return fields.filter((_, i) => !named.includes(fields[i - (i % 2)] ?? ''))
}

/** The fields that a Connection field names. What nearly every one holds names none. */
function connectionOptions(value: string): readonly string[] {
  if (value === '' || value === 'keep-alive' || value === 'close') return []
  return value.split(',').map((option) => option.trim().toLowerCase())
}

function refuseLoop(via: string, viaPseudonym: string): void {
  for (const hop of via.split(',')) {
    // Each hop is `[protocol/]version received-by [(comment)]`.
    const [, receivedBy] = hop.trim().split(/[ \t]+/, 2)
    if (receivedBy?.toLowerCase() !== viaPseudonym.toLowerCase()) continue
    throw new BrokerError('loop_detected', 'The request has passed through this broker already.')
  }
}
