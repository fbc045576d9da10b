// deploy/prometheus and deploy/grafana: what they ask for is what a broker serves; every alert fires when it should, on an
// ordinary day none does; and every event that an alert is due for has one.

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { parse } from 'yaml'
import { ALERTING_EVENTS } from '../src/event-counts.ts'
import { renderOpenApi } from '../src/http/render-openapi.ts'
import { SETTINGS } from '../src/settings.ts'
import { ALERT_CASES, ORDINARY, REPLICAS, REST, type Values } from './support/alert-cases.ts'
import { ROOT } from './support/program.ts'
import {
  exposition,
  groupingLabelsIn,
  hasPromtool,
  type Labels,
  namesOf,
  parseSamples,
  promtool,
  selectorsIn,
} from './support/prometheus.ts'

const RULES = join(ROOT, 'deploy/prometheus/alerts.yml')
const CONFIGURATION = join(ROOT, 'deploy/prometheus/prometheus.yml')
const DASHBOARD = join(ROOT, 'deploy/grafana/pagero-broker.json')
const JOB = 'pagero-broker'
/** Labels that Prometheus adds to whatever it scrapes. */
const ADDED = ['instance', 'job']
/** Columns of a dashboard. */
const COLUMNS = 24

const skip = !hasPromtool && 'promtool is not installed (Debian: apt-get install prometheus)'

interface Alert {
  alert: string
  expr: string
  for?: string
  labels: Labels
  annotations: Record<string, string>
}
interface Recording {
  record: string
  expr: string
}

const { groups } = parse(readFileSync(RULES, 'utf8')) as {
  groups: Array<{ name: string; rules: Array<Alert | Recording> }>
}
const rules = groups.flatMap((group) => group.rules)
const alerts = rules.filter((rule): rule is Alert => 'alert' in rule)
const recordings = rules.filter((rule): rule is Recording => 'record' in rule)

interface Position {
  x: number
  y: number
  w: number
  h: number
}
interface Panel {
  id: number
  type: string
  title: string
  description?: string
  gridPos: Position
  datasource?: { uid: string }
  fieldConfig?: { defaults: { unit?: string } }
  targets?: Array<{
    refId: string
    expr: string
    legendFormat: string
    datasource: { uid: string }
  }>
}
interface Dashboard {
  uid: string
  refresh: string
  templating: { list: Array<{ name: string; type: string; definition?: string }> }
  panels: Panel[]
}

const dashboard = JSON.parse(readFileSync(DASHBOARD, 'utf8')) as Dashboard
const panels = dashboard.panels.filter(({ type }) => type !== 'row')
const targets = panels.flatMap((panel) =>
  (panel.targets ?? []).map((target) => ({ title: panel.title, ...target })),
)
/** As Grafana asks: its variables have become values. */
const asked = (expr: string) =>
  expr.replaceAll('$__rate_interval', '5m').replaceAll('$instance', REPLICAS.join('|'))

const text = await exposition()
const samples = parseSamples(text)
const names = namesOf(text)

// ── What a broker serves ─────────────────────────────────────────────────────────────────────────

/** The names that a rule records stand for what they are made of. */
const sourceOf = (name: string) => {
  const recorded = recordings.find(({ record }) => record === name)
  return recorded === undefined ? name : (selectorsIn(recorded.expr)[0]?.name ?? name)
}

/** Values that a label has, in some series of this name; undefined: there is no such label. */
function valuesOf(name: string, label: string): string[] | undefined {
  const values = samples.filter((one) => one.name === name).map(({ labels }) => labels[label])
  return values.every((value) => value === undefined)
    ? undefined
    : values.map((value) => value ?? '')
}

function checkExpression(t: Test, expr: string, about: string): void {
  const selectors = selectorsIn(expr)
  t.ok(selectors.length > 0, `${about}: something of a broker`)
  const labels = new Set([...ADDED, 'alertname'])
  for (const { name, matchers } of selectors) {
    const source = sourceOf(name)
    t.ok(source === 'up' || names.has(source), `${about}: ${source} is served`)
    for (const one of samples.filter((sample) => sample.name === source)) {
      for (const label of Object.keys(one.labels)) labels.add(label)
    }
    for (const { label, operator, value } of matchers) {
      if (ADDED.includes(label)) continue
      const values = valuesOf(source, label) ?? []
      const wanted = operator.includes('~') ? value.split('|') : [value]
      for (const one of wanted) {
        const pattern = operator.includes('~') ? new RegExp(`^(?:${one})$`) : undefined
        t.ok(
          values.some((found) => pattern?.test(found) ?? found === one),
          `${about}: ${source} has ${label}="${one}"`,
        )
      }
    }
  }
  for (const label of groupingLabelsIn(expr)) t.ok(labels.has(label), `${about}: by ${label}`)
}

