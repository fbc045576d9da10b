// The production engine on simulated ports: thousands of runs, each from its seed, each with its own faults, and the
// rules of the protocol checked at every event. A run that breaks one is told with its trace; it is run again by
// `npm run simulate -- --seed N`. SIMULATION_SEEDS sets how many, SIMULATION_FROM the first.

import t, { type Test } from 'tap'
import { NO_FAULTS, type Profile } from './support/simulation/faults.ts'
import { simulate, type SimulationOptions } from './support/simulation/simulate.ts'
import { runSeeds } from './support/simulation/worker.ts'

const SEEDS = Number(process.env['SIMULATION_SEEDS'] ?? 5_000)
const FROM = Number(process.env['SIMULATION_FROM'] ?? 1)
/** At three milliseconds a run, or four times that on a machine that has more to do. */
t.setTimeout(100_000 + SEEDS * 12)

/** Runs the seeds and says which one breaks a rule; returns how often what happened. */
async function expectNoneBroken(
  t: Test,
  seeds: readonly number[],
  options: Omit<SimulationOptions, 'trace'> = {},
): Promise<Map<string, number>> {
  const halves = [seeds.filter((_, i) => i % 2 === 0), seeds.filter((_, i) => i % 2 === 1)]
  const reports = await Promise.all(halves.map((half) => runSeeds(half, options)))
  const sums = new Map<string, number>()
  for (const { totals, broken } of reports) {
    for (const [name, count] of totals) sums.set(name, (sums.get(name) ?? 0) + count)
    if (broken === undefined) t.pass('no rule is broken')
    else t.fail(`seed ${broken.seed}: ${broken.violations.join('; ')}`, { trace: broken.trace })
  }
  return sums
}

const range = (from: number, count: number) => Array.from({ length: count }, (_, i) => from + i)

t.test('no seed breaks a rule, and the runs see every kind of end', async (t) => {
  const totals = await expectNoneBroken(t, range(FROM, SEEDS))
  if (SEEDS < 5_000) return
  for (const end of [
    ...['granted', 'refused', 'rejected_client', 'not_processed', 'in_doubt', 'replayed'],
    ...['stored', 'already_stored', 'found stored', 'superseded', 'taken over', 'suspect', 'lost'],
    ...['successor_lost', 'stale_request', 'owner_absent', 'revoked by the user'],
    ...['reauthentication_required', 'temporarily_unavailable', 'client_rejected_by_pagero'],
  ]) {
    t.ok((totals.get(end) ?? 0) > 0, `${end}: ${totals.get(end) ?? 0}`)
  }
})

t.test('without faults every token is presented once and none is refused', async (t) => {
  const totals = await expectNoneBroken(t, range(1, 300), { profile: NO_FAULTS })
  t.equal(totals.get('presented'), totals.get('consumed'))
  t.equal(totals.get('presented'), totals.get('stored'))
  t.equal(totals.get('refused'), undefined)
})

const NEVER_LOST: ReadonlyArray<readonly [name: string, profile: Partial<Profile>]> = [
  ['the database goes away, for up to two minutes at a time', { outages: 4 }],
  [
    'processes are killed, and the server replays within its grace',
    { kills: 3, graceSeconds: 3_600 },
  ],
  ['statements fail, are slow, or run without being confirmed', { statementFaults: 0.2 }],
  ['the database fails over and loses its last commits', { failovers: 2, replicas: 3, users: 2 }],
  ['users log in again and disconnect', { logins: 3, disconnects: 2 }],
]
for (const [name, profile] of NEVER_LOST) {
  t.test(`no grant is lost while ${name}`, async (t) => {
    const totals = await expectNoneBroken(t, range(1, 300), {
      profile: { ...NO_FAULTS, ...profile },
    })
    t.equal(totals.get('lost'), undefined)
    t.equal(totals.get('reauthentication_required'), undefined)
  })
}

t.test('with a grace, only a request older than its parent can lose a grant', async (t) => {
  const profile = { ...NO_FAULTS, serverFaults: 0.5, graceSeconds: 3_600 }
  const totals = await expectNoneBroken(t, range(1, 600), { profile })
  t.ok((totals.get('in_doubt') ?? 0) > 0)
  t.ok((totals.get('lost') ?? 0) <= (totals.get('stale_request') ?? 0))
  t.equal(totals.get('successor_lost'), undefined)
})

