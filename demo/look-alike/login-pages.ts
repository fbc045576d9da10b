// The form on which somebody logs in at the look-alike, or refuses.

import { readFileSync } from 'node:fs'
import type Provider from 'oidc-provider'
import type { Interaction } from 'oidc-provider'
import { ACCOUNTS } from './accounts.ts'
import { type Middleware, PATHS, recordedRequest } from './record.ts'

const STYLE_PATH = `${PATHS.login}style.css`
const STYLE = readFileSync(new URL('login.css', import.meta.url), 'utf8')

/** No form-action: browsers apply it to the redirects that follow, and those lead to the client. */
const CONTENT_SECURITY_POLICY =
  "default-src 'none'; style-src 'self'; base-uri 'none'; frame-ancestors 'none'"

/** Serves the form and takes its answer. */
export function serveLoginPages(provider: Provider): Middleware {
  return async (context, next) => {
    if (recordedRequest(context).endpoint !== 'login') {
      await next()
      return
    }
    context.set('cache-control', 'no-store')
    if (context.path === STYLE_PATH) {
      context.type = 'css'
      context.body = STYLE
      return
    }
    const interaction = await provider
      .interactionDetails(context.req, context.res)
      .catch(() => undefined)
    context.set('content-security-policy', CONTENT_SECURITY_POLICY)
    context.type = 'html'
    if (interaction === undefined) {
      context.status = 400
      context.body = page(
        'This login has ended',
        '<p>Go back to where you came from, and begin again.</p>',
      )
      return
    }
    if (context.method !== 'POST') {
      context.body = loginForm(interaction)
      return
    }
    const { user } = recordedRequest(context).form
    const result =
      user === undefined || user === ''
        ? { error: 'access_denied', error_description: 'The user refused.' }
        : { login: { accountId: user } }
    const resumeUrl = await provider.interactionResult(context.req, context.res, result)
    if (user !== undefined) await leaveOtherAccount(provider, interaction, user)
    context.status = 303
    context.redirect(resumeUrl)
  }
}

/** A browser logged in as somebody else is logged out first; the provider itself would ask for it on a page of its own. */
async function leaveOtherAccount(
  provider: Provider,
  interaction: Interaction,
  subject: string,
): Promise<void> {
  const uid = interaction.session?.uid
  const session = uid === undefined ? undefined : await provider.Session.findByUid(uid)
  if (session === undefined || session.accountId === subject) return
  delete session.accountId
  delete session.authorizations
  await session.persist()
}

function loginForm(interaction: Interaction): string {
  const choices = ACCOUNTS.map(
    ({ subject, name, company }) =>
      `<button class="account" name="user" value="${escapeHtml(subject)}">
        <span class="initials" aria-hidden="true">${escapeHtml(initialsOf(name))}</span>
        <span><strong>${escapeHtml(name)}</strong><small>${escapeHtml(company.name)}</small></span>
      </button>`,
  ).join('\n')
  return page(
    'Log in',
    `<p><b>${escapeHtml(String(interaction.params['client_id']))}</b> asks for access to your company's documents.</p>
    <form method="post">
      ${choices}
      <button class="refuse" name="user" value="">Refuse access</button>
    </form>
    <footer>A stand-in for trying things out. Not Pagero: never type a password here.</footer>`,
  )
}

/** The page for what cannot be answered by a redirect: an unknown client or redirect URI. */
export function errorPage(error: string, description: string | undefined): string {
  return page(
    'This does not work',
    `<p><b>${escapeHtml(error)}</b> ${escapeHtml(description ?? '')}</p>`,
  )
}

function page(title: string, content: string): string {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title} · Pagero look-alike</title>
<link rel="stylesheet" href="${STYLE_PATH}">
</head>
<body>
<main>
<p class="brand">Pagero look-alike</p>
<h1>${title}</h1>
${content}
</main>
</body>
</html>
`
}

function initialsOf(name: string): string {
  return name
    .split(' ')
    .map((word) => word.charAt(0))
    .join('')
}

function escapeHtml(text: string): string {
  return text.replaceAll(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`)
}
