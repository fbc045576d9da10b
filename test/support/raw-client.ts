// A client on a bare socket that sends bytes as they are, and reads the answers one by one as their framing says.

import { connect } from 'node:net'

export interface RawAnswerHead {
  status: number
  /** Lower-case names; of a field that stands several times, the last. */
  fields: ReadonlyMap<string, string>
}

export interface Exchange {
  /** Interim answers (100) left out. */
  answers: RawAnswerHead[]
  /** Whether the broker ended the connection. */
  closed: boolean
  /** What came behind the last whole answer. */
  rest: Buffer
}

/**
 * Sends bytes and reads until the broker closes, until as many answers have come as are waited for, or until nothing
 * has come for `quietMs`.
 */
export function exchange(
  port: number,
  bytes: Buffer,
  options: { methods: readonly string[]; answersMax: number; quietMs: number },
): Promise<Exchange> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    const answers: RawAnswerHead[] = []
    let rest = Buffer.alloc(0)
    let over = false
    const end = (closed: boolean) => {
      if (over) return
      over = true
      clearTimeout(quietTimer)
      socket.destroy()
      resolve({ answers, closed, rest })
    }
    const quietTimer = setTimeout(() => end(false), options.quietMs)
    socket.setNoDelay(true)
    socket.on('data', (chunk) => {
      quietTimer.refresh()
      rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk])
      for (;;) {
        const read = readAnswer(rest, options.methods[answers.length] ?? 'GET')
        if (read === undefined) break
        rest = rest.subarray(read.length)
        if (read.head.status >= 200) answers.push(read.head)
      }
      if (answers.length >= options.answersMax) end(false)
    })
    // A broker that closes with bytes unread resets; what it had said is kept.
    socket.on('error', () => end(true))
    socket.on('close', () => end(true))
    socket.write(bytes)
  })
}

/** Reads one whole answer from the beginning of the bytes (RFC 9112 section 6.3). */
function readAnswer(
  bytes: Buffer,
  method: string,
): { head: RawAnswerHead; length: number } | undefined {
  const headEnd = bytes.indexOf('\r\n\r\n')
  if (headEnd === -1) return undefined
  const [line = '', ...lines] = bytes.subarray(0, headEnd).toString('latin1').split('\r\n')
  const fields = new Map(
    lines.map((one) => {
      const colon = one.indexOf(':')
      return [one.slice(0, colon).toLowerCase(), one.slice(colon + 1).trim()] as const
    }),
  )
  const status = Number(/^HTTP\/1\.1 (\d{3}) /.exec(line)?.[1] ?? Number.NaN)
  if (Number.isNaN(status)) throw new Error(`This is no answer: ${line.slice(0, 200)}`)
  const head = { status, fields }
  const bodyAt = headEnd + 4
  if (status < 200 || status === 204 || status === 304 || method === 'HEAD') {
    return { head, length: bodyAt }
  }
  if (fields.get('transfer-encoding') === 'chunked') {
    const end = bytes.indexOf('0\r\n\r\n', bodyAt)
    return end === -1 ? undefined : { head, length: end + 5 }
  }
  const length = bodyAt + Number(fields.get('content-length') ?? 0)
  return bytes.length < length ? undefined : { head, length }
}