t.test('alerts and recorded series ask for series, labels and values that are served', (t) => {
  for (const rule of rules)
    checkExpression(t, rule.expr, 'alert' in rule ? rule.alert : rule.record)
  t.end()
})

t.test('panels ask for series, labels and values that are served', (t) => {
  for (const { title, expr, legendFormat } of targets) {
    checkExpression(t, asked(expr), title)
    const grouped = groupingLabelsIn(expr)
    for (const [, label = ''] of legendFormat.matchAll(/\{\{(\w+)\}\}/g)) {
      t.ok(grouped.includes(label), `${title}: the legend has ${label}`)
    }
  }
  t.end()
})

t.test('routes that are told apart are routes of the broker', async (t) => {
  const { paths } = parse(await renderOpenApi()) as { paths: Record<string, unknown> }
  const routes = Object.keys(paths).map((path) =>
    path.replace(/\{path\}$/, '*').replaceAll(/\{(\w+)\}/g, ':$1'),
  )
  for (const route of valuesOf('pagero_broker_http_requests_total', 'route') ?? []) {
    t.ok(routes.includes(route), route)
  }
})

t.test('every event that an alert is due for has one, and no other is asked for', (t) => {
  const askedFor = alerts
    .flatMap(({ expr }) => selectorsIn(expr))
    .flatMap(({ matchers }) => matchers)
    .filter(({ label }) => label === 'event')
    .flatMap(({ value }) => value.split('|'))
  t.same([...new Set(askedFor)].toSorted(), Object.keys(ALERTING_EVENTS).toSorted())
  t.end()
})

t.test('what Prometheus scrapes follows its own rules for names', { skip }, async (t) => {
  // The three of prom-client are what others call them.
  const ours = text.split('\n').filter((line) => !/nodejs_active_\w+_total/.test(line))
  const { isContent, output } = await promtool(['check', 'metrics'], ours.join('\n'))
  t.ok(isContent, output)
})

// ── The alerts ───────────────────────────────────────────────────────────────────────────────────

t.test('each alert says how urgent it is, what it means and what to do first', (t) => {
  t.equal(new Set(alerts.map(({ alert }) => alert)).size, alerts.length)
  const settings = SETTINGS.map(({ name }) => name as string)
  for (const { alert, labels, annotations } of alerts) {
    t.match(alert, /^PageroBroker[A-Z]/)
    t.match(labels['severity'], /^(page|ticket)$/, alert)
    t.same(Object.keys(annotations), ['summary', 'description'], alert)
    const { summary = '', description = '' } = annotations
    t.ok(summary.length < 130 && !summary.includes('\n'), `${alert}: ${summary}`)
    t.match(description, /\bFirst, /, alert)
    for (const [name] of description.matchAll(/\b[A-Z]+(?:_[A-Z]+)+\b/g)) {
      t.ok(settings.includes(name), `${alert}: ${name} is a setting`)
    }
  }
  t.end()
})

t.test('commands, endpoints and chapters that are named exist', async (t) => {
  const all = alerts.map(({ annotations }) => annotations['description']).join('\n')
  const commands = [...all.matchAll(/`broker ([a-z -]+)`/g)].map(([, command = '']) => command)
  const main = readFileSync(join(ROOT, 'src/main.ts'), 'utf8')
  t.ok(commands.length > 5)
  for (const command of new Set(commands))
    t.match(main, new RegExp(`^ +${command}\\b`, 'm'), command)
  const { paths } = parse(await renderOpenApi()) as { paths: Record<string, object> }
  for (const [, method = '', path = ''] of all.matchAll(/\b(GET|POST) (\/[\w/{}-]+)/g)) {
    t.ok(Object.hasOwn(paths[path] ?? {}, method.toLowerCase()), `${method} ${path}`)
  }
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8')
  for (const [, chapter = ''] of all.matchAll(/read "([^"]+)" in README/g)) {
    t.ok(readme.includes(`**${chapter}.**`), chapter)
  }
})

t.test('rules and configuration are what Prometheus can read', { skip }, async (t) => {
  const checked = await promtool(['check', 'rules', '--lint-fatal', RULES])
  t.ok(checked.isContent, checked.output)
  const configuration = await promtool(['check', 'config', '--lint-fatal', CONFIGURATION])
  t.ok(configuration.isContent, configuration.output)
})

