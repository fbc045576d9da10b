// The crash matrix: a process dies by SIGKILL at every step of a rotation, and either comes back with its disk or stays
// away while another replica takes over. The server is strict, so what cannot be known again is lost, and said to be.

import type { CrashPoint } from '../../src/crash-points.ts'
import { type Fleet, holdAnswers, inParallel, until } from './fleet.ts'
import type { Replica } from './replica.ts'

/** Moments of which no crash point tells by itself: a request or an answer is on its way, a restart has died again. */
type Moment = CrashPoint | 'request_on_its_way' | 'answer_on_its_way' | 'again_in_the_pass'
export type Fate = 'recovered' | 'lost' | 'reported' | 'revoked' | 'stuck'

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

/** A replica that is about to die, named as its one user. */
interface Victim {
  fleet: Fleet
  replica: Replica
  user: string
}

interface Step extends Omit<MatrixRow, 'restarted' | 'gone'> {
  /** Where its process dies in its first life, unless it is killed. */
  point?: CrashPoint
  /** Brings it to its death; asking for the token is enough otherwise. */
  die?: (victim: Victim) => Promise<void>
  /** It holds up, or misleads, whoever calls the server meanwhile. */
  isAlone?: true
}

const UNSPENT = 'The token is unspent: it is presented again.'
const IN_TRANSIT = 'The server has spent the token; the one answer with its successor is gone.'
const SPOOLED = 'The answer is in the spool on the disk, and goes with it.'
const QUEUED = 'Its token waits in the queue of revocations until the server confirms.'
const bothAre = (fate: Fate) => ({ restarted: fate, gone: fate })
const RECOVERED = bothAre('recovered')
const LOST = bothAre('lost')
const WITH_DISK = { restarted: 'recovered', gone: 'lost' } as const

/** A step at a crash point of its own. */
function at(point: CrashPoint, step: string, reason: string, expected: Step['expected']): Step {
  return { moment: point, point, step, reason, expected }
}

const STEPS: readonly Step[] = [
  at('before_arm', 'before the intent is written', 'Nothing has happened.', RECOVERED),
  at('after_arm', 'the intent is written', UNSPENT, RECOVERED),
  at('before_send', 'about to send', UNSPENT, RECOVERED),
  {
    moment: 'request_on_its_way',
    step: 'sent, not yet read by the server',
    reason: UNSPENT,
    expected: RECOVERED,
    die: dieInTransit('request_on_its_way'),
    isAlone: true,
  },
  {
    moment: 'answer_on_its_way',
    step: 'answered by the server, not yet read',
    reason: IN_TRANSIT,
    expected: LOST,
    die: dieInTransit('answer_on_its_way'),
    isAlone: true,
  },
  at('after_answer', 'the answer is read', IN_TRANSIT, LOST),
  at('before_spool', 'about to spool', IN_TRANSIT, LOST),
  at('after_spool', 'spooled', SPOOLED, WITH_DISK),
  at('before_store', 'about to store', SPOOLED, WITH_DISK),
  {
    moment: 'again_in_the_pass',
    point: 'after_spool',
    step: 'spooled, and again when its restart is about to store that',
    reason: SPOOLED,
    expected: WITH_DISK,
    async die(victim) {
      const { replica, user } = victim
      await dieAsked(victim)
      const start = replica.start({ BROKER_TEST_CRASH_POINT: 'before_store' })
      await start.catch(() => undefined)
      if (replica.processId() !== undefined) throw new Error(`${user} has not died again`)
    },
  },
  at('after_store', 'stored', 'The row has the successor.', RECOVERED),
  {
    ...at('after_doubt', 'told that no answer came', UNSPENT, RECOVERED),
    die: dieOfToken({ kind: 'reset_before' }),
    isAlone: true,
  },
  {
    ...at(
      'after_refusal',
      'refused once, for no reason',
      'A single refusal is not believed.',
      RECOVERED,
    ),
    die: dieOfToken({ kind: 'status', status: 400, body: { error: 'invalid_grant' } }),
    isAlone: true,
  },
  {
    ...at(
      'after_verdict',
      'refused twice, and the row says so',
      'The user had withdrawn the access, and is told to log in.',
      bothAre('reported'),
    ),
    async die(victim) {
      const { fleet, user } = victim
      await fleet.lookAlike.revokeLogin(await fleet.refreshToken(user))
      await dieAsked(victim)
    },
  },
  {
    ...at('after_close', 'disconnected, the server not yet told', QUEUED, bothAre('revoked')),
    die: dieOfDisconnecting,
    isAlone: true,
  },
  {
    ...at(
      'after_revoke',
      'revoked by the server, the queue not yet told',
      'It is revoked once more, which changes nothing.',
      bothAre('revoked'),
    ),
    async die(victim) {
      const { fleet, user } = victim
      const token = await fleet.refreshToken(user)
      await dieOfDisconnecting(victim)
      if (!(await fleet.lookAlike.acceptsRefreshToken(token))) return
      throw new Error(`${user} has died of another's revocation`)
    },
    isAlone: true,
  },
]

