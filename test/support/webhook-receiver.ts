// A receiver of webhooks as an application would have one: it verifies with the library that the specification's
// authors publish, and keeps what it was sent. A test tells it what to answer.

import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { randomBytes } from 'node:crypto'
import { Webhook } from 'standardwebhooks'
import type { Test } from 'tap'
import { resetSocket } from '../../src/reset-socket.ts'

export interface ReceivedEvent {
  id: string
  type: string
  timestamp: string
  data: {
    user: string
    state: string
    cause: string | null
    generation: number
    expires_at: string
    within_days: number | null
    reconnect_url: string | null
    detail: string
  }
}

export interface WebhookReceiver {
  url: string
  /** In the form of WEBHOOK_SECRET. */
  secret: string
  /** Every request in the order of its arrival, answered well or not. */
  requests: Array<{ id: string; headers: IncomingMessage['headers']; body: string }>
  /** Those that were answered 2xx and whose signature is right, in order. */
  accepted: ReceivedEvent[]
  /** What could not be verified. */
  forged: string[]
  /** Requests that are being received or answered at this moment, by user; and the most there were at a time. */
  atOnce(): number
  /** Decides about a request; undefined is 204. */
  answer: (event: ReceivedEvent, request: { count: number }) => Reply | undefined
  stop(): Promise<void>
  start(): Promise<void>
}

export type Reply =
  | { status: number; headers?: Record<string, string>; body?: string }
  | 'hang'
  | 'reset'
  | { afterMs: number }

/** Starts a receiver; it ends with the test. */
export async function startWebhookReceiver(test: Test): Promise<WebhookReceiver> {
  const secret = `whsec_${randomBytes(32).toString('base64')}`
  const verifier = new Webhook(secret)
  let port = 0
  let server = createServer()
  let present = 0
  let most = 0
  const counts = new Map<string, number>()

  async function receive(request: IncomingMessage, response: ServerResponse): Promise<void> {
    present += 1
    most = Math.max(most, present)
    response.once('close', () => (present -= 1))
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const body = Buffer.concat(chunks).toString('utf8')
    const id = String(request.headers['webhook-id'])
    receiver.requests.push({ id, headers: request.headers, body })
    let event: ReceivedEvent
    try {
      const payload = verifier.verify(body, request.headers as Record<string, string>)
      event = { ...(payload as Omit<ReceivedEvent, 'id'>), id }
    } catch (error) {
      receiver.forged.push(`${String(error)}: ${body}`)
      response.writeHead(401).end()
      return
    }
    const count = (counts.get(id) ?? 0) + 1
    counts.set(id, count)
    const reply = receiver.answer(event, { count }) ?? { status: 204 }
    if (reply === 'hang') return
    if (reply === 'reset') {
      resetSocket(request.socket)
      return
    }
    if ('afterMs' in reply) {
      await new Promise((resolve) => void setTimeout(resolve, reply.afterMs))
      receiver.accepted.push(event)
      response.writeHead(204).end()
      return
    }
    if (reply.status >= 200 && reply.status < 300) receiver.accepted.push(event)
    response.writeHead(reply.status, reply.headers).end(reply.body)
  }

  const receiver: WebhookReceiver = {
    url: '',
    secret,
    requests: [],
    accepted: [],
    forged: [],
    atOnce: () => most,
    answer: () => undefined,
    async stop() {
      server.closeAllConnections()
      await new Promise((resolve) => void server.close(resolve))
    },
    async start() {
      server = createServer((request, response) => {
        receive(request, response).catch(() => response.destroy())
      })
      await new Promise<void>((resolve) => void server.listen(port, '127.0.0.1', resolve))
      port = (server.address() as AddressInfo).port
      receiver.url = `http://127.0.0.1:${port}/hooks?from=broker`
    },
  }
  await receiver.start()
  test.teardown(() => receiver.stop())
  return receiver
}
