// A limit on how many at once: it is kept, it is fair, and giving a slot back twice gives nothing away.

import t from 'tap'
import { createSlots } from '../src/slots.ts'

t.test('no more than the limit at a time, in the order of asking', async (t) => {
  const slots = createSlots(2, 10)
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

t.test('a slot that is given back twice is free once', async (t) => {
  const slots = createSlots(1, 10)
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
  const slots = createSlots(1, 10)
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

t.test('it is full while as many wait as may, and none is free', async (t) => {
  const slots = createSlots(1, 2)
  t.equal(slots.isFull(), false)
  const first = await slots.take()
  const second = slots.take()
  t.equal(slots.isFull(), false, 'one waits, and one more may')
  const third = slots.take()
  t.equal(slots.isFull(), true)
  const fourth = slots.take()
  first()
  ;(await second)()
  t.equal(slots.isFull(), false, 'one waits')
  ;(await third)()
  ;(await fourth)()
  t.equal(slots.isFull(), false)
})