t.test(
  'every replica is scraped on its internal listener, under the name that alerts know',
  (t) => {
    interface Configuration {
      global: { scrape_interval: string }
      rule_files: string[]
      scrape_configs: Array<{
        job_name: string
        metrics_path?: string
        static_configs: Array<{ targets: string[] }>
      }>
    }
    const {
      global,
      rule_files: files,
      scrape_configs: jobs,
    } = parse(readFileSync(CONFIGURATION, 'utf8')) as Configuration
    t.equal(global.scrape_interval, '15s')
    t.same(files, ['alerts.yml'])
    t.equal(jobs.length, 1)
    const [job] = jobs
    t.equal(job?.job_name, JOB)
    t.equal(job?.metrics_path ?? '/metrics', '/metrics')
    const compose = parse(readFileSync(join(ROOT, 'deploy/compose/compose.yaml'), 'utf8'), {
      merge: true,
    }) as { services: Record<string, unknown> }
    const port = SETTINGS.find(({ name }) => name === 'INTERNAL_PORT')?.default
    t.same(
      job?.static_configs.flatMap((one) => one.targets),
      Object.keys(compose.services)
        .filter((name) => name.startsWith('broker-'))
        .map((name) => `${name}:${port}`),
    )
    for (const { expr } of alerts) {
      for (const { name, matchers } of selectorsIn(expr)) {
        // Others serve these too.
        if (!/^(up$|process_|nodejs_)/.test(name)) continue
        t.ok(
          matchers.some(({ label, value }) => label === 'job' && value === JOB),
          `${name} of the broker alone`,
        )
      }
    }
    t.end()
  },
)

const seriesName = (name: string, labels: Labels) => {
  const entries = Object.entries(labels).map(([label, value]) => `${label}="${value}"`)
  return entries.length === 0 ? name : `${name}{${entries.join(',')}}`
}
const known = new Set(['up', ...samples.map(({ name, labels }) => seriesName(name, labels))])
const used = new Set([
  'up',
  ...rules.flatMap(({ expr }) => selectorsIn(expr)).map(({ name }) => name),
])

/** All series of all replicas, as on an ordinary day but for what is said. */
function inputSeries(
  minutes: number,
  { series, everywhere }: { series: Readonly<Record<string, Values>>; everywhere?: true },
): Array<{ series: string; values: string }> {
  for (const name of [...Object.keys(series), ...Object.keys(ORDINARY)]) {
    if (!known.has(name)) throw new Error(`No broker serves ${name}`)
  }
  const all = [
    { name: 'up', labels: {}, value: 1 },
    ...samples.filter(({ name }) => used.has(name)),
  ]
  return REPLICAS.flatMap((instance, index) =>
    all.flatMap(({ name, labels, value }) => {
      const key = seriesName(name, labels)
      const isOther = Object.hasOwn(series, key) && (index === 0 || everywhere === true)
      const usual = Object.hasOwn(ORDINARY, key) ? ORDINARY[key] : `${value}+0${REST}`
      const values = isOther ? series[key] : usual
      if (values === undefined) return []
      const own = seriesName(name, { ...labels, instance, job: JOB })
      return [{ series: own, values: values.replace(REST, `x${minutes}`) }]
    }),
  )
}

const MINUTES = { m: 1, h: 60, d: 1_440 }

/** A duration of Prometheus, of one unit. */
function minutesOf(duration = '0m'): number {
  const [, count, unit = ''] = /^(\d+)([mhd])$/.exec(duration) ?? []
  if (count === undefined) throw new Error(`Not so many minutes, hours or days: ${duration}`)
  return Number(count) * MINUTES[unit as keyof typeof MINUTES]
}

/** What an annotation says, of those labels and that value. */
const rendered = (template: string, labels: Labels, value: string) =>
  template
    .replaceAll(/\{\{ \$labels\.(\w+) \}\}/g, (_all, label: string) => labels[label] ?? '')
    .replaceAll(/\{\{ \$value\b[^}]*\}\}/g, value)

interface Case {
  name: string
  interval: string
  input_series: Array<{ series: string; values: string }>
  alert_rule_test: Array<{ eval_time: string; alertname: string; exp_alerts: object[] }>
}

/** Has promtool run tests of these rules; resolves with what it has to say. */
function runTests(
  directory: string,
  ruleFile: string,
  tests: object[],
): Promise<{ isContent: boolean; output: string }> {
  const file = join(directory, 'tests.yml')
  const document = { rule_files: [ruleFile], evaluation_interval: '1m', tests }
  writeFileSync(file, JSON.stringify(document))
  return promtool(['test', 'rules', file])
}

/** Has promtool run the cases of each group by themselves: with all rules at each minute it would take ten times as long. */
async function runCases(t: Test, cases: Case[]): Promise<void> {
  const directory = t.testdir()
  const ruleFile = join(directory, 'rules.yml')
  const recorded = groups.filter((group) => group.rules.some((rule) => 'record' in rule))
  for (const group of groups) {
    const own = cases.filter(({ name }) =>
      group.rules.some((rule) => 'alert' in rule && rule.alert === name),
    )
    if (own.length === 0) continue
    writeFileSync(ruleFile, JSON.stringify({ groups: [...recorded, group] }))
    const { isContent, output } = await runTests(directory, ruleFile, own)
    t.ok(isContent, `${group.name}: ${own.length} cases\n${output}`)
  }
}

