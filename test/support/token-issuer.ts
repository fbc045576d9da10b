// An issuer of callers' JWTs: key pairs, tokens good and forged, and the place where its keys are published, over HTTP
// or over HTTPS for whoever brings a token, as Kubernetes does it.

import { execFile } from 'node:child_process'
import { createServer as createHttpServer, type RequestListener } from 'node:http'
import { createServer as createHttpsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import * as jose from 'jose'
import type { Test } from 'tap'

export const ISSUER = 'https://issuer.example'
export const AUDIENCE = 'pagero-broker'
export const SUBJECT = 'system:serviceaccount:erp:sync'

export interface IssuerKey {
  kid: string
  algorithm: string
  privateKey: jose.CryptoKey
  publicJwk: jose.JWK
}

/** Makes a key pair of the issuer. */
export async function createIssuerKey(kid: string, algorithm = 'ES256'): Promise<IssuerKey> {
  const { privateKey, publicKey } = await jose.generateKeyPair(algorithm, { extractable: true })
  const publicJwk = { ...(await jose.exportJWK(publicKey)), kid, alg: algorithm, use: 'sig' }
  return { kid, algorithm, privateKey, publicJwk }
}

/** Signs a token that is good but for the changes; undefined takes a member out. */
export async function signToken(
  key: IssuerKey,
  changes: { header?: Record<string, unknown>; claims?: Record<string, unknown>; at?: Date } = {},
): Promise<string> {
  const now = Math.floor((changes.at ?? new Date()).getTime() / 1000)
  const claims = {
    iss: ISSUER,
    aud: [AUDIENCE],
    sub: SUBJECT,
    iat: now,
    exp: now + 600,
    ...changes.claims,
  }
  const header = { alg: key.algorithm, kid: key.kid, typ: 'JWT', ...changes.header }
  const payload = new TextEncoder().encode(JSON.stringify(claims))
  return new jose.CompactSign(payload)
    .setProtectedHeader(JSON.parse(JSON.stringify(header)) as jose.CompactJWSHeaderParameters)
    .sign(key.privateKey, { crit: { 'x-thing': true } })
}

/** A token as somebody writes it who has no key: header, claims and signature put together. */
export function joinToken(header: object, claims: object, signature = ''): string {
  const part = (value: object): string => Buffer.from(JSON.stringify(value)).toString('base64url')
  return `${part(header)}.${part(claims)}.${signature}`
}

export interface KeyEndpoint {
  url: string
  /** Requests so far, with their path and credential. */
  requests: Array<{ path: string | undefined; authorization: string | undefined }>
  /** Answers from now on. */
  answer(status: number, body: unknown, headers?: Record<string, string>): void
}

/** Publishes keys over HTTP on a loopback address. */
export async function publishKeys(test: Test, keys: readonly IssuerKey[]): Promise<KeyEndpoint> {
  const { endpoint, listener } = createEndpoint(keys)
  const server = createHttpServer(listener)
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  test.teardown(() => new Promise((resolve) => server.close(resolve)))
  const { port } = server.address() as AddressInfo
  return { ...endpoint, url: `http://127.0.0.1:${port}/jwks` }
}

/** Publishes keys over HTTPS, with a certificate that only `caFile` vouches for. */
export async function publishKeysOverTls(
  test: Test,
  keys: readonly IssuerKey[],
): Promise<KeyEndpoint & { caFile: string }> {
  const directory = test.testdir()
  const caFile = join(directory, 'ca.crt')
  const keyFile = join(directory, 'tls.key')
  await promisify(execFile)('openssl', [
    ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'],
    ...['-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'],
    ...['-keyout', keyFile, '-out', caFile],
  ])
  const { endpoint, listener } = createEndpoint(keys)
  const options = { key: await readFile(keyFile), cert: await readFile(caFile) }
  const server = createHttpsServer(options, listener)
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  test.teardown(() => new Promise((resolve) => server.close(resolve)))
  const { port } = server.address() as AddressInfo
  return { ...endpoint, url: `https://localhost:${port}/openid/v1/jwks`, caFile }
}

function createEndpoint(keys: readonly IssuerKey[]): {
  endpoint: Omit<KeyEndpoint, 'url'>
  listener: RequestListener
} {
  const requests: KeyEndpoint['requests'] = []
  let status = 200
  let body: unknown = { keys: keys.map(({ publicJwk }) => publicJwk) }
  let headers: Record<string, string> = {}
  return {
    endpoint: {
      requests,
      answer(newStatus, newBody, newHeaders = {}) {
        status = newStatus
        body = newBody
        headers = newHeaders
      },
    },
    listener: (request, response) => {
      requests.push({ path: request.url, authorization: request.headers.authorization })
      response.writeHead(status, { 'content-type': 'application/jwk-set+json', ...headers })
      response.end(typeof body === 'string' ? body : JSON.stringify(body))
    },
  }
}
