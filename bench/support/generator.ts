// The load generator where wrk is missing: as many loops as connections, each sending its next request when the last
// one is answered. Parameters: connections, seconds, origin, then as in load.lua.

import { Pool } from 'undici'

const [connections, seconds, origin = '', path = '', first, count, method, body = '', ...fields] =
  process.argv.slice(2)
const pool = new Pool(origin, { connections: Number(connections), pipelining: 1 })
const latenciesUs: number[] = []
let made = Number(first)
let failed = 0

async function sendUntil(endMs: number): Promise<void> {
  while (performance.now() < endMs) {
    const number = String(made++ % Number(count)).padStart(7, '0')
    const sentMs = performance.now()
    try {
      const answer = await pool.request({
        method: method === 'POST' ? 'POST' : 'GET',
        path: path.replaceAll('{number}', number),
        headers: fields.map((text) => text.replaceAll('{number}', number)),
        body: body === '' ? null : body,
      })
      await answer.body.dump()
      if (answer.statusCode >= 300) failed += 1
    } catch {
      failed += 1
    }
    latenciesUs.push((performance.now() - sentMs) * 1000)
  }
}

const startedMs = performance.now()
const endMs = startedMs + Number(seconds) * 1000
await Promise.all(Array.from({ length: Number(connections) }, () => sendUntil(endMs)))
const tookSeconds = (performance.now() - startedMs) / 1000
await pool.close()
latenciesUs.sort((a, b) => a - b)
const percentile = (share: number) => latenciesUs[Math.floor(latenciesUs.length * share)]
process.stdout.write(
  `RESULT ${JSON.stringify({
    answered: latenciesUs.length,
    seconds: tookSeconds,
    p50Us: percentile(0.5),
    p99Us: percentile(0.99),
    failed,
  })}\n`,
)
