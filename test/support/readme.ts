// The parts of README.md that are made from the sources, each between a pair of markers. Run as a program
// (`npm run readme`) it writes them; test/readme.test.ts compares.

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parse } from 'yaml'
import { settingsMarkdown } from '../../src/settings.ts'

const ROOT = join(import.meta.dirname, '../..')
const README = join(ROOT, 'README.md')
const METHODS = ['get', 'head', 'post', 'put', 'patch', 'delete']

interface OpenApi {
  paths: Record<
    string,
    Record<string, { summary?: string; tags?: string[]; security?: unknown[] } | undefined>
  >
}

/** The OpenAPI document as it is committed. */
export function readOpenApi(): OpenApi {
  return parse(readFileSync(join(ROOT, 'openapi.yaml'), 'utf8')) as OpenApi
}

/** README.md as it is committed. */
export function readReadme(): string {
  return readFileSync(README, 'utf8')
}

/** Returns the text with its generated parts made anew. */
export function withGeneratedParts(text: string): string {
  const parts = { settings: settingsMarkdown(), endpoints: endpointsMarkdown(readOpenApi()) }
  let result = text
  for (const [name, part] of Object.entries(parts)) {
    const [begin, end] = [`<!-- begin ${name} -->\n`, `<!-- end ${name} -->`]
    const [from, to] = [result.indexOf(begin), result.indexOf(end)]
    if (from === -1 || to < from) throw new Error(`README.md has no markers for ${name}.`)
    result = `${result.slice(0, from + begin.length)}\n${part}\n${result.slice(to)}`
  }
  return result
}

/** One row for each path and what can be done there; methods that do the same share a row. */
function endpointsMarkdown({ paths }: OpenApi): string {
  const rows = new Map<string, string[]>()
  for (const [path, item] of Object.entries(paths)) {
    for (const method of METHODS) {
      const operation = item[method]
      if (operation === undefined) continue
      const key = `${path}\` | ${operation.summary ?? ''} |`
      rows.set(key, [...(rows.get(key) ?? []), method.toUpperCase()])
    }
  }
  const lines = [...rows].map(([key, methods]) => `| \`${methods.join(', ')} ${key}`)
  return ['| method and path | |', '| --- | --- |', ...lines, ''].join('\n')
}

if (import.meta.main) writeFileSync(README, withGeneratedParts(readReadme()))
