// Whether the audit record is whole: whatever was changed, moved or taken away is found, but for what retention took.

import { execFile } from 'node:child_process'
import { createHash, randomBytes, randomUUID } from 'node:crypto'
import { join } from 'node:path'
import t from 'tap'
import type { Test } from 'tap'
import { type AuditRecord, createAudit } from '../src/audit.ts'
import { verifyAudit } from '../src/audit-check.ts'
import { expireEvents, noteHeads } from '../src/audit-upkeep.ts'
import { systemClock } from '../src/clock.ts'
import type { UserKey } from '../src/grant.ts'
import { createAuditStore } from '../src/postgres/audit-store.ts'
import { readDeploymentId } from '../src/postgres/deployment.ts'
import { createReplicaStore } from '../src/postgres/replica-store.ts'
import { createChainKeys } from '../src/seal.ts'
import { createTestDatabase, silentLog } from './support/database.ts'
import { keepingLog } from './support/keeping-log.ts'

const KEY = { keyId: 'k1', key: randomBytes(32) }
const TOKEN = 'an-access-token-that-leaked'
const FINGERPRINT = createHash('sha256').update(TOKEN).digest('base64url')

async function setUp(t: Test, keys = [KEY]) {
  const { database, url } = await createTestDatabase(t)
  const auditEvents = createAuditStore(database)
  const chainKeys = createChainKeys(keys, await readDeploymentId(database))
  const log = keepingLog()
  /** Starts the chain of one more process, with so many events. */
  async function startChain(events = 5): Promise<{ audit: AuditRecord; boot: string }> {
    const boot = randomUUID()
    const ports = { clock: systemClock, log, auditEvents }
    const audit = createAudit(ports, chainKeys, { replica: 'broker-1', boot })
    for (let i = 1; i < events; i += 1) {
      audit.record({
        action: 'token_handed_out',
        actor: 'caller',
        name: `caller-${i}`,
        user: 'alice' as UserKey,
        requestId: `r${i}`,
        fingerprint: FINGERPRINT,
        details: { method: 'GET' },
      })
    }
    await audit.flush()
    return { audit, boot }
  }
  const change = async (statement: string, values: unknown[] = []) => {
    await database.pool.query('alter table audit_events disable trigger user')
    await database.pool.query(statement, values)
    await database.pool.query('alter table audit_events enable trigger user')
  }
  const verify = (keysOfReader = chainKeys) => verifyAudit(auditEvents, keysOfReader)
  const expire = (audit: AuditRecord, days = 400) =>
    expireEvents({ audit, auditEvents, log }, chainKeys, days)
  const live = ({ boot }: { boot: string }) =>
    createReplicaStore(database.db).heartbeat('broker-1', boot)
  return { database, url, auditEvents, chainKeys, log, startChain, change, verify, expire, live }
}

t.test('a record that nobody has touched is unbroken', async (t) => {
  const { startChain, verify, auditEvents, live } = await setUp(t)
  const one = await startChain()
  await one.audit.close()
  const two = await startChain(2_500)
  await noteHeads({ audit: two.audit, auditEvents })
  await two.audit.flush()
  await live(two)
  t.same(await verify(), { events: 5 + 1 + 2_501, chains: 2, faults: [], remarks: [] })
  await two.audit.close()
})

