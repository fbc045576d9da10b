// What cold reads are measured against: the one row's token columns by a named statement over a pool as large as the
// broker's, with nothing around it: no HTTP, no decryption, no checks. Asked over HTTP for `?seconds=&first=&count=`.
// Environment: PORT, DATABASE_URL, POOL_MAX, CONNECTIONS.

import { createServer } from 'node:http'
import { Pool } from 'pg'

const pool = new Pool({
  connectionString: process.env['DATABASE_URL'],
  max: Number(process.env['POOL_MAX']),
})
const STATEMENT = {
  name: 'bare_select',
  text: `select generation, state, access_token_sealed, access_token_expires_at
    from grants where user_id = $1`,
}

async function readFor(seconds: number, first: number, count: number): Promise<number> {
  const endMs = performance.now() + seconds * 1000
  let answered = 0
  let asked = first
  const loop = async () => {
    while (performance.now() < endMs) {
      const user = `user-${String(asked++ % count).padStart(7, '0')}`
      const { rows } = await pool.query({ ...STATEMENT, values: [user] })
      if (rows.length !== 1) throw new Error(`no row of ${user}`)
      answered += 1
    }
  }
  await Promise.all(Array.from({ length: Number(process.env['CONNECTIONS']) }, loop))
  return answered
}

createServer((request, response) => {
  const query = new URL(request.url ?? '/', 'http://localhost').searchParams
  const number = (name: string) => Number(query.get(name) ?? 0)
  const startedMs = performance.now()
  readFor(number('seconds'), number('first'), number('count') || 1).then(
    (answered) => {
      const seconds = (performance.now() - startedMs) / 1000
      response.end(JSON.stringify({ answered, seconds }))
    },
    (error: unknown) => response.writeHead(500).end(String(error)),
  )
}).listen(Number(process.env['PORT']), '127.0.0.1')
