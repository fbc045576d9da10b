// What goes wrong in a run, drawn from its seed: first a profile, then each fault at the call that it befalls.

import type { Life } from './life.ts'
import type { Random } from './random.ts'

export interface Profile {
  replicas: number
  users: number
  /** The authorization server replays the successor to whoever presents its parent, for this long. */
  graceSeconds: number
  /** Reuse of a spent refresh token ends the whole login there. */
  punishesReuse: boolean
  cacheTrustMs: number
  skewMs: number
  /** How many deaths and stops there may be, and how likely one is at a step that another process could see. */
  kills: number
  pauses: number
  /** Chance that a process that died comes back while calls go on, and that it finds its disk. */
  restarts: number
  keepsDisk: number
  serverFaults: number
  lies: number
  statementFaults: number
  outages: number
  cuts: number
  /** A standby takes over that lacks the last commits. What is lost with them but rotations is not looked at. */
  failovers: number
  spoolFaults: number
  /** Applied entries go as early as they may. */
  crowdedSpool: boolean
  /** Logins again, disconnections, and revocations by the user at the authorization server. */
  logins: number
  disconnects: number
  revocations: number
}

/** Draws the profile of a run. Half of the kinds of fault are absent from any one run, so that others come through. */
export function drawProfile(random: Random): Omit<Profile, 'crowdedSpool'> {
  const often = <T>(value: T, otherwise: T) => (random.chance(0.5) ? value : otherwise)
  const failovers = random.pick([0, 0, 0, 1])
  return {
    failovers,
    replicas: random.pick([1, 2, 2, 3]),
    users: random.pick([1, 1, 2]),
    graceSeconds: random.pick([0, 0, 0, 3_600]),
    punishesReuse: random.chance(0.75),
    cacheTrustMs: often(1_000, 0),
    skewMs: often(3_600_000, 0),
    kills: random.pick([0, 1, 1, 2, 3]),
    pauses: random.pick([0, 0, 1, 2]),
    restarts: random.pick([0.5, 0.9, 1]),
    keepsDisk: random.pick([0.7, 1, 1]),
    serverFaults: random.pick([0, 0, 0.1, 0.4]),
    lies: random.pick([0, 0, 0.1]),
    statementFaults: random.pick([0, 0, 0.02, 0.1]),
    outages: random.pick([0, 0, 1, 2]),
    cuts: random.pick([0, 0, 1]),
    spoolFaults: random.pick([0, 0, 0, 0.3]),
    logins: failovers > 0 ? 0 : random.pick([0, 0, 1]),
    disconnects: failovers > 0 ? 0 : random.pick([0, 0, 0, 1]),
    revocations: random.pick([0, 0, 0, 0, 1]),
  }
}

/** What a run that names its own faults begins from. */
export const NO_FAULTS: Partial<Profile> = {
  ...{ graceSeconds: 0, punishesReuse: true, kills: 0, pauses: 0, serverFaults: 0, lies: 0 },
  ...{ statementFaults: 0, outages: 0, cuts: 0, failovers: 0, spoolFaults: 0 },
  ...{ logins: 0, disconnects: 0, revocations: 0 },
}

export const TOKEN_CALL_FAULTS = [
  'connection_refused',
  'connects_late',
  'request_lost',
  'request_lost_silently',
  'request_late',
  'answer_lost',
  'answer_lost_silently',
  'answer_late',
  'answer_cut',
  'fails_before',
  'fails_after',
  'garbled',
  'too_many_requests',
  'unavailable',
  'invalid_client',
] as const
export type TokenCallFault = (typeof TOKEN_CALL_FAULTS)[number] | 'lie' | 'none'

/** `late`: told after the time-out that it failed, applied after that. */
export type StatementFault = 'none' | 'slow' | 'not_applied' | 'applied' | 'late'

/** Steps of a rotation at which a process may die or stop: before and after each call that leaves it. */
export type Step = `${'before' | 'after'}_${'arm' | 'send' | 'spool' | 'store'}`

export type Faults = ReturnType<typeof createFaults>

/** Makes the source of faults of one run. From `cease` on nothing goes wrong any more. */
export function createFaults(random: Random, profile: Profile) {
  let ceased = false
  let killsLeft = profile.kills
  let pausesLeft = profile.pauses
  let spoolFailsUntilCalls = 0
  const chance = (probability: number) => !ceased && random.chance(probability)
  return {
    /** A life that dies or stops at this step, or goes on. */
    step(_life: Life): 'go_on' | 'die' | 'stop' {
      if (killsLeft > 0 && chance(0.06)) {
        killsLeft -= 1
        return 'die'
      }
      if (pausesLeft > 0 && chance(0.06)) {
        pausesLeft -= 1
        return 'stop'
      }
      return 'go_on'
    },
    tokenCall(_token: string): TokenCallFault {
      if (chance(profile.lies)) return 'lie'
      return chance(profile.serverFaults) ? random.pick(TOKEN_CALL_FAULTS) : 'none'
    },
    revocationFails: () => chance(profile.serverFaults),
    statement(): StatementFault {
      if (!chance(profile.statementFaults)) return 'none'
      return random.pick(['slow', 'not_applied', 'applied', 'late'])
    },
    /** `lost`: nothing is written. `written`: it is, and the call fails all the same. */
    spoolWrite(_life: Life): 'none' | 'lost' | 'written' {
      if (!chance(profile.spoolFaults)) return 'none'
      spoolFailsUntilCalls = Math.floor(random.between(0, 4))
      return random.pick(['lost', 'lost', 'written'])
    },
    crowdedSpool: profile.crowdedSpool,
    spoolWritable(): boolean {
      spoolFailsUntilCalls -= 1
      return ceased || spoolFailsUntilCalls < 0
    },
    diskMs: () => random.between(0.2, 15),
    statementMs: () => random.between(0.3, 4),
    networkMs: () => random.between(5, 60),
    /** How much of an answer came through. */
    cutAt: () => random.next(),
    /** Until a reset is noticed, or a gateway answers. */
    troubleMs: () => random.between(5, 2_000),
    /** Longer than any deadline, now and then. */
    lateMs: () => random.between(1_000, 100_000),
    slowMs: () => random.between(100, 9_000),
    cease() {
      ceased = true
    },
  }
}
