// One listener with nothing but the proxied API on it, before an upstream of the test; and a client on a bare socket,
// which sends what a well-behaved one would not.

import { createHash } from 'node:crypto'
import { type AddressInfo, connect, type LookupFunction } from 'node:net'
import type { FreshToken } from '../../src/access-token.ts'
import { systemClock } from '../../src/clock.ts'
import type { Config } from '../../src/config.ts'
import { createForwarder } from '../../src/forward.ts'
import type { UserKey } from '../../src/grant.ts'
import { buildApp } from '../../src/http/app.ts'
import type { Listener } from '../../src/http/problem.ts'
import { type ProxyRouteParts, registerProxyRoutes } from '../../src/http/proxy-routes.ts'
import type { Log, LogFields } from '../../src/ports.ts'

export const PSEUDONYM = 'test-broker'

export interface TestProxy {
  port: number
  url: string
  /** Events of the log with their fields. */
  lines: Array<{ event: string; fields: LogFields | undefined }>
  /** Calls of `replaceRejected`. */
  renewals(): number
  /** Shuts the listener down. */
  close(): Promise<void>
}

interface Options {
  apiUrl: string
  listener?: Listener
  limits?: Partial<Config['proxy']>
  /** The tokens that are current one after the other; a renewal moves on until the last. */
  tokens?: readonly string[]
  parts?: Partial<ProxyRouteParts>
  lookup?: LookupFunction
}

export const PROXY_LIMITS: Config['proxy'] = {
  requestBytesMax: 1_073_741_824,
  responseBytesMax: 1_073_741_824,
  connectTimeoutMs: 2_000,
  headersTimeoutMs: 5_000,
  idleTimeoutMs: 5_000,
  totalTimeoutMs: 60_000,
  requestBytesPerSecondMin: 0,
  connections: 8,
  connectionsPerUser: 8,
  waitingMax: 256,
}

/** Starts a listener whose only route is the proxy, for the user `alice`; closed at teardown. */
export async function startProxy(
  t: { teardown(fn: () => unknown): void },
  options: Options,
): Promise<TestProxy> {
  const { apiUrl, listener = 'public', tokens = ['access-token-1'] } = options
  const lines: TestProxy['lines'] = []
  const record = (event: string, fields?: LogFields): void => void lines.push({ event, fields })
  const log: Log = { trace: record, debug: record, info: record, warn: record, error: record }
  const issued = issueTokens(tokens)
  const forwarder = createForwarder({
    ...PROXY_LIMITS,
    ...options.limits,
    apiUrl,
    viaPseudonym: PSEUDONYM,
    ...(options.lookup === undefined ? {} : { lookup: options.lookup }),
  })
  const app = await buildApp(
    { clock: systemClock, log },
    {
      listener,
      trustedProxies: [],
      requestTimeoutMs: 60_000,
      answerIdleTimeoutMs: options.limits?.idleTimeoutMs ?? PROXY_LIMITS.idleTimeoutMs,
      tls: false,
    },
    (scope) =>
      registerProxyRoutes(scope, {
        listener,
        authorize: async () => ({ user: 'alice' as UserKey, actor: 'session', name: 'alice' }),
        accessTokens: issued.accessTokens,
        forwarder,
        audit: { record: ({ action }) => log.debug(action) },
        log,
        ...options.parts,
      }),
  )
  await app.listen({ host: '127.0.0.1', port: 0 })
  t.teardown(async () => {
    app.server.closeAllConnections()
    await app.close()
    await forwarder.close()
  })
  const { port } = app.server.address() as AddressInfo
  const close = () => app.close()
  return { port, url: `http://127.0.0.1:${port}`, lines, renewals: issued.renewals, close }
}

function issueTokens(tokens: readonly string[]): {
  accessTokens: ProxyRouteParts['accessTokens']
  renewals: () => number
} {
  let current = 0
  let renewals = 0
  const token = (): FreshToken => {
    const accessToken = tokens[current] ?? ''
    return {
      accessToken,
      expiresInSeconds: 600,
      expiresAt: new Date(Date.now() + 600_000),
      scope: '',
      fingerprint: createHash('sha256').update(accessToken).digest('base64url'),
    }
  }
  return {
    renewals: () => renewals,
    accessTokens: {
      fresh: async () => token(),
      async replaceRejected(_user, fingerprint) {
        renewals += 1
        if (token().fingerprint === fingerprint && current < tokens.length - 1) current += 1
        return token()
      },
    },
  }
}

export interface RawAnswer {
  status: number
  /** Lower-case name and value, in order, duplicates too. */
  fields: ReadonlyArray<readonly [name: string, value: string]>
  values(name: string): string[]
  /** Everything behind the head, framing included. */
  body: string
}

/** Sends bytes as they are and reads until the broker closes: say `Connection: close`, or rely on a refusal. */
export function sendRaw(port: number, text: string | Buffer): Promise<RawAnswer> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1')
    const chunks: Buffer[] = []
    socket.on('data', (chunk) => chunks.push(chunk))
    socket.on('error', reject)
    socket.on('close', () => resolve(parseAnswer(Buffer.concat(chunks).toString('latin1'))))
    socket.write(typeof text === 'string' ? Buffer.from(text, 'latin1') : text)
  })
}

/** One request without a body, with these field lines. */
export function requestText(line: string, fields: readonly string[] = []): string {
  return `${[`${line} HTTP/1.1`, 'Host: broker.example', 'Connection: close', ...fields].join('\r\n')}\r\n\r\n`
}

function parseAnswer(text: string): RawAnswer {
  const headEnd = text.indexOf('\r\n\r\n')
  const [line = '', ...lines] = text.slice(0, headEnd).split('\r\n')
  const fields = lines.map((one) => {
    const colon = one.indexOf(':')
    return [one.slice(0, colon).toLowerCase(), one.slice(colon + 1).trim()] as const
  })
  return {
    status: Number(line.split(' ')[1]),
    fields,
    values: (name) => fields.filter(([field]) => field === name).map(([, value]) => value),
    body: text.slice(headEnd + 4),
  }
}
