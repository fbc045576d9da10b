// README.md and the other papers against what they speak of: what they name exists, what they show works as written.

import { execFile } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import t from 'tap'
import manifest from '../package.json' with { type: 'json' }
import { parseCallers } from '../src/callers.ts'
import { PROBLEM_CODES, type ProblemCode } from '../src/errors.ts'
import { DEATH_CAUSES } from '../src/grant.ts'
import { PROBLEM_KINDS, statusOf } from '../src/http/problem.ts'
import { SETTINGS } from '../src/settings.ts'
import { readOpenApi, readReadme, withGeneratedParts } from './support/readme.ts'

const run = promisify(execFile)
const ROOT = join(import.meta.dirname, '..')

const readme = readReadme()
const map = readFileSync(join(ROOT, 'src/README.md'), 'utf8')
const papers = [
  { name: 'README.md', text: readme },
  { name: 'src/README.md', text: map },
  { name: 'migrations/README.md', text: readFileSync(join(ROOT, 'migrations/README.md'), 'utf8') },
]
const blocksOf = (language: string): string[] =>
  [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n([^]*?)^\`\`\`$`, 'gm'))].map(
    ([, code = '']) => code,
  )
const withoutBlocks = readme.replaceAll(/^```[^]*?^```$/gm, '')
/** What the log may say, by the names in the sources. */
const logEvents = (): string[] =>
  readdirSync(join(ROOT, 'src'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts'))
    .map((name) => readFileSync(join(ROOT, 'src', name), 'utf8'))
    .flatMap((text) => [...text.matchAll(/\blog\??\.(?:info|warn|error)\(\s*'([a-z_]+)'/g)])
    .map(([, event = '']) => event)
/** What stands in backticks. */
const named = [...withoutBlocks.matchAll(/`([^`\n]+)`/g)].map(([, text = '']) => text)

t.test('the tables of README.md are what the sources say; `npm run readme` writes them', (t) => {
  t.equal(readme, withGeneratedParts(readme))
  t.end()
})

t.test('the first code of README.md is how to try it', (t) => {
  const [first, second] = blocksOf('sh')
  t.equal(first, 'npm ci && npm run demo\n')
  t.equal(second, 'npm ci && npm test\n')
  t.ok(readme.indexOf('```') === readme.indexOf(`\`\`\`sh\n${first}`))
  t.end()
})

t.test('every npm script that is named exists', (t) => {
  const scripts = papers.flatMap(({ text }) =>
    [...text.matchAll(/\bnpm run (?:-s )?([a-z:-]+)/g)].map(([, script = '']) => script),
  )
  t.ok(scripts.length > 5)
  t.same(
    [...new Set(scripts)].filter((script) => !Object.hasOwn(manifest.scripts, script)),
    [],
  )
  t.end()
})

t.test('every command of the broker that is named is one', async (t) => {
  const { stdout } = await run(process.execPath, [join(ROOT, 'src/main.ts'), 'help'])
  const commands = [...readme.matchAll(/broker -- ((?:[a-z]+)(?:[ -][a-z]+)?)/g)].map(
    ([, command = '']) => command,
  )
  t.ok(commands.length > 3)
  for (const command of new Set(commands)) {
    if (command !== 'help') t.match(stdout, new RegExp(`^  ${command}\\b`, 'm'), command)
  }
})

t.test('every relative link leads somewhere', (t) => {
  for (const { name, text } of papers) {
    const targets = [...text.matchAll(/\]\(([^)#]+)\)/g)].map(([, target = '']) => target)
    for (const target of targets.filter((one) => !one.startsWith('https://'))) {
      t.ok(existsSync(join(ROOT, dirname(name), target)), `${name}: ${target}`)
    }
  }
  t.end()
})

t.test('every file in backticks that has a path is there', (t) => {
  const files = named.filter((text) => /^(?:\.ci|src|test|demo|migrations)\//.test(text))
  t.ok(files.length > 1)
  for (const file of files) t.ok(existsSync(join(ROOT, file)), file)
  t.end()
})

t.test('the TypeScript of README.md compiles as strictly as the sources', async (t) => {
  const folder = await mkdtemp(join(tmpdir(), 'broker-readme-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const blocks = blocksOf('ts')
  t.ok(blocks.length > 3)
  await writeFile(join(folder, 'package.json'), '{ "type": "module" }')
  for (const [index, code] of blocks.entries()) {
    await writeFile(join(folder, `block-${index}.ts`), code)
  }
  const settings = {
    extends: join(ROOT, 'tsconfig.json'),
    compilerOptions: {
      lib: ['es2024', 'dom', 'dom.iterable'],
      typeRoots: [join(ROOT, 'node_modules/@types')],
      // What the package exports, before it is built.
      paths: { 'pagero-token-broker-client': [join(ROOT, 'src/client/index.ts')] },
    },
    include: ['*.ts'],
  }
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify(settings))
  const tsc = join(ROOT, 'node_modules/typescript/bin/tsc')
  const complaints = await run(process.execPath, [tsc, '--project', folder]).then(
    () => '',
    (error: unknown) => (error as { stdout: string }).stdout,
  )
  t.equal(complaints, '')
})

t.test('every endpoint that is named or called is in openapi.yaml', (t) => {
  const templates = Object.entries(readOpenApi().paths).map(([path, item]) => ({
    methods: Object.keys(item).map((name) => name.toUpperCase()),
    // The last parameter of a proxied path takes any number of segments.
    pattern: new RegExp(`^${path.replace('{path}', '.+').replaceAll(/\{\w+\}/g, '[^/]+')}$`),
  }))
  const exists = (method: string | undefined, path: string): boolean =>
    path === '/docs' ||
    templates.some(
      ({ methods, pattern }) =>
        pattern.test(path) && (method === undefined || methods.includes(method)),
    )
  const calls = [
    ...named.map((text) => /^([A-Z]+) (\/[^ ?]*)/.exec(text)),
    ...readme.matchAll(/->>B: ([A-Z]+) (\/[^\s?,]*)/g),
    ...readme.matchAll(/()http:\/\/localhost:300[01](\/[^'\s`?]*)/g),
    ...readme.matchAll(/()fetch\('(\/[^'?]*)/g),
  ].filter((match) => match !== null)
  t.ok(calls.length > 20)
  for (const [text, method, path = ''] of calls) {
    // `${user}` and `${path}` of an example stand for one segment and for a path.
    const filled = path.replace('${user}', 'alice').replace('${path}', '/document')
    t.ok(exists(method || undefined, filled), text)
  }
  t.end()
})

t.test('every problem code that is named is one, with the statuses that the table says', (t) => {
  const rows = [...readme.matchAll(/^\| `([a-z_]+)` \| (\d*) ?\| (\d*) ?\| .+ \|$/gm)]
  t.ok(rows.length > 10)
  for (const [, code = '', internal, publicly] of rows) {
    if (!t.ok(PROBLEM_CODES.includes(code as ProblemCode), code)) continue
    for (const [listener, status] of [
      ['internal', internal],
      ['public', publicly],
    ] as const) {
      if (status !== '') t.equal(Number(status), statusOf(code as ProblemCode, listener), code)
    }
  }
  t.end()
})

t.test(
  'every word in backticks with an underscore is of the API, the schema or the settings',
  (t) => {
    const known = [
      ...PROBLEM_CODES,
      ...DEATH_CAUSES,
      ...SETTINGS.flatMap(({ name }) => [name, `${name}_FILE`]),
      ...[
        'openapi.yaml',
        'migrations/0001_broker.sql',
        'migrations/0002_connect.sql',
        'migrations/0003_audit.sql',
        'migrations/0004_webhooks.sql',
        'src/settings.ts',
      ].flatMap((name) => readFileSync(join(ROOT, name), 'utf8').split(/[^A-Za-z0-9_]+/)),
      ...logEvents(),
      // Of CALLERS_FILE, of PostgreSQL and PgBouncer, of the log, of Proxy-Status, of Node.
      ...[
        'proxy_allow',
        'ca_file',
        'token_file',
        'jwks_file',
        'pg_upgrade',
        '_FILE',
        'rejected_client',
        'max_prepared_statements',
        'max_connections',
        'connection_limit_reached',
        'NODE_EXTRA_CA_CERTS',
      ],
    ]
    const words = named.filter((text) => /^[A-Za-z]*_\w+$/.test(text))
    t.ok(words.length > 20)
    t.same(
      words.filter((word) => !known.includes(word)),
      [],
    )
    t.end()
  },
)

t.test('the causes of death that are explained are those that there are', (t) => {
  const rows = [...readme.matchAll(/^\| `([a-z_]+)` \| [^|\d]+ \|$/gm)].map(([, name]) => name)
  t.same(rows, DEATH_CAUSES)
  t.end()
})

t.test('the JSON of README.md is what the broker reads and says', (t) => {
  const [problem, callers, jwtCallers] = blocksOf('json').map((text) => JSON.parse(text) as unknown)
  const { code, status, title, type } = problem as Record<string, string | number>
  t.match(PROBLEM_KINDS[code as ProblemCode], { status, title })
  t.equal(type, `/problems/${code}`)
  const text = JSON.stringify(callers).replace('<64 hex digits>', 'ab'.repeat(32))
  t.equal(parseCallers(text).length, 1)
  t.equal(parseCallers(JSON.stringify(jwtCallers)).length, 2)
  t.end()
})

t.test('the map names every file of src/, and no other', (t) => {
  const files = readdirSync(join(ROOT, 'src'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts'))
    .toSorted()
  const inTable = [...map.matchAll(/`([a-z/-]+\.ts)`/g)]
    .map(([, name = '']) => name)
    .filter((name) => !name.startsWith('test/'))
  t.same(
    files.filter((name) => !inTable.includes(name)),
    [],
    'missing in src/README.md',
  )
  t.same(
    inTable.filter((name) => !files.includes(name)),
    [],
    'not there',
  )
  t.end()
})

t.test('the map says which files import which package', (t) => {
  const rows = [...map.matchAll(/^\| ([a-z0-9-]+) \| (`[^|]+`) \|$/gm)].filter(
    ([, name = '']) => name in manifest.dependencies,
  )
  t.ok(rows.length > 4)
  const sources = readdirSync(join(ROOT, 'src'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts'))
    .map((name) => ({ name, text: readFileSync(join(ROOT, 'src', name), 'utf8') }))
  for (const [, name = '', files = ''] of rows) {
    const importers = sources.filter(({ text }) => text.includes(` from '${name}'`))
    t.same(
      [...files.matchAll(/`([^`]+)`/g)].map(([, file]) => `${file}.ts`).toSorted(),
      importers.map((file) => file.name).toSorted(),
      name,
    )
  }
  t.end()
})
