// Serves the demonstration's page from the origin of the public listener. Files are read once, at start.

import { readFileSync } from 'node:fs'
import type { App } from '../src/http/app.ts'

/** The page loads and calls its own origin alone; what is embedded by data: is the icon. */
const CONTENT_SECURITY_POLICY = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "img-src 'self' data:",
  "connect-src 'self'",
  "form-action 'self'",
  "base-uri 'none'",
  "frame-ancestors 'none'",
].join('; ')

const FILES = [
  { path: '/', file: 'index.html', type: 'text/html; charset=utf-8' },
  { path: '/style.css', file: 'style.css', type: 'text/css; charset=utf-8' },
  { path: '/app.js', file: 'app.js', type: 'text/javascript; charset=utf-8' },
] as const

/** Adds `GET /`, `/style.css` and `/app.js`. */
export function registerPageRoutes(app: App): void {
  for (const { path, file, type } of FILES) {
    const content = readFileSync(new URL(`page/${file}`, import.meta.url))
    app.get(path, { schema: { hide: true } }, async (_request, reply) =>
      reply
        .header('content-security-policy', CONTENT_SECURITY_POLICY)
        .header('cache-control', 'no-cache')
        .type(type)
        .send(content),
    )
  }
}
