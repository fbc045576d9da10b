// HTML documents as text: the frame of a page with one style of its own, and the policy that names nothing else.
// What a page says is for the page to decide; it escapes every text that it puts in.

import { createHash } from 'node:crypto'

const ESCAPES: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  "'": '&#39;',
}

/** Returns a text that stands for itself in content and in quoted attributes. */
export function escapeHtml(text: string): string {
  return text.replaceAll(/[&<>"']/g, (character) => ESCAPES[character] ?? '')
}

/** Returns the source expression that allows one inline style and no other (CSP Level 3 section 2.3.1). */
export function styleSource(style: string): string {
  return `'sha256-${createHash('sha256').update(style).digest('base64')}'`
}

/** Returns the policy of a page with this style: even markup that got in could load and run nothing. */
export function contentSecurityPolicy(style: string): string {
  return (
    `default-src 'none'; style-src ${styleSource(style)}; ` +
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
  )
}

/** Returns a whole document with a title, which is its heading too; `body` is HTML. */
export function htmlDocument(page: { title: string; style: string; body: string }): string {
  const title = escapeHtml(page.title)
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${title}</title>
<style>${page.style}</style>
</head>
<body>
<h1>${title}</h1>
${page.body}
</body>
</html>
`
}
