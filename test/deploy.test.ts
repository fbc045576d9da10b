// deploy/ without an engine: what is written there of settings, ports, probes and time is what the broker has and needs.

import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import t from 'tap'
import { parse, parseAllDocuments } from 'yaml'
import { SETTINGS } from '../src/settings.ts'
import { renderOpenApi } from '../src/http/render-openapi.ts'
import { ROOT } from './support/program.ts'

const read = (name: string) => readFileSync(join(ROOT, 'deploy', name), 'utf8')
const settingOf = (name: string) => SETTINGS.find((setting) => setting.name === name)
const defaultOf = (name: string) => Number(settingOf(name)?.default)
const isSetting = (name: string) =>
  settingOf(name) !== undefined || settingOf(name.replace(/_FILE$/, '')) !== undefined
const port = (name: 'PUBLIC_PORT' | 'INTERNAL_PORT') => defaultOf(name)
const SECRETS = ['DATABASE_URL', 'ENCRYPTION_KEYS', 'PAGERO_CLIENT_SECRET']

/** What a stop may take: the pause for the balancer, and one refresh begun at its end. */
const graceSeconds = (listenSeconds: number) =>
  listenSeconds + defaultOf('REFRESH_DEADLINE_SECONDS') + 10

interface Service {
  environment?: Record<string, string>
  stop_grace_period?: string
  volumes?: string[]
  ports?: string[]
  secrets?: string[]
  configs?: string[]
  networks?: string[]
  read_only?: boolean
}
interface Compose {
  services: Record<string, Service>
  volumes: Record<string, unknown>
  secrets: Record<string, unknown>
  networks: Record<string, { internal?: boolean; ipam?: { config: Array<{ subnet: string }> } }>
}

const compose = parse(read('compose/compose.yaml'), { merge: true }) as Compose
const brokers = Object.entries(compose.services).filter(([name]) => name.startsWith('broker-'))

t.test('compose: settings exist, and secrets are files that are there', (t) => {
  t.equal(brokers.length, 2)
  for (const [name, { environment = {}, secrets = [] }] of brokers) {
    for (const [setting, value] of Object.entries(environment)) {
      t.ok(isSetting(setting), `${name}: ${setting}`)
      const file = /^\/run\/secrets\/(.+)$/.exec(value)?.[1]
      if (file !== undefined) t.ok(secrets.includes(file), `${name}: ${file}`)
    }
    for (const secret of SECRETS) t.ok(environment[`${secret}_FILE`], secret)
    t.equal(environment['REPLICA_NAME'], name)
  }
  const { outside } = compose.networks
  t.equal(brokers[0]?.[1].environment?.['TRUSTED_PROXIES'], outside?.ipam?.config[0]?.subnet)
  t.ok(compose.networks['inside']?.internal)
  for (const service of Object.values(compose.services)) {
    for (const secret of service.secrets ?? []) t.ok(Object.hasOwn(compose.secrets, secret), secret)
  }
  t.end()
})

t.test('compose: each replica has a spool of its own and time to store what is in flight', (t) => {
  const spools = brokers.map(([, { volumes = [] }]) => volumes[0] ?? '')
  t.equal(new Set(spools).size, brokers.length)
  const [, spoolDir] =
    /^ENV SPOOL_DIR=(\S+)$/m.exec(readFileSync(join(ROOT, 'Dockerfile'), 'utf8')) ?? []
  for (const [index, [name, service]] of brokers.entries()) {
    const [volume = '', path] = spools[index]?.split(':') ?? []
    t.ok(Object.hasOwn(compose.volumes, volume), volume)
    t.equal(path, spoolDir, name)
    const seconds = Number(/^(\d+)s$/.exec(service.stop_grace_period ?? '')?.[1])
    t.ok(seconds >= graceSeconds(defaultOf('SHUTDOWN_LISTEN_SECONDS')), `${name}: ${seconds} s`)
    t.ok(service.read_only)
    for (const published of service.ports ?? []) {
      t.match(published, new RegExp(`^127\\.0\\.0\\.1:\\d+:${port('INTERNAL_PORT')}$`))
    }
  }
  t.end()
})

