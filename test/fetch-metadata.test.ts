// Every public route, asked with every combination of Fetch Metadata, method and CSRF header. The rules are written down
// here once more, by themselves; and each of the answers has the fields that every answer must have.

import t, { type Test } from 'tap'
import { SESSION_COOKIE } from '../src/http/session-cookie.ts'
import type { Answer, Browser } from './support/browser.ts'
import { type PublicListener, startPublicListener } from './support/public-listener.ts'

const SITES = [undefined, 'same-origin', 'same-site', 'cross-site', 'none'] as const
const MODES = [undefined, 'navigate', 'cors', 'no-cors'] as const
const DESTS = [undefined, 'document', 'empty', 'iframe', 'image', 'script'] as const
const METHODS = ['GET', 'HEAD', 'POST', 'DELETE'] as const

interface Asked {
  site: (typeof SITES)[number]
  mode: (typeof MODES)[number]
  dest: (typeof DESTS)[number]
  method: (typeof METHODS)[number]
  /** Whether `X-CSRF: 1` is there. */
  header: boolean
}

/** Without an Origin, as these are asked: whether the cookie may be used. */
function mayUseCookie({ site, mode, dest, method, header }: Asked): boolean {
  if (!header || dest === 'iframe') return false
  if (site === undefined) return method === 'GET' || method === 'HEAD'
  return site === 'same-origin' || (site === 'none' && mode === 'navigate')
}

/** Whether a person may have opened it. */
function isOpened({ mode, dest }: Asked): boolean {
  return (mode ?? 'navigate') === 'navigate' && (dest ?? 'document') === 'document'
}

type Status = number | 'passed on'

/** What each route answers. The session's cookie goes with all of them but the logout. */
const ROUTES: Readonly<Record<string, (asked: Asked) => Status>> = {
  '/auth/login': (asked) => (asked.method !== 'GET' ? 405 : isOpened(asked) ? 302 : 403),
  '/auth/callback': (asked) => (asked.method !== 'GET' ? 405 : isOpened(asked) ? 400 : 403),
  '/auth/session': (asked) =>
    asked.method !== 'GET' && asked.method !== 'HEAD' ? 405 : mayUseCookie(asked) ? 200 : 403,
  '/auth/logout': (asked) => (asked.method !== 'POST' ? 405 : mayUseCookie(asked) ? 204 : 403),
  '/api/document/v1/documents': (asked) => (mayUseCookie(asked) ? 'passed on' : 403),
  '/auth/done': ({ method }) => (method === 'GET' || method === 'HEAD' ? 200 : 405),
  '/livez': ({ method }) => (method === 'GET' || method === 'HEAD' ? 200 : 405),
  '/nowhere': () => 404,
}

function* allAsked(): Generator<Asked> {
  for (const site of SITES) {
    for (const mode of MODES) {
      for (const dest of DESTS) {
        for (const method of METHODS) {
          for (const header of [true, false]) yield { site, mode, dest, method, header }
        }
      }
    }
  }
}

function headersOf({ site, mode, dest, header }: Asked): Record<string, string> {
  return {
    ...(site === undefined ? {} : { 'sec-fetch-site': site }),
    ...(mode === undefined ? {} : { 'sec-fetch-mode': mode }),
    ...(dest === undefined ? {} : { 'sec-fetch-dest': dest }),
    ...(header ? { 'x-csrf': '1' } : {}),
  }
}

t.test('every combination is answered by the rules', async (t) => {
  const listener = await startPublicListener(t, {
    pagero: { redirectUri: 'https://broker.example/auth/callback' },
    // The session is read once: what is asked here is who may use it.
    config: { tokenCacheTrustMs: 300_000 },
  })
  const browser = listener.browser()
  await browser.logIn('alice')
  const session = browser.cookies.get(SESSION_COOKIE)?.value ?? ''
  const all = [...allAsked()]
  for (const [route, expected] of Object.entries(ROUTES)) {
    await t.test(`${route}, ${all.length} of them`, async (t) => {
      const cookie = route === '/auth/logout' ? '' : `${SESSION_COOKIE}=${session}`
      const wrong: string[] = []
      const faults = new Set<string>()
      for (const asked of all) {
        const reached = listener.api.record.length
        const answer = await listener.app.inject({
          url: route,
          method: asked.method,
          headers: { ...headersOf(asked), cookie },
        })
        const { statusCode: status, headers } = answer
        const due = expected(asked)
        const passedOn = listener.api.record.length > reached
        const isRight = due === 'passed on' ? passedOn : status === due && !passedOn
        if (!isRight) wrong.push(`${JSON.stringify(asked)} was answered ${status}`)
        const setCookies = [headers['set-cookie'] ?? []].flat()
        for (const fault of faultsOf({ status, headers, setCookies })) {
          faults.add(`${status} ${fault}`)
        }
      }
      t.same(wrong, [])
      t.same([...faults], [])
      if (route === '/auth/login') t.not(await pendingLogins(listener), 0)
      else t.equal(await pendingLogins(listener), 0, 'no login was begun')
      await listener.scene.database.pool.query('delete from login_transactions')
    })
  }
})

