// The audit record over HTTP, and that it has everything: each call, and what the log says of security.

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import type { Test } from 'tap'
import { AUDIT_ACTIONS, type AuditEvent } from '../src/audit-event.ts'
import { createAuditedLog } from '../src/audited-log.ts'
import { BrokerError } from '../src/errors.ts'
import { keepingLog } from './support/keeping-log.ts'
import { buildListeners } from './support/internal-listener.ts'

interface Page {
  items: Array<{
    at: string
    action: string
    user: string | null
    count: number
    actor: { kind: string; name: string | null }
    fingerprint: string | null
    sequence: number
  }>
  next: string | null
}

async function setUp(t: Test) {
  const listeners = await buildListeners(t, {
    callers: {
      service: { rights: ['token:read', 'proxy:call', 'grant:read'], users: ['*'] },
      acme: { rights: ['ops:read'], users: ['acme-*'] },
      operator: { rights: ['ops:read'], users: ['*'] },
    },
  })
  const { internalApp, credentials, scene, engine } = listeners
  for (const user of ['acme-1', 'acme-2', 'bob']) await scene.connect(engine, user)
  const ask = (url: string, caller: string, method: 'GET' | 'POST' = 'GET') =>
    internalApp.inject({ method, url, headers: credentials[caller] ?? {} })
  const token = (user: string) => ask(`/v1/users/${user}/access-token`, 'service')
  const list = async (query: string, caller = 'operator') => {
    await engine.audit.flush()
    return (await ask(`/v1/audit-events${query}`, caller)).json() as Page
  }
  return { ...listeners, ask, token, list }
}

t.test('a caller sees the events of its users, and no others', async (t) => {
  const { token, list, ask } = await setUp(t)
  const answer = (await token('acme-1')).json() as { fingerprint: string }
  await token('bob')
  await ask('/v1/users/bob/access-token', 'nobody')
  const all = await list('')
  t.same(
    new Set(all.items.map(({ user }) => user)),
    new Set([null, 'acme-1', 'bob']),
    'who may see every user sees what concerns none of them',
  )
  t.ok(all.items.some(({ action }) => action === 'caller_unauthenticated'))
  const acme = await list('', 'acme')
  t.match(acme, {
    items: [
      {
        action: 'token_handed_out',
        user: 'acme-1',
        actor: { kind: 'caller', name: 'service' },
        fingerprint: answer.fingerprint,
        count: 1,
      },
    ],
    next: null,
  })
  t.equal(acme.items.length, 1)
  t.same((await list('?user=bob', 'acme')).items, [])
  t.same((await list('?user=eve', 'acme')).items, [])
  const chosen = await list('?user=bob&action=token_handed_out')
  t.match(chosen.items, [{ user: 'bob', action: 'token_handed_out' }])
  t.equal(chosen.items.length, 1)
})

t.test('pages join without a gap, newest first, whatever is added meanwhile', async (t) => {
  const { token, list } = await setUp(t)
  for (const user of ['acme-1', 'acme-2', 'bob']) await token(user)
  const { items: all } = await list('')
  t.ok(all.length >= 4)
  t.same(
    all.map(({ at }) => at),
    all
      .map(({ at }) => at)
      .toSorted()
      .toReversed(),
  )
  const found: Page['items'] = []
  for (let after = ''; ;) {
    const page = await list(`?limit=1${after}`)
    found.push(...page.items)
    if (page.next === null) break
    after = `&after=${page.next}`
    await token('bob')
  }
  t.same(found, all)
})

t.test('what is no cursor, no action or no limit of the list is 400', async (t) => {
  const { ask } = await setUp(t)
  const cursor = (text: string) => Buffer.from(text).toString('base64url')
  for (const query of [
    'after=nonsense',
    `after=${cursor('2026-02-31T00:00:00.000Z x 1')}`,
    `after=${cursor('2026-13-01T00:00:00.000Z 0d9f7a52-6f0e-4f86-9a3e-7d5a3b1c2d4e 1')}`,
    "after='",
    'action=everything',
    'limit=501',
    'limit=0',
    'user=a%20b',
    'unknown=1',
  ]) {
    t.match((await ask(`/v1/audit-events?${query}`, 'operator')).json(), {
      status: 400,
      code: 'request_invalid',
    })
  }
  t.equal((await ask('/v1/audit-events', 'service')).statusCode, 403)
})

