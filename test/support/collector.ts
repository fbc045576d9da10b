// A collector of traces as an operator would have one: it takes OTLP over HTTP in its JSON form, and keeps what it was sent.

import { createServer, type IncomingHttpHeaders } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { Test } from 'tap'

export interface CollectedSpan {
  name: string
  traceId: string
  spanId: string
  parentSpanId: string | undefined
  /** As OTLP numbers them: 1 internal, 2 server, 3 client. */
  kind: number
  attributes: Readonly<Record<string, string | number>>
  isError: boolean
  tookMs: number
}

export interface Collector {
  /** What OTEL_EXPORTER_OTLP_ENDPOINT is. */
  url: string
  spans: CollectedSpan[]
  /** Attributes of whoever sent the spans. */
  resources: Array<Readonly<Record<string, string | number>>>
  /** All bodies, in the order of their arrival, with the target and fields that they came with. */
  requests: Array<{ target: string; headers: IncomingHttpHeaders; body: string }>
  /** The status of its answers; 0 gives none. */
  status: number
  /** How long it takes over each. */
  delayMs: number
}

interface Value {
  stringValue?: string
  intValue?: number | string
  doubleValue?: number
}

interface Attribute {
  key: string
  value: Value
}

interface OtlpSpan {
  name: string
  traceId: string
  spanId: string
  parentSpanId?: string
  kind: number
  startTimeUnixNano: string
  endTimeUnixNano: string
  attributes: Attribute[]
  status: { code?: number; message?: string }
}

interface Export {
  resourceSpans: Array<{
    resource: { attributes: Attribute[] }
    scopeSpans: Array<{ spans: OtlpSpan[] }>
  }>
}

function attributesOf(attributes: readonly Attribute[]): Record<string, string | number> {
  return Object.fromEntries(
    attributes.map(({ key, value }) => [
      key,
      value.stringValue ?? Number(value.intValue ?? value.doubleValue),
    ]),
  )
}

function spanOf(span: OtlpSpan): CollectedSpan {
  const { name, traceId, spanId, parentSpanId, kind } = span
  const tookNs = BigInt(span.endTimeUnixNano) - BigInt(span.startTimeUnixNano)
  return {
    ...{ name, traceId, spanId, kind },
    parentSpanId: parentSpanId === '' ? undefined : parentSpanId,
    attributes: attributesOf(span.attributes),
    isError: span.status.code === 2,
    tookMs: Number(tookNs / 1_000n) / 1_000,
  }
}

/** Starts a collector; it ends with the test. */
export async function startCollector(test: Test): Promise<Collector> {
  const server = createServer((request, response) => {
    request.setEncoding('utf8')
    let body = ''
    request.on('data', (text: string) => (body += text))
    request.on('end', () => {
      collector.requests.push({ target: request.url ?? '', headers: request.headers, body })
      if (collector.status === 0) return
      if (collector.status === 200) {
        for (const { resource, scopeSpans } of (JSON.parse(body) as Export).resourceSpans) {
          collector.resources.push(attributesOf(resource.attributes))
          collector.spans.push(...scopeSpans.flatMap(({ spans }) => spans.map(spanOf)))
        }
      }
      setTimeout(() => {
        response.writeHead(collector.status, { 'content-type': 'application/json' }).end('{}')
      }, collector.delayMs)
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  test.teardown(() => {
    server.close()
    server.closeAllConnections()
  })
  const { port } = server.address() as AddressInfo
  const collector: Collector = {
    url: `http://127.0.0.1:${port}`,
    spans: [],
    resources: [],
    requests: [],
    status: 200,
    delayMs: 0,
  }
  return collector
}