async function pendingLogins({ scene }: PublicListener): Promise<number> {
  const { rows } = await scene.database.pool.query('select 1 from login_transactions')
  return rows.length
}

/** What an answer of the public listener lacks, or has too much of. */
function faultsOf({
  status,
  headers,
  setCookies,
}: Pick<Answer, 'status' | 'setCookies'> & { headers: Record<string, unknown> }): string[] {
  const faults: string[] = []
  const must = (name: string, pattern: RegExp) => {
    const value = headers[name]
    if (typeof value !== 'string' || !pattern.test(value)) faults.push(`${name}: ${String(value)}`)
  }
  must('content-security-policy', /default-src 'none'/)
  must('content-security-policy', /frame-ancestors 'none'/)
  must('content-security-policy', /base-uri 'none'/)
  must('x-content-type-options', /^nosniff$/)
  must('referrer-policy', /^no-referrer$/)
  must('cross-origin-resource-policy', /^same-origin$/)
  must('cross-origin-opener-policy', /^same-origin$/)
  must('strict-transport-security', /^max-age=(?:3153[6-9]|[4-9]\d{4}|\d{6})\d{3}/)
  must('cache-control', /(?:^|, )no-store$/)
  if (status === 401) must('www-authenticate', /^Session$/)
  if (status === 405) must('allow', /^[A-Z, ]+$/)
  if (headers['content-type'] !== undefined) {
    must('content-type', /^(?:application\/(?:problem\+)?json|text\/html); ?charset=utf-8$/i)
  }
  if (status === 307 || status === 308) faults.push('a redirect that keeps the method')
  for (const name of ['server', 'x-powered-by', 'access-control-allow-origin', 'etag']) {
    if (headers[name] !== undefined) faults.push(`has ${name}`)
  }
  for (const cookie of setCookies) {
    if (!COOKIES.some((pattern) => pattern.test(cookie))) faults.push(`set-cookie: ${cookie}`)
  }
  return faults
}

/** The only forms in which cookies are set. */
const COOKIES = [
  /^__Host-broker-session=[A-Za-z0-9_-]{43}; Path=\/; HttpOnly; Secure; SameSite=Strict$/,
  /^__Host-broker-session=; Max-Age=0; Path=\/; Expires=Thu, 01 Jan 1970 00:00:00 GMT; HttpOnly; Secure; SameSite=Strict$/,
  /^__Host-broker-login=[A-Za-z0-9_-]{43}; Max-Age=1560; Path=\/; HttpOnly; Secure; SameSite=Lax$/,
]

t.test('every answer of a life in the browser has the fields that all must have', async (t) => {
  const listener = await startPublicListener(t, {
    pagero: { redirectUri: 'https://broker.example/auth/callback' },
  })
  const browser = listener.browser()
  const answers = await answersOfALife(browser)
  const statuses = [...new Set(answers.map(({ status }) => status))].toSorted((a, b) => a - b)
  t.same(statuses, [200, 204, 302, 303, 400, 401, 403, 404, 405, 415, 431])
  isWithoutFault(t, answers)
})

/** One of each kind of answer. */
async function answersOfALife(browser: Browser): Promise<Answer[]> {
  const begun = await browser.open('/auth/login')
  const completed = await browser.logIn('alice')
  const cookie = [...browser.cookies].map(([name, { value }]) => `${name}=${value}`).join('; ')
  const post = (headers: Record<string, string>, body?: string) =>
    browser.fetch('/auth/logout', {
      method: 'POST',
      headers,
      ...(body === undefined ? {} : { body }),
    })
  return [
    begun,
    completed,
    await browser.open('/auth/callback?error=x&state=y'),
    await browser.fetch('/auth/session'),
    await browser.fetch('/auth/session', { headers: { cookie: '' } }),
    await browser.fetch('/auth/session', { headers: { cookie: `${cookie}; ${cookie}` } }),
    await browser.fetch('/auth/session', { headers: { cookie: 'a'.repeat(20_000) } }),
    await browser.fetch('/auth/session', { method: 'PUT' }),
    await browser.fetch('/api/a//b'),
    await browser.fetch('/nowhere'),
    await post({ 'x-csrf': '' }),
    await post({ 'content-type': 'text/plain' }, '{}'),
    await post({}),
  ]
}

function isWithoutFault(t: Test, answers: readonly Answer[]): void {
  for (const answer of answers) t.same(faultsOf(answer), [], String(answer.status))
}

t.test('without https nobody is told to insist on it', async (t) => {
  const listener = await startPublicListener(t)
  for (const answer of await answersOfALife(listener.browser())) {
    t.same(faultsOf(answer), ['strict-transport-security: undefined'], String(answer.status))
  }
})
