// How a problem is answered: through Fastify, onto a raw response, or onto a socket that no request was read from.
// Whichever way, an answer that comes before the body was read closes the connection, and can be read all the same.

import { type IncomingMessage, type ServerResponse, STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { endAnswer, LINGER_MS } from '../forward-answer.ts'
import { BrokerError } from '../errors.ts'
import { hasBody } from '../forward-upload.ts'
import { type Audience, problemDocument } from './problem.ts'

type Fields = Readonly<Record<string, string | string[] | number | undefined>>

interface Problem {
  listener: Audience
  requestId: string
  error: unknown
  /** Fields besides those of every problem, with names in lower case. */
  fields: Fields
}

/** Answers with the problem document of an error. */
export function sendProblem(
  reply: FastifyReply,
  request: FastifyRequest,
  listener: Audience,
  error: unknown,
): FastifyReply {
  const { raw } = request
  if (hasBody(raw) && !raw.complete && !raw.readableEnded) {
    reply.hijack()
    const problem = { listener, requestId: request.id, error, fields: reply.getHeaders() }
    answerProblem(raw, reply.raw, problem)
    return reply
  }
  const answer = renderProblem({ listener, requestId: request.id, error, fields: {} })
  return reply.code(answer.status).headers(answer.fields).serializer(String).send(answer.body)
}

/** Answers a request whose response Fastify does not write, or not any more. Its client may still be sending. */
export function answerProblem(
  request: IncomingMessage,
  response: ServerResponse,
  problem: Problem,
): void {
  const { status, fields, body } = renderProblem(problem)
  const unread = hasBody(request) && !request.complete
  response.writeHead(status, {
    ...(fields as Record<string, string>),
    'content-length': Buffer.byteLength(body),
    ...(unread ? { connection: 'close' } : {}),
  })
  endAnswer(request, response, body)
}

/** Answers on a socket without a response, and closes it. What the client still sends is not read. */
export function answerOnSocket(socket: Socket, problem: Problem): void {
  const { status, fields, body } = renderProblem(problem)
  const lines = Object.entries({
    ...fields,
    'content-length': Buffer.byteLength(body),
    connection: 'close',
  }).map(([name, value]) => `${name}: ${String(value)}\r\n`)
  socket.end(`HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\n${lines.join('')}\r\n${body}`)
  // A client that keeps its side open would keep the socket.
  const timer = setTimeout(() => socket.destroy(), LINGER_MS)
  socket.on('close', () => clearTimeout(timer))
}

/**
 * Challenge that goes with a 401 of ours (RFC 9110 section 11.6.1). That of a gateway is passed on to its client. Who sent
 * no credential is told no error (RFC 6750 section 3.1).
 */
function challengeFor({ listener, error }: Pick<Problem, 'listener' | 'error'>): string {
  if (listener !== 'internal') return 'Session'
  const refused = error instanceof BrokerError && error.extensions.credentialRefused === true
  return `Bearer realm="pagero-token-broker"${refused ? ', error="invalid_token"' : ''}`
}

function renderProblem(problem: Problem): { status: number; fields: Fields; body: string } {
  const { status, document, retryAfterSeconds } = problemDocument(problem.error, problem)
  const fields: Record<string, Fields[string]> = {
    ...problem.fields,
    'content-type': 'application/problem+json; charset=utf-8',
    'cache-control': 'no-store',
  }
  if (retryAfterSeconds !== undefined) fields['retry-after'] = String(retryAfterSeconds)
  // A challenge of ours would ask for a credential that was good; it was Pagero's API that refused.
  if (status === 401 && document['code'] !== 'upstream_refused') {
    fields['www-authenticate'] = challengeFor(problem)
  }
  return { status, fields, body: JSON.stringify(document) }
}
