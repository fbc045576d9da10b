// An hour in which the authorization server is of no use, in each of the ways that it may be, and an hour in which it
// fails for one grant alone: in virtual time, by the production code on the simulated ports.

import t from 'tap'
import type { UserKey } from '../src/grant.ts'
import type { TokenCallFault } from './support/simulation/faults.ts'
import { type Asked, type Outage, setOutage } from './support/simulation/outage.ts'
import { SIMULATED_SETTINGS } from './support/simulation/simulate.ts'

const HOUR_MS = 3_600_000
const REPLICAS = 2
const ASK_EVERY_MS = 30_000
/** What RF-34 allows a caller who cannot be served, once the breaker is open; and everybody, once the server is back. */
const REFUSAL_MS = 1_000
const RECOVERY_MS = 10_000
/** Five failures open the breaker. The longest of them is a call that hangs. */
const OPEN_AFTER_MS = SIMULATED_SETTINGS.deadlineSeconds * 1000 + ASK_EVERY_MS

/** So many that five fail within ten seconds on each replica. */
const EXPIRED = Array.from({ length: 16 }, (_, i) => `expired-${i}`)

/** A network that swallows what is sent keeps a probe until its deadline. */
const HANGS: TokenCallFault = 'request_lost_silently'

const KINDS: ReadonlyArray<readonly [TokenCallFault, string, code: string]> = [
  [
    'connection_refused',
    'no connection: refused, no DNS, TLS that fails',
    'temporarily_unavailable',
  ],
  [HANGS, 'a network that swallows everything', 'temporarily_unavailable'],
  ['fails_before', '502, with the page of a gateway', 'temporarily_unavailable'],
  ['garbled', '200, with the page of a gateway', 'temporarily_unavailable'],
  ['too_many_requests', '429', 'temporarily_unavailable'],
  ['unavailable', '503', 'temporarily_unavailable'],
  ['invalid_client', 'invalid_client', 'client_rejected_by_pagero'],
]

const isBy = (...users: readonly UserKey[]) => {
  const wanted = new Set<string>(users)
  return ({ user }: Asked) => wanted.has(user)
}

