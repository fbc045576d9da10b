// Sites as a browser meets them in production: https, names without ports, and a broker behind a proxy that ends TLS.
// One port stands for all of them; the name that the browser asks for decides who answers.

import { execFile } from 'node:child_process'
import { createHash, X509Certificate } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { createServer as createHttpServer, type RequestListener } from 'node:http'
import { type AddressInfo, connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createServer, type TLSSocket } from 'node:tls'
import { promisify } from 'node:util'
import type { BrowserContext, Page } from 'playwright-core'
import type { Test } from 'tap'
import { launchChromium } from './chromium.ts'
import { type PublicListener, startPublicListener } from './public-listener.ts'

const BROKER_HOST = 'broker.example.test'
export const BROKER = `https://${BROKER_HOST}`
/** Same site as the broker, and listed. */
export const APP = 'https://app.example.test'
/** Same site as the broker, and not listed. */
export const SIBLING = 'https://sibling.example.test'
/** Another site altogether. */
export const EVIL = 'https://evil.test'
/** Another site too, and listed. */
export const PARTNER = 'https://partner.test'

/** Long enough for a machine that is busy with much else. */
export const LIMIT_MS = 15_000

export interface Sites {
  listener: PublicListener
  context: BrowserContext
  /** All that browsers have sent to the broker, in clear. */
  sent(): string
  /** All that the broker has answered. */
  received(): string
  /** What the broker has answered since the last call, as `METHOD route status`, sorted. */
  answered(): string[]
}

/** Starts a broker and the sites around it, and Chromium with a jar of its own; they end with the test. */
export async function startSites(
  test: Test,
  setup: Parameters<typeof startPublicListener>[1] = {},
): Promise<Sites> {
  const listener = await startPublicListener(test, {
    ...setup,
    pagero: { redirectUri: `${BROKER}/auth/callback`, ...setup.pagero },
    config: { allowedOrigins: [APP, PARTNER], ...setup.config },
    routes: (app) => {
      app.get('/app', { schema: { hide: true } }, (_request, reply) =>
        reply
          .header('content-security-policy', "default-src 'self'; script-src 'unsafe-inline'")
          .type('text/html; charset=utf-8')
          .send('<!doctype html><title>App</title>'),
      )
    },
  })
  const line = await startTls(test, listener.port)
  const browser = await launchChromium(test, line.browserArguments)
  const context = await browser.newContext()
  context.setDefaultTimeout(LIMIT_MS)
  let seen = 0
  return {
    listener,
    context,
    sent: () => Buffer.concat(line.sent).toString('latin1'),
    received: () => Buffer.concat(line.received).toString('latin1'),
    answered() {
      const { events } = listener.engine.log
      const answers = events.slice(seen).filter(({ event }) => event === 'request_answered')
      seen = events.length
      return answers
        .map(({ method, route, status }) => `${String(method)} ${String(route)} ${String(status)}`)
        .toSorted()
    },
  }
}

/** Logs in from a page of the broker's own origin, by clicks, and returns there; the page is open at `returnTo`. */
export async function logInAs(
  page: Page,
  name: 'Alice Andersson' | 'Bob Berg',
  returnTo = '/app',
): Promise<void> {
  await page.goto(`${BROKER}/auth/login?prompt=login&return_to=${encodeURIComponent(returnTo)}`)
  await page.getByRole('button', { name }).click()
  await page.waitForURL(new URL(returnTo, BROKER).href)
}

/** What a page finds when it asks the broker for its session. */
export async function sessionOf(
  page: Page,
): Promise<{ status: number; user?: string; code?: string }> {
  return page.evaluate(`
    fetch('${BROKER}/auth/session', { headers: { 'X-CSRF': '1' }, credentials: 'include' }).then(
      async (response) => {
        const { user, code } = await response.json()
        return { status: response.status, ...(user ? { user } : { code }) }
      })`)
}

/** All of the names but the broker's answer a page with the cookies that the query asks for. */
const serveOthers: RequestListener = (request, response) => {
  const planted = new URL(request.url ?? '', 'http://x').searchParams.getAll('plant')
  if (planted.length > 0) response.setHeader('set-cookie', planted)
  response.setHeader('content-type', 'text/html; charset=utf-8')
  response.end(`<!doctype html><title>${request.headers.host}</title>`)
}

async function startTls(
  test: Test,
  brokerPort: number,
): Promise<{ browserArguments: string[]; sent: Buffer[]; received: Buffer[] }> {
  const { key, cert } = await makeCertificate()
  const sent: Buffer[] = []
  const received: Buffer[] = []
  const sockets = new Set<Socket>()
  const keep = (socket: Socket) => {
    sockets.add(socket)
    socket.on('error', () => {})
    socket.once('close', () => sockets.delete(socket))
  }
  const others = createHttpServer(serveOthers)
  const server = createServer({ key, cert }, (client: TLSSocket) => {
    keep(client)
    if (client.servername !== BROKER_HOST) {
      others.emit('connection', client)
      return
    }
    const broker = connect(brokerPort, '127.0.0.1')
    keep(broker)
    client.on('data', (chunk: Buffer) => sent.push(chunk))
    broker.on('data', (chunk: Buffer) => received.push(chunk))
    client.pipe(broker).pipe(client)
    client.once('close', () => broker.destroy())
    broker.once('close', () => client.destroySoon())
  })
  server.on('tlsClientError', () => {})
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  test.teardown(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  const { port } = server.address() as AddressInfo
  const publicKey = new X509Certificate(cert).publicKey.export({ type: 'spki', format: 'der' })
  const pin = createHash('sha256').update(publicKey).digest('base64')
  return {
    browserArguments: [
      `--host-resolver-rules=MAP *.test 127.0.0.1:${port}`,
      // Not "ignore errors": with errors ignored Chromium leaves out HSTS and Clear-Site-Data.
      `--ignore-certificate-errors-spki-list=${pin}`,
    ],
    sent,
    received,
  }
}

async function makeCertificate(): Promise<{ key: Buffer; cert: Buffer }> {
  const directory = await mkdtemp(join(tmpdir(), 'broker-sites-'))
  const [key, cert] = [join(directory, 'key.pem'), join(directory, 'cert.pem')]
  try {
    await promisify(execFile)('/usr/bin/openssl', [
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'],
      ...['-keyout', key, '-out', cert, '-days', '2', '-subj', '/CN=sites of a test'],
      ...['-addext', 'subjectAltName=DNS:*.example.test,DNS:evil.test,DNS:partner.test'],
    ])
    return { key: await readFile(key), cert: await readFile(cert) }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}
