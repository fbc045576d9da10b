// What large transfers are measured against: the least in Node that passes a request and its answer on faithfully, over
// undici, with nothing looked at. Its `/api` stays in the path. Environment: PORT, UPSTREAM, CONNECTIONS.

import { createServer } from 'node:http'
import { Pool } from 'undici'

const pool = new Pool(process.env['UPSTREAM'] ?? '', {
  connections: Number(process.env['CONNECTIONS']),
})

createServer((request, response) => {
  const { method = '', url = '', headers } = request
  const { connection: _, ...passed } = headers
  const body = headers['content-length'] === undefined ? null : request
  pool
    .stream({ method, path: url, headers: passed, body }, (answer) =>
      response.writeHead(answer.statusCode, answer.headers),
    )
    .catch(() => response.destroy())
}).listen(Number(process.env['PORT']), '127.0.0.1')
