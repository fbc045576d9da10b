// What Prometheus reads: the metrics that a broker serves, by name and labels, the parts of an expression that must be
// among them, and Debian's promtool, where it is installed, for the rest.

import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createMetrics } from '../../src/metrics.ts'
import { silentLog } from './silent-log.ts'
import { standingClock } from './stored-grants.ts'

const PROMTOOL = '/usr/bin/promtool'

export const hasPromtool = existsSync(PROMTOOL)

/** Runs promtool and resolves with whether it was content, and all that it said. */
export function promtool(
  parameters: readonly string[],
  input = '',
): Promise<{ isContent: boolean; output: string }> {
  return new Promise((resolve) => {
    const child = execFile(PROMTOOL, parameters, (error, stdout, stderr) =>
      resolve({ isContent: error === null, output: stdout + stderr }),
    )
    child.stdin?.end(input)
  })
}

export type Labels = Readonly<Record<string, string>>

export interface Sample {
  name: string
  labels: Labels
  value: number
}

/** What a broker serves that has answered a request of each route and status that is asked of here. */
export async function exposition(): Promise<string> {
  const metrics = createMetrics({ clock: standingClock(), log: silentLog })
  metrics.read({
    rotationsInFlight: () => 1,
    grantsCached: () => 500,
    spoolEntries: () => 300,
    auditEventsWaiting: () => 20,
    auditEventsDropped: () => 0,
    secondsSinceHeartbeat: () => 1,
    checks: async () => ({
      database: 'ok',
      spool: 'ok',
      draining: 'ok',
    }),
    warnings: () => ({ callers_file: 'is not valid', caller_keys: 'cannot be read' }),
    databaseConnections: () => ({ total: 10, idle: 8, waiting: 0 }),
    requestsShed: () => 0,
    logLinesDropped: () => 0,
    census: async () => ({
      grants: { active: 500, suspect: 0, reauthentication_required: 4, revoked: 2 },
      expiringWithinDays: new Map([
        [7, 0],
        [30, 0],
        [90, 1],
      ]),
      webhooksPending: 3,
      webhooksDead: 1,
      revocationsPending: 0,
    }),
  })
  const internal = metrics.requestsOf('internal')
  const probes = ['/livez', '/readyz', '/metrics']
  const routes = ['/v1/users/:user/access-token', '/v1/users/:user/pagero/*', '/v1/forward-auth']
  for (const route of [...probes, ...routes]) {
    internal.note({ method: 'GET', route, status: 200, durationMs: 1 })
    internal.note({ method: 'GET', route, status: 503, durationMs: 1 })
  }
  const publicOnes = metrics.requestsOf('public')
  publicOnes.note({ method: 'GET', route: '/api/*', status: 200, durationMs: 1 })
  publicOnes.note({ method: 'GET', route: '/api/*', status: 502, durationMs: 1 })
  metrics
    .counted({ record: () => undefined })
    .record({ action: 'token_handed_out', actor: 'caller', name: 'erp' })
  metrics
    .counted({ record: () => undefined })
    .record({ action: 'call_proxied', actor: 'caller', name: 'erp' })
  return metrics.exposition()
}

/** The samples of a text of Prometheus. */
export function parseSamples(text: string): Sample[] {
  return text
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('#'))
    .map((line) => {
      const [, name = '', labels = '', value] =
        /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line) ?? []
      if (value === undefined) throw new Error(`Not a sample: ${line}`)
      return { name, labels: labelsIn(labels), value: Number(value) }
    })
}

function labelsIn(text: string): Labels {
  return Object.fromEntries([...text.matchAll(/(\w+)="([^"]*)"/g)].map(([, k, v]) => [k, v]))
}

/** The names in a text of Prometheus, also of what has no samples yet. */
export function namesOf(text: string): Set<string> {
  const names = parseSamples(text).map(({ name }) => name)
  for (const [, name = '', type] of text.matchAll(/^# TYPE (\S+) (\S+)$/gm)) {
    if (type !== 'histogram') names.push(name)
    else names.push(...['_bucket', '_sum', '_count'].map((part) => name + part))
  }
  return new Set(names)
}

export interface Matcher {
  label: string
  operator: string
  value: string
}

export interface Selector {
  name: string
  matchers: Matcher[]
}

const OURS = /^(up|(pagero_broker|process|nodejs)[\w:]*)$/

/** The selectors of series in an expression, by the names that series of a broker have. */
export function selectorsIn(expression: string): Selector[] {
  const found = expression.matchAll(/("[^"]*")|([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?/g)
  return [...found]
    .filter(([, , name = '']) => OURS.test(name))
    .map(([, , name = '', text = '']) => ({
      name,
      matchers: [...text.matchAll(/(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"/g)].map(
        ([, label = '', operator = '', value = '']) => ({ label, operator, value }),
      ),
    }))
}

/** The labels that an expression groups and joins by. */
export function groupingLabelsIn(expression: string): string[] {
  return [...expression.matchAll(/\b(?:by|on)\s*\(([^)]*)\)/g)].flatMap(([, text = '']) =>
    text.split(',').flatMap((label) => label.trim() || []),
  )
}