t.test('every alert fires when it should', { skip }, async (t) => {
  t.same(
    [...new Set(ALERT_CASES.map(({ alert }) => alert))].toSorted(),
    alerts.map(({ alert }) => alert).toSorted(),
    'each has a case',
  )
  const tests = ALERT_CASES.map((one) => {
    const rule = alerts.find(({ alert }) => alert === one.alert)
    if (rule === undefined) throw new Error(`There is no ${one.alert}`)
    const { labels = {}, value = '' } = one
    const annotations = Object.entries(rule.annotations).map(([name, template]) => [
      name,
      rendered(template, labels, value),
    ])
    return {
      name: one.alert,
      interval: '1m',
      input_series: inputSeries(one.atMinutes, one),
      alert_rule_test: [
        {
          eval_time: `${one.atMinutes}m`,
          alertname: one.alert,
          exp_alerts: [
            {
              exp_labels: { ...labels, ...rule.labels },
              exp_annotations: Object.fromEntries(annotations),
            },
          ],
        },
      ],
    }
  })
  await runCases(t, tests)
})

t.test('and not when it is nearly so', { skip }, async (t) => {
  const tests = ALERT_CASES.flatMap(({ almost = [], ...one }) => {
    const { alert } = one
    // Whatever lasts too short a time is nearly so as well.
    const lastsMinutes = minutesOf(alerts.find((rule) => rule.alert === alert)?.for)
    const tooShort = lastsMinutes === 0 ? [] : [{ ...one, atMinutes: lastsMinutes - 1 }]
    return [...tooShort, almost].flat().map((situation) => ({
      name: alert,
      interval: '1m',
      input_series: inputSeries(situation.atMinutes, situation),
      alert_rule_test: [{ eval_time: `${situation.atMinutes}m`, alertname: alert, exp_alerts: [] }],
    }))
  })
  t.ok(tests.length > 20)
  await runCases(t, tests)
})

t.test('on an ordinary day and a half none fires', { skip }, async (t) => {
  const minutes = 36 * 60
  const instants = Array.from({ length: minutes / 15 }, (_, index) => `${(index + 1) * 15}m`)
  const { isContent, output } = await runTests(t.testdir(), RULES, [
    {
      interval: '1m',
      input_series: inputSeries(minutes, { series: {} }),
      promql_expr_test: instants.map((instant) => ({
        expr: 'ALERTS{alertstate="firing"}',
        eval_time: instant,
        exp_samples: [],
      })),
    },
  ])
  t.ok(isContent, output)
})

// ── The dashboard ────────────────────────────────────────────────────────────────────────────────

t.test('no panel lies on another, and each says what it shows, in which unit', (t) => {
  t.equal(dashboard.uid, 'pagero-broker')
  t.equal(dashboard.refresh, '30s')
  t.match(dashboard.templating.list[0], { name: 'datasource', type: 'datasource' })
  const ids = dashboard.panels.map(({ id }) => id)
  t.equal(new Set(ids).size, ids.length)
  t.equal(new Set(panels.map(({ title }) => title)).size, panels.length)
  for (const { title, description = '', datasource, fieldConfig, targets: own = [] } of panels) {
    t.match(description, /^[^a-z].{20,}\.$/, title)
    t.ok(fieldConfig?.defaults.unit, `${title}: a unit`)
    t.ok(own.length > 0, `${title}: something to show`)
    for (const uid of [datasource?.uid, ...own.map((target) => target.datasource.uid)]) {
      t.equal(uid, '${datasource}', title)
    }
    t.equal(new Set(own.map(({ refId }) => refId)).size, own.length, title)
  }
  const overlap = (a: Position, b: Position) =>
    a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h
  for (const [index, { title, gridPos }] of dashboard.panels.entries()) {
    t.ok(gridPos.x >= 0 && gridPos.x + gridPos.w <= COLUMNS, title)
    for (const other of dashboard.panels.slice(index + 1)) {
      t.notOk(overlap(gridPos, other.gridPos), `${title} and ${other.title}`)
    }
  }
  t.end()
})

t.test('what the panels ask is PromQL', { skip }, async (t) => {
  const file = join(t.testdir(), 'panels.yml')
  const asRules = targets.map(({ expr }, index) => ({
    record: `panel:${index}`,
    expr: asked(expr),
  }))
  writeFileSync(file, JSON.stringify({ groups: [{ name: 'panels', rules: asRules }] }))
  const { isContent, output } = await promtool(['check', 'rules', file])
  t.ok(isContent, output)
  t.ok(targets.length >= panels.length)
})
