// The OpenAPI 3.1 document, written by the routes' own schemas: nothing is described twice.
// Each listener collects its operations; the two are merged into the one document that integrators read.

import { isDeepStrictEqual } from 'node:util'
import swagger from '@fastify/swagger'
import { stringify } from 'yaml'
import manifest from '../../package.json' with { type: 'json' }
import type { App } from './app.ts'
import { INTRODUCTION } from './openapi-introduction.ts'
import type { Listener } from './problem.ts'

/** Tags in reading order. An operation names one of them. */
export const TAGS = [
  { name: 'tokens', description: 'Access tokens for backend services.' },
  {
    name: 'grants',
    description: 'What each user gave the broker at Pagero: look, disconnect, trace.',
  },
  { name: 'webhooks', description: 'Events of grants that the webhook has not confirmed yet.' },
  { name: 'proxy', description: "Calls to Pagero's API with the user's access token." },
  { name: 'login', description: 'Login of a person, in the browser.' },
  { name: 'session', description: "The browser's session." },
  { name: 'operations', description: 'Probes and documentation.' },
] as const

/** How each listener knows who calls. An operation names the schemes that it asks for. */
const SECURITY_SCHEMES = {
  internal: {
    apiKey: {
      type: 'http',
      scheme: 'bearer',
      bearerFormat: 'pgb_<id>_<secret>',
      description:
        'API key of a calling service, made by the operator. Only the Authorization header counts.',
    },
    jwt: {
      type: 'http',
      scheme: 'bearer',
      bearerFormat: 'JWT',
      description:
        'Instead of an API key: a JWT of an issuer that the operator has listed, such as a service-account token of Kubernetes, or an access token from client credentials. With `exp` and `iat`, a day apart at most.',
    },
  },
  public: {
    session: {
      type: 'apiKey',
      in: 'cookie',
      name: '__Host-broker-session',
      description: 'Session cookie, set by a login. HttpOnly, Secure, SameSite=Strict.',
    },
    csrf: {
      type: 'apiKey',
      in: 'header',
      name: 'X-CSRF',
      description: 'The constant 1. A page of another origin cannot send it unasked.',
    },
  },
} as const

interface Operation {
  operationId?: string
  parameters?: Array<{ name: string; in: string }>
  requestBody?: unknown
  responses: Record<string, Answer>
}
interface Answer {
  $ref?: string
  content?: Record<string, { examples?: Record<string, unknown> }>
}
type PathItem = Record<string, unknown>
interface Server {
  url: string
  description: string
}

/** As much of an OpenAPI document as merging touches. */
export interface OpenApiDocument {
  openapi: string
  info: { title: string; version: string; description: string }
  servers?: Server[]
  tags?: ReadonlyArray<{ name: string; description: string }>
  paths: Record<string, PathItem>
  components: {
    securitySchemes: Record<string, unknown>
    schemas: Record<string, unknown>
    responses?: Record<string, unknown>
  }
}

/** Either credential of a calling service will do. */
export const CALLER_SECURITY = [{ apiKey: [] }, { jwt: [] }]

/** A body of these has no meaning (RFC 9110 section 9.3). */
const BODILESS: ReadonlySet<string> = new Set(['get', 'head', 'delete'])

const METHODS = ['get', 'head', 'post', 'put', 'patch', 'delete', 'options'] as const

/**
 * Collects the operations of one listener. Await it before the first route: routes that are older stay out.
 * Shared schemas keep their `$id` as name.
 */
export async function registerOpenApi(app: App, listener: Listener): Promise<void> {
  await app.register(swagger, {
    openapi: {
      openapi: '3.1.0',
      info: {
        title: 'Pagero token broker',
        version: manifest.version,
        description: INTRODUCTION,
        license: { name: manifest.license, identifier: manifest.license },
      },
      tags: [...TAGS],
      components: { securitySchemes: SECURITY_SCHEMES[listener] },
    },
    refResolver: { buildLocalReference: (schema) => schema['$id'] as string },
  })
}

