// Debian's slowhttptest with 500 sockets in each of its modes against a real process: heads that never end, bodies that
// trickle into the proxy, and answers that are hardly read. They are closed in time, and an honest client does not notice.

import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { stripVTControlCharacters } from 'node:util'
import t from 'tap'
import { createTestDatabase } from './support/database.ts'
import { startRawBroker } from './support/raw-broker.ts'
import type { Answer } from './support/replica.ts'
import { answer, type UpstreamCall } from './support/upstream.ts'

const SLOWHTTPTEST = '/usr/bin/slowhttptest'
const SOCKETS = 500
/** More than the buffers between the upstream and a client hold. */
const LARGE = Buffer.alloc(20_000_000)
const HONEST_EVERY_MS = 50
const QUIET_CALLS = 60
const HONEST_P99_MS = 200
const ROUNDS_MAX = 3
/** Ten seconds for a head, and room for a machine with ten times more to do than it can. */
const CLOSED_LIMIT_SECONDS = 60

function respond(call: UpstreamCall): void {
  if (call.target === '/large') {
    call.socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${LARGE.length}\r\n\r\n`)
    call.socket.write(LARGE)
    return
  }
  void call.body.then((body) => answer(call, 200, `{"bytes":${body.length}}`))
}

/** Attacks until no connection is open any more, or the limit is over; resolves with what is said about the end. */
function attack(parameters: readonly string[]): Promise<string> {
  const all = ['-c', SOCKETS, '-r', SOCKETS / 5, '-l', CLOSED_LIMIT_SECONDS, ...parameters].map(
    String,
  )
  return new Promise((resolve, reject) => {
    // It asks without a pause whether there is something to read, and an attacker has a machine of his own.
    const child = spawn('nice', ['-n', '10', SLOWHTTPTEST, ...all], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let output = ''
    child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text))
    child.on('error', reject)
    child.on('close', () => {
      const text = stripVTControlCharacters(output)
      resolve(/Exit status:\s*(.*)/.exec(text)?.[1] ?? text.slice(-1_000))
    })
  })
}

function p99Of(answers: readonly Answer[]): number {
  const sorted = answers.map(({ tookMs }) => tookMs).toSorted((a, b) => a - b)
  return sorted[Math.ceil(sorted.length * 0.99) - 1] ?? Number.NaN
}

t.test(
  'slow clients are closed in time, and an honest one does not notice them',
  { skip: existsSync(SLOWHTTPTEST) ? false : 'slowhttptest is not installed' },
  async (t) => {
    const { url } = await createTestDatabase(t)
    const broker = await startRawBroker(t, {
      databaseUrl: url,
      respond,
      env: {
        LOG_LEVEL: 'error',
        // Shorter than an operator would have them, so that the test is short.
        PROXY_IDLE_TIMEOUT_MS: '3000',
        PROXY_HEADERS_TIMEOUT_MS: '5000',
      },
    })
    const { fleet, replica } = broker
    const processId = replica.processId()
    await broker.seat('honest')
    const [, slow] = await broker.seat('slow')
    const before = await fleet.row('slow')
    const path = `${replica.origin}${slow?.prefix}`

    /** Tokens and proxied calls of the honest user, one after the other, until it is enough. */
    const beHonest = async (isEnough: (count: number) => boolean): Promise<Answer[]> => {
      const answers: Answer[] = []
      while (!isEnough(answers.length)) {
        answers.push(await replica.token('honest'))
        await delay(HONEST_EVERY_MS)
        answers.push(await replica.call('POST', '/v1/users/honest/pagero/files', { a: 1 }))
        await delay(HONEST_EVERY_MS)
      }
      return answers
    }

    // The program has no other way to add a field than behind the value of the one that it knows.
    const who = ['-j', `a=b\r\n${slow?.who}\r\nConnection: close`]
    const trickle = ['-i', '1', '-x', '5', '-s', '100000']
    const sips = ['-n', '1', '-z', '512', '-w', '64', '-y', '128']
    const modes = {
      heads: ['-H', '-i', '2', '-x', '10', '-u', `${replica.publicOrigin}/auth/session`],
      bodies: ['-B', ...trickle, ...who, '-u', `${path}/files`],
      reads: ['-X', ...sips, ...who, '-u', `${path}/large`],
    }
    // Other tests run beside this one. What disturbs it for a moment does not do so each time; slow clients would.
    for (let round = 1, isUnnoticed = false; !isUnnoticed; round += 1) {
      const quiet = await beHonest((count) => count >= QUIET_CALLS)
      let isOver = false
      const attacks = Promise.all(
        Object.entries(modes).map(async ([mode, parameters]) => [mode, await attack(parameters)]),
      ).finally(() => (isOver = true))
      const meanwhile = await beHonest(() => isOver)
      const quietAgain = await beHonest((count) => count >= QUIET_CALLS)

      for (const [mode = '', end] of await attacks) {
        t.equal(end, 'No open connections left', mode)
      }
      const begun = broker.upstream.calls.filter(({ target }) => target === '/large').length
      t.ok(begun >= 32 * round, `${begun} answers were begun and hardly read`)
      const quietMs = Math.max(p99Of(quiet), p99Of(quietAgain))
      const isQuiet = quietMs < HONEST_P99_MS / 2
      if (isQuiet) t.strictSame([...new Set(meanwhile.map(({ status }) => status))], [200])
      const p99Ms = p99Of(meanwhile)
      const figure = `p99 of ${meanwhile.length} honest calls is ${Math.round(p99Ms)} ms, ${Math.round(quietMs)} without the slow ones`
      isUnnoticed = p99Ms < HONEST_P99_MS
      if (isUnnoticed) t.pass(figure)
      else if (!isQuiet) {
        t.pass(figure, { skip: 'this machine has too much to do to tell' })
        break
      } else if (round === ROUNDS_MAX) {
        t.fail(`${figure}: below ${HONEST_P99_MS} ms in none of ${round} rounds`)
        break
      } else t.comment(`${figure}: once more`)
    }
    t.equal(replica.processId(), processId, 'the process lives')
    const after = await fleet.row('slow')
    t.strictSame(after, before, 'and the grant of the slow user is as it was')
  },
)
