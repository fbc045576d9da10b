// The log: what may come out comes out as one line of JSON, and nothing else comes out at all.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import t from 'tap'
import { createLog, reduceError } from '../src/log.ts'
import { BrokerError } from '../src/errors.ts'
import type { LogFields } from '../src/ports.ts'

const CANARY = 'canary-3f9a1c-refresh-token'

function recordingLog(level: 'trace' | 'info' = 'trace', replica = 'broker-0') {
  const chunks: string[] = []
  const log = createLog({ level, replica, destination: { write: (line) => chunks.push(line) } })
  return {
    log,
    chunks,
    text: () => chunks.join(''),
    line: () => JSON.parse(chunks.at(-1) as string) as Record<string, unknown>,
  }
}

t.test(
  'a line has time, level, replica, event and the fields, and ends in one newline',
  async (t) => {
    const { log, line, chunks } = recordingLog()
    const before = new Date()
    log.info('refresh_stored', { user: 'acme-alice', generation: 8, durationMs: 12.5 })
    const { time, ...rest } = line()
    t.strictSame(rest, {
      level: 'info',
      replica: 'broker-0',
      event: 'refresh_stored',
      user: 'acme-alice',
      generation: 8,
      durationMs: 12.5,
    })
    t.match(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/)
    t.ok(new Date(time as string) >= before)
    t.equal(chunks.length, 1)
    t.match(chunks[0], /^\{.*\}\n$/)
  },
)

t.test('every level is named by its word, and those below the setting stay silent', async (t) => {
  const all = recordingLog('trace')
  const some = recordingLog('info')
  for (const level of ['trace', 'debug', 'info', 'warn', 'error'] as const) {
    all.log[level]('event')
    some.log[level]('event')
    t.equal(all.line()['level'], level)
  }
  t.equal(all.chunks.length, 5)
  t.equal(some.chunks.length, 3)
})

t.test(
  'a field that is not on the list does not come out, nor one that is no text or number',
  async (t) => {
    const { log, text, line } = recordingLog()
    const fields = {
      user: 'acme-alice',
      accessToken: CANARY,
      msg: CANARY,
      event: CANARY,
      err: new Error(CANARY),
      route: { toString: () => CANARY, toJSON: () => CANARY },
      method: [CANARY],
      status: true,
      code: undefined,
      [CANARY]: 'x',
    }
    log.info('request_answered', fields as unknown as LogFields)
    t.notMatch(text(), CANARY)
    t.strictSame(Object.keys(line()).toSorted(), ['event', 'level', 'replica', 'time', 'user'])
  },
)

t.test('messages, properties and causes of errors do not come out', async (t) => {
  const { log, text, line } = recordingLog()
  class ResponseBodyError extends Error {
    code = 'OAUTH_RESPONSE_BODY_ERROR'
    response = { body: CANARY }
    error_description = CANARY
  }
  const cause = Object.assign(new RangeError(CANARY), { code: `not a code: ${CANARY}` })
  const error = new ResponseBodyError(`duplicate key (${CANARY})`, {
    cause: new TypeError(CANARY, { cause }),
  })
  log.error('refresh_failed', { error })
  t.notMatch(text(), CANARY)
  t.match(line()['error'], {
    class: 'ResponseBodyError',
    code: 'OAUTH_RESPONSE_BODY_ERROR',
    stack: [/^at .*log\.test\.ts:\d+:\d+\)?$/],
    cause: { class: 'TypeError', cause: { class: 'RangeError', code: undefined } },
  })
})

t.test(
  'a message that looks like a stack, or was changed afterwards, does not come out either',
  async (t) => {
    const { log, text } = recordingLog()
    log.error('x', { error: new Error(`oops\n    at ${CANARY} (/a/b.js:1:2)`) })
    log.error('x', { error: new Error('', { cause: `    at ${CANARY} (/a/b.js:1:2)` }) })
    const changed = new Error(`first\n    at ${CANARY} (/a/b.js:1:2)`)
    void changed.stack
    changed.message = 'second'
    log.error('x', { error: changed })
    const renamed = new Error('x')
    renamed.name = CANARY
    log.error('x', { error: renamed })
    const evaluated = new Error('x')
    evaluated.stack = `Error: x\n    at data:text/javascript,${CANARY}:1:2\n    at eval (eval at ${CANARY} (file:///a.js:1:2), <anonymous>:1:1)`
    log.error('x', { error: evaluated })
    for (const thrown of [CANARY, { message: CANARY }, [CANARY], Symbol(CANARY), () => CANARY]) {
      log.error('x', { error: thrown })
    }
    t.notMatch(text(), CANARY)
  },
)

