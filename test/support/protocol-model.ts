// The refresh protocol as a small machine of states, of which every interleaving is explored: two replicas, one grant,
// a network that loses, processes that die, at most two rotations. It tells for a variant of the protocol whether a
// state of rest can be reached in which the grant is lost. It knows no time: a lease is over when a guard says so.

/** What makes one variant differ from another. */
export interface Variant {
  /** The row is claimed before the call. */
  lock: boolean
  /** When an armed row may be claimed by somebody else. */
  takeOver: 'when the call is over' | 'when the call is over and the spool is empty' | 'at any time'
  /** What a store asks of the row. */
  store: 'nothing' | 'version' | 'version and lease'
  /** A refusal cannot be overruled by a late success. */
  verdictFinal: boolean
  /** The server ends the family when a spent token comes again. */
  punishesReuse: boolean
  /** The server answers the parent of its newest token with the same successor. */
  grace: boolean
  spool: boolean
  /** Where a process may die. */
  crashes: ReadonlyArray<'before sending' | 'while the call is out' | 'after the answer'>
  crashesMax: number
  losses: ReadonlyArray<'request' | 'answer'>
  lossesMax: number
}

interface ReplicaState {
  at: 'idle' | 'claimed' | 'sent' | 'answered' | 'dead'
  /** What it read when it claimed the row. */
  token: number
  version: number
  epoch: number
  /** The answer in hand; 0 is a refusal. */
  answer: number
  /** Successor on its disk, and the version that it follows; 0 for none. */
  spooled: number
  spooledVersion: number
  /** Tells the messages of its present call from those of earlier ones. */
  call: number
}

interface Message {
  kind: 'request' | 'answer'
  replica: number
  call: number
  token: number
}

interface State {
  server: { current: number; ended: boolean }
  row: {
    token: number
    version: number
    armed: boolean
    owner: number
    epoch: number
    dead: boolean
  }
  replicas: ReplicaState[]
  messages: Message[]
  crashesLeft: number
  lossesLeft: number
}

/** Two rotations are enough for a token that is two generations old. */
const ROTATIONS_MAX = 2
const REFUSAL = 0

export interface Exploration {
  states: number
  lossReachable: boolean
}

/** Visits the states that the variant can reach: all of them, or up to the first loss. */
export function explore(variant: Variant): Exploration {
  const first: State = {
    server: { current: 1, ended: false },
    row: { token: 1, version: 0, armed: false, owner: 0, epoch: 0, dead: false },
    replicas: [idleReplica(), idleReplica()],
    messages: [],
    crashesLeft: variant.crashesMax,
    lossesLeft: variant.lossesMax,
  }
  const seen = new Set<string>([JSON.stringify(first)])
  const open = [first]
  for (;;) {
    const state = open.pop()
    if (state === undefined) return { states: seen.size, lossReachable: false }
    if (isAtRest(state) && isLost(state, variant)) return { states: seen.size, lossReachable: true }
    for (const next of successors(state, variant)) {
      const key = JSON.stringify(next)
      if (seen.has(key)) continue
      seen.add(key)
      open.push(next)
    }
  }
}

function idleReplica(): ReplicaState {
  return {
    ...{ at: 'idle', token: 0, version: 0, epoch: 0, answer: 0, spooled: 0, spooledVersion: 0 },
    call: 0,
  }
}

/** Nobody is at work and nothing is under way. */
function isAtRest(state: State): boolean {
  return (
    state.messages.length === 0 &&
    state.replicas.every(({ at, spooled }) => (at === 'idle' || at === 'dead') && spooled === 0) &&
    (!state.row.armed || state.row.dead)
  )
}

function isLost({ server, row }: State, variant: Variant): boolean {
  if (row.dead || server.ended) return true
  if (row.token === server.current) return false
  return !(variant.grace && row.token === server.current - 1)
}

function* successors(state: State, variant: Variant): Generator<State> {
  for (const [index, replica] of state.replicas.entries()) {
    switch (replica.at) {
      case 'idle':
        if (replica.spooled !== 0) yield replaySpool(state, index, variant)
        if (mayClaim(state, index, variant)) yield claim(state, index, variant)
        break
      case 'claimed':
        yield send(state, index)
        break
      case 'sent':
        // The call came to nothing, and its owner notices.
        if (!isUnderWay(state, index)) yield send(state, index)
        break
      case 'answered':
        yield conclude(state, index, variant)
        break
      case 'dead':
        yield change(state, (next) => {
          const { spooled, spooledVersion, call } = replica
          next.replicas[index] = { ...idleReplica(), spooled, spooledVersion, call }
        })
        break
    }
    if (state.crashesLeft > 0 && mayCrash(replica, variant)) {
      yield change(state, (next) => {
        next.crashesLeft -= 1
        const { spooled, spooledVersion, call } = replica
        next.replicas[index] = { ...idleReplica(), at: 'dead', spooled, spooledVersion, call }
      })
    }
  }
  for (const [index, message] of state.messages.entries()) {
    yield message.kind === 'request'
      ? redeem(state, index, variant)
      : receive(state, index, variant)
    if (state.lossesLeft > 0 && variant.losses.includes(message.kind)) {
      yield change(state, (next) => {
        next.lossesLeft -= 1
        next.messages.splice(index, 1)
      })
    }
  }
}