t.test('of a thousand mixed calls none is missing on the record', async (t) => {
  const { ask, token, scene, engine } = await setUp(t)
  const sent = {
    token_handed_out: 0,
    call_proxied: 0,
    caller_unauthenticated: 0,
    caller_forbidden: 0,
  }
  const users = ['acme-1', 'acme-2', 'bob']
  const calls = Array.from({ length: 1_000 }, (_, i) => async () => {
    const user = users[i % 3] ?? ''
    if (i % 4 === 0) {
      const { statusCode } = await token(user)
      sent.token_handed_out += Number(statusCode === 200)
    } else if (i % 4 === 1) {
      const { statusCode } = await ask(`/v1/users/${user}/pagero/document/v1/documents`, 'service')
      sent.call_proxied += Number(statusCode === 200)
    } else if (i % 4 === 2) {
      const { statusCode } = await ask(`/v1/users/${user}/access-token`, 'nobody')
      sent.caller_unauthenticated += Number(statusCode === 401)
    } else {
      const { statusCode } = await ask(`/v1/users/${user}/access-token`, 'acme')
      sent.caller_forbidden += Number(statusCode === 403)
    }
  })
  while (calls.length > 0) await Promise.all(calls.splice(0, 20).map((call) => call()))
  t.same(Object.values(sent), [250, 250, 250, 250])
  await engine.audit.flush()
  const { rows } = await scene.database.pool.query<{ action: string; times: number }>(
    'select action, sum(count)::integer as times from audit_events group by action',
  )
  const times = Object.fromEntries(rows.map((row) => [row.action, row.times]))
  t.match(times, sent)
})

t.test('what the log says of security is on record, with its cause and nothing more', (t) => {
  const events: AuditEvent[] = []
  const inner = keepingLog()
  const log = createAuditedLog(inner, { record: (event) => void events.push(event) })
  log.warn('grant_condemned', { user: 'alice', generation: 7, cause: 'rotation_lost' })
  log.error('breaker_opened', { reason: 'unreachable' })
  log.warn('rate_limited', { caller: 'sync', retryAfterSeconds: 3 })
  log.error('spool_pass_failed', { error: new BrokerError('integrity_failure', 'It was changed.') })
  log.info('broker_stopping')
  log.warn('constructor')
  t.equal(inner.events.length, 6, 'the log has each as well')
  t.same(events, [
    {
      action: 'grant_condemned',
      actor: 'broker',
      outcome: 'failed',
      user: 'alice',
      details: { cause: 'rotation_lost', generation: 7 },
    },
    {
      action: 'breaker_opened',
      actor: 'broker',
      outcome: 'failed',
      details: { reason: 'unreachable' },
    },
    { action: 'rate_limited', actor: 'caller', name: 'sync', outcome: 'refused', details: {} },
    {
      action: 'integrity_failure',
      actor: 'broker',
      outcome: 'failed',
      details: { reason: 'spool_pass_failed' },
    },
  ])
  t.end()
})

t.test(
  'every action has somebody who records it, and every event that goes on record is logged',
  (t) => {
    const root = join(import.meta.dirname, '../src')
    const sources = readdirSync(root, { recursive: true, encoding: 'utf8' })
      .filter((name) => name.endsWith('.ts') && !name.endsWith('audit-event.ts'))
      .map((name) => ({ name, text: readFileSync(join(root, name), 'utf8') }))
    for (const action of Object.keys(AUDIT_ACTIONS)) {
      const writes = new RegExp(`(?:[:?] |record\\()'${action}'`)
      t.ok(
        sources.some(({ text }) => writes.test(text)),
        action,
      )
    }
    const table = sources.find(({ name }) => name === 'audited-log.ts')?.text ?? ''
    const mapped = [...table.matchAll(/^ {2}(\w+): \{/gm)].map(([, event = '']) => event)
    t.ok(mapped.length >= 10)
    for (const event of mapped) {
      const logs = new RegExp(`log\\.(?:info|warn|error)\\(\\s*'${event}'`)
      t.ok(
        sources.some(({ text }) => logs.test(text)),
        event,
      )
    }
    t.end()
  },
)
