// What small calls are measured against: Fastify's own proxy plugin as it comes, with nothing but an upstream.
// Environment: PORT, UPSTREAM.

import httpProxy from '@fastify/http-proxy'
import fastify from 'fastify'

const app = fastify()
await app.register(httpProxy, { upstream: process.env['UPSTREAM'] ?? '', prefix: '/api' })
await app.listen({ host: '127.0.0.1', port: Number(process.env['PORT']) })
