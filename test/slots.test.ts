// A limit on how many at once: it is kept, it is fair, and giving a slot back twice gives nothing away.

import t from 'tap'
import { systemClock } from '../src/clock.ts'
import { createSlots } from '../src/slots.ts'

t.test('no more than the limit at a time, in the order of asking', async (t) => {
  const slots = createSlots(2, systemClock)
  const begun: string[] = []
  const take = async (name: string) => {
    const release = await slots.take()
    begun.push(name)
    return release
  }
  const [first, second, third, fourth] = [take('1'), take('2'), take('3'), take('4')]
  const [releaseFirst, releaseSecond] = await Promise.all([first, second])
  t.strictSame(begun, ['1', '2'])
  releaseSecond()
  const releaseThird = await third
  t.strictSame(begun, ['1', '2', '3'])
  releaseFirst()
  await fourth
  t.strictSame(begun, ['1', '2', '3', '4'])
  releaseThird()
})

t.test('until it is widened a limit is narrower', async (t) => {
  const slots = createSlots(4, systemClock, 2)
  const begun: number[] = []
  for (let turn = 1; turn <= 6; turn += 1) void slots.take().then(() => begun.push(turn))
  const settle = () => new Promise((resolve) => setImmediate(resolve))
  await settle()
  t.strictSame(begun, [1, 2])
  slots.widen()
  await settle()
  t.strictSame(begun, [1, 2, 3, 4])
  slots.widen()
  await settle()
  t.strictSame(begun, [1, 2, 3, 4], 'once')
})

t.test('a limit is never wider than it is asked to be', async (t) => {
  const slots = createSlots(1, systemClock, 2)
  await slots.take()
  t.ok(slots.waitMs() > 0)
})

t.test('a slot that is given back twice is free once', async (t) => {
  const slots = createSlots(1, systemClock)
  const release = await slots.take()
  release()
  release()
  await slots.take()
  let extra = false
  void slots.take().then(() => (extra = true))
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(extra, false)
})

t.test('a slot that nobody waits for is there for the next', async (t) => {
  const slots = createSlots(1, systemClock)
  for (let i = 0; i < 3; i += 1) (await slots.take())()
  const release = await slots.take()
  const next = slots.take()
  release()
  await next
  let extra = false
  void slots.take().then(() => (extra = true))
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(extra, false, 'handed over, it is not free besides')
})

t.test('how long one would wait is judged by those who wait, and by the last turns', async (t) => {
  let nowMs = 5_000
  const slots = createSlots(2, { monotonicMs: () => nowMs })
  t.equal(slots.waitMs(), 0)
  const first = await slots.take()
  t.equal(slots.waitMs(), 0, 'one is free')
  const second = await slots.take()
  t.equal(slots.waitMs(), 100, 'two turns of 200 ms, until some have been seen')
  const third = slots.take()
  t.equal(slots.waitMs(), 200)
  nowMs += 1_000
  first()
  first()
  // One eighth of a second, and seven of 200 ms.
  t.equal(slots.waitMs(), 150, 'nobody waits, and turns are taken to last 300 ms')
  second()
  ;(await third)()
  t.equal(slots.waitMs(), 0)
})
