// openapi.yaml against the routes it was written from, and against what an integrator expects of it.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { parse } from 'yaml'
import { PROBLEM_CODES } from '../src/errors.ts'
import { renderOpenApi } from '../src/http/render-openapi.ts'
import { TAGS } from '../src/http/openapi.ts'

interface Media {
  schema?: unknown
  example?: unknown
  examples?: Record<string, { value: unknown }>
}
interface Operation {
  operationId?: string
  summary?: string
  description?: string
  tags?: string[]
  security?: unknown[]
  parameters?: Array<{ name: string; in: string; required?: boolean; example?: unknown } & Media>
  requestBody?: { content: Record<string, Media> }
  responses: Record<string, Answer | { $ref: string }>
}
interface Answer {
  description: string
  content?: Record<string, Media>
}
interface Document {
  openapi: string
  info: { title: string; version: string; description: string }
  servers: Array<{ url: string }>
  tags: Array<{ name: string }>
  paths: Record<string, { servers?: Array<{ url: string }> } & Record<string, Operation>>
  components: {
    schemas: Record<string, unknown>
    responses: Record<string, Answer>
    securitySchemes: Record<string, unknown>
  }
}

const METHODS = ['get', 'head', 'post', 'put', 'patch', 'delete', 'options']

const text = await renderOpenApi()
const document = parse(text) as Document
const operations = Object.entries(document.paths).flatMap(([path, item]) =>
  METHODS.filter((method) => item[method] !== undefined).map((method) => ({
    name: `${method.toUpperCase()} ${path}`,
    path,
    method,
    operation: item[method] as Operation,
    answers: Object.entries((item[method] as Operation).responses).map(
      ([status, answer]) => [status, '$ref' in answer ? resolve(answer.$ref) : answer] as const,
    ),
  })),
)

/** The proxied API: what passes there has Pagero's shape, not ours. */
const isProxied = (path: string) => path === '/api/{path}' || path.endsWith('/pagero/{path}')

t.test('openapi.yaml is what the routes say; `npm run openapi` writes it', (t) => {
  const file = readFileSync(join(import.meta.dirname, '../openapi.yaml'), 'utf8')
  t.equal(file, text)
  t.end()
})

t.test('writing the document twice gives the same bytes', async (t) => {
  t.equal(await renderOpenApi(), text)
})

t.test('the document has the shape of OpenAPI 3.1', (t) => {
  t.equal(document.openapi, '3.1.0')
  t.match(document.info, { title: 'Pagero token broker', version: /^\d+\.\d+\.\d+/ })
  t.same(
    document.tags.map(({ name }) => name),
    TAGS.map(({ name }) => name),
  )
  for (const [path, item] of Object.entries(document.paths)) {
    t.match(path, /^\/(?:[a-z0-9._-]+|\{[a-z_]+\})?(?:\/(?:[a-z0-9._-]+|\{[a-z_]+\}))*$/, path)
    const extra = Object.keys(item).filter((key) => key !== 'servers' && !METHODS.includes(key))
    t.same(extra, [], `${path} has operations and servers only`)
  }
  for (const { name, path, operation, answers } of operations) {
    const named = [...path.matchAll(/\{([^}]+)\}/g)].map((match) => match[1] ?? '')
    const described = (operation.parameters ?? []).filter((one) => one.in === 'path')
    t.same(
      described.map((one) => one.name).toSorted(),
      named.toSorted(),
      `${name} describes its path parameters`,
    )
    t.ok(
      described.every((one) => one.required),
      `${name} requires its path parameters`,
    )
    for (const [status, response] of answers) {
      t.match(status, /^(?:[1-5]\d\d|[1-5]XX)$/, name)
      t.type(response.description, 'string')
      t.not(response.description, 'Default Response', `${name} ${status} is described`)
    }
  }
  t.end()
})

