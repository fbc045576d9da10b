// The log: one event a line, JSON, on standard output. Only the fields of `LogFields` come out, whatever is handed in, with
// the id of the trace that the line belongs to; and of an error only what cannot hold a value: class, code, stack frames. No
// message but the broker's own.
// What is worth an event is for the code that logs to decide.

import { destination as openDestination, pino, stdTimeFunctions } from 'pino'
import { BrokerError } from './errors.ts'
import type { Config } from './config.ts'
import type { Log, LogFields } from './ports.ts'

/** Every field that may come out, but for `error`. The compiler keeps it equal to `LogFields`. */
const FIELD_TABLE: Readonly<Record<Exclude<keyof LogFields, 'error'>, true>> = {
  requestId: true,
  method: true,
  route: true,
  status: true,
  durationMs: true,
  user: true,
  caller: true,
  code: true,
  attemptId: true,
  eventId: true,
  generation: true,
  cause: true,
  outcome: true,
  reason: true,
  state: true,
  setting: true,
  keyId: true,
  fingerprint: true,
  address: true,
  port: true,
  count: true,
  withinDays: true,
  bytes: true,
  path: true,
  signal: true,
  version: true,
  upstreamStatus: true,
  retryAfterSeconds: true,
}
const FIELD_NAMES = Object.keys(FIELD_TABLE) as Array<keyof typeof FIELD_TABLE>

/** Enough for a user key's beginning, an id or a reason; a line stays far below the 16 KiB that container logs keep whole. */
const TEXT_LENGTH_MAX = 200
/** The frames that name the place; what is further up is Node's or Fastify's. */
const STACK_FRAMES_MAX = 12
/** The error, and what caused it, and what caused that. */
const CAUSE_DEPTH_MAX = 3
/** Lines wait here while the reader of standard output is slow. Beyond it they are dropped: requests go on. */
const BUFFER_BYTES_MAX = 16 * 1024 * 1024
/** How long an exit waits for a reader that does not read. */
const FLUSH_WAIT_MS = 1000

/** What a terminal or a log viewer could take for more than text: control, format (bidi among it), line separators, lone surrogates. */
const NOT_TEXT = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu
/** A stack frame that names a place in a file; not one of code that was evaluated, which could quote it. */
const STACK_FRAME = /^ {4}at (?:[^()]+ \(|async )?(?:file:\/\/|node:|\/)[^()]*:\d+:\d+\)?$/
/** Codes of Node, undici and SQLSTATE. */
const ERROR_CODE = /^[A-Z0-9_]{2,40}$/
const CLASS_NAME = /^[A-Za-z0-9_$]{1,64}$/

/** An error as it is logged. */
export interface ReducedError {
  class: string
  code?: string
  /** Of the broker's own errors only: a sentence written for callers. */
  detail?: string
  stack?: string[]
  cause?: ReducedError
}

export interface LogSettings {
  level: Config['logLevel']
  replica: string
  /** The trace that a line belongs to, if any. */
  traceIdOf?: () => string | undefined
  /** Takes whole lines; standard output when not given. */
  destination?: { write(line: string): unknown }
}

/**
 * Creates the log. Writing never waits and never throws; a reader that has stopped costs lines, not requests.
 *
 * `flush` resolves when what was logged before it has been written, at most a second later. `linesDropped` counts those that
 * a reader has missed.
 */
