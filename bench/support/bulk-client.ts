// One large body each way, by a client that costs less than what it measures: a bare socket, and for all that it reads
// one buffer. Parameters: `down` or `up`, port, path, bytes, then names and values of fields.

import { connect } from 'node:net'

const [direction, port, path, size, ...fields] = process.argv.slice(2)
const bytes = Number(size)
const isDown = direction === 'down'
const CHUNK = Buffer.alloc(1_048_576, 'pagero')

let answer = ''
let headLength = 0
let received = 0

/** Keeps the head and whatever came with it, or all of a small answer, and counts. */
function take(length: number, buffer: Uint8Array): boolean {
  received += length
  if (headLength === 0 || !isDown) {
    answer += Buffer.from(buffer.buffer, buffer.byteOffset, length).toString('latin1')
    const headEnd = answer.indexOf('\r\n\r\n')
    if (headEnd !== -1) headLength = headEnd + 4
  }
  return true
}

const startedMs = performance.now()
const socket = connect({
  port: Number(port),
  host: '127.0.0.1',
  noDelay: true,
  onread: { buffer: new Uint8Array(1_048_576), callback: take },
})
const lines = [
  `${isDown ? 'GET' : 'POST'} ${path} HTTP/1.1`,
  'host: localhost',
  'connection: close',
]
for (let at = 0; at < fields.length; at += 2) lines.push(`${fields[at]}: ${fields[at + 1]}`)
if (!isDown) lines.push(`content-length: ${bytes}`)
socket.write(`${lines.join('\r\n')}\r\n\r\n`)
let unsent = isDown ? 0 : bytes
const sendMore = () => {
  while (unsent > 0) {
    const chunk = unsent < CHUNK.length ? CHUNK.subarray(0, unsent) : CHUNK
    unsent -= chunk.length
    if (!socket.write(chunk)) {
      socket.once('drain', sendMore)
      return
    }
  }
}
sendMore()
await new Promise((resolve, reject) => socket.once('close', resolve).once('error', reject))
const seconds = (performance.now() - startedMs) / 1000
const isWhole = isDown ? received - headLength === bytes : answer.includes(`"bytes":${bytes}}`)
if (!answer.startsWith('HTTP/1.1 200 ') || !isWhole) {
  throw new Error(`${received} bytes came, of which the first are:\n${answer.slice(0, 1_000)}`)
}
process.stdout.write(`RESULT ${JSON.stringify({ seconds })}\n`)
