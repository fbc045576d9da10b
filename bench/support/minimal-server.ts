// What the token endpoint is measured against: Fastify with one route that answers a constant string of the same size.
// Environment: PORT, BYTES.

import fastify from 'fastify'

const body = 'x'.repeat(Number(process.env['BYTES']))
const app = fastify()
app.get('/constant/:number', (_request, reply) => {
  void reply.type('application/json; charset=utf-8').send(body)
})
await app.listen({ host: '127.0.0.1', port: Number(process.env['PORT']) })
