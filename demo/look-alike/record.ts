// Every request that reached the look-alike, so that a test can say exactly what was sent and what came of it.
// Entries are made on arrival and completed when the connection is done with them.

import type Provider from 'oidc-provider'
import { Readable } from 'node:stream'

export type Middleware = Parameters<Provider['use']>[0]
export type Context = Parameters<Middleware>[0]

export type Endpoint = 'authorize' | 'resume' | 'login' | 'token' | 'revoke' | 'jwks' | 'other'

export interface RecordedRequest {
  /** Of `performance.now()`, when the head had arrived. */
  at: number
  /** When the answer was handed to the socket, or the connection was gone. */
  endedAt: number | undefined
  endpoint: Endpoint
  method: string
  /** The request target as it stood on the request line. */
  rawTarget: string
  /** Name and value as sent, in order. */
  headers: ReadonlyArray<readonly [string, string]>
  remotePort: number
  body: string
  form: Readonly<Record<string, string>>
  status: number | undefined
  /** The whole answer was handed to a socket that was still open. */
  answered: boolean
  /** Kind of the fault that befell this request. */
  fault: string | undefined
  /** Whose refresh token was presented, as far as the server knew it when it came. */
  presented: { subject: string; grantId: string; generation: number } | undefined
  /** Answered with a successor that had been given out before; nothing was spent. */
  replayed: boolean
  /** What a token request spent: one login, and the generation of its refresh token; 0 is the code. */
  spent: { grantId: string; generation: number } | undefined
}

/** More than any form of the protocol needs. */
const FORM_BYTES_MAX = 65_536

export const PATHS = {
  authorize: '/oauth/v2/oauth-authorize',
  token: '/oauth/v2/oauth-token',
  revoke: '/oauth/v2/oauth-revoke',
  /** Where the product that Pagero runs has its issuer and keys. */
  issuer: '/oauth/v2/oauth-anonymous',
  jwks: '/oauth/v2/oauth-anonymous/jwks',
  login: '/login/',
} as const

function endpointOf(path: string): Endpoint {
  if (path === PATHS.authorize) return 'authorize'
  if (path.startsWith(`${PATHS.authorize}/`)) return 'resume'
  if (path === PATHS.token) return 'token'
  if (path === PATHS.revoke) return 'revoke'
  if (path === PATHS.jwks) return 'jwks'
  return path.startsWith(PATHS.login) ? 'login' : 'other'
}

/** Returns the entry of the request that is being answered. */
export function recordedRequest(context: Context): RecordedRequest {
  return context.state['recorded'] as RecordedRequest
}

/** Records each request, with its form read, before anything else looks at it. */
export function recordRequests(record: RecordedRequest[]): Middleware {
  return async (context, next) => {
    const { req, res } = context
    const recorded: RecordedRequest = {
      at: performance.now(),
      endedAt: undefined,
      endpoint: endpointOf(context.path),
      method: context.method,
      rawTarget: req.url ?? '',
      headers: pairsOf(req.rawHeaders),
      remotePort: req.socket.remotePort ?? 0,
      body: '',
      form: {},
      status: undefined,
      answered: false,
      fault: undefined,
      presented: undefined,
      replayed: false,
      spent: undefined,
    }
    record.push(recorded)
    context.state['recorded'] = recorded
    res.once('finish', () => {
      recorded.status = res.statusCode
      recorded.answered = !req.socket.destroyed
    })
    res.once('close', () => {
      recorded.endedAt = performance.now()
    })
    if (context.method === 'POST') await readForm(context, recorded)
    await next()
  }
}

async function readForm(context: Context, recorded: RecordedRequest): Promise<void> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of context.req as AsyncIterable<Buffer>) {
    bytes += chunk.length
    if (bytes > FORM_BYTES_MAX) context.throw(413)
    chunks.push(chunk)
  }
  const body = Buffer.concat(chunks)
  recorded.body = body.toString('utf8')
  recorded.form = Object.fromEntries(new URLSearchParams(recorded.body))
  // The provider reads the body by this iterator and warns on the console about any other way.
  Object.defineProperties(context.req, {
    readable: { value: true },
    iterator: { value: () => Readable.from([body]) },
  })
}

/** Pairs up the alternating names and values of `rawHeaders`. */
export function pairsOf(rawHeaders: readonly string[]): Array<readonly [string, string]> {
  const pairs: Array<readonly [string, string]> = []
  for (let i = 0; i + 1 < rawHeaders.length; i += 2) {
    pairs.push([rawHeaders[i] ?? '', rawHeaders[i + 1] ?? ''])
  }
  return pairs
}
