// The crash matrix: a process dies by SIGKILL at every step of a rotation, and either comes back with its disk or stays
// away while another replica takes over. The server is strict, so what cannot be known again is lost, and said to be.

import { CRASH_POINTS, type CrashPoint } from '../../src/crash-points.ts'
import { type Fleet, inParallel, until } from './fleet.ts'
import type { Replica } from './replica.ts'

/** Two more moments that lie between steps: the request, or the answer, is on its way. */
type Moment = CrashPoint | 'request_on_its_way' | 'answer_on_its_way'
export type Fate = 'recovered' | 'lost' | 'stuck'

export interface MatrixRow {
  moment: Moment
  /** What the process had done when it died. */
  step: string
  restarted: Fate
  gone: Fate
  /** Why it is so. */
  reason: string
  /** What must come out, and does. */
  expected: { restarted: Fate; gone: Fate }
}

const UNSPENT = 'The token is unspent: it is presented again.'
const IN_TRANSIT = 'The server has spent the token; the one answer with its successor is gone.'
const SPOOLED = 'The answer is in the spool on the disk, and goes with it.'
const BOTH = { restarted: 'recovered', gone: 'recovered' } as const
const NEITHER = { restarted: 'lost', gone: 'lost' } as const
const WITH_DISK = { restarted: 'recovered', gone: 'lost' } as const

const STEPS: ReadonlyArray<Omit<MatrixRow, 'restarted' | 'gone'>> = [
  {
    moment: 'before_arm',
    step: 'before the intent is written',
    reason: 'Nothing has happened.',
    expected: BOTH,
  },
  { moment: 'after_arm', step: 'the intent is written', reason: UNSPENT, expected: BOTH },
  { moment: 'before_send', step: 'about to send', reason: UNSPENT, expected: BOTH },
  {
    moment: 'request_on_its_way',
    step: 'sent, not yet read by the server',
    reason: UNSPENT,
    expected: BOTH,
  },
  {
    moment: 'answer_on_its_way',
    step: 'answered by the server, not yet read',
    reason: IN_TRANSIT,
    expected: NEITHER,
  },
  { moment: 'after_answer', step: 'the answer is read', reason: IN_TRANSIT, expected: NEITHER },
  { moment: 'before_spool', step: 'about to spool', reason: IN_TRANSIT, expected: NEITHER },
  { moment: 'after_spool', step: 'spooled', reason: SPOOLED, expected: WITH_DISK },
  { moment: 'before_store', step: 'about to store', reason: SPOOLED, expected: WITH_DISK },
  {
    moment: 'after_store',
    step: 'stored',
    reason: 'The row has the successor.',
    expected: BOTH,
  },
]

const CASES = STEPS.flatMap(({ moment }) =>
  (['restarted', 'gone'] as const).map((ending) => ({
    moment,
    ending,
    user: `${ending}-${moment}`,
  })),
)

/** Beyond the lease of the dead and the wait for an answer that it may still have. */
const FATE_LIMIT_MS = 30_000
/** Processes that start at a time: each needs most of a core for a second. */
const STARTS_AT_A_TIME = 4

/** Runs the whole matrix on a fleet without replicas. */
export async function runCrashMatrix(fleet: Fleet): Promise<MatrixRow[]> {
  const survivor = await fleet.add({ name: 'survivor' })
  const victims = new Map<string, Replica>()
  await fleet.connect(CASES.map(({ user }) => user))
  await inParallel(CASES, STARTS_AT_A_TIME, async ({ moment, user }) => {
    const replica = await fleet.add({ name: user, started: false })
    victims.set(user, replica)
    // The pass over the spool might store an answer before the rotation that spooled it goes on.
    const quiet = { ANTI_ENTROPY_SECONDS: '3600' }
    await replica.start(
      isCrashPoint(moment) ? { ...quiet, BROKER_TEST_CRASH_POINT: moment } : quiet,
    )
    await fleet.expire([user])
    if (!isCrashPoint(moment)) return
    await replica.token(user)
    await replica.gone()
  })
  // One after the other: what holds them up is not theirs alone.
  for (const { moment, user } of CASES) {
    const replica = victims.get(user)
    if (replica !== undefined && !isCrashPoint(moment)) await crashInTransit(fleet, replica, moment)
  }
  const fates = new Map<string, Fate>()
  await inParallel(CASES, STARTS_AT_A_TIME, async ({ ending, user }) => {
    if (ending === 'restarted') await victims.get(user)?.start()
  })
  await Promise.all(
    CASES.map(async ({ user }) => void fates.set(user, await fateOf(fleet, survivor, user))),
  )
  return STEPS.map((step) => ({
    ...step,
    restarted: fates.get(`restarted-${step.moment}`) ?? 'stuck',
    gone: fates.get(`gone-${step.moment}`) ?? 'stuck',
  }))
}

/** The matrix as a Markdown table. */
export function matrixMarkdown(rows: readonly MatrixRow[]): string {
  const lines = rows.map(
    ({ step, restarted, gone, reason }) => `| ${step} | ${restarted} | ${gone} | ${reason} |`,
  )
  return [
    '| the process dies when it is … | it restarts with its disk | it is gone for good | why |',
    '| --- | --- | --- | --- |',
    ...lines,
    '',
  ].join('\n')
}

function isCrashPoint(moment: Moment): moment is CrashPoint {
  return CRASH_POINTS.some((point) => point === moment)
}

/** Kills the replica while its request, or the answer to it, is on its way. */
async function crashInTransit(fleet: Fleet, replica: Replica, moment: Moment): Promise<void> {
  const { opened } = fleet.toServer
  const calls = fleet.refreshes().length
  const gate = Promise.withResolvers<void>()
  if (moment === 'request_on_its_way') fleet.toServer.mode = 'stall'
  else {
    fleet.lookAlike.faults.push({
      endpoint: 'token',
      kind: 'delay',
      when: 'after',
      until: gate.promise,
    })
  }
  const waiting = replica.token(replica.name)
  await until(
    () =>
      moment === 'request_on_its_way'
        ? fleet.toServer.opened > opened
        : fleet
            .refreshes()
            .slice(calls)
            .some(({ spent }) => spent !== undefined),
    10_000,
    moment,
  )
  await replica.kill('SIGKILL')
  await waiting
  gate.resolve()
  fleet.toServer.cut()
  fleet.toServer.mode = 'pass'
}

/** Asks for the token until it is there, or the grant is said to be lost. */
async function fateOf(fleet: Fleet, asked: Replica, user: string): Promise<Fate> {
  let fate = 'stuck' as Fate
  const isKnown = async () => {
    const { status, body } = await asked.token(user)
    if (status === 200) fate = 'recovered'
    if (status === 409 && body['cause'] === 'rotation_lost') fate = 'lost'
    return fate !== 'stuck'
  }
  await until(isKnown, FATE_LIMIT_MS, user).catch(() => undefined)
  const isLost = (await fleet.lost()).includes(user)
  return isLost === (fate === 'lost') ? fate : 'stuck'
}
