// Probes. Live: the process answers. Ready: everything of ours that a request needs is there.
// Pagero is not asked: its outage must not take every replica out of the balancer.

import Type from 'typebox'
import { inTime } from '../in-time.ts'
import type { Clock } from '../ports.ts'
import type { App } from './app.ts'
import { jsonAnswer } from './openapi.ts'

/** Under the 5 s within which a lost database must show, and over any healthy answer. */
const CHECK_TIMEOUT_MS = 2_000

/** Resolves to what is wrong, in a few words without names of hosts or paths; undefined when all is well. */
export type Check = () => Promise<string | undefined>

/** What leaves the process ready and should be mended all the same, by name, in words like those of a check. */
export type Warnings = () => Readonly<Record<string, string>>

const Liveness = Type.Object({ status: Type.Enum(['ok'], { type: 'string' }) }, { $id: 'Liveness' })

const Readiness = Type.Object(
  {
    status: Type.Enum(['ok', 'unready'], { type: 'string' }),
    checks: Type.Record(Type.String(), Type.String(), {
      description: 'Each check by name: `ok`, or what is wrong.',
    }),
    warnings: Type.Optional(
      Type.Record(Type.String(), Type.String(), {
        description: 'What an operator should mend, although requests may be sent here.',
      }),
    ),
  },
  { $id: 'Readiness' },
)

const HEALTHY = { database: 'ok', migrations: 'ok', keys: 'ok', spool: 'ok', draining: 'ok' }

/** `GET /livez`, on either listener. */
export function registerLivenessRoute(app: App): void {
  app.addSchema(Liveness)
  app.get(
    '/livez',
    {
      schema: {
        operationId: 'getLiveness',
        summary: 'Is the process alive?',
        description: 'Answers 200 while the process can answer at all. On both listeners.',
        tags: ['operations'],
        security: [],
        response: {
          200: jsonAnswer({
            description: 'Alive.',
            schema: 'Liveness',
            example: { status: 'ok' },
          }),
        },
      },
    },
    (_request, reply) => reply.header('cache-control', 'no-store').send({ status: 'ok' as const }),
  )
}

/** `GET /livez` and `GET /readyz`. The checks run at the same time, two seconds each at most. */
export function registerHealthRoutes(
  app: App,
  parts: {
    clock: Pick<Clock, 'sleep'>
    checks: Readonly<Record<string, Check>>
    warnings: Warnings
  },
): void {
  const { clock, checks } = parts
  registerLivenessRoute(app)
  app.addSchema(Readiness)
  app.get(
    '/readyz',
    {
      schema: {
        operationId: 'getReadiness',
        summary: 'May requests be sent here?',
        description:
          'Ready means: the database is writable and its schema current, the keys are loaded, the spool is drained and writable, and the process is not shutting down. Pagero being down does not make it unready.',
        tags: ['operations'],
        security: [],
        response: {
          200: jsonAnswer({
            description: 'Ready. With `warnings`, the broker goes on with what it knew before.',
            schema: 'Readiness',
            example: {
              status: 'ok',
              checks: HEALTHY,
              warnings: {
                callers_file: 'the last good one is in force: The file is not valid JSON.',
              },
            },
          }),
          503: jsonAnswer({
            description: 'Not ready; `checks` says why.',
            schema: 'Readiness',
            example: { status: 'unready', checks: { ...HEALTHY, database: 'not writable' } },
          }),
        },
      },
    },
    async (_request, reply) => {
      const results = await runChecks(clock, checks)
      const warnings = parts.warnings()
      const ready = Object.values(results).every((result) => result === 'ok')
      return reply
        .code(ready ? 200 : 503)
        .header('cache-control', 'no-store')
        .send({
          status: ready ? 'ok' : 'unready',
          checks: results,
          ...(Object.keys(warnings).length === 0 ? {} : { warnings }),
        })
    },
  )
}

/**
 * Makes a check that whoever asks while it runs has the result of: but not of one that hangs, which says nothing of how
 * things are by now.
 */
export function sharedCheck(clock: Pick<Clock, 'monotonicMs'>, check: Check): Check {
  let running: { result: ReturnType<Check>; begunAtMs: number } | undefined
  return () => {
    const nowMs = clock.monotonicMs()
    if (running !== undefined && nowMs - running.begunAtMs < CHECK_TIMEOUT_MS) return running.result
    const begun = { result: check(), begunAtMs: nowMs }
    running = begun
    return begun.result.finally(() => {
      if (running === begun) running = undefined
    })
  }
}

/** Runs the checks at the same time, two seconds each at most; returns `ok` of each, or what is wrong. Never throws. */
export async function runChecks(
  clock: Pick<Clock, 'sleep'>,
  checks: Readonly<Record<string, Check>>,
): Promise<Record<string, string>> {
  const results = Object.entries(checks).map(
    async ([name, check]) => [name, await runCheck(clock, check)] as const,
  )
  return Object.fromEntries(await Promise.all(results))
}

async function runCheck(clock: Pick<Clock, 'sleep'>, check: Check): Promise<string> {
  try {
    const result = check().then((problem) => problem ?? 'ok')
    return (
      (await inTime(clock, result, CHECK_TIMEOUT_MS)) ?? `no result within ${CHECK_TIMEOUT_MS} ms`
    )
  } catch {
    // The error may name hosts or paths; the check's own code logs what it must.
    return 'failed'
  }
}
