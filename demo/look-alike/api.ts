// A local API that looks like Pagero's: the file and document paths that integrations use, for holders of a live token.
// It keeps what was sent to it, byte for byte, so that a test of the proxy can say what arrived.

import { createHash } from 'node:crypto'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { Account } from './accounts.ts'
import { createDocuments, type Document, type Documents } from './documents.ts'
import { invoicePdf, invoiceXml } from './invoice-files.ts'
import { close, listen } from './listening.ts'
import { boundaryOf, createMultipartReader } from './multipart.ts'
import { pairsOf } from './record.ts'

export interface ApiOptions {
  /** Tells whose live access token this is. */
  isActive(accessToken: string): Promise<Account | undefined>
  host?: string
  port?: number
  /** How long a file is on its way before its document appears. */
  processingMs?: number
}

export interface ApiRequest {
  /** Of `performance.now()`, when the head had arrived. */
  at: number
  /** As it stood on the wire: method, target, version. */
  requestLine: string
  method: string
  rawTarget: string
  headers: ReadonlyArray<readonly [string, string]>
  bodyBytes: number
  /** SHA-256 of the body in hex. */
  bodyDigest: string
  /** The body arrived whole. */
  complete: boolean
  status: number | undefined
}

export interface LookAlikeApi {
  origin: string
  /** Every request so far, oldest first. */
  record: ApiRequest[]
  stop(): Promise<void>
}

interface Answer {
  status: number
  headers?: Record<string, string>
  /** An object is sent as JSON. */
  body?: Buffer | object
}

interface Call {
  account: Account
  query: URLSearchParams
  accept: string
  contentType: string
  /** What the pattern of the path matched. */
  id: string
  body: AsyncIterable<Buffer>
}

type Resource = (documents: Documents, call: Call) => Answer | Promise<Answer>

/** Time enough to see that a file is being processed. */
const PROCESSING_MS = 1_500
const LIMIT_DEFAULT = 10
const LIMIT_MAX = 100
/** More than any JSON body here needs. */
const JSON_BYTES_MAX = 65_536

const RESOURCES: ReadonlyArray<readonly [RegExp, Readonly<Record<string, Resource>>]> = [
  [/^\/file\/v1\/files$/, { POST: uploadFile }],
  [/^\/file\/v1\/files\/([^/]+)\/fileparts$/, { GET: listFileParts }],
  [/^\/file\/v1\/fileparts\/([^/]+)\/action$/, { POST: actOnFilePart }],
  [/^\/document\/v1\/documents$/, { GET: listDocuments }],
  [/^\/document\/v1\/documents\/fetch$/, { POST: markFetched }],
  [/^\/document\/v1\/documents\/([^/]+)\/targetdocument$/, { GET: downloadTarget }],
  [/^\/document\/v1\/documents\/([^/]+)\/presentation$/, { GET: downloadPresentation }],
]

/** Starts the API; resolves when it listens. */
export async function startApi(options: ApiOptions): Promise<LookAlikeApi> {
  const record: ApiRequest[] = []
  const documents = createDocuments(options.processingMs ?? PROCESSING_MS)
  const server = createServer((request, response) => {
    const recorded = recordRequest(record, request, response)
    answerOf(options, documents, request, recorded)
      .then((answer) => send(response, answer))
      .catch(() => response.destroy())
  })
  const host = options.host ?? '127.0.0.1'
  const port = await listen(server, host, options.port ?? 0)
  return { origin: `http://${host}:${port}`, record, stop: () => close(server) }
}

function recordRequest(
  record: ApiRequest[],
  request: IncomingMessage,
  response: ServerResponse,
): ApiRequest {
  const { method = '', url = '', httpVersion } = request
  const recorded: ApiRequest = {
    at: performance.now(),
    requestLine: `${method} ${url} HTTP/${httpVersion}`,
    method,
    rawTarget: url,
    headers: pairsOf(request.rawHeaders),
    bodyBytes: 0,
    bodyDigest: '',
    complete: false,
    status: undefined,
  }
  record.push(recorded)
  response.once('finish', () => {
    recorded.status = response.statusCode
  })
  return recorded
}

