// Spans on their way to the collector: in batches, over HTTP, as JSON. What is lost on it is told, and nobody waits for it.

import { ExportResultCode, parseKeyPairsIntoRecord } from '@opentelemetry/core'
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import { BatchSpanProcessor, type SpanExporter, type SpanProcessor } from '@opentelemetry/sdk-trace'
import type { TraceSettings } from './config.ts'
import type { Clock, Log } from './ports.ts'

/** Spans that wait for the collector: about 2 MiB. More are lost. */
const WAITING_MAX = 2_048
const BATCH_MAX = 512
const BATCH_DELAY_MS = 1_000
const EXPORT_TIMEOUT_MS = 5_000
/** How often the log says that a collector is still away. */
const NOTE_INTERVAL_MS = 60_000

/**
 * Makes what sends spans, in batches, and tells the log of those that are lost: because the collector takes none, or not as
 * many as there are.
 */
export function createSpanSender(
  settings: TraceSettings,
  { clock, log }: { clock: Pick<Clock, 'monotonicMs'>; log: Pick<Log, 'info' | 'warn'> },
): SpanProcessor {
  const exporter = createExporter(settings)
  let waiting = 0
  let lost = 0
  let notedAtMs = -Infinity
  let isAway = false

  function lose(count: number, error?: Error): void {
    lost += count
    if (clock.monotonicMs() - notedAtMs < NOTE_INTERVAL_MS) return
    notedAtMs = clock.monotonicMs()
    log.warn('traces_not_exported', { count: lost, ...(error === undefined ? {} : { error }) })
    lost = 0
  }

  const batches = new BatchSpanProcessor({
    exporter: {
      export(spans, done) {
        waiting -= spans.length
        exporter.export(spans, (result) => {
          const failed = result.code !== ExportResultCode.SUCCESS
          if (failed) lose(spans.length, result.error)
          else if (isAway) {
            log.info('traces_exported_again', { count: lost })
            lost = 0
            notedAtMs = -Infinity
          }
          isAway = failed
          done(result)
        })
      },
      shutdown: () => exporter.shutdown(),
    },
    maxQueueSize: WAITING_MAX,
    maxExportBatchSize: BATCH_MAX,
    scheduledDelayMillis: BATCH_DELAY_MS,
    exportTimeoutMillis: EXPORT_TIMEOUT_MS,
  })
  return {
    onStart: () => undefined,
    onEnd(span) {
      // As the batches decide it, which tell nobody.
      if (waiting >= WAITING_MAX) lose(1)
      else waiting += 1
      batches.onEnd(span)
    },
    forceFlush: () => batches.forceFlush(),
    shutdown: () => batches.shutdown(),
  }
}

function createExporter({ endpoint, fields }: TraceSettings): SpanExporter {
  return new OTLPTraceExporter({
    url: `${endpoint.replace(/\/+$/, '')}/v1/traces`,
    headers: fields === undefined ? {} : parseKeyPairsIntoRecord(fields.reveal()),
    timeoutMillis: EXPORT_TIMEOUT_MS,
    // A stop sends all batches at once, beside the one that is on its way; beyond this it would send none.
    concurrencyLimit: WAITING_MAX / BATCH_MAX + 2,
    keepAlive: true,
  })
}
