// The long form of the fault suite: `npm run soak`, on a machine that has nothing else to do. What it promises is printed,
// and broken, beside each figure. One part alone: `npm run soak -- --part strict`; a smaller form of all:
// `npm run soak -- --rotations 3000 --grants 200 --callers 10 --kills 20 --stops 5 --restarts 5 --spooled 10`.

import { parseArgs } from 'node:util'
import { type Fleet, setFleet } from '../test/support/fleet.ts'
import { readHistory } from '../test/support/history.ts'
import { type OwnPostgres, startOwnPostgres } from '../test/support/own-postgres.ts'
import {
  killWhileSpooled,
  restartInTurn,
  rotateInPeace,
  rotateUnderFire,
} from '../test/support/soak.ts'

const { values } = parseArgs({
  options: {
    part: {
      type: 'string',
      multiple: true,
      default: ['peace', 'grace', 'strict', 'restarts', 'spool'],
    },
    replicas: { type: 'string', default: '4' },
    rotations: { type: 'string', default: '100000' },
    grants: { type: 'string', default: '2000' },
    callers: { type: 'string', default: '50' },
    kills: { type: 'string', default: '200' },
    stops: { type: 'string', default: '50' },
    /** Grants in the runs with kills and restarts: each has a caller of its own that never rests. */
    'grants-under-fire': { type: 'string', default: '100' },
    restarts: { type: 'string', default: '100' },
    spooled: { type: 'string', default: '100' },
  },
})

/** A grace as one may ask of Pagero: longer than any recovery. */
const GRACE_SECONDS = 90
/**
 * How long a process lives at most before it is killed again: within the grace long enough to present again what the one
 * before it had lost, else as short as a process can live.
 */
const ALIVE_MS = { grace: 20_000, strict: 2_000 }
/** What Pagero may take for an answer: so long it can be lost on its way. */
const SERVER_MS = 100
/** How long the others ask for what only the spool of a dead process holds. */
const DEAD_MS = 5_000

let broken = 0

/** How far it has come goes beside the figures, so that those alone can be kept. */
function say(text: string): void {
  process.stderr.write(`${text}\n`)
}

function show(title: string, figures: object, promises: Record<string, boolean>): void {
  process.stdout.write(`${title}\n${JSON.stringify(figures)}\n`)
  for (const [promise, isKept] of Object.entries(promises)) {
    process.stdout.write(`  ${isKept ? 'kept  ' : 'BROKEN'} ${promise}\n`)
    if (!isKept) broken += 1
  }
}

function numbered(count: string): string[] {
  return Array.from({ length: Number(count) }, (_, i) => `user-${i}`)
}

interface Stage {
  fleet: Fleet
  postgres: OwnPostgres
}

/** Sets up so many replicas with these users, and takes everything down after `run`, whatever came of it. */
async function withReplicas(
  count: number,
  options: { users: readonly string[]; graceSeconds?: number; env?: Record<string, string> },
  run: (stage: Stage) => Promise<void>,
): Promise<void> {
  const postgres = await startOwnPostgres()
  try {
    const fleet = await setFleet({
      url: postgres.url(),
      graceSeconds: options.graceSeconds ?? 0,
      // The real deadline and lease, on a busy machine too: no answer comes after the one, and a process that was killed
      // is back before the other is over.
      env: {
        ...{ LOG_LEVEL: 'warn', CALLER_WAIT_SECONDS: '10', REFRESH_LEASE_SECONDS: '60' },
        REFRESH_DEADLINE_SECONDS: '45',
        ...options.env,
      },
    })
    try {
      for (let i = 0; i < count; i += 1) await fleet.add()
      await fleet.connect(options.users)
      await run({ fleet, postgres })
    } finally {
      await fleet.stop()
    }
  } finally {
    await postgres.remove()
  }
}

async function inPeace({ fleet }: Stage): Promise<void> {
  const figures = await rotateInPeace(fleet, {
    users: numbered(values.grants),
    rotations: Number(values.rotations),
    callersPerGrant: Number(values.callers),
    say,
  })
  const { rotations, granted, spent } = figures
  show('No faults, strict server', figures, {
    'as many rotations as were asked for': rotations >= Number(values.rotations),
    'no grant is lost': figures.lost === 0,
    'exactly one call for each rotation, and none overlaps another of its login':
      figures.extraCalls === 0 && figures.overlaps === 0,
    'server, ledger and grants agree': rotations === granted && rotations === spent,
    'every caller has a token in the end': figures.unserved === 0,
  })
}