async function answerOf(
  options: ApiOptions,
  documents: Documents,
  request: IncomingMessage,
  recorded: ApiRequest,
): Promise<Answer> {
  const body = measure(request, recorded)
  const token = /^Bearer (\S+)$/i.exec(request.headers.authorization ?? '')?.[1]
  const account = token === undefined ? undefined : await options.isActive(token)
  if (account === undefined) {
    const challenge = token === undefined ? 'Bearer' : 'Bearer error="invalid_token"'
    return { ...refusal(401, 'unauthorized'), headers: { 'www-authenticate': challenge } }
  }
  const url = new URL(request.url ?? '/', 'http://localhost')
  for (const [pattern, methods] of RESOURCES) {
    const match = pattern.exec(url.pathname)
    if (match === null) continue
    const resource = methods[request.method === 'HEAD' ? 'GET' : (request.method ?? '')]
    if (resource === undefined) {
      return {
        ...refusal(405, 'method_not_allowed'),
        headers: { allow: Object.keys(methods).join() },
      }
    }
    const answer = await resource(documents, {
      account,
      query: url.searchParams,
      accept: request.headers.accept ?? '*/*',
      contentType: request.headers['content-type'] ?? '',
      id: match[1] ?? '',
      body,
    })
    // What nobody asked for is read too, so that the record has it.
    for await (const chunk of body) void chunk
    return answer
  }
  return refusal(404, 'not_found')
}

/** Passes the body on while counting it. */
async function* measure(request: IncomingMessage, recorded: ApiRequest): AsyncGenerator<Buffer> {
  const digest = createHash('sha256')
  for await (const chunk of request as AsyncIterable<Buffer>) {
    recorded.bodyBytes += chunk.length
    digest.update(chunk)
    yield chunk
  }
  recorded.bodyDigest = digest.digest('hex')
  recorded.complete = request.complete
}

function send(response: ServerResponse, { status, headers = {}, body }: Answer): void {
  const isJson = body !== undefined && !Buffer.isBuffer(body)
  const bytes = isJson ? Buffer.from(JSON.stringify(body)) : body
  response.writeHead(status, {
    ...(isJson ? { 'content-type': 'application/json;charset=UTF-8' } : {}),
    'content-length': bytes?.length ?? 0,
    ...headers,
  })
  response.end(bytes)
}

function refusal(status: number, code: string): Answer {
  return { status, body: { error: { code } } }
}

// ── Resources ────────────────────────────────────────────────────────────────────────────────────

async function uploadFile(documents: Documents, call: Call): Promise<Answer> {
  const boundary = boundaryOf(call.contentType)
  if (boundary === undefined) return refusal(415, 'unsupported_media_type')
  const reader = createMultipartReader(boundary)
  for await (const chunk of call.body) reader.add(chunk)
  const form = reader.read()
  const { documentType, sendMode, sendingCompanyId, senderReference = '' } = form?.fields ?? {}
  if (form?.filename === undefined || !documentType || !sendMode || !sendingCompanyId) {
    return refusal(400, 'invalid_form')
  }
  if (sendingCompanyId !== call.account.company.id) return refusal(403, 'company_not_allowed')
  const { fileId } = documents.upload(call.account, {
    filename: form.filename,
    documentType,
    sendMode,
    senderReference,
  })
  return {
    status: 201,
    headers: { location: `/file/v1/files/${fileId}` },
    body: { id: fileId, filename: form.filename, sendMode, createTime: new Date().toISOString() },
  }
}

function listFileParts(documents: Documents, call: Call): Answer {
  if (chooseType(call.accept, ['application/json']) === undefined)
    return refusal(406, 'not_acceptable')
  const statuses = call.query.get('Status')?.split(',')
  const items = documents
    .parts(call.account, call.id)
    ?.filter(({ status }) => statuses === undefined || statuses.includes(status))
  if (items === undefined) return refusal(404, 'not_found')
  return { status: 200, body: { items, meta: { offset: 0, total: items.length } } }
}

async function actOnFilePart(documents: Documents, call: Call): Promise<Answer> {
  // Known clients send no Content-Type here, so none is asked for.
  const { action } = (await readJson(call.body)) ?? {}
  if (action !== 'Restart' && action !== 'Cancel') return refusal(400, 'invalid_action')
  return documents.act(call.account, call.id, action) ? { status: 204 } : refusal(404, 'not_found')
}