t.test("the broker's own errors keep code and detail", async (t) => {
  const { log, line, text } = recordingLog()
  const cause = Object.assign(new Error(CANARY), { code: 'ECONNREFUSED' })
  const detail = 'The database cannot be reached at the moment.'
  log.warn('x', { error: new BrokerError('temporarily_unavailable', detail, {}, { cause }) })
  t.match(line()['error'], {
    class: 'BrokerError',
    code: 'temporarily_unavailable',
    detail,
    cause: { class: 'Error', code: 'ECONNREFUSED' },
  })
  t.notMatch(text(), CANARY)
})

t.test(
  'causes are followed three deep, circles too, and an error that cannot be read costs nothing',
  async (t) => {
    const circle = new Error('x')
    circle.cause = circle
    const reduced = reduceError(circle)
    t.ok(reduced.cause?.cause)
    t.notOk(reduced.cause?.cause?.cause)

    const hostile = new Error('x')
    Object.defineProperty(hostile, 'code', {
      get() {
        throw new Error(CANARY)
      },
    })
    t.strictSame(reduceError(hostile), { class: 'Error' })
    t.strictSame(reduceError(null), { class: 'null' })
    t.strictSame(reduceError('text'), { class: 'string' })
    t.equal(reduceError(Object.create(Error.prototype)).class, 'Error')
  },
)

t.test('hostile text stays in its line and shows as what it is', async (t) => {
  const { log, text, line, chunks } = recordingLog('trace', 'broker\u202e\n0')
  const hostile =
    'a\r\n{"level":"info","event":"forged"}\u001b[2J\u202eb\u2028c\u0000d\ud800e\u200ff'
  log.info('request_answered', { user: hostile })
  t.equal(chunks.length, 1)
  t.equal(text().indexOf('\n'), text().length - 1)
  t.equal(
    line()['user'],
    'a<U+000D><U+000A>{"level":"info","event":"forged"}<U+001B>[2J<U+202E>b<U+2028>c<U+0000>d<U+D800>e<U+200F>f',
  )
  t.equal(line()['replica'], 'broker<U+202E><U+000A>0')
  t.equal(line()['event'], 'request_answered')
})

t.test('long text is cut at 200 characters', async (t) => {
  const { log, line } = recordingLog()
  log.info('x', { user: 'u'.repeat(200), reason: 'r'.repeat(100_000) })
  t.equal(line()['user'], 'u'.repeat(200))
  t.equal(line()['reason'], `${'r'.repeat(200)}…`)
})

const LOG_MODULE = JSON.stringify(new URL('../src/log.ts', import.meta.url).href)

function runScript(script: string) {
  const source = `import { createLog } from ${LOG_MODULE}
    const log = createLog({ level: 'info', replica: 'r' })
    ${script}`
  return spawn(process.execPath, ['--input-type=module', '-e', source], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
}

t.test('what was logged before flush is on standard output when the process ends', async (t) => {
  const child = runScript(`
    for (let i = 0; i < 5000; i += 1) log.info('line', { count: i })
    await log.flush()
    process.kill(process.pid, 'SIGKILL')`)
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => (output += chunk))
  await once(child, 'close')
  const lines = output.trimEnd().split('\n')
  t.equal(lines.length, 5000)
  t.match(JSON.parse(lines.at(-1) as string), { event: 'line', count: 4999 })
})

t.test('a reader that does not read holds nobody up', async (t) => {
  // 20,000 lines of 300 bytes are some hundred times what a pipe holds.
  const child = runScript(`
    const began = performance.now()
    for (let i = 0; i < 20_000; i += 1) log.info('line', { reason: 'r'.repeat(200) })
    await new Promise((resolve) => setImmediate(resolve))
    log.info('after')
    await log.flush()
    process.stderr.write('went on', () => process.kill(process.pid, 'SIGKILL'))`)
  const [said] = (await once(child.stderr, 'data')) as [Buffer]
  t.equal(said.toString(), 'went on')
  await once(child, 'exit')
})

t.test('lines that no reader takes in time are lost, and counted', async (t) => {
  // Three times of what is kept for it.
  const child = runScript(`
    for (let i = 0; i < 150_000; i += 1) log.info('line', { reason: 'r'.repeat(200) })
    process.stderr.write(String(log.linesDropped()), () => process.kill(process.pid, 'SIGKILL'))`)
  const [said] = (await once(child.stderr, 'data')) as [Buffer]
  const dropped = Number(said.toString())
  t.ok(dropped > 50_000 && dropped < 150_000, `${dropped} of 150,000`)
  await once(child, 'exit')
})
