#!/usr/bin/env node
// The command line, and but for `tick-shape.ts` the only file of the product that touches `process`. It reads the
// settings, starts what was asked for, and ends it in order.

// oxlint-disable-next-line import/no-unassigned-import -- it must come before everything that the others do
import './tick-shape.ts'
import { text as readText } from 'node:stream/consumers'
import closeWithGrace from 'close-with-grace'
import { type Broker, startBroker } from './broker.ts'
import { type Terminal, UsageError } from './terminal.ts'
import { ConfigError, readConfig } from './config.ts'
import { CRASH_POINTS, withCrashPoint } from './crash-points.ts'
import { BrokerError, deepestCodeOf } from './errors.ts'
import { createLog } from './log.ts'

const USAGE = `broker <command>

  serve                     run the broker (settings come from the environment; see README.md)
  doctor                    look whether everything is there that the broker needs, and say what to do; changes nothing
  migrate                   bring the database's schema up to this version, and exit
  accept-database           after a restore, or in a copy: confirm that nothing else uses its tokens
  audit verify              check that the audit record is whole: no row changed, moved or missing
  tokens find               read an access token, or its SHA-256, from standard input, and print who had it
  keys generate [ID]        print a new entry for ENCRYPTION_KEYS
  keys rotate ID            seal everything in the database with this key, the first of ENCRYPTION_KEYS; beside running
                            replicas
  callers add NAME          add a caller to CALLERS_FILE and print its API key, once
      --rights a,b          token:read, proxy:call, grant:read, grant:manage, ops:read
      --users a,b           user keys it may name; * stands for any run of characters
      --proxy-allow a,b     METHOD /path pairs; none = every path
      --expires-at TIME     when the key ends, such as 2027-01-01T00:00:00Z; never if not given
      --another-key         a second key for a caller that is there, which otherwise stays as it is
  callers list              list the callers of CALLERS_FILE, with their keys, when these end, and (with DATABASE_URL)
                            when each was used last
  callers check             check that CALLERS_FILE can be used, or whether a caller may do something
      --caller NAME --right R --user U --call 'GET /path'
  openapi                   print the OpenAPI document

CALLERS_FILE may be given as --file for the callers commands.
`

/** Beyond the longest refresh a broken shutdown is cut short; the spool has what matters by then. */
const SHUTDOWN_MARGIN_SECONDS = 10

/** Errors that are told of while the process is being ended. */
const SHUTDOWN_ERRORS_MAX = 10

/**
 * What ends a process. Heard here, because close-with-grace exits at the second one, whatever is in flight; and a second
 * one is usual: a Ctrl-C reaches npm as well, which passes it on.
 */
const STOP_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT'] as const
const ERRORS = ['uncaughtException', 'unhandledRejection'] as const

async function serve(): Promise<void> {
  const config = readConfig(process.env)
  let broker: Broker | undefined
  const log = createLog({
    level: config.logLevel,
    replica: config.replicaName,
    ...(config.traces === undefined ? {} : { traceIdOf: () => broker?.traceId() }),
  })
  const point = CRASH_POINTS.find((name) => name === process.env['BROKER_TEST_CRASH_POINT'])
  if (point !== undefined) log.warn('crash_point_set', { setting: 'BROKER_TEST_CRASH_POINT' })
  const started = await startBroker(config, {
    log,
    logLinesDropped: () => log.linesDropped(),
    wrapPorts: (ports) => (point === undefined ? ports : withCrashPoint(ports, point, die)),
  })
  broker = started
  const delaySeconds =
    config.shutdownListenSeconds + config.refresh.deadlineSeconds + SHUTDOWN_MARGIN_SECONDS
  let isStopping = false
  let errors = 0
  const grace = closeWithGrace(
    { delay: delaySeconds * 1000, logger: false, skip: [...STOP_SIGNALS, ...ERRORS] },
    async () => {
      await started.stop()
      await log.flush()
      if (errors > 0) process.exit(1)
    },
  )
  function stop(): void {
    if (isStopping) return
    isStopping = true
    grace.close()
  }
  for (const name of STOP_SIGNALS) {
    process.on(name, (signal: string) => {
      if (isStopping) log.info('shutdown_already_running', { signal })
      else log.info('signal_received', { signal })
      stop()
    })
  }
  for (const name of ERRORS) {
    process.on(name, (error: unknown) => {
      errors += 1
      if (!isStopping) log.error('unexpected_error', { error })
      // Where a line cannot be written, that is an error as well, and so on.
      else if (errors < SHUTDOWN_ERRORS_MAX) log.error('shutdown_error', { error })
      stop()
    })
  }
}

/** Ends the process as a power cut would: nothing is flushed, no handler runs. */
function die(): never {
  process.kill(process.pid, 'SIGKILL')
  throw new Error('the process outlived SIGKILL')
}

/** What an operator can act on. A database that is away at the start says little by itself, so its code goes along. */
function sentenceOf(error: unknown): string {
  if (error instanceof BrokerError && error.code === 'temporarily_unavailable') {
    return `The database of DATABASE_URL cannot be reached (${deepestCodeOf(error)}).`
  }
  return error instanceof Error ? error.message : 'failed'
}

const terminal: Terminal = {
  environment: process.env,
  readInput: () => readText(process.stdin),
  print(line) {
    process.stdout.write(`${line}\n`)
  },
  answerNo() {
    process.exitCode = 1
  },
}

async function run([command, ...rest]: string[]): Promise<void> {
  if (command === 'serve') return serve()
  if (command === 'help' || command === '--help') return terminal.print(USAGE)
  // Not before: what a command needs besides would stand in the memory of each broker that serves.
  const commands = await import('./commands.ts')
  switch (command) {
    case 'doctor':
      if (rest.length !== 0) throw new UsageError()
      return commands.examineAll(terminal)
    case 'migrate':
      return commands.migrateOnce(terminal)
    case 'accept-database':
      return commands.acceptDatabaseOnce(terminal)
    case 'audit':
      if (rest.length !== 1 || rest[0] !== 'verify') throw new UsageError()
      return commands.verifyAuditRecord(terminal)
    case 'tokens':
      // Nothing more: an argument can be read by everybody on the machine.
      if (rest.length !== 1 || rest[0] !== 'find') throw new UsageError()
      return commands.findTokenUses(terminal)
    case 'keys':
      if (rest[0] === 'generate') return commands.generateKey(terminal, rest[1])
      if (rest.length !== 2 || rest[0] !== 'rotate') throw new UsageError()
      return commands.rotateKeysOnce(terminal, rest[1] ?? '')
    case 'callers': {
      const { runCallersCommand } = await import('./callers-commands.ts')
      return runCallersCommand(terminal, rest[0], rest.slice(1))
    }
    case 'openapi': {
      const { renderOpenApi } = await import('./http/render-openapi.ts')
      return terminal.print((await renderOpenApi()).trimEnd())
    }
    default:
      throw new UsageError()
  }
}

try {
  await run(process.argv.slice(2))
} catch (error) {
  process.exitCode = error instanceof UsageError ? 2 : 1
  if (error instanceof UsageError) process.stderr.write(USAGE)
  else if (error instanceof ConfigError) process.stderr.write(`${error.message}\n`)
  else process.stderr.write(`broker: ${sentenceOf(error)}\n`)
}