t.test('a run is the same each time', async (t) => {
  const traceOf = async (seed: number) => {
    const trace: string[] = []
    const { events } = await simulate(seed, { trace: (line) => trace.push(line) })
    return { events, trace }
  }
  for (const seed of [3, 14, 159]) t.strictSame(await traceOf(seed), await traceOf(seed))
})

/** Restarts between statements that fail: what a spool holds, and what a heartbeat says, matters most here. */
const RESTARTS: Partial<Profile> = {
  ...NO_FAULTS,
  ...{
    kills: 3,
    statementFaults: 0.3,
    keepsDisk: 1,
    restarts: 1,
    replicas: 2,
    users: 2,
    outages: 1,
  },
}

t.test('no rule is broken while processes restart and statements fail', async (t) => {
  const totals = await expectNoneBroken(t, range(1, 1_000), { profile: RESTARTS })
  t.ok((totals.get('taken over') ?? 0) > 0)
})

/** One process that dies again and again, and a server that fails in every way. */
const DEATHS: Partial<Profile> = {
  ...NO_FAULTS,
  ...{ kills: 3, serverFaults: 0.4, keepsDisk: 1, restarts: 1 },
}

/** Seeds that once broke a rule, and what they met. */
const ONCE_BROKEN: ReadonlyArray<readonly [seed: number, met: string, profile?: Partial<Profile>]> =
  [
    [320, 'a take-over right after an outage, when the heartbeats of the living were old too'],
    [
      342,
      'an arming statement that ran after the one that takes it back: nobody could free the row',
    ],
    [5407, 'a recovery not begun because one for the login before was still waiting'],
    [332, 'one refusal that became final when the attempt in doubt turned out to be none'],
    [162, 'a token with less life than was asked for, adopted from another replica'],
    [1, 'a loss by a second presentation, told as the doing of the user'],
    [14518, 'the same, where the second presentation had no answer'],
    [83497, 'a caller told of a verdict that a late success had overtaken'],
    [74166, 'a loss told as the doing of the user, when a refusal arrived after a later attempt'],
    [752, 'a take-over from an owner that was back and had not drained its spool', RESTARTS],
    [6713, 'a late heartbeat of a dead boot that undid what the living one had said of its spool'],
    [27, 'a failover that lost a commit whose spool entry could not be written'],
    [2217, 'a process that woke after a failover, and armed before it had brought back its own'],
    [1924, 'a late word of a dead boot that made the living one look gone', RESTARTS],
    [53362, 'a loss by a token presented two generations late, told as the doing of the user'],
    [29, 'the same, where the later attempt was armed late, and taken back', RESTARTS],
    [96, 'a loss told only when somebody asked: a later attempt was not processed', DEATHS],
    [
      213336,
      'a token served after the grant was closed, to a caller that had waited for a newer one',
    ],
    [99711, 'one refusal that was believed for an attempt in doubt that turned out to be none'],
    [13699, 'an owner that was back with the answer, and an unsent attempt that had hidden it'],
    [97232, 'an attempt in doubt that the server after a failover knew nothing of'],
    [4032966, 'a row armed by the living, and told by nobody to its owner after a failover'],
    [
      8053392,
      'an attempt of a process that was stopped until its lease was over, after a failover',
    ],
    [9055758, 'a token whose end a stopped process had put too early, for as long as it was kept'],
    [7067853, 'a loss that nobody told of: who had given way to another did not come back'],
    [
      6019697,
      'a heartbeat that a failover lost right after an outage that had made all of them old',
    ],
    [1041685, 'a replica that came back to the server after a failover when the others had waited'],
  ]
for (const [seed, met, profile = {}] of ONCE_BROKEN) {
  t.test(`seed ${seed} breaks no rule any more: ${met}`, async (t) => {
    await expectNoneBroken(t, [seed], { profile: { crowdedSpool: false, ...profile } })
  })
}