for (const [fault, name, code] of KINDS) {
  t.test(`an hour of this changes no grant and ends within seconds: ${name}`, async (t) => {
    let present: TokenCallFault = 'none'
    const outage: Outage = await setOutage(
      {
        replicas: REPLICAS,
        users: [...EXPIRED, 'rested', 'ageing'],
        accessTokenLifeSeconds: (1.5 * HOUR_MS) / 1000,
      },
      () => present,
    )
    t.teardown(() => outage.end())
    const rested = 'rested' as UserKey
    const ageing = 'ageing' as UserKey
    const expired = outage.users.filter((user) => user.startsWith('expired'))
    outage.shorten(expired, -1)
    outage.shorten([ageing], HOUR_MS / 2 / 1000)
    present = fault
    const { nowMs, calls, database, witness } = outage
    const startedAtMs = nowMs()
    const opening = await outage.ask(outage.users, OPEN_AFTER_MS, ASK_EVERY_MS)
    const openAtMs = nowMs()
    const callsBefore = calls.length
    const asked = await outage.ask(outage.users, HOUR_MS - (openAtMs - startedAtMs), ASK_EVERY_MS)
    const probes = calls.length - callsBefore

    await t.test('living tokens are served as ever', (t) => {
      const answers = [...opening, ...asked].filter(isBy(rested))
      t.ok(answers.length > 200)
      t.ok(answers.every(({ error, tookMs }) => error === undefined && tookMs < REFUSAL_MS))
      const endsAtMs = startedAtMs + HOUR_MS / 2
      const old = [...opening, ...asked].filter(isBy(ageing))
      // Who comes in the very last seconds may wait for a newer one until it is over.
      const inTimeMs = endsAtMs - SIMULATED_SETTINGS.callerWaitSeconds * 1000
      t.ok(old.filter(({ atMs }) => atMs < inTimeMs).every(({ error }) => error === undefined))
      t.ok(old.filter(({ atMs }) => atMs > endsAtMs).every(({ error }) => error !== undefined))
      t.end()
    })

    await t.test('the others are refused soon, and told when to come again', (t) => {
      const refused = asked.filter(isBy(...expired))
      // Right after its own failure a grant is not due yet, whatever else is known.
      const codes = new Set(refused.map(({ error }) => error?.code))
      t.ok(codes.delete(code))
      codes.delete('temporarily_unavailable')
      t.strictSame([...codes], [])
      t.ok(refused.every(({ error }) => (error?.retryAfterSeconds ?? 0) > 0))
      // Whoever is the probe waits for it.
      const isProbing = ({ user, atMs, tookMs }: Asked) =>
        calls.some(
          (call) =>
            call.user === user &&
            call.atMs <= atMs + tookMs &&
            call.atMs + SIMULATED_SETTINGS.deadlineSeconds * 1000 >= atMs,
        )
      const slow = refused.filter((one) => one.tookMs > REFUSAL_MS && !isProbing(one))
      t.strictSame(slow.slice(0, 3), [], `${slow.length} waited`)
      t.end()
    })

    await t.test('the server is asked by single probes', (t) => {
      const most = REPLICAS * (HOUR_MS / 1000 / SIMULATED_SETTINGS.breakerProbeSeconds)
      t.ok(probes > 0 && probes <= most, `${probes} probes, ${most} at most`)
      t.end()
    })

    await t.test('no grant changes its state, and none has a back-off of its own', (t) => {
      for (const { user, state, stateReason, failureCount } of database.grants.values()) {
        t.match({ user, state, stateReason }, { state: 'active', stateReason: null })
        t.ok(failureCount <= REPLICAS, `${user}: ${failureCount}`)
      }
      t.end()
    })

    await t.test('everybody is served within seconds of its return', async (t) => {
      // Whoever is the probe at that moment waits for what the network has swallowed.
      if (fault === HANGS) await outage.pass(SIMULATED_SETTINGS.deadlineSeconds * 1000)
      present = 'none'
      const healedAtMs = nowMs()
      const hanging = new Set(
        calls.filter(({ atMs }) => atMs > healedAtMs - 45_000).map(({ user }) => user),
      )
      const answers = await outage.ask(outage.users, RECOVERY_MS, 500)
      for (const user of outage.users) {
        const served = answers.find((one) => isBy(user)(one) && one.error === undefined)
        if (fault === HANGS && hanging.has(user)) continue
        t.ok(served !== undefined, `${user} is served`)
        t.ok((served?.atMs ?? Infinity) + (served?.tookMs ?? 0) - healedAtMs <= RECOVERY_MS, user)
      }
      t.strictSame(outage.lost(), [])
      t.strictSame(witness.violations, [])
    })
  })
}

t.test('the back-off of one grant grows to 15 minutes, and a success clears it', async (t) => {
  const failing = 'failing' as UserKey
  let isFailing = true
  const well = Array.from({ length: 12 }, (_, i) => `well-${i}`)
  const outage = await setOutage(
    { replicas: 1, users: [failing, ...well], accessTokenLifeSeconds: 100 },
    (user) => (user === failing && isFailing ? 'fails_before' : 'none'),
  )
  t.teardown(() => outage.end())
  const { calls, database, witness } = outage
  // All the time somebody else is answered: a failure is put down to one grant only then.
  outage.users.slice(1).forEach((user, i) => outage.shorten([user], 55 + i * 4))
  const asked = await outage.ask(outage.users, HOUR_MS, 5_000)
  const at = calls.filter(({ user }) => user === failing).map(({ atMs }) => atMs)
  const pauses = at.slice(1).map((atMs, i) => (atMs - (at[i] ?? 0)) / 1000)
  t.ok(at.length <= 14, `${at.length} calls in an hour`)
  t.ok(
    pauses.every((pause, i) => i === 0 || pause >= (pauses[i - 1] ?? 0) - 10),
    `each pause is as long as the one before: ${pauses.map(Math.round).join(' ')}`,
  )
  const last = pauses.at(-1) ?? 0
  t.ok(last >= 890 && last <= 920, `and none longer than 15 minutes: ${last}`)
  t.ok(
    asked.filter(({ user }) => user !== failing).every(({ error }) => error === undefined),
    'nobody else notices',
  )
  t.match(database.grants.get(failing), { state: 'active', stateReason: null })

  isFailing = false
  await outage.ask(outage.users, 920_000, 5_000)
  t.match(database.grants.get(failing), { failureCount: 0, nextRetryAt: null, phase: 'idle' })
  t.strictSame(outage.lost(), [])
  t.strictSame(witness.violations, [])
})
