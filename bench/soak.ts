// The long form of the fault suite: `npm run soak`. What it promises is printed, and broken, beside each figure.
// A smaller form: `npm run soak -- --rotations 3000 --grants 200 --callers 10 --kills 20 --stops 5 --replicas 3`.

import { parseArgs } from 'node:util'
import { setFleet } from '../test/support/fleet.ts'
import { startOwnPostgres } from '../test/support/own-postgres.ts'
import { rotateInPeace, rotateUnderFire, type SoakFigures } from '../test/support/soak.ts'

const { values } = parseArgs({
  options: {
    rotations: { type: 'string', default: '100000' },
    grants: { type: 'string', default: '2000' },
    callers: { type: 'string', default: '50' },
    replicas: { type: 'string', default: '4' },
    kills: { type: 'string', default: '200' },
    stops: { type: 'string', default: '50' },
    /** Grants in the runs with kills: each has a caller of its own that never rests. */
    'grants-under-fire': { type: 'string', default: '100' },
  },
})

/** A grace as one may ask of Pagero: longer than any recovery. */
const GRACE_SECONDS = 90

let broken = 0

function show(title: string, figures: SoakFigures, promises: Record<string, boolean>): void {
  process.stdout.write(`${title}\n${JSON.stringify(figures)}\n`)
  for (const [promise, isKept] of Object.entries(promises)) {
    process.stdout.write(`  ${isKept ? 'kept  ' : 'BROKEN'} ${promise}\n`)
    if (!isKept) broken += 1
  }
}

function numbered(count: number): string[] {
  return Array.from({ length: count }, (_, i) => `user-${i}`)
}

async function setReplicas(graceSeconds: number) {
  const postgres = await startOwnPostgres()
  const fleet = await setFleet({
    url: postgres.url(),
    graceSeconds,
    // The real lease: a process that was killed is back before it is over, on a busy machine too.
    env: { LOG_LEVEL: 'warn', CALLER_WAIT_SECONDS: '10', REFRESH_LEASE_SECONDS: '60' },
  })
  await Promise.all(Array.from({ length: Number(values.replicas) }, () => fleet.add()))
  return {
    postgres,
    fleet,
    async stop() {
      await fleet.stop()
      await postgres.remove()
    },
  }
}

async function inPeace(): Promise<void> {
  const { fleet, stop } = await setReplicas(0)
  const users = numbered(Number(values.grants))
  await fleet.connect(users)
  const figures = await rotateInPeace(fleet, {
    users,
    rotations: Number(values.rotations),
    callersPerGrant: Number(values.callers),
  })
  show('No faults, strict server', figures, {
    'no grant is lost': figures.lost === 0,
    'exactly one call for each rotation': figures.extraCalls === 0,
    'every call is answered with a token': figures.unserved === 0,
  })
  await stop()
}

async function underFire(graceSeconds: number): Promise<void> {
  const { fleet, postgres, stop } = await setReplicas(graceSeconds)
  const users = numbered(Number(values['grants-under-fire']))
  await fleet.connect(users)
  const figures = await rotateUnderFire(fleet, postgres, {
    users,
    kills: Number(values.kills),
    databaseStops: Number(values.stops),
  })
  const promises =
    graceSeconds > 0
      ? { 'no grant is lost': figures.lost === 0 }
      : {
          'only what died on the way is lost': figures.lost === figures.irreducible,
          'every loss is reported as ours': figures.unreported === 0,
        }
  show(graceSeconds > 0 ? `Kills, grace of ${graceSeconds} s` : 'Kills, strict server', figures, {
    ...promises,
  })
  await stop()
}

await inPeace()
await underFire(GRACE_SECONDS)
await underFire(0)
process.exitCode = broken === 0 ? 0 : 1