export function createLog(
  settings: LogSettings,
): Log & { flush(): Promise<void>; linesDropped(): number } {
  const { level, replica, traceIdOf } = settings
  const standardOutput =
    settings.destination === undefined
      ? // With `minLength` 1 every line is still written at once; with 0 `flush` would not wait.
        openDestination({ dest: 1, sync: false, minLength: 1, maxLength: BUFFER_BYTES_MAX })
      : undefined
  let linesDropped = 0
  standardOutput?.on('drop', () => {
    linesDropped += 1
  })
  const logger = pino(
    {
      level,
      base: { replica: printable(replica) },
      messageKey: 'event',
      timestamp: stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      ...(traceIdOf === undefined ? {} : { mixin: () => ({ traceId: traceIdOf() }) }),
    },
    standardOutput ?? (settings.destination as NonNullable<LogSettings['destination']>),
  )

  function at(lineLevel: Config['logLevel']): Log['info'] {
    return (event, fields) => {
      if (logger.isLevelEnabled(lineLevel)) logger[lineLevel](pickFields(fields), event)
    }
  }

  return {
    writes: (lineLevel) => logger.isLevelEnabled(lineLevel),
    trace: at('trace'),
    debug: at('debug'),
    info: at('info'),
    warn: at('warn'),
    error: at('error'),
    linesDropped: () => linesDropped,
    async flush() {
      if (standardOutput === undefined) return
      await new Promise<void>((resolve) => {
        const givenUp = setTimeout(resolve, FLUSH_WAIT_MS)
        // An error here means that nobody reads any more: there is nothing left to wait for.
        standardOutput.flush(() => {
          clearTimeout(givenUp)
          resolve()
        })
      })
    },
  }
}

function pickFields(fields: LogFields | undefined): Record<string, unknown> {
  const picked: Record<string, unknown> = {}
  if (fields === undefined) return picked
  for (const name of FIELD_NAMES) {
    const value: unknown = fields[name]
    if (typeof value === 'string') picked[name] = printable(value)
    else if (typeof value === 'number') picked[name] = value
  }
  if (fields.error !== undefined) picked['error'] = reduceError(fields.error)
  return picked
}

/**
 * Reduces an error to its class, code and stack frames, and its causes likewise.
 *
 * Messages stay out, because those of drivers and parsers quote values; so does every other property, because
 * OAuth libraries put the whole token answer there.
 */
export function reduceError(error: unknown, depth = 1): ReducedError {
  if (!(error instanceof Error)) return { class: error === null ? 'null' : typeof error }
  try {
    const reduced: ReducedError = { class: className(error) }
    if (error instanceof BrokerError) {
      reduced.code = error.code
      reduced.detail = printable(error.detail)
    } else if ('code' in error && typeof error.code === 'string' && ERROR_CODE.test(error.code)) {
      reduced.code = error.code
    }
    const stack = stackFrames(error)
    if (stack.length > 0) reduced.stack = stack
    if (error.cause !== undefined && depth < CAUSE_DEPTH_MAX) {
      reduced.cause = reduceError(error.cause, depth + 1)
    }
    return reduced
  } catch {
    // A property that throws when it is read must not cost the request that wanted to log it.
    return { class: 'Error' }
  }
}

/** `name` can be set to anything; the class's own name is source text. */
function className(error: Error): string {
  const name: unknown = error.constructor?.name
  return typeof name === 'string' && CLASS_NAME.test(name) ? name : 'Error'
}

/** The frames behind the message. Where the message is not found in the stack, nothing tells where frames begin: none. */
function stackFrames(error: Error): string[] {
  const { stack, message } = error
  if (typeof stack !== 'string' || typeof message !== 'string') return []
  const messageFrom = stack.indexOf(message)
  if (messageFrom === -1) return []
  return stack
    .slice(messageFrom + message.length)
    .split('\n')
    .filter((line) => STACK_FRAME.test(line))
    .slice(0, STACK_FRAMES_MAX)
    .map((line) => printable(line.trim()))
}

/** The text cut to length, and every character that is not plain text as its code point: `<U+202E>`. */
export function printable(text: string): string {
  const cut = text.length > TEXT_LENGTH_MAX ? `${text.slice(0, TEXT_LENGTH_MAX)}…` : text
  return cut.replace(NOT_TEXT, (character) => {
    const codePoint = character.codePointAt(0) as number
    return `<U+${codePoint.toString(16).toUpperCase().padStart(4, '0')}>`
  })
}