t.test('whatever is done to the rows is found, and the row is named', async (t) => {
  const { database, startChain, verify, auditEvents, change, live } = await setUp(t)
  const one = await startChain(8)
  await one.audit.close()
  const two = await startChain(8)
  await noteHeads({ audit: two.audit, auditEvents })
  await two.audit.flush()
  await live(two)
  t.same((await verify()).faults, [])
  await change('create table kept as select * from audit_events')

  const row3 = `where chain_id = '${one.boot}' and sequence = 3`
  const changed = /^chain \S+: row 3 was changed, inserted or moved here$/
  const columns: Record<string, string> = {
    at: `at = at + interval '1 millisecond'`,
    replica: `replica = 'broker-2'`,
    actor_kind: `actor_kind = 'session'`,
    actor_name: `actor_name = 'somebody-else'`,
    action: `action = 'call_proxied'`,
    user_id: `user_id = 'bob'`,
    outcome: `outcome = 'refused'`,
    request_id: `request_id = null`,
    fingerprint: `fingerprint = null`,
    count: `count = 2`,
    details: `details = '{}'`,
    previous_hash: `previous_hash = decode(repeat('00', 32), 'hex')`,
    hash: `hash = decode(repeat('00', 32), 'hex')`,
  }
  const { rows: all } = await database.pool.query<{ name: string }>(
    "select column_name as name from information_schema.columns where table_name = 'audit_events'",
  )
  t.same(
    all.map(({ name }) => name).filter((name) => !Object.hasOwn(columns, name)),
    ['chain_id', 'sequence', 'key_id'],
    'every column is tried, these three below',
  )

  const cases: Array<[what: string, statement: string, fault: RegExp]> = [
    ...Object.entries(columns).map(([name, assignment]): [string, string, RegExp] => [
      name,
      `update audit_events set ${assignment} ${row3}`,
      changed,
    ]),
    ['its key', `update audit_events set key_id = 'k9' ${row3}`, /row 3 cannot be checked .*"k9"/],
    ['deleted', `delete from audit_events ${row3}`, /: row 3 is missing, before /],
    [
      'two deleted',
      `delete from audit_events where chain_id = '${one.boot}' and sequence in (3, 4)`,
      /: rows 3 to 4 are missing, before /,
    ],
    [
      'the beginning deleted',
      `delete from audit_events where chain_id = '${one.boot}' and sequence < 2`,
      /: rows 0 to 1 are missing, before /,
    ],
    [
      'inserted at the end',
      `insert into audit_events select chain_id, 99, at, replica, actor_kind, actor_name, action, user_id, outcome,
         request_id, fingerprint, count, details, key_id, previous_hash, hash
       from audit_events ${row3}`,
      /: rows 9 to 98 are missing/,
    ],
    [
      'inserted behind the end',
      `insert into audit_events select chain_id, 9, at, replica, actor_kind, actor_name, action, user_id, outcome,
         request_id, fingerprint, count, details, key_id, previous_hash, hash
       from audit_events ${row3}`,
      /: row 9 was changed, inserted or moved here/,
    ],
    [
      'reordered',
      `update audit_events set sequence = case sequence when 3 then 1004 when 4 then 1003 end
       where chain_id = '${one.boot}' and sequence in (3, 4);
       update audit_events set sequence = sequence - 1000 where sequence > 1000`,
      changed,
    ],
    [
      'the end cut off',
      `delete from audit_events where chain_id = '${one.boot}' and sequence > 5`,
      /: its end is missing: rows 6 to 8, or more/,
    ],
    [
      'swapped between chains',
      `update audit_events set chain_id = case chain_id when '${one.boot}' then '${two.boot}'::uuid else '${one.boot}' end,
         sequence = sequence + 1000 where sequence = 3;
       update audit_events set sequence = sequence - 1000 where sequence > 1000`,
      changed,
    ],
    [
      'a whole chain deleted',
      `delete from audit_events where chain_id = '${one.boot}'`,
      new RegExp(`^chain ${one.boot}: it is missing; it had rows up to 8`),
    ],
    ['everything deleted', 'delete from audit_events', /^There is no event at all/],
  ]
  for (const [what, statement, fault] of cases) {
    await change(statement)
    const { faults } = await verify()
    t.match(faults[0], fault, what)
    await change('delete from audit_events')
    await change('insert into audit_events select * from kept')
    t.same((await verify()).faults, [], 'and nothing else')
  }
  await two.audit.close()
})

t.test('a chain that was killed is told of, and is no fault', async (t) => {
  const { startChain, verify, live } = await setUp(t)
  const killed = await startChain()
  const running = await startChain()
  await live(running)
  const { faults, remarks } = await verify()
  t.same(faults, [])
  t.equal(remarks.length, 1)
  t.match(remarks[0], new RegExp(`^chain ${killed.boot} of broker-1 ends openly with row 4, `))
  await killed.audit.close()
  await running.audit.close()
})

t.test('without the encryption key the record is not called unbroken', async (t) => {
  const { startChain, verify, database } = await setUp(t)
  const { audit } = await startChain()
  await audit.close()
  const others = createChainKeys(
    [{ keyId: 'k2', key: randomBytes(32) }],
    await readDeploymentId(database),
  )
  t.match((await verify(others)).faults, [
    /row 0 cannot be checked without the encryption key "k1"/,
  ])
  const wrong = createChainKeys(
    [{ ...KEY, key: randomBytes(32) }],
    await readDeploymentId(database),
  )
  t.match((await verify(wrong)).faults, [/row 0 was changed/])
})

// The clock of the database cannot be moved, so the broker that wrote the old rows had one that went back in time.
async function startOldChain(
  scene: Awaited<ReturnType<typeof setUp>>,
  days: number,
  events: number,
) {
  const boot = randomUUID()
  const { auditEvents, chainKeys } = scene
  const audit = createAudit(
    {
      clock: systemClock,
      log: silentLog,
      auditEvents: { ...auditEvents, now: async () => new Date(Date.now() - days * 86_400_000) },
    },
    chainKeys,
    { replica: 'broker-0', boot },
  )
  for (let i = 1; i < events; i += 1) audit.record({ action: 'sessions_ended', actor: 'broker' })
  await audit.flush()
  return { audit, boot }
}

