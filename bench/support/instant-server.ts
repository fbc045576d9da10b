// An authorization server that answers a refresh at once, with tokens as long as Pagero's. It remembers nothing, and so
// costs as little as it can. Environment: PORT, TOKEN_CHARACTERS.

import { createServer } from 'node:http'

const filler = 'A'.repeat(Number(process.env['TOKEN_CHARACTERS']) - 16)
let issued = 0

createServer((request, response) => {
  request.resume().on('end', () => {
    const number = String((issued += 1)).padStart(16, '0')
    response.setHeader('content-type', 'application/json').end(
      JSON.stringify({
        token_type: 'bearer',
        access_token: `${filler}${number}`,
        refresh_token: `refresh-${number}`,
        scope: '',
        expires_in: 600,
      }),
    )
  })
}).listen(Number(process.env['PORT']), '127.0.0.1')
