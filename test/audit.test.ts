// The audit record: nothing that is recorded gets lost, nothing waits for it, and no flood fills it.

import { randomBytes, randomUUID } from 'node:crypto'
import t from 'tap'
import type { Test } from 'tap'
import { createAudit } from '../src/audit.ts'
import type { AuditEvent } from '../src/audit-event.ts'
import { systemClock } from '../src/clock.ts'
import type { UserKey } from '../src/grant.ts'
import type { AuditStore } from '../src/record-stores.ts'
import { createAuditStore } from '../src/postgres/audit-store.ts'
import type { Clock } from '../src/ports.ts'
import { createChainKeys } from '../src/seal.ts'
import { EVERY_EVENT } from './support/audit.ts'
import { createTestDatabase } from './support/database.ts'
import { keepingLog } from './support/keeping-log.ts'
import { standingClock } from './support/stored-grants.ts'

const ALICE = 'alice' as UserKey
const BOB = 'bob' as UserKey

function handOut(fingerprint: string, more: Partial<AuditEvent> = {}): AuditEvent {
  return {
    action: 'token_handed_out',
    actor: 'caller',
    name: 'invoice-sync',
    user: ALICE,
    requestId: 'r1',
    fingerprint,
    ...more,
  }
}

async function startRecord(
  t: Test,
  intercept: (store: AuditStore) => AuditStore = (one) => one,
  clock: Clock = systemClock,
) {
  const { database } = await createTestDatabase(t)
  const store = createAuditStore(database)
  const log = keepingLog()
  const audit = createAudit(
    { clock, log, auditEvents: intercept(store) },
    createChainKeys([{ keyId: 'k1', key: randomBytes(32) }], 'deployment'),
    { replica: 'broker-1', boot: randomUUID() },
  )
  const all = async () =>
    (await store.list(EVERY_EVENT)).toSorted((a, b) => a.sequence - b.sequence)
  return { database, store, log, audit, all }
}

t.test('an event is on record by itself, and a chain has a first and a last row', async (t) => {
  const { audit, all } = await startRecord(t)
  audit.record({ action: 'login_completed', actor: 'session', name: ALICE, user: ALICE })
  while ((await all()).length < 2) await systemClock.sleep(20)
  await audit.close()
  const rows = await all()
  t.same(
    rows.map(({ action, sequence }) => [action, sequence]),
    [
      ['chain_opened', 0],
      ['login_completed', 1],
      ['chain_closed', 2],
    ],
  )
  t.match(rows[1], { actorKind: 'session', actorName: ALICE, user: ALICE, outcome: 'succeeded' })
  t.ok(Math.abs(Date.now() - Number(rows[1]?.at)) < 60_000)
})

t.test(
  'hand-outs at human rates are a row each; faster ones are added up, none left out',
  async (t) => {
    const { audit, all } = await startRecord(t)
    audit.record(handOut('f1', { requestId: 'first' }))
    for (let i = 0; i < 499; i += 1) audit.record(handOut('f1'))
    audit.record(handOut('f2'))
    // The same account of Pagero, connected by two users, may have one token at both.
    for (let i = 0; i < 3; i += 1) audit.record(handOut('f2', { user: BOB }))
    for (let i = 0; i < 3; i += 1) audit.record(handOut('f1', { name: 'reports' }))
    await audit.close()
    const rows = (await all()).filter(({ action }) => action === 'token_handed_out')
    const told = rows.map(({ actorName, user, fingerprint, requestId, count }) =>
      [actorName, user, fingerprint, requestId, count].join(' '),
    )
    t.same(told.toSorted(), [
      'invoice-sync alice f1  499',
      'invoice-sync alice f1 first 1',
      'invoice-sync alice f2 r1 1',
      'invoice-sync bob f2  2',
      'invoice-sync bob f2 r1 1',
      'reports alice f1  2',
      'reports alice f1 r1 1',
    ])
  },
)

t.test('while the database is away events wait, in order, and each is written once', async (t) => {
  let isAway = true
  let unconfirmed = 0
  const { audit, all, log } = await startRecord(t, (store) => ({
    ...store,
    async append(rows) {
      if (isAway) throw new Error('away')
      await store.append(rows)
      // Carried out, and its answer lost: the same rows come again.
      if (unconfirmed++ === 0) throw new Error('lost')
    },
  }))
  for (let i = 0; i < 3; i += 1) {
    audit.record({ action: 'sessions_ended', actor: 'broker', requestId: `r${i}` })
    t.equal(await audit.flush(), false)
  }
  t.same(await all(), [])
  isAway = false
  await audit.close()
  t.same(
    (await all()).map(({ sequence, requestId }) => [sequence, requestId]),
    [
      [0, null],
      [1, 'r0'],
      [2, 'r1'],
      [3, 'r2'],
      [4, null],
    ],
  )
  const told = log.events.map(({ event }) => event)
  t.same(told, ['audit_not_written', 'audit_resumed'], 'said once')
})

