// The loop that empties a queue in the database, in virtual time: how many at once, when it looks, and what an error ends.

import t from 'tap'
import { backoffSeconds, createQueueWorker } from '../src/queue.ts'
import { keepingLog } from './support/keeping-log.ts'
import { startLife } from './support/simulation/life.ts'
import { createRandom } from './support/simulation/random.ts'
import { createScheduler } from './support/simulation/scheduler.ts'

/** A queue of numbers of which each is worked on for a second. */
function setUp() {
  const scheduler = createScheduler()
  const { clock } = startLife({ scheduler, random: createRandom(1) }, 'broker', 0)
  const log = keepingLog()
  const due: number[] = []
  const asked: number[] = []
  const begun: number[] = []
  const ended: number[] = []
  const broken = new Set<number>()
  let isAway = false
  /** How many are handed out at a time. */
  const hand = { max: Infinity }
  const worker = createQueueWorker<number>(
    { clock, log },
    {
      concurrency: 3,
      pollMs: 5_000,
      event: 'queue_trouble',
      async take(limit) {
        asked.push(limit)
        if (isAway) throw new Error('away')
        return due.splice(0, Math.min(limit, hand.max))
      },
      async work(item) {
        begun.push(item)
        await clock.sleep(1_000)
        if (broken.has(item)) throw new Error('broken')
        ended.push(item)
      },
    },
  )
  const pass = (ms: number) => scheduler.run({ untilMs: scheduler.nowMs() + ms })
  const leave = (away: boolean) => (isAway = away)
  /** Ends the test's worker, and what it has in hand. */
  const end = async () => {
    const stopped = worker.stop()
    await pass(1_000)
    await stopped
  }
  return { log, due, hand, asked, begun, ended, broken, worker, pass, leave, end }
}

t.test('a pause doubles up to an hour, less up to half of it by chance', async (t) => {
  t.strictSame(
    [0, 1, 2, 9, 10, 60].map((count) => backoffSeconds(5, count, 0)),
    [5, 10, 20, 2_560, 3_600, 3_600],
  )
  t.equal(backoffSeconds(5, 1, 0.5), 7.5)
  t.equal(backoffSeconds(5, 1, 1), 5)
})

t.test('three are worked on at a time, and each that ends makes room for the next', async (t) => {
  const { due, asked, begun, ended, worker, pass, end } = setUp()
  due.push(1, 2, 3, 4, 5)
  worker.start()
  await pass(999)
  t.strictSame(begun, [1, 2, 3])
  t.strictSame(asked, [3], 'while there is no room the queue is not asked')
  await pass(10)
  t.strictSame(begun, [1, 2, 3, 4, 5])
  await pass(1_000)
  t.strictSame(ended, [1, 2, 3, 4, 5])
  await end()
})

t.test('a queue that hands out one at a time is asked until there is no room', async (t) => {
  const { due, hand, asked, begun, worker, pass, end } = setUp()
  hand.max = 1
  due.push(1, 2, 3)
  worker.start()
  await pass(0)
  t.strictSame(
    [begun, asked],
    [
      [1, 2, 3],
      [3, 2, 1],
    ],
  )
  await end()
})

t.test('an empty queue is looked at again each five seconds, or when it is kicked', async (t) => {
  const { due, asked, begun, worker, pass, end } = setUp()
  worker.start()
  await pass(4_999)
  t.equal(asked.length, 1)
  await pass(1)
  t.equal(asked.length, 2)
  due.push(1)
  worker.kick()
  await pass(0)
  t.strictSame(begun, [1])
  await end()
})

t.test(
  'a worker that is started twice runs once, and one that was stopped starts again',
  async (t) => {
    const { due, asked, begun, worker, pass, end } = setUp()
    worker.start()
    worker.start()
    await pass(0)
    t.equal(asked.length, 1)
    await worker.stop()
    due.push(1)
    await pass(20_000)
    t.equal(asked.length, 1, 'nothing is taken after the stop')
    worker.start()
    await pass(0)
    t.strictSame(begun, [1])
    await end()
  },
)

t.test('a stop waits for what was taken', async (t) => {
  const { due, ended, worker, pass } = setUp()
  due.push(1, 2, 3, 4)
  worker.start()
  await pass(0)
  let isStopped = false
  const stopped = worker.stop().then(() => (isStopped = true))
  await pass(999)
  t.equal(isStopped, false)
  await pass(1)
  await stopped
  t.strictSame(ended, [1, 2, 3])
  t.strictSame(due, [4], 'and takes nothing more')
})

t.test('what fails is logged and ends nothing', async (t) => {
  const { due, broken, ended, log, worker, pass, leave, end } = setUp()
  leave(true)
  due.push(1, 2, 3, 4)
  broken.add(2)
  worker.start()
  await pass(4_999)
  t.match(log.events, [{ level: 'warn', event: 'queue_trouble', error: { message: 'away' } }])
  t.equal(log.events.length, 1, 'and not asked again at once')
  leave(false)
  await pass(2_010)
  t.strictSame(ended, [1, 3, 4])
  t.match(log.events[1], { event: 'queue_trouble', error: { message: 'broken' } })
  await end()
})

t.test('one round takes as many as may be worked on, and says how many there were', async (t) => {
  const { due, asked, ended, worker, pass } = setUp()
  due.push(1, 2, 3, 4)
  const first = worker.runOnce()
  await pass(1_000)
  t.equal(await first, 3)
  t.strictSame([asked, ended, due], [[3], [1, 2, 3], [4]])
})
