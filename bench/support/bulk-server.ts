// An API for large bodies that costs less than whatever stands before it: `GET /…?<bytes>` is answered with as many,
// and any other method by how many came. HTTP as far as the proxies that are measured speak it. Environment: PORT.

import { createServer, type Socket } from 'node:net'

const CHUNK = Buffer.alloc(1_048_576, 'pagero')
const HEAD_END = '\r\n\r\n'

createServer((socket) => {
  let head = ''
  /** Of the body that is being read. */
  let left = 0
  let size = 0
  socket.setNoDelay(true)
  socket.on('error', () => socket.destroy())
  socket.on('data', (data) => {
    if (left > 0) {
      left -= data.length
      if (left <= 0) answer(socket, JSON.stringify({ bytes: size }))
      return
    }
    head += data.toString('latin1')
    const end = head.indexOf(HEAD_END)
    if (end === -1) return
    const [line = ''] = head.split('\r\n', 1)
    size = Number(/^content-length: *(\d+)/im.exec(head)?.[1] ?? 0)
    left = size - (head.length - end - HEAD_END.length)
    head = ''
    if (line.startsWith('GET ')) send(socket, Number(/\?(\d+) /.exec(line)?.[1] ?? 0))
    else if (left <= 0) answer(socket, JSON.stringify({ bytes: size }))
  })
}).listen(Number(process.env['PORT']), '127.0.0.1')

function answer(socket: Socket, text: string): void {
  socket.write(
    `HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ${text.length}${HEAD_END}${text}`,
  )
}

function send(socket: Socket, bytes: number): void {
  socket.write(
    `HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: ${bytes}${HEAD_END}`,
  )
  let unsent = bytes
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
}