t.test('compose: the callers file is mounted with its folder, so that another one is seen', (t) => {
  for (const [name, { environment = {}, volumes = [] }] of brokers) {
    const folder = dirname(environment['CALLERS_FILE'] ?? '')
    t.ok(
      volumes.some((volume) => volume.split(':')[1] === folder),
      `${name}: ${folder}`,
    )
  }
  for (const { volumes = [], secrets = [], configs = [] } of Object.values(compose.services)) {
    const files = [...volumes, ...secrets, ...configs].map((one) => JSON.stringify(one))
    t.same(
      files.filter((one) => one.includes('callers.json')),
      [],
    )
  }
  t.notMatch(JSON.stringify(compose.secrets), /callers\.json/)
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8')
  t.match(
    readme,
    /-v "\$PWD\/callers:\/etc\/broker:ro" -e CALLERS_FILE=\/etc\/broker\/callers\.json/,
  )
  t.notMatch(readme, /callers\.json:\//)
  t.end()
})

t.test('compose: TLS ends before the public listener, and no query is logged', (t) => {
  const proxy = read('compose/public-proxy.conf')
  const upstreams = [...proxy.matchAll(/^ {2}server (\S+):(\d+) /gm)].map((match) => match.slice(1))
  t.same(
    upstreams,
    brokers.map(([name]) => [name, String(port('PUBLIC_PORT'))]),
  )
  const [, format = ''] = /log_format \w+ '([^']+)'/.exec(proxy) ?? []
  t.match(format, /\$uri/)
  t.notMatch(format, /request_uri|\$request |\$args|referer/)
  t.end()
})

interface Kubernetes {
  kind: string
  metadata: { name: string }
  data?: Record<string, string>
  spec?: Record<string, unknown>
}

const documents = parseAllDocuments(read('kubernetes/broker.yaml')).map((document) => {
  if (document.errors.length > 0) throw document.errors[0]
  return document.toJS() as Kubernetes
})
/** The only document of a kind; the test knows its shape. */
const one = (kind: string): unknown => {
  const found = documents.filter((document) => document.kind === kind)
  if (found.length !== 1) throw new Error(`${found.length} of ${kind}`)
  return found[0]
}

interface Probe {
  httpGet: { path: string; port: string }
}
interface StatefulSet {
  spec: {
    replicas: number
    serviceName: string
    template: {
      spec: {
        terminationGracePeriodSeconds: number
        containers: Array<{
          env: Array<{ name: string }>
          ports: Array<{ name: string; containerPort: number }>
          startupProbe: Probe
          livenessProbe: Probe
          readinessProbe: Probe
          resources: { requests: { memory: string }; limits: { memory: string } }
          volumeMounts: Array<{ name: string; mountPath: string }>
        }>
        volumes: Array<{ name: string; secret: { defaultMode: number } }>
      }
    }
    volumeClaimTemplates: Array<{ metadata: { name: string } }>
  }
}

const config = (one('ConfigMap') as { data: Record<string, string> }).data
const { spec } = one('StatefulSet') as StatefulSet
const pod = spec.template.spec
const [container] = pod.containers
if (container === undefined) throw new Error('no container')
const mountOf = (volume: string) =>
  container.volumeMounts.find(({ name }) => name === volume)?.mountPath

t.test('Kubernetes: settings exist, and no secret is a setting', (t) => {
  for (const name of [...Object.keys(config), ...container.env.map((entry) => entry.name)]) {
    t.ok(isSetting(name), name)
    t.notOk(SECRETS.includes(name), name)
  }
  const secrets = pod.volumes.find(({ name }) => name === 'secrets')
  t.equal(secrets?.secret.defaultMode, 0o440)
  const mounted = mountOf('secrets')
  for (const [name, value] of Object.entries(config)) {
    if (name.endsWith('_FILE')) t.ok(value.startsWith(`${mounted}/`), name)
  }
  t.end()
})

