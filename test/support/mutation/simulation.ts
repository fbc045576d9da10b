// Runs of the simulator that a mutant must not survive: fewer than test/simulation.test.ts has, in the thread of the
// mutant. A rule that is broken is one way to notice it; the other is that calls, losses or refusals become more or fewer
// than these runs have reason for.

import t from 'tap'
import { NO_FAULTS, type Profile } from '../simulation/faults.ts'
import { simulate } from '../simulation/simulate.ts'

/** Runs the seeds and returns how often what happened. */
async function totalsOf(seeds: readonly number[], profile: Partial<Profile> = {}) {
  const totals = new Map<string, number>()
  for (const seed of seeds) {
    const run = await simulate(seed, { profile })
    if (run.violations.length > 0) throw new Error(`seed ${seed}: ${run.violations.join('; ')}`)
    for (const [name, count] of run.counts) totals.set(name, (totals.get(name) ?? 0) + count)
  }
  return (name: string) => totals.get(name) ?? 0
}

const range = (from: number, count: number) => Array.from({ length: count }, (_, i) => from + i)

t.test('without faults every token is presented once, and every caller is served', async (t) => {
  const total = await totalsOf(range(1, 8), NO_FAULTS)
  t.equal(total('presented'), total('consumed'))
  t.equal(total('presented'), total('stored'))
  t.ok(total('presented') < 100, `${total('presented')} presented`)
  t.equal(total('temporarily_unavailable'), 0)
  t.equal(total('refused'), 0)
})

const NO_LOSS = { lost: 0, reauthentication_required: 0 }

/** What may go wrong, and how often callers may be turned away for it: half as often again as they are. */
const TROUBLES: ReadonlyArray<readonly [Partial<Profile>, atMost: Record<string, number>]> = [
  [{ outages: 4 }, { ...NO_LOSS, temporarily_unavailable: 300 }],
  [
    { kills: 3, graceSeconds: 3_600 },
    { ...NO_LOSS, temporarily_unavailable: 20 },
  ],
  [{ statementFaults: 0.2 }, { ...NO_LOSS, temporarily_unavailable: 80 }],
  [
    { failovers: 2, replicas: 3, users: 2 },
    { ...NO_LOSS, temporarily_unavailable: 40 },
  ],
  [
    { logins: 3, disconnects: 2 },
    { ...NO_LOSS, temporarily_unavailable: 5 },
  ],
  [{ spoolFaults: 0.4 }, { ...NO_LOSS, temporarily_unavailable: 20 }],
  [
    { serverFaults: 0.5, graceSeconds: 3_600 },
    { temporarily_unavailable: 70, presented: 160 },
  ],
  [
    { serverFaults: 0.4, kills: 2, pauses: 2 },
    { temporarily_unavailable: 240, lost: 14 },
  ],
  [{ lies: 0.2 }, { temporarily_unavailable: 5, lost: 0, presented: 150, suspect: 0 }],
  [
    {
      kills: 3,
      statementFaults: 0.3,
      keepsDisk: 1,
      restarts: 1,
      replicas: 2,
      users: 2,
      outages: 1,
    },
    { temporarily_unavailable: 300, lost: 9 },
  ],
]
for (const [profile, atMost] of TROUBLES) {
  t.test(`with ${JSON.stringify(profile)} nothing happens without a reason`, async (t) => {
    const total = await totalsOf(range(1, 12), { ...NO_FAULTS, ...profile })
    for (const [name, most] of Object.entries(atMost)) t.ok(total(name) <= most, name)
    t.ok(total('served') > 300)
  })
}

t.test('with whatever the seeds draw no rule is broken', async () => {
  await totalsOf(range(1, 60))
})