async function underFire(
  { fleet, postgres }: Stage,
  graceSeconds: number,
  aliveMs: number,
): Promise<void> {
  const { unexplained, ...figures } = await rotateUnderFire(fleet, postgres, {
    users: numbered(values['grants-under-fire']),
    kills: Number(values.kills),
    databaseStops: Number(values.stops),
    serverMs: SERVER_MS,
    graceSeconds,
    aliveMs,
    say,
  })
  const losses =
    graceSeconds > 0
      ? { 'no grant is lost within the grace': figures.lost === figures.beyondGrace }
      : {
          'only what died on the way is lost': figures.lost === figures.irreducible,
          'every loss is reported as ours': figures.unreported === 0,
        }
  show(graceSeconds > 0 ? `Kills, grace of ${graceSeconds} s` : 'Kills, strict server', figures, {
    ...losses,
    'nobody is told of a loss that is none': figures.reportedAlive === 0,
    'no two calls of one login overlap': figures.overlaps === 0,
  })
  for (const story of unexplained) process.stdout.write(`${story}\n`)
}

async function throughRestarts({ fleet }: Stage): Promise<void> {
  const { failed, ...figures } = await restartInTurn(fleet, {
    users: numbered(values['grants-under-fire']),
    restarts: Number(values.restarts),
  })
  const { overlaps, presentedAgain, spent, granted, increments } = await readHistory(fleet)
  const lost = await fleet.lost()
  show(
    'Rolling restarts, strict server',
    { ...figures, failed: failed.length, lost: lost.length },
    {
      'no grant is lost': lost.length === 0,
      'no call fails': failed.length === 0,
      'every replica leaves by itself': figures.exitCodes.join() === '0',
      'exactly one call for each rotation, and none overlaps another of its login':
        overlaps.length === 0 && presentedAgain.length === 0,
      'server, ledger and grants agree': spent === granted && spent === increments,
    },
  )
  for (const answer of failed.slice(0, 10)) process.stdout.write(`  ${JSON.stringify(answer)}\n`)
}

async function fromTheSpool({ fleet, postgres }: Stage): Promise<void> {
  const users = numbered(values.spooled)
  const [owner] = fleet.replicas
  if (owner === undefined) throw new Error('one was started')
  const other = await fleet.add({ env: { CALLER_WAIT_SECONDS: '0.5' } })
  const database = {
    stop: () => postgres.stopImmediately(),
    async start() {
      await postgres.start()
      fleet.moveDatabase(postgres.port())
    },
  }
  const figures = await killWhileSpooled(
    fleet,
    { owner, other },
    { users, deadMs: DEAD_MS, database },
  )
  const lost = await fleet.lost()
  show(
    'PostgreSQL stopped after the answers, then kill -9, then both back',
    { ...figures, lost: lost.length },
    {
      'all are recovered': figures.recovered === users.length,
      'no grant is lost': lost.length === 0,
      'no token is presented again': figures.presentedAgain === 0,
      'the other replica waits': figures.refused.join() === '503',
    },
  )
}

const count = Number(values.replicas)
const underFireOf = numbered(values['grants-under-fire'])
const fire = (graceSeconds: number, aliveMs: number) =>
  // What a story of a lost login is told from.
  withReplicas(count, { users: underFireOf, graceSeconds, env: { LOG_LEVEL: 'info' } }, (stage) =>
    underFire(stage, graceSeconds, aliveMs),
  )
const parts: Record<string, () => Promise<void>> = {
  // The trust of production: with fifty callers for each token most are served from memory.
  peace: () =>
    withReplicas(
      count,
      { users: numbered(values.grants), env: { TOKEN_CACHE_TRUST_MS: '1000' } },
      inPeace,
    ),
  grace: () => fire(GRACE_SECONDS, ALIVE_MS.grace),
  strict: () => fire(0, ALIVE_MS.strict),
  restarts: () =>
    withReplicas(
      count,
      { users: underFireOf, env: { CALLER_WAIT_SECONDS: '15' } },
      throughRestarts,
    ),
  spool: () =>
    withReplicas(
      1,
      {
        users: numbered(values.spooled),
        env: { REFRESH_CONCURRENCY: values.spooled, REFRESH_DEADLINE_SECONDS: '30' },
      },
      fromTheSpool,
    ),
}

for (const part of values.part) {
  const run = parts[part]
  if (run === undefined) throw new Error(`No such part: ${part}`)
  await run()
}
process.exitCode = broken === 0 ? 0 : 1