t.test(
  'an outage that outgrows the memory merges hand-outs, and tells what it had to drop',
  async (t) => {
    let isAway = true
    const { audit, store, database } = await startRecord(t, (inner) => ({
      ...inner,
      async append(rows) {
        if (isAway) throw new Error('away')
        await inner.append(rows)
      },
    }))
    const login: AuditEvent = { action: 'login_completed', actor: 'session', name: ALICE }
    // More than there is room for, and one batch of 200 that is on its way.
    for (let i = 0; i < 25_000; i += 1) audit.record(login)
    for (let i = 0; i < 30_000; i += 1) audit.record(handOut(`f${i % 10}`))
    isAway = false
    while (!(await audit.flush())) await systemClock.sleep(20)
    await audit.flush()
    await audit.close()
    const { rows } = await database.pool.query<{ action: string; times: number }>(
      `select action, sum(count)::integer as times from audit_events
     where action in ('login_completed', 'token_handed_out', 'events_dropped') group by action`,
    )
    const times = Object.fromEntries(rows.map((row) => [row.action, row.times]))
    t.equal(times['token_handed_out'], 30_000, 'hand-outs are all counted')
    t.equal((times['login_completed'] ?? 0) + (times['events_dropped'] ?? 0), 25_000)
    t.ok((times['events_dropped'] ?? 0) >= 5_000)
    t.ok((await store.list({ ...EVERY_EVENT, action: 'events_dropped' })).length < 5)
  },
)

t.test('a flood of refusals takes a few rows, which count all of it', async (t) => {
  const { audit, all } = await startRecord(t)
  for (let i = 0; i < 100_000; i += 1) {
    audit.record({
      action: 'caller_unauthenticated',
      actor: 'anyone',
      outcome: 'refused',
      requestId: randomUUID(),
      details: { address: `2001:db8::${i.toString(16)}` },
    })
  }
  await audit.close()
  const rows = (await all()).filter(({ action }) => action === 'caller_unauthenticated')
  t.equal(
    rows.reduce((sum, { count }) => sum + count, 0),
    100_000,
  )
  t.ok(rows.length <= 25, `${rows.length} rows`)
})

t.test('texts that somebody else chose are cut and made plain, and stop nothing', async (t) => {
  const { audit, all } = await startRecord(t)
  audit.record({
    action: 'login_refused',
    actor: 'anyone',
    requestId: 'a\u0000b\u202e\ud800',
    details: { reason: 'x'.repeat(10_000), address: '\u0000' },
  })
  await audit.close()
  t.match((await all())[1], {
    requestId: 'a<U+0000>b<U+202E><U+D800>',
    details: { reason: /^x{200}…$/, address: '<U+0000>' },
  })
})

t.test('rows cannot be changed or taken away by mistake', async (t) => {
  const { audit, database } = await startRecord(t)
  await audit.close()
  for (const statement of [
    'update audit_events set count = 2',
    'delete from audit_events',
    'truncate audit_events',
  ]) {
    await t.rejects(database.pool.query(statement), { message: 'audit_events is append-only' })
  }
})

t.test('a flush after an outage stores the counts too for which there was no room', async (t) => {
  let isAway = true
  const { audit, database } = await startRecord(
    t,
    (inner) => ({
      ...inner,
      async append(rows) {
        if (isAway) throw new Error('away')
        await inner.append(rows)
      },
    }),
    // Nothing is counted or written but by the flush.
    standingClock(),
  )
  for (let i = 0; i < 12_000; i += 1) {
    audit.record({ action: 'login_completed', actor: 'session', name: ALICE })
  }
  for (let i = 0; i < 100; i += 1) audit.record(handOut(`f${i % 10}`))
  t.equal(await audit.flush(), false)
  isAway = false
  t.equal(await audit.flush(), true)
  const { rows } = await database.pool.query<{ times: number }>(
    `select sum(count)::integer as times from audit_events where action = 'token_handed_out'`,
  )
  t.equal(rows[0]?.times, 100)
  await audit.close()
})

t.test('a flush waits for what came before it, however much comes after it', async (t) => {
  const { audit, all } = await startRecord(t, (inner) => ({
    ...inner,
    async append(rows) {
      await systemClock.sleep(20)
      await inner.append(rows)
    },
  }))
  let recorded = 0
  const timer = setInterval(() => {
    for (let i = 0; i < 10; i += 1) audit.record(handOut(`f${(recorded += 1)}`))
  }, 2)
  t.teardown(() => clearInterval(timer))
  await systemClock.sleep(300)
  const before = `f${recorded}`
  const startedMs = performance.now()
  t.equal(await audit.flush(), true)
  t.ok(performance.now() - startedMs < 3_000)
  clearInterval(timer)
  t.ok((await all()).some(({ fingerprint }) => fingerprint === before))
  await audit.close()
})
