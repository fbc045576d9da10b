// Documentation that the broker serves of itself: the OpenAPI document, its interactive page, and a page for each problem code.
// Everything comes from this process; no page loads anything from elsewhere.

import swaggerUi from '@fastify/swagger-ui'
import Type from 'typebox'
import { BrokerError, PROBLEM_CODES } from '../errors.ts'
import type { App } from './app.ts'
import { styleSource } from './html.ts'
import { type OpenApiDocument, toYaml } from './openapi.ts'
import { problemResponses } from './problem.ts'
import { sendProblemCodePage, sendProblemIndexPage } from './problem-pages.ts'

/** Stands in the logo that Swagger UI draws before it has read that it is to show none. */
const LOGO_STYLE = '.logo_small_svg__cls-2{fill:#fff}.logo_small_svg__cls-3{fill:#85ea2d}'

/** Swagger UI brings its own scripts and styles as files, but for one, and draws its icons from data: URLs. */
const DOCS_CONTENT_SECURITY_POLICY =
  `default-src 'none'; script-src 'self'; style-src 'self' ${styleSource(LOGO_STYLE)}; ` +
  "img-src 'self' data:; connect-src 'self'; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

export interface DocsRouteParts {
  /** The document of both listeners. Called once they are ready, at the first request for it. */
  document: () => OpenApiDocument
}

/** `/docs`, `/openapi.yaml`, `/openapi.json`, `/problems` and `/problems/{code}`. */
export async function registerDocsRoutes(app: App, parts: DocsRouteParts): Promise<void> {
  let known: OpenApiDocument | undefined
  const document = () => (known ??= parts.document())

  registerDocumentRoutes(app, document)
  registerProblemPages(app)
  await app.register(swaggerUi, {
    routePrefix: '/docs',
    staticCSP: DOCS_CONTENT_SECURITY_POLICY,
    theme: { title: 'Pagero token broker' },
    uiConfig: { docExpansion: 'list', displayOperationId: true, tryItOutEnabled: false },
    transformSpecificationClone: false,
    transformSpecification: () => document(),
  })
}

function registerDocumentRoutes(app: App, document: () => OpenApiDocument): void {
  app.get(
    '/openapi.yaml',
    {
      schema: {
        operationId: 'getOpenApiYaml',
        summary: 'Read this document as YAML',
        description: 'The OpenAPI 3.1 document of both listeners.',
        tags: ['operations'],
        security: [],
        response: { 200: textAnswer('The document.', 'application/yaml', 'openapi: 3.1.0\n…') },
      },
    },
    async (_request, reply) =>
      reply.type('application/yaml; charset=utf-8').send(toYaml(document())),
  )

  app.get(
    '/openapi.json',
    {
      schema: {
        operationId: 'getOpenApiJson',
        summary: 'Read this document as JSON',
        description: 'The OpenAPI 3.1 document of both listeners.',
        tags: ['operations'],
        security: [],
        response: {
          200: {
            description: 'The document.',
            content: {
              'application/json': {
                schema: Type.Unsafe<string>({ type: 'object', additionalProperties: true }),
                example: { openapi: '3.1.0', info: { title: 'Pagero token broker' } },
              },
            },
          },
        },
      },
    },
    async (_request, reply) =>
      reply.type('application/json; charset=utf-8').send(JSON.stringify(document())),
  )
}

function registerProblemPages(app: App): void {
  app.get(
    '/problems',
    {
      schema: {
        operationId: 'listProblems',
        summary: 'List the problem codes',
        description: 'A page with every code that a problem document of the broker can carry.',
        tags: ['operations'],
        security: [],
        response: { 200: textAnswer('The page.', 'text/html', '<!doctype html>…') },
      },
    },
    async (_request, reply) => sendProblemIndexPage(reply),
  )

  app.get(
    '/problems/:code',
    {
      schema: {
        operationId: 'getProblem',
        summary: 'Explain a problem code',
        description: 'The page that the member `type` of a problem document points at.',
        tags: ['operations'],
        security: [],
        params: Type.Object({
          code: Type.String({ description: 'The code.', examples: ['grant_not_found'] }),
        }),
        response: {
          200: textAnswer('The page.', 'text/html', '<!doctype html>…'),
          ...problemResponses('internal', ['not_found']),
        },
      },
    },
    async (request, reply) => {
      const code = PROBLEM_CODES.find((known) => known === request.params.code)
      if (code === undefined) throw new BrokerError('not_found', 'There is no such problem code.')
      return sendProblemCodePage(reply, code)
    },
  )
}

function textAnswer(description: string, mediaType: string, example: string) {
  const content = { [mediaType]: { schema: Type.String(), example } }
  return { description, content }
}
