// One replica of the broker as a process of its own, started as an operator starts it: settings from the environment,
// a disk and a name that outlive it. A test may kill it, stop its clock hands with SIGSTOP, and start it again.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { type Dispatcher, Pool } from 'undici'
import { ROOT } from './program.ts'

/** A start takes one second; on a machine with twenty times more to do than it can, more than a minute. */
const READY_LIMIT_MS = 120_000
/** Beyond the longest wait of a caller. */
const CALL_LIMIT_MS = 20_000

export interface Answer {
  /** 0 when the connection broke or nothing came in time. */
  status: number
  body: Record<string, unknown>
  tookMs: number
}

export interface LogLine {
  event: string
  [field: string]: unknown
}

export interface Replica {
  readonly name: string
  /** Of the internal listener. */
  readonly origin: string
  /** Of the public listener. */
  readonly publicOrigin: string
  /** The Authorization header of its caller. */
  readonly authorization: string
  /** Log lines of all its lives, oldest first. */
  readonly log: LogLine[]
  /** Undefined while there is no process. */
  processId(): number | undefined
  /** Starts the process, with the settings changed for this life, and waits until it is ready. */
  start(env?: Readonly<Record<string, string>>): Promise<void>
  /** Sends a signal to the process. */
  signal(name: NodeJS.Signals): void
  /** Sends a signal and waits until the process is gone; returns its exit code, or the signal that ended it. */
  kill(name?: 'SIGKILL' | 'SIGTERM'): Promise<number | NodeJS.Signals | null>
  /** Resolves when the process has ended, by whatever hand. */
  gone(): Promise<number | NodeJS.Signals | null>
  /** Asks for the access token of a user. Never throws. */
  token(user: string, options?: { minTtl?: number; limitMs?: number }): Promise<Answer>
  /** Any call of the internal listener. Never throws. */
  call(method: string, path: string, body?: object, limitMs?: number): Promise<Answer>
  ready(): Promise<Answer>
  /** Ends the process, if there is one, and the connections to it. */
  close(): Promise<void>
}

/** Makes a replica that is not started yet. */
export function createReplica(settings: {
  name: string
  ports: { public: number; internal: number }
  apiKey: string
  env: Readonly<Record<string, string>>
}): Replica {
  const origin = `http://127.0.0.1:${settings.ports.internal}`
  const log: LogLine[] = []
  let child: ChildProcess | undefined
  let end: Promise<number | NodeJS.Signals | null> = Promise.resolve(null)
  const connections = new Pool(origin, { connections: 256, pipelining: 1 })

  // `dispatch`, a timer and no stream: a long run makes millions of these calls in one process.
  function call(
    method: string,
    path: string,
    body?: object,
    limitMs = CALL_LIMIT_MS,
  ): Promise<Answer> {
    const startedAtMs = performance.now()
    return new Promise((resolve) => {
      let controller: Dispatcher.DispatchController | undefined
      let isOver = false
      let status = 0
      const pieces: Buffer[] = []
      const finish = (statusNow: number, json: Record<string, unknown>) => {
        if (isOver) return
        isOver = true
        clearTimeout(timer)
        resolve({ status: statusNow, body: json, tookMs: performance.now() - startedAtMs })
      }
      const timer = setTimeout(() => {
        finish(0, { error: 'nothing came in time' })
        controller?.abort(new Error('nothing came in time'))
      }, limitMs)
      connections.dispatch(
        {
          method: method as 'GET',
          path,
          headers: {
            authorization: `Bearer ${settings.apiKey}`,
            ...(body === undefined ? {} : { 'content-type': 'application/json' }),
          },
          body: body === undefined ? null : JSON.stringify(body),
        },
        {
          onRequestStart(started) {
            controller = started
            if (isOver) started.abort(new Error('given up before it was sent'))
          },
          onResponseStart(_controller, received) {
            status = received
          },
          onResponseData(_controller, piece) {
            pieces.push(piece)
          },
          onResponseEnd() {
            try {
              finish(status, readBody(Buffer.concat(pieces)))
            } catch (error) {
              finish(0, { error: String(error) })
            }
          },
          onResponseError(_controller, error) {
            finish(0, { error: String(error) })
          },
        },
      )
    })
  }

  function spawnProcess(env: Readonly<Record<string, string>>): void {
    const started = spawn(process.execPath, ['src/main.ts', 'serve'], {
      cwd: ROOT,
      env: {
        PATH: process.env['PATH'] ?? '',
        // As `npm start` has it.
        NODE_COMPILE_CACHE: 'node_modules/.compile-cache',
        ...settings.env,
        REPLICA_NAME: settings.name,
        PUBLIC_HOST: '127.0.0.1',
        PUBLIC_PORT: String(settings.ports.public),
        INTERNAL_HOST: '127.0.0.1',
        INTERNAL_PORT: String(settings.ports.internal),
        ...env,
      },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    child = started
    // Not `close`, which waits for the last line of the log too.
    end = once(started, 'exit').then(([code, signal]) => {
      if (child === started) child = undefined
      return (code ?? signal) as number | NodeJS.Signals | null
    })
    for (const stream of [started.stdout, started.stderr]) {
      let unfinished = ''
      stream.setEncoding('utf8').on('data', (text: string) => {
        const lines = (unfinished + text).split('\n')
        unfinished = lines.pop() ?? ''
        log.push(...lines.map(readLine))
      })
    }
  }

  return {
    name: settings.name,
    origin,
    publicOrigin: `http://127.0.0.1:${settings.ports.public}`,
    authorization: `Bearer ${settings.apiKey}`,
    log,
    processId: () => child?.pid,
    async start(env = {}) {
      spawnProcess(env)
      const [mine, ended] = [child, end]
      const startedAtMs = performance.now()
      while ((await call('GET', '/readyz', undefined, 2_000)).status !== 200) {
        if (child !== mine)
          throw new Error(`${settings.name} ended with ${await ended}:\n${shown(log)}`)
        if (performance.now() - startedAtMs > READY_LIMIT_MS) {
          throw new Error(`${settings.name} is not ready:\n${shown(log)}`)
        }
        await delay(50)
      }
    },
    signal: (name) => void child?.kill(name),
    async kill(name = 'SIGKILL') {
      child?.kill(name)
      return end
    },
    gone: () => end,
    call,
    token: (user, { minTtl, limitMs } = {}) =>
      call(
        'GET',
        `/v1/users/${user}/access-token${minTtl === undefined ? '' : `?min_ttl=${minTtl}`}`,
        undefined,
        limitMs,
      ),
    ready: () => call('GET', '/readyz', undefined, 5_000),
    async close() {
      // One that is stopped does not hear anything else.
      child?.kill('SIGKILL')
      await end
      await connections.destroy()
    },
  }
}

function readBody(bytes: Buffer): Record<string, unknown> {
  return bytes.length === 0 ? {} : (JSON.parse(bytes.toString()) as Record<string, unknown>)
}

function readLine(line: string): LogLine {
  try {
    return JSON.parse(line) as LogLine
  } catch {
    return { event: 'not_json', line }
  }
}

/** The last lines, the very last first: a report may be cut. */
function shown(log: readonly LogLine[]): string {
  const lines = log.slice(-20).toReversed()
  return lines.map((line) => JSON.stringify(line).slice(0, 300)).join('\n')
}