/** A JSON answer of a route: the shared schema of that name, with an example beside it. */
export function jsonAnswer(answer: { description: string; schema: string; example: unknown }): {
  description: string
  content: Record<'application/json', { schema: object; example: unknown }>
} {
  const { description, schema, example } = answer
  return {
    description,
    content: { 'application/json': { schema: { $ref: `${schema}#` }, example } },
  }
}

/**
 * Merges the documents of the two listeners, both of them ready. Public paths name their own server;
 * a path of both, such as /livez, stands once and names both servers.
 */
export function openApiDocument(listeners: {
  publicApp: App
  internalApp: App
  /** Origin that browsers see. */
  publicUrl: string
}): OpenApiDocument {
  const internal = readDocument(listeners.internalApp)
  const open = readDocument(listeners.publicApp)
  const internalServer = { url: '/', description: 'Internal listener, which serves this document' }
  const publicServer = { url: listeners.publicUrl, description: 'Public listener' }

  const paths: Record<string, PathItem> = { ...internal.paths }
  for (const [path, item] of Object.entries(open.paths)) {
    const shared = internal.paths[path]
    paths[path] =
      shared === undefined
        ? { servers: [publicServer], ...item }
        : { servers: [internalServer, publicServer], ...item, ...shared }
  }
  return {
    openapi: internal.openapi,
    info: internal.info,
    servers: [internalServer],
    tags: internal.tags ?? [],
    paths,
    components: {
      securitySchemes: {
        ...internal.components.securitySchemes,
        ...open.components.securitySchemes,
      },
      schemas: sortByKey({ ...open.components.schemas, ...internal.components.schemas }),
      responses: sortByKey(takeOutProblemResponses(paths)),
    },
  }
}

/** The document as YAML: the text of openapi.yaml. */
export function toYaml(document: OpenApiDocument): string {
  return stringify(document, { lineWidth: 0, blockQuote: 'literal', aliasDuplicateObjects: false })
}

function readDocument(app: App): OpenApiDocument {
  // A copy: the plugin keeps its object, and shares parts of it between operations.
  const document = JSON.parse(JSON.stringify(app.swagger())) as OpenApiDocument
  const paths = Object.entries(document.paths).map(([path, item]) => {
    tellMethodsApart(item)
    return [path.replace('{*}', '{path}'), item] as const
  })
  return { ...document, paths: Object.fromEntries(paths) }
}

/** Tells the methods of one route apart: an operationId each, no body where none is usual, a name for the wildcard. */
function tellMethodsApart(item: PathItem): void {
  const methods = METHODS.filter((method) => item[method] !== undefined)
  const operationIds = methods.map((method) => (item[method] as Operation).operationId)
  for (const method of methods) {
    const operation = item[method] as Operation
    const { operationId } = operation
    if (operationIds.filter((other) => other === operationId).length > 1) {
      operation.operationId = `${operationId}${method[0]?.toUpperCase()}${method.slice(1)}`
    }
    if (BODILESS.has(method)) delete operation.requestBody
    for (const parameter of operation.parameters ?? []) {
      if (parameter.in === 'path' && parameter.name === '*') parameter.name = 'path'
    }
  }
}

/**
 * Puts a reference in place of each answer that is a problem, and returns these answers by name: status and codes.
 * Standing in full at every operation, they would be nine tenths of the document.
 */
function takeOutProblemResponses(paths: Record<string, PathItem>): Record<string, unknown> {
  const taken: Record<string, unknown> = {}
  for (const item of Object.values(paths)) {
    for (const method of METHODS) {
      const responses = (item[method] as Operation | undefined)?.responses ?? {}
      for (const [status, response] of Object.entries(responses)) {
        const problem = response.content?.['application/problem+json']
        if (problem === undefined) continue
        const name = [status, ...Object.keys(problem.examples ?? {})].join('.')
        taken[name] ??= response
        // One that says more than its namesake, such as a page beside the document, stays where it is.
        if (!isDeepStrictEqual(taken[name], response)) continue
        responses[status] = { $ref: `#/components/responses/${name}` }
      }
    }
  }
  return taken
}

function sortByKey(record: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(record).toSorted(([one], [other]) => (one < other ? -1 : 1)),
  )
}
