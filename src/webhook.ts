// Telling the application what happens to grants: events from the outbox are posted to the operator's URL, signed as
// Standard Webhooks 1.0.0 has it. At least once, those of one user in their order, and never anywhere else: no redirect is
// followed and no proxy of the environment is used.

import { createHmac } from 'node:crypto'
import type { WebhookSettings } from './config.ts'
import { type GrantEvent, PAGERO_USER_PREFIX } from './grant.ts'
import type { Ports } from './ports.ts'
import type { WebhookDelivery } from './record-stores.ts'
import {
  BACKOFF_LAST_SECONDS,
  backoffSeconds,
  createQueueWorker,
  type QueueWorker,
} from './queue.ts'
import { type Secret } from './secret.ts'
import { sendOnce, type SendResult } from './send-once.ts'
import { readRetryAfter } from './token-answer.ts'
import { createUpstreamLookup } from './upstream-address.ts'

/** Of one replica: one receiver that hangs must not fill the process with waiting requests. */
const CONCURRENCY = 8
/** How long an event may wait before its first attempt; looking costs one query that finds nothing, nearly always. */
const POLL_MS = 1_000
/** A lease of three timeouts: a delivery begins within the first two or not at all, and ends within the third. */
const LEASE_TIMEOUTS = 3
/** "The sender should disable the webhook endpoint": of the event at hand it is believed at once. */
const GONE = 410

/** What an application makes of an event. A sentence for a person, the same for every user of its kind. */
const MEANINGS: Readonly<Record<GrantEvent, string>> = {
  'grant.connected': 'The user has connected to Pagero: tokens are to be had.',
  'grant.reauthentication_required':
    'Pagero refuses the refresh token of this user for good. The user must log in again.',
  'grant.recovered': 'The grant of this user is in use again.',
  'grant.expiring': 'The grant of this user runs out unless the user logs in again.',
  'grant.disconnected': 'The grant of this user was closed, and is being revoked at Pagero.',
}

/** Returns the body of a delivery; the same bytes at each attempt, unless the public URL has changed meanwhile. */
export function webhookBody(event: WebhookDelivery, publicUrl: string): string {
  return JSON.stringify({
    type: event.type,
    timestamp: event.occurredAt.toISOString(),
    data: {
      user: event.user,
      state: event.grantState,
      cause: event.cause,
      generation: event.generation,
      expires_at: event.expiresAt.toISOString(),
      within_days: event.withinDays,
      // Only a user that Pagero has named can log in without a link of the application's.
      reconnect_url: event.user.startsWith(PAGERO_USER_PREFIX) ? `${publicUrl}/auth/login` : null,
      detail: MEANINGS[event.type],
    },
  })
}

/**
 * Returns `webhook-signature`: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`, once for each secret.
 * A receiver takes the message when one of them is right, so secrets can be changed without a gap.
 * @see {@link https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md Standard Webhooks, "Signature scheme"}
 */
export function webhookSignature(
  secrets: readonly Secret[],
  message: { id: string; timestampSeconds: number; body: string },
): string {
  const content = `${message.id}.${message.timestampSeconds}.${message.body}`
  return secrets
    .map((secret) => {
      const key = Buffer.from(secret.reveal().slice('whsec_'.length), 'base64')
      return `v1,${createHmac('sha256', key).update(content).digest('base64')}`
    })
    .join(' ')
}

/** Makes the loop that delivers events. Any number of replicas may run one. */
export function createWebhookSender(
  ports: Pick<Ports, 'clock' | 'log' | 'outbox'>,
  settings: WebhookSettings & { publicUrl: string },
): QueueWorker {
  const { clock, log, outbox } = ports
  const timeoutMs = settings.timeoutSeconds * 1000
  // The operator's own receiver is mostly in the same network, and it is not given a token.
  const lookup = createUpstreamLookup({ allowPrivate: true })

  async function deliver({ event, sendBeforeMs }: Taken): Promise<void> {
    const { eventId: id, user } = event
    const body = webhookBody(event, settings.publicUrl)
    const timestampSeconds = Math.floor(clock.now().getTime() / 1000)
    const sent = await sendOnce(
      clock,
      {
        url: settings.url,
        headers: {
          'content-type': 'application/json',
          'user-agent': 'pagero-token-broker',
          'webhook-id': id,
          'webhook-timestamp': String(timestampSeconds),
          'webhook-signature': webhookSignature(settings.secrets, { id, timestampSeconds, body }),
        },
        body,
      },
      { sendBeforeMs, deadlineMs: clock.monotonicMs() + timeoutMs },
      lookup,
    )
    const status = 'status' in sent ? sent.status : undefined
    if (status !== undefined && status >= 200 && status < 300) {
      await outbox.done(id)
      log.info('webhook_delivered', { eventId: id, user, upstreamStatus: status })
      return
    }
    const failure = status === undefined ? reasonOf(sent) : `http_${status}`
    if (status === GONE) {
      await outbox.giveUp(id, failure)
      log.error('webhook_dead', { eventId: id, user, reason: failure })
      return
    }
    const delaySeconds = Math.max(
      backoffSeconds(settings.backoffSeconds, event.attemptCount - 1, clock.random()),
      (sent.kind === 'answered'
        ? readRetryAfter(sent.headers['retry-after'], BACKOFF_LAST_SECONDS)
        : undefined) ?? 0,
    )
    if ((await outbox.retryLater(id, failure, delaySeconds)) === 'dead') {
      log.error('webhook_dead', { eventId: id, user, reason: failure })
      return
    }
    log.warn('webhook_failed', {
      eventId: id,
      user,
      reason: failure,
      retryAfterSeconds: Math.round(delaySeconds),
    })
  }

  return createQueueWorker(ports, {
    concurrency: CONCURRENCY,
    pollMs: POLL_MS,
    event: 'webhooks_postponed',
    async take(limit) {
      const sendBeforeMs = clock.monotonicMs() + (LEASE_TIMEOUTS - 1) * timeoutMs
      const events = await outbox.take(limit, LEASE_TIMEOUTS * settings.timeoutSeconds)
      return events.map((event): Taken => ({ event, sendBeforeMs }))
    },
    work: deliver,
  })
}

/** `sendBeforeMs` is monotonic: later than that another replica may have taken the event. */
interface Taken {
  event: WebhookDelivery
  sendBeforeMs: number
}

function reasonOf(sent: SendResult): string {
  return 'reason' in sent ? sent.reason : 'error'
}