function change(state: State, edit: (next: State) => void): State {
  const next: State = {
    ...state,
    server: { ...state.server },
    row: { ...state.row },
    replicas: state.replicas.map((replica) => ({ ...replica })),
    messages: [...state.messages],
  }
  edit(next)
  return next
}

const replicaOf = (state: State, index: number) => state.replicas[index] as ReplicaState

function isUnderWay(state: State, index: number): boolean {
  return state.messages.some(({ replica }) => replica === index)
}

function mayClaim(state: State, index: number, variant: Variant): boolean {
  const { row } = state
  if (row.dead || row.version >= ROTATIONS_MAX) return false
  if (!variant.lock || !row.armed) return true
  if (variant.takeOver === 'at any time') return row.owner !== index
  const owner = replicaOf(state, row.owner)
  const over = (owner.at === 'idle' || owner.at === 'dead') && !isUnderWay(state, row.owner)
  const waits = variant.takeOver === 'when the call is over and the spool is empty'
  return over && (!waits || owner.spooled === 0)
}

function claim(state: State, index: number, variant: Variant): State {
  return change(state, ({ row, replicas }) => {
    if (variant.lock) {
      row.armed = true
      row.owner = index
      row.epoch += 1
    }
    Object.assign(replicas[index] as ReplicaState, {
      ...{ at: 'claimed', token: row.token, version: row.version, epoch: row.epoch },
    })
  })
}

function send(state: State, index: number): State {
  return change(state, ({ messages, replicas }) => {
    const replica = replicas[index] as ReplicaState
    replica.at = 'sent'
    replica.call += 1
    const { token, call } = replica
    messages.push({ kind: 'request', replica: index, call, token })
  })
}

function mayCrash({ at }: ReplicaState, { crashes }: Variant): boolean {
  if (at === 'claimed') return crashes.includes('before sending')
  if (at === 'sent') return crashes.includes('while the call is out')
  return at === 'answered' && crashes.includes('after the answer')
}

/** The server decides on a request. */
function redeem(state: State, index: number, variant: Variant): State {
  return change(state, ({ server, messages }) => {
    const request = messages[index] as Message
    let token = REFUSAL
    if (!server.ended) {
      if (request.token === server.current) {
        server.current += 1
        token = server.current
      } else if (variant.grace && request.token === server.current - 1) {
        token = server.current
      } else if (variant.punishesReuse) {
        server.ended = true
      }
    }
    messages[index] = { ...request, kind: 'answer', token }
  })
}

/** An answer arrives; that of a process that has died, or of an earlier call, reaches nobody. */
function receive(state: State, index: number, variant: Variant): State {
  return change(state, ({ messages, replicas }) => {
    const [answer] = messages.splice(index, 1) as [Message]
    const replica = replicas[answer.replica] as ReplicaState
    if (replica.at !== 'sent' || replica.call !== answer.call) return
    replica.at = 'answered'
    replica.answer = answer.token
    if (variant.spool && answer.token !== REFUSAL) {
      replica.spooled = answer.token
      replica.spooledVersion = replica.version
    }
  })
}

/** Stores the successor in hand, or gives the verdict on a refusal. */
function conclude(state: State, index: number, variant: Variant): State {
  return change(state, ({ row, replicas }) => {
    const replica = replicas[index] as ReplicaState
    const { answer, version, epoch } = replica
    if (answer === REFUSAL) {
      // Whoever finds that the row has moved on adopts the winner's token.
      if (variant.store === 'nothing' || row.version === version) {
        row.dead = true
        row.armed = false
      }
    } else {
      place(row, { token: answer, version, epoch }, variant)
    }
    const { call } = replica
    replicas[index] = { ...idleReplica(), call }
  })
}

function replaySpool(state: State, index: number, variant: Variant): State {
  return change(state, ({ row, replicas }) => {
    const replica = replicas[index] as ReplicaState
    const { spooled: token, spooledVersion: version } = replica
    place(row, { token, version, epoch: row.epoch }, variant)
    replica.spooled = 0
    replica.spooledVersion = 0
  })
}

function place(
  row: State['row'],
  successor: { token: number; version: number; epoch: number },
  variant: Variant,
): void {
  if (variant.verdictFinal && row.dead) return
  if (variant.store !== 'nothing' && row.version !== successor.version) return
  if (variant.store === 'version and lease' && row.epoch !== successor.epoch) return
  row.token = successor.token
  row.version = successor.version + 1
  row.armed = false
  row.dead = false
}