function listDocuments(documents: Documents, call: Call): Answer {
  if (chooseType(call.accept, ['application/json']) === undefined)
    return refusal(406, 'not_acceptable')
  const { query } = call
  const limit = wholeNumber(query.get('limit') ?? String(LIMIT_DEFAULT), 1, LIMIT_MAX)
  const offset = wholeNumber(query.get('offset') ?? '0', 0, Number.MAX_SAFE_INTEGER)
  if (limit === undefined || offset === undefined) return refusal(400, 'invalid_paging')
  const types = query.getAll('documentType')
  const matching = documents.of(call.account).filter(
    ({ fileId, isFetched, documentInfo }) =>
      (types.length === 0 || types.includes(documentInfo.documentType)) &&
      isAskedFor(query, 'direction', documentInfo.direction) &&
      isAskedFor(query, 'fileId', fileId) &&
      isAskedFor(query, 'companyId', call.account.company.id) &&
      // False hides what was fetched; true shows nothing else.
      isAskedFor(query, 'showFetchedOnly', String(isFetched)),
  )
  const items = matching.slice(offset, offset + limit)
  return {
    status: 200,
    body: { items, meta: { count: items.length, limit, offset, total: matching.length } },
  }
}

function isAskedFor(query: URLSearchParams, key: string, value: string): boolean {
  return (query.get(key) ?? value) === value
}

async function markFetched(documents: Documents, call: Call): Promise<Answer> {
  if (!call.contentType.startsWith('application/json'))
    return refusal(415, 'unsupported_media_type')
  const { ids } = (await readJson(call.body)) ?? {}
  if (!Array.isArray(ids)) return refusal(400, 'invalid_ids')
  for (const document of documents.of(call.account)) {
    if (ids.includes(document.id)) document.isFetched = true
  }
  return { status: 204 }
}

function downloadTarget(documents: Documents, call: Call): Answer {
  // XML is what JSON is answered with, too: known clients ask so.
  const type = chooseType(call.accept, ['application/xml', 'application/pdf', 'application/json'])
  if (type === undefined) return refusal(406, 'not_acceptable')
  return download(documents, call, type === 'application/pdf' ? 'pdf' : 'xml')
}

function downloadPresentation(documents: Documents, call: Call): Answer {
  if (chooseType(call.accept, ['application/pdf']) === undefined)
    return refusal(406, 'not_acceptable')
  return download(documents, call, 'pdf')
}

function download(documents: Documents, call: Call, format: 'pdf' | 'xml'): Answer {
  const document = documents.of(call.account).find(({ id }) => id === call.id)
  if (document === undefined) return refusal(404, 'not_found')
  return {
    status: 200,
    headers: {
      'content-type': `application/${format}`,
      'content-disposition': `attachment; filename="${filenameOf(document)}.${format}"`,
    },
    body: format === 'pdf' ? invoicePdf(document) : invoiceXml(document),
  }
}

function filenameOf({ documentInfo }: Document): string {
  return `${documentInfo.documentType}-${documentInfo.documentIdentifier}`.replaceAll(
    /[^\w.-]/g,
    '_',
  )
}

// ── Reading ──────────────────────────────────────────────────────────────────────────────────────

/** Returns the first type of the Accept list that is offered; Pagero goes by order, not by weight. */
function chooseType(accept: string, offered: readonly string[]): string | undefined {
  for (const range of accept.split(',')) {
    const wanted = range.split(';')[0]?.trim().toLowerCase() ?? ''
    const found = offered.find(
      (type) => wanted === '*/*' || wanted === type || wanted === `${type.split('/')[0]}/*`,
    )
    if (found !== undefined) return found
  }
  return undefined
}

async function readJson(body: AsyncIterable<Buffer>): Promise<Record<string, unknown> | undefined> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of body) {
    bytes += chunk.length
    if (bytes <= JSON_BYTES_MAX) chunks.push(chunk)
  }
  try {
    const value: unknown = JSON.parse(Buffer.concat(chunks).toString('utf8'))
    return typeof value === 'object' && value !== null
      ? (value as Record<string, unknown>)
      : undefined
  } catch {
    return undefined
  }
}

function wholeNumber(text: string, min: number, max: number): number | undefined {
  const number = /^\d+$/.test(text) ? Number(text) : Number.NaN
  return number >= min && number <= max ? number : undefined
}