const CASES = STEPS.flatMap((step) =>
  (['restarted', 'gone'] as const).map((ending) => ({
    ...step,
    ending,
    user: `${ending}-${step.moment}`,
  })),
)

/** Beyond the lease of the dead and the wait for an answer that it may still have. */
const FATE_LIMIT_MS = 30_000
/** It dies while it is asked, or within the poll of a queue after that. */
const DEATH_LIMIT_MS = 30_000
/** Processes that start at a time: each needs most of a core for a second. */
const STARTS_AT_A_TIME = 4

/** Runs the whole matrix on a fleet without replicas. */
export async function runCrashMatrix(fleet: Fleet): Promise<MatrixRow[]> {
  const survivor = await fleet.add({ name: 'survivor' })
  const victims = new Map<string, Replica>()
  const tokens = new Map<string, string>()
  await fleet.connect(CASES.map(({ user }) => user))
  await inParallel(CASES, STARTS_AT_A_TIME, async ({ point, die = dieAsked, isAlone, user }) => {
    const replica = await fleet.add({ name: user, started: false })
    victims.set(user, replica)
    tokens.set(user, await fleet.refreshToken(user))
    // The pass over the spool might store an answer before the rotation that spooled it goes on.
    const quiet = { ANTI_ENTROPY_SECONDS: '3600' }
    await replica.start(point === undefined ? quiet : { ...quiet, BROKER_TEST_CRASH_POINT: point })
    await fleet.expire([user])
    if (isAlone !== true) await die({ fleet, replica, user })
  })
  // The last first: who dies of having revoked must find no revocation in the queue that another has left there.
  for (const { die, isAlone, user } of CASES.toReversed()) {
    const replica = victims.get(user)
    if (isAlone === true && replica !== undefined) await die?.({ fleet, replica, user })
  }
  const fates = new Map<string, Fate>()
  await inParallel(CASES, STARTS_AT_A_TIME, async ({ ending, user }) => {
    if (ending === 'restarted') await victims.get(user)?.start()
  })
  // What a replica took from the queue and died with is left to it for a minute.
  await fleet.database.pool.query('update revocations set next_attempt_at = clock_timestamp()')
  await Promise.all(
    CASES.map(async ({ user }) => {
      fates.set(user, await fateOf(fleet, survivor, { user, token: tokens.get(user) ?? '' }))
    }),
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

/** Kills the replica while its request, or the answer to it, is on its way. */
function dieInTransit(moment: 'request_on_its_way' | 'answer_on_its_way') {
  return async ({ fleet, replica, user }: Victim): Promise<void> => {
    const { opened } = fleet.toServer
    const calls = fleet.refreshes().length
    let letGo = () => {}
    if (moment === 'request_on_its_way') fleet.toServer.mode = 'stall'
    else letGo = holdAnswers(fleet)
    const waiting = replica.token(user)
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
    letGo()
    fleet.toServer.cut()
    fleet.toServer.mode = 'pass'
  }
}

async function dieAsked({ replica, user }: Victim): Promise<void> {
  await replica.token(user)
  await death(replica, user)
}

function death(replica: Replica, user: string): Promise<void> {
  return until(() => replica.processId() === undefined, DEATH_LIMIT_MS, `the death of ${user}`)
}

/** Asks for the token when the server will not do what it should. */
function dieOfToken(
  effect: { kind: 'reset_before' } | { kind: 'status'; status: number; body: object },
) {
  return async (victim: Victim): Promise<void> => {
    victim.fleet.lookAlike.faults.push({ endpoint: 'token', ...effect })
    await dieAsked(victim)
  }
}

async function dieOfDisconnecting({ replica, user }: Victim): Promise<void> {
  await replica.call('DELETE', `/v1/users/${user}/grant`)
  await death(replica, user)
}

/** Asks for the token until it is there, or it is said why it never will be. `token` is the one that the victim had. */
async function fateOf(
  fleet: Fleet,
  asked: Replica,
  { user, token }: { user: string; token: string },
): Promise<Fate> {
  let fate: Fate | undefined
  const isKnown = async () => {
    const { status, body } = await asked.token(user)
    if (status === 200) fate = 'recovered'
    if (status === 409) fate = body['cause'] === 'rotation_lost' ? 'lost' : 'reported'
    const isRevoked = status === 404 && !(await fleet.lookAlike.acceptsRefreshToken(token))
    if (isRevoked && (await queuedRevocations(fleet, user)) === 0) fate = 'revoked'
    return fate !== undefined
  }
  await until(isKnown, FATE_LIMIT_MS, user).catch(() => undefined)
  const isAlive = !(await fleet.lost([user])).includes(user)
  return fate !== undefined && isAlive === (fate === 'recovered') ? fate : 'stuck'
}

async function queuedRevocations(fleet: Fleet, user: string): Promise<number> {
  const { rows } = await fleet.database.pool.query('select 1 from revocations where user_id = $1', [
    user,
  ])
  return rows.length
}
