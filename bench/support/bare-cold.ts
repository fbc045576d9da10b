// The least that reads cold tokens over HTTP in Node: its own HTTP server, one named select for all requests that have come
// meanwhile, the unsealing, the answer. No credential, no right, no limit, no router; nothing is checked, recorded or kept.
// What the broker does besides comes on top of this. Environment: PORT, DATABASE_URL, KEY.

import { createServer, type ServerResponse } from 'node:http'
import { Pool } from 'pg'
import { createEnding } from '../../src/answer-together.ts'
import { grantSealContext, type UserKey } from '../../src/grant.ts'
import { createSealer } from '../../src/seal.ts'

interface Row {
  user_id: UserKey
  login_id: string
  generation: string
  access_token_sealed: Buffer
}

/** As many as the broker has in flight. */
const STATEMENTS_MAX = 2
const PREFIX = '/v1/users/'
const SUFFIX = '/access-token'
const STATEMENT = {
  name: 'bare_cold',
  text: `select user_id, login_id, generation, access_token_sealed
    from grants where user_id = any($1)`,
}

const pool = new Pool({ connectionString: process.env['DATABASE_URL'], max: STATEMENTS_MAX })
const { rows: deployments } = await pool.query<{ id: string }>(
  'select deployment_id as id from deployment',
)
const [keyId = '', key = ''] = (process.env['KEY'] ?? '').split(':')
const sealer = createSealer([{ keyId, key: Buffer.from(key, 'base64') }], deployments[0]?.id ?? '')
const end = createEnding()
let waiting = new Map<string, ServerResponse>()
let running = 0
let scheduled = false

function schedule(): void {
  if (scheduled || running >= STATEMENTS_MAX || waiting.size === 0) return
  scheduled = true
  setImmediate(() => {
    scheduled = false
    void readAll()
  })
}

async function readAll(): Promise<void> {
  const batch = waiting
  waiting = new Map()
  running += 1
  const { rows } = await pool.query<Row>({ ...STATEMENT, values: [[...batch.keys()]] })
  for (const row of rows) {
    const response = batch.get(row.user_id)
    if (response !== undefined) answer(response, row)
  }
  running -= 1
  schedule()
}

function answer(response: ServerResponse, row: Row): void {
  const { user_id: user, login_id: loginId } = row
  const place = { user, loginId, generation: Number(row.generation) }
  const token = sealer.open(grantSealContext('access_token_sealed', place), row.access_token_sealed)
  const text = `{"access_token":"${token}","token_type":"Bearer"}`
  response.writeHead(200, [
    ...['content-type', 'application/json; charset=utf-8', 'cache-control', 'no-store'],
    ...['content-length', String(text.length)],
  ])
  end(response, text)
}

createServer((request, response) => {
  const { url = '' } = request
  if (!url.startsWith(PREFIX)) {
    response.end()
    return
  }
  waiting.set(url.slice(PREFIX.length, -SUFFIX.length), response)
  schedule()
}).listen(Number(process.env['PORT']), '127.0.0.1')