t.test('every reference leads somewhere, and every schema has a name of its own', (t) => {
  const references = [...text.matchAll(/\$ref: ["']?([^"'\s]+)/g)].map((match) => match[1] ?? '')
  t.ok(references.length > 20)
  for (const reference of new Set(references)) {
    const [, kind, name] = /^#\/components\/(schemas|responses)\/([\w.]+)$/.exec(reference) ?? []
    const components = document.components[kind === 'responses' ? 'responses' : 'schemas']
    t.ok(Object.hasOwn(components, name ?? ''), reference)
  }
  for (const name of Object.keys(document.components.schemas)) {
    t.match(name, /^[A-Z][A-Za-z]+$/, name)
    t.ok(references.includes(`#/components/schemas/${name}`), `${name} is referred to`)
  }
  t.end()
})

t.test('every operation says what it is, who may call it, and which tag it is under', (t) => {
  t.ok(operations.length > 15, `${operations.length} operations`)
  const ids = operations.map(({ operation }) => operation.operationId)
  t.equal(new Set(ids).size, ids.length, 'operation ids are unique')
  const tags = new Set(TAGS.map(({ name }) => name as string))
  const schemes = Object.keys(document.components.securitySchemes)
  for (const { name, operation } of operations) {
    t.match(operation.operationId, /^[a-z][A-Za-z]+$/, `${name}: operationId`)
    t.match(operation.summary, /^[A-Z].{5,}/, `${name}: summary`)
    t.match(operation.description, /^[A-Z].{20,}/, `${name}: description`)
    t.equal(operation.tags?.length, 1, `${name}: one tag`)
    t.ok(tags.has(operation.tags?.[0] ?? ''), `${name}: a known tag`)
    t.type(operation.security, Array, `${name}: security, or none said aloud`)
    for (const requirement of operation.security ?? []) {
      t.same(
        Object.keys(requirement as object).filter((scheme) => !schemes.includes(scheme)),
        [],
      )
    }
    // Whatever a calling service authenticates with is recognized on every path.
    const required = (operation.security ?? []).flatMap((requirement) =>
      Object.keys(requirement as object),
    )
    t.equal(required.includes('apiKey'), required.includes('jwt'), `${name}: either credential`)
  }
  t.end()
})

t.test('every request and every answer with a body has an example', (t) => {
  for (const { name, path, operation, answers } of operations) {
    for (const parameter of operation.parameters ?? []) {
      t.ok(hasExample(parameter), `${name}: parameter ${parameter.name}`)
    }
    for (const [type, media] of Object.entries(operation.requestBody?.content ?? {})) {
      t.ok(hasExample(media) || isProxied(path), `${name}: request body ${type}`)
    }
    const good = answers.filter(([status]) => /^[1-3]/.test(status))
    t.ok(good.length > 0, `${name} has an answer for when all is well`)
    for (const [status, response] of good) {
      for (const [type, media] of Object.entries(response.content ?? {})) {
        t.ok(hasExample(media) || isProxied(path), `${name}: ${status} ${type}`)
      }
    }
  }
  t.end()
})

t.test('every operation that can be refused says with which problems', (t) => {
  const seen = new Set<string>()
  for (const { name, operation, answers } of operations) {
    const problems = answers.flatMap(([status, response]) =>
      Object.entries(response.content?.['application/problem+json']?.examples ?? {}).map(
        ([code, { value }]) => ({ status, code, value: value as Record<string, unknown> }),
      ),
    )
    for (const { status, code, value } of problems) {
      seen.add(code)
      t.match(value, { code, status: Number(status), type: `/problems/${code}` }, `${name} ${code}`)
    }
    const authenticated = (operation.security?.length ?? 0) > 0
    const codes = problems.map(({ code }) => code)
    if (authenticated) {
      t.ok(
        codes.includes('caller_unauthenticated') || codes.includes('session_required'),
        `${name} says what comes without a credential`,
      )
      t.ok(
        codes.includes('caller_forbidden') || codes.includes('csrf_refused'),
        `${name} says what comes without the right`,
      )
    }
  }
  t.same(
    [...seen].filter((code) => !PROBLEM_CODES.some((known) => known === code)),
    [],
    'no code is made up',
  )
  t.end()
})

t.test('each path says which listener serves it', (t) => {
  t.same(document.servers.length, 1)
  for (const [path, item] of Object.entries(document.paths)) {
    const servers = item.servers?.map(({ url }) => url)
    if (path === '/livez') t.same(servers, ['/', 'http://localhost:3000'])
    else if (path.startsWith('/auth/') || path.startsWith('/api/')) {
      t.same(servers, ['http://localhost:3000'], path)
    } else t.equal(servers, undefined, path)
  }
  t.end()
})

t.test(
  'the introduction tells of authentication, errors, both listeners and the life of a token',
  (t) => {
    for (const heading of ['Two listeners', 'Authentication', 'The life of a token', 'Errors']) {
      t.match(document.info.description, `## ${heading}`)
    }
    for (const word of ['RFC 9457', 'Authorization: Bearer', 'X-CSRF', 'token:read', 'ops:read']) {
      t.match(document.info.description, word)
    }
    t.end()
  },
)

function resolve(reference: string): Answer {
  const answer = document.components.responses[reference.replace('#/components/responses/', '')]
  if (answer === undefined) throw new Error(`${reference} leads nowhere`)
  return answer
}

function hasExample(media: Media): boolean {
  return media.example !== undefined || Object.keys(media.examples ?? {}).length > 0
}
