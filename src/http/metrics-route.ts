// What Prometheus scrapes. Without a credential, as the probes: the listener is private, and no user, secret or host is told.

import Type from 'typebox'
import type { Metrics } from '../metrics.ts'
import type { App } from './app.ts'

const EXAMPLE = `# HELP pagero_broker_refresh_attempts_total Refresh tokens presented to Pagero, by what they were presented for and what came of it.
# TYPE pagero_broker_refresh_attempts_total counter
pagero_broker_refresh_attempts_total{cause="expiry",outcome="granted"} 1284
pagero_broker_refresh_attempts_total{cause="expiry",outcome="in_doubt"} 0
…`

/** `GET /metrics`. */
export function registerMetricsRoute(
  app: App,
  metrics: Pick<Metrics, 'exposition' | 'contentType'> | undefined,
): void {
  app.get(
    '/metrics',
    {
      schema: {
        operationId: 'getMetrics',
        summary: 'Read the metrics of this replica',
        description:
          'In the text format of Prometheus. Scrape every replica; what concerns the database as a whole (`pagero_broker_grants`, `_grants_expiring`, `_queue_entries`) each of them tells alike. Alert rules and a dashboard are in `deploy/`.',
        tags: ['operations'],
        security: [],
        response: {
          200: {
            description: 'The metrics.',
            content: { 'text/plain': { schema: Type.String(), example: EXAMPLE } },
          },
        },
      },
    },
    async (_request, reply) =>
      reply
        .header('cache-control', 'no-store')
        .type(metrics?.contentType ?? 'text/plain')
        .send((await metrics?.exposition()) ?? ''),
  )
}
