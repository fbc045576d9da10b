// Requests that come when they come, however long the answers take: so many a second, each on a connection of its own
// while no other is free. Parameters: port, path with `{number}`, the first number and how many there are, requests a second,
// seconds, names and values of fields. Prints what became of them.

import { connect, type Socket } from 'node:net'

export interface FloodResult {
  /** Requests that were due; those without a connection of their own are among `unsent`. */
  offered: number
  unsent: number
  /** Answers with a 200. */
  good: number
  /** Answers with a 503. */
  shed: number
  /** Answers with any other status. */
  other: number
  /** Connections that broke, and answers that took longer than anybody waits. */
  broken: number
  late: number
  /** Those that were still to come at the end. */
  waiting: number
  p99GoodMs: number
  seconds: number
}

const TICK_MS = 5
const CONNECTIONS_MAX = 4_000
/** Beyond what the broker lets a caller wait. */
const PATIENCE_MS = 15_000

const [port, path = '', first, numbers, rate, length, ...fields] = process.argv.slice(2)
const count = Number(numbers)
const perSecond = Number(rate)
const seconds = Number(length)
const head = ['HTTP/1.1', 'host: localhost']
for (let at = 0; at < fields.length; at += 2) head.push(`${fields[at]}: ${fields[at + 1]}`)
const after = ` ${head.join('\r\n')}\r\n\r\n`
const result = { offered: 0, unsent: 0, good: 0, shed: 0, other: 0, broken: 0, late: 0 }
const tookMs: number[] = []

interface Line {
  socket: Socket
  text: string
  sentAtMs: number
  isBusy: boolean
}

const lines = new Set<Line>()
const idle: Line[] = []

function open(): Line {
  const line: Line = {
    socket: connect(Number(port), '127.0.0.1').setNoDelay(true),
    text: '',
    sentAtMs: 0,
    isBusy: false,
  }
  lines.add(line)
  line.socket.setEncoding('latin1').on('data', (piece: string) => {
    line.text += piece
    const headEnd = line.text.indexOf('\r\n\r\n')
    if (headEnd === -1) return
    const size = Number(/\r\ncontent-length: (\d+)/i.exec(line.text)?.[1])
    if (line.text.length >= headEnd + 4 + size) answered(line)
  })
  line.socket.on('error', () => {})
  line.socket.on('close', () => {
    lines.delete(line)
    if (line.isBusy) result.broken += 1
    else if (idle.includes(line)) idle.splice(idle.indexOf(line), 1)
  })
  return line
}

function send(line: Line): void {
  line.isBusy = true
  line.text = ''
  line.sentAtMs = performance.now()
  const number = String((Number(first) + result.offered) % count).padStart(7, '0')
  line.socket.write(`GET ${path.replace('{number}', number)}${after}`)
}

function answered(line: Line): void {
  line.isBusy = false
  if (line.text.startsWith('HTTP/1.1 200 ')) {
    result.good += 1
    tookMs.push(performance.now() - line.sentAtMs)
  } else if (line.text.startsWith('HTTP/1.1 503 ')) result.shed += 1
  else result.other += 1
  if (!line.socket.destroyed) idle.push(line)
}

const startedMs = performance.now()
let looked = startedMs
await new Promise<void>((resolve) => {
  const timer = setInterval(() => {
    const nowMs = performance.now()
    const elapsedSeconds = Math.min(seconds, (nowMs - startedMs) / 1000)
    const due = Math.floor(elapsedSeconds * perSecond)
    while (result.offered < due) {
      const line = idle.pop() ?? (lines.size < CONNECTIONS_MAX ? open() : undefined)
      if (line === undefined) result.unsent += 1
      else send(line)
      result.offered += 1
    }
    if (nowMs - looked > 1_000) {
      looked = nowMs
      for (const line of lines) {
        if (!line.isBusy || nowMs - line.sentAtMs < PATIENCE_MS) continue
        line.isBusy = false
        result.late += 1
        line.socket.destroy()
      }
    }
    if (elapsedSeconds < seconds) return
    clearInterval(timer)
    resolve()
  }, TICK_MS)
})
const whole: FloodResult = {
  ...result,
  waiting: [...lines].filter(({ isBusy }) => isBusy).length,
  p99GoodMs: tookMs.toSorted((a, b) => a - b)[Math.floor(tookMs.length * 0.99)] ?? Infinity,
  seconds,
}
process.stdout.write(`RESULT ${JSON.stringify(whole)}\n`, () => process.exit(0))