t.test('retention takes what is too old, and what remains is unbroken', async (t) => {
  const scene = await setUp(t)
  const { verify, expire, startChain, auditEvents, live, database } = scene
  const old = await startOldChain(scene, 401, 1_203)
  const young = await startOldChain(scene, 399, 3)
  const { audit, boot } = await startChain()
  await noteHeads({ audit, auditEvents })
  await audit.flush()
  await live({ boot })
  t.equal(await expire(audit), 1_203)
  t.equal(await expire(audit), 0)
  const { rows } = await database.pool.query<{ chain_id: string; details: object }>(
    "select chain_id, details from audit_events where action = 'events_expired'",
  )
  t.match(rows, [{ chain_id: boot, details: { chain: old.boot, sequence: 1_203 } }])
  t.same((await verify()).faults, [])
  // Its process is still there, and goes on with the chain.
  old.audit.record({ action: 'logged_out', actor: 'session' })
  await old.audit.flush()
  t.same((await verify()).faults, [])
  t.equal(await expire(audit, 398), 1 + 3, 'a shorter retention')
  t.same((await verify()).faults, [])
  await old.audit.close()
  await young.audit.close()
  await audit.close()
})

t.test('a row that was given an earlier date is not swept away', async (t) => {
  const scene = await setUp(t)
  const { startChain, expire, change, verify, log, live } = scene
  const one = await startChain()
  await live(one)
  await change("update audit_events set at = at - interval '1000 days'")
  t.equal(await expire(one.audit), 0)
  t.match(log.events, [{ event: 'audit_row_kept' }])
  t.match((await verify()).faults, [/row 0 was changed/])
  await one.audit.close()
})

t.test(
  'rows taken away and said to be expired are missed: who has no key cannot say so',
  async (t) => {
    const { startChain, verify, change, live } = await setUp(t)
    const one = await startChain()
    await live(one)
    await change(
      `update audit_events set action = 'events_expired',
       details = jsonb_build_object('chain', chain_id::text, 'sequence', 3) where sequence = 4;
     delete from audit_events where sequence < 3`,
    )
    t.match((await verify()).faults, [/rows 0 to 2 are missing/])
    await one.audit.close()
  },
)

// ── The commands ─────────────────────────────────────────────────────────────────────────────────

interface Ended {
  code: unknown
  output: string
}

function runCommand(url: string, command: string[], input = ''): Promise<Ended> {
  return new Promise((resolve) => {
    const child = execFile(
      process.execPath,
      [join(import.meta.dirname, '../src/main.ts'), ...command],
      {
        env: {
          DATABASE_URL: url,
          ENCRYPTION_KEYS: `${KEY.keyId}:${KEY.key.toString('base64')}`,
          PAGERO_CLIENT_ID: 'c',
          PAGERO_CLIENT_SECRET: 'a-secret-of-the-client',
          PAGERO_REDIRECT_URI: 'http://localhost:3000/auth/callback',
        },
      },
      (error, stdout, stderr) => resolve({ code: error?.code ?? 0, output: stdout + stderr }),
    )
    child.stdin?.end(input)
  })
}

t.test('`audit verify` says so, and its exit code does', async (t) => {
  const { url, startChain, change } = await setUp(t)
  const { audit } = await startChain()
  await audit.close()
  t.strictSame(await runCommand(url, ['audit', 'verify']), {
    code: 0,
    output: '6 events in 1 chain, unbroken\n',
  })
  await change('delete from audit_events where sequence = 2')
  const { code, output } = await runCommand(url, ['audit', 'verify'])
  t.equal(code, 1)
  t.match(
    output,
    /^broken: chain \S+: row 2 is missing, before .*\n5 events in 1 chain, 1 broken\n$/,
  )
})

t.test('`tokens find` says who had a token, given as it is or as its hash', async (t) => {
  const { url, startChain } = await setUp(t)
  const { audit } = await startChain(3)
  audit.record({
    action: 'call_proxied',
    actor: 'session',
    name: 'bob',
    user: 'bob' as UserKey,
    fingerprint: FINGERPRINT,
  })
  await audit.close()
  const digest = createHash('sha256').update(TOKEN)
  for (const input of [
    `${TOKEN}\n`,
    digest.copy().digest('hex'),
    `${digest.digest('base64url')}\n`,
  ]) {
    const { code, output } = await runCommand(url, ['tokens', 'find'], input)
    t.equal(code, 0)
    const lines = output.trimEnd().split('\n')
    t.equal(lines.length, 3)
    t.match(output, /^token_handed_out\tcaller caller-1\tuser alice\t1 times\t20\S+ to 20\S+$/m)
    t.match(output, /^call_proxied\tsession bob\tuser bob\t1 times\t/m)
    t.notMatch(output, new RegExp(TOKEN))
  }
  t.match(await runCommand(url, ['tokens', 'find'], 'another'), {
    code: 1,
    output: /nothing of it/,
  })
  const nonsense = await runCommand(url, ['tokens', 'find'], 'two words')
  t.match(nonsense, { code: 1, output: /Give one access token/ })
  t.notMatch(nonsense.output, /two words/)
  const argument = await runCommand(url, ['tokens', 'find', TOKEN])
  t.equal(argument.code, 2, 'an argument is refused')
  t.notMatch(argument.output, new RegExp(TOKEN))
})