t.test('Kubernetes: nothing is mounted as a single file, which would stay as it is', (t) => {
  t.equal(dirname(config['CALLERS_FILE'] ?? ''), mountOf('secrets'))
  for (const mount of container.volumeMounts) {
    t.notOk('subPath' in mount || 'subPathExpr' in mount, mount.name)
  }
  t.end()
})

t.test(
  'Kubernetes: browsers have addresses of their own, and there is room for their tokens',
  (t) => {
    t.ok(config['TRUSTED_PROXIES'])
    const { requests, limits } = container.resources
    const mebibytes = (text: string) => {
      const [, number, unit] = /^(\d+)([MG])i$/.exec(text) ?? []
      return Number(number) * (unit === 'G' ? 1024 : 1)
    }
    const [, measured] =
      /^\| memory with 100,000 tokens [^|]*\|[^|]*\| (\d+) MiB/m.exec(
        readFileSync(join(ROOT, 'README.md'), 'utf8'),
      ) ?? []
    t.ok(mebibytes(requests.memory) > Number(measured), requests.memory)
    t.ok(mebibytes(limits.memory) >= 2 * Number(measured), limits.memory)
    t.end()
  },
)

t.test('Kubernetes: the spool outlives the pod, and the pod may finish what is in flight', (t) => {
  t.ok(config['SPOOL_DIR']?.startsWith(`${mountOf('state')}/`))
  t.same(
    spec.volumeClaimTemplates.map(({ metadata }) => metadata.name),
    ['state'],
  )
  const listenSeconds = Number(config['SHUTDOWN_LISTEN_SECONDS'])
  t.ok(pod.terminationGracePeriodSeconds >= graceSeconds(listenSeconds))
  t.ok(spec.replicas > 1)
  t.end()
})

t.test(
  'Kubernetes: ports and probes are those of the broker, and services lead to them',
  async (t) => {
    t.same(container.ports, [
      { name: 'public', containerPort: port('PUBLIC_PORT') },
      { name: 'internal', containerPort: port('INTERNAL_PORT') },
    ])
    const { paths } = parse(await renderOpenApi()) as { paths: Record<string, unknown> }
    const { startupProbe, livenessProbe, readinessProbe } = container
    for (const { httpGet } of [startupProbe, livenessProbe, readinessProbe]) {
      t.ok(Object.hasOwn(paths, httpGet.path), httpGet.path)
      t.equal(httpGet.port, 'internal')
    }
    t.equal(readinessProbe.httpGet.path, '/readyz')
    const services = documents.filter(({ kind }) => kind === 'Service')
    t.ok(services.some(({ metadata }) => metadata.name === spec.serviceName))
    for (const service of services) {
      const ports = service.spec?.['ports'] as Array<{ port: number; targetPort: string }>
      for (const entry of ports) {
        const target = container.ports.find(({ name }) => name === entry.targetPort)
        t.equal(entry.port, target?.containerPort, service.metadata.name)
      }
    }
  },
)

t.test('Kubernetes: nothing reaches a listener but who is named for it', (t) => {
  interface Policy {
    spec: { ingress: Array<{ ports: Array<{ port: string }>; from: object[] }> }
  }
  const { ingress } = (one('NetworkPolicy') as Policy).spec
  t.same(
    ingress.flatMap(({ ports }) => ports.map((entry) => entry.port)),
    ['public', 'internal'],
  )
  for (const rule of ingress) t.ok(rule.from.length > 0)
  const budget = one('PodDisruptionBudget') as { spec: { maxUnavailable: number } }
  t.equal(budget.spec.maxUnavailable, 1)
  t.end()
})
