// What pages of other origins can do to somebody who is logged in: in Chromium, with names and https as in production.
// Everything arrives at the broker as the browser sends it, is refused there, and never gets to Pagero's API.

import type { BrowserContext, Page } from 'playwright-core'
import t from 'tap'
import { withoutChromium } from './support/chromium.ts'
import { until } from './support/fleet.ts'
import {
  BROKER,
  EVIL,
  LIMIT_MS,
  logInAs,
  PARTNER,
  sessionOf,
  SIBLING,
  type Sites,
  startSites,
} from './support/sites.ts'

const DOCUMENTS = `${BROKER}/api/document/v1/documents`
const FILES = `${BROKER}/api/file/v1/files`
const LOGOUT = `${BROKER}/auth/logout`
const SESSION = `${BROKER}/auth/session`
interface Attack {
  /** Runs in a page of the other origin; ${'`done`'} is when its promise is settled. */
  script: string
  /** What the broker answered, as `METHOD route status`, in any order. */
  arrives: readonly string[]
}

const API_REFUSED = 'GET /api/* 403'

/** A form that is sent to a window of its own. */
function form(method: string, action: string, enctype = 'application/x-www-form-urlencoded') {
  return `
    const form = document.createElement('form')
    Object.assign(form, ${JSON.stringify({ method, action, enctype, target: '_blank' })})
    form.innerHTML = '<input name="disconnect" value="true">'
    document.body.append(form)
    form.submit()`
}

/** An element that loads something by being there. */
function element(name: string, properties: object) {
  return `
    const node = document.createElement('${name}')
    Object.assign(node, ${JSON.stringify(properties)})
    document.body.append(node)`
}

function fetchOf(url: string, init: object) {
  return `await fetch('${url}', ${JSON.stringify({ credentials: 'include', ...init })}).catch(() => {})`
}

const HEADER = { headers: { 'X-CSRF': '1' } }
const JSON_TYPE = { headers: { 'X-CSRF': '1', 'Content-Type': 'application/json' } }

const ATTACKS: Readonly<Record<string, Attack>> = {
  'a form posts a logout': { script: form('post', LOGOUT), arrives: ['POST /auth/logout 403'] },
  'a form posts a disconnect': {
    script: form('post', `${LOGOUT}?disconnect=true`, 'text/plain'),
    arrives: ['POST /auth/logout 403'],
  },
  'a form gets a logout': { script: form('get', LOGOUT), arrives: ['GET /auth/logout 405'] },
  'a form uploads a file': {
    script: form('post', FILES, 'multipart/form-data'),
    arrives: ['POST /api/* 403'],
  },
  'a fetch reads': { script: fetchOf(DOCUMENTS, {}), arrives: [API_REFUSED] },
  'a fetch reads the session': { script: fetchOf(SESSION, {}), arrives: ['GET /auth/session 403'] },
  // The browser asks first, is told nothing, and does not send it.
  'a fetch brings the header': {
    script: fetchOf(DOCUMENTS, HEADER),
    arrives: ['OPTIONS /api/* 405'],
  },
  'a fetch posts JSON with the header': {
    script: fetchOf(FILES, { method: 'POST', body: '{}', ...JSON_TYPE }),
    arrives: ['OPTIONS /api/* 405'],
  },
  'a fetch deletes': {
    script: fetchOf(`${DOCUMENTS}/1`, { method: 'DELETE' }),
    arrives: ['OPTIONS /api/* 405'],
  },
  'a fetch logs out with the header': {
    script: fetchOf(LOGOUT, { method: 'POST', ...HEADER }),
    arrives: ['OPTIONS /auth/logout 405'],
  },
  'a fetch without CORS reads': {
    script: fetchOf(DOCUMENTS, { mode: 'no-cors' }),
    arrives: [API_REFUSED],
  },
  // Chromium leaves the header out.
  'a fetch without CORS posts': {
    script: fetchOf(LOGOUT, { mode: 'no-cors', method: 'POST', ...HEADER }),
    arrives: ['POST /auth/logout 403'],
  },
  'a fetch without CORS asks for the head': {
    script: fetchOf(DOCUMENTS, { mode: 'no-cors', method: 'HEAD' }),
    arrives: ['HEAD /api/* 403'],
  },
  'a beacon posts': {
    script: `navigator.sendBeacon('${LOGOUT}', 'disconnect=true')`,
    arrives: ['POST /auth/logout 403'],
  },
  'an event source reads': {
    script: `
      const source = new EventSource('${DOCUMENTS}', { withCredentials: true })
      await new Promise((resolve) => { source.onerror = resolve })
      source.close()`,
    arrives: [API_REFUSED],
  },
  'a WebSocket opens': {
    script: `
      const socket = new WebSocket('${DOCUMENTS.replace('https', 'wss')}')
      await new Promise((resolve) => { socket.onclose = resolve })`,
    arrives: [API_REFUSED],
  },
  'an image loads': { script: element('img', { src: DOCUMENTS }), arrives: [API_REFUSED] },
  'a script loads': { script: element('script', { src: DOCUMENTS }), arrives: [API_REFUSED] },
  'a style sheet loads': {
    script: element('link', { rel: 'stylesheet', href: DOCUMENTS }),
    arrives: [API_REFUSED],
  },
  'a video loads': {
    script: element('video', { src: DOCUMENTS, preload: 'auto' }),
    arrives: [API_REFUSED],
  },
  'a frame loads': { script: element('iframe', { src: DOCUMENTS }), arrives: [API_REFUSED] },
  'an object loads': { script: element('object', { data: DOCUMENTS }), arrives: [API_REFUSED] },
  'an embed loads': { script: element('embed', { src: DOCUMENTS }), arrives: [API_REFUSED] },
  'a prefetch reads': {
    script: element('link', { rel: 'prefetch', href: DOCUMENTS }),
    arrives: [API_REFUSED],
  },
  'a window opens the API': { script: `open('${DOCUMENTS}')`, arrives: [API_REFUSED] },
  'a window opens the session': {
    script: `open('${SESSION}')`,
    arrives: ['GET /auth/session 403'],
  },
  'a window opens the logout': { script: `open('${LOGOUT}')`, arrives: ['GET /auth/logout 405'] },
  'an image begins a login': {
    script: element('img', { src: `${BROKER}/auth/login` }),
    arrives: ['GET /auth/login 403'],
  },
  'a frame begins a login': {
    script: element('iframe', { src: `${BROKER}/auth/login` }),
    arrives: ['GET /auth/login 403'],
  },
  'a prefetch begins a login': {
    script: element('link', { rel: 'prefetch', href: `${BROKER}/auth/login` }),
    arrives: ['GET /auth/login 403'],
  },
  'a fetch begins a login': {
    script: fetchOf(`${BROKER}/auth/login`, { mode: 'no-cors' }),
    arrives: ['GET /auth/login 403'],
  },
  'a form posts to the callback': {
    script: form('post', `${BROKER}/auth/callback`),
    arrives: ['POST /auth/callback 405'],
  },
}

/** Waits until the broker has answered so many requests. */
async function answersTo(sites: Sites, count: number): Promise<string[]> {
  const answers: string[] = []
  await until(
    () => answers.push(...sites.answered()) >= count,
    LIMIT_MS,
    `the broker has answered only ${answers.join(', ')}`,
  )
  return answers
}

async function closeOthers(context: BrowserContext, kept: readonly Page[]): Promise<void> {
  await Promise.all(
    context
      .pages()
      .filter((page) => !kept.includes(page))
      .map((page) => page.close()),
  )
}

const ALICE = { status: 200, user: 'pagero:alice' }

t.test('whatever another origin tries is refused', { skip: withoutChromium }, async (t) => {
  const sites = await startSites(t)
  const { listener, context } = sites
  const home = await context.newPage()
  await logInAs(home, 'Alice Andersson')
  for (const origin of [EVIL, SIBLING]) {
    const page = await context.newPage()
    for (const [name, { script, arrives }] of Object.entries(ATTACKS)) {
      await t.test(`${name}, on ${new URL(origin).hostname}`, async (t) => {
        await page.goto(origin)
        sites.answered()
        const sentBefore = sites.sent().length
        await page.evaluate(`(async () => { ${script} })()`)
        t.same(await answersTo(sites, arrives.length), arrives)
        const sent = sites.sent().slice(sentBefore)
        if (origin === EVIL) t.notMatch(sent, '__Host-broker-session', 'Strict keeps the cookie')
        t.same(await sessionOf(home), ALICE, 'she is still logged in')
        t.same(listener.api.record, [], 'nothing got to the API')
        await closeOthers(context, [home, page])
      })
    }
    await page.close()
  }
  t.match(
    sites.sent(),
    /sec-fetch-site: same-site\r\n(?:.+\r\n)*cookie: [^\r]*__Host-broker-session=/i,
    'Strict does not keep it from a sibling; it is the broker that refuses',
  )
  const { rows } = await listener.scene.database.pool.query(
    `select (select state from grants), (select count(*)::int from login_transactions) as pending`,
  )
  t.same(rows, [{ state: 'active', pending: 0 }], 'the grant stands, and no login was begun')
})

t.test('a listed origin on another site is refused too', { skip: withoutChromium }, async (t) => {
  const sites = await startSites(t)
  const { listener, context } = sites
  const [home, page] = [await context.newPage(), await context.newPage()]
  await logInAs(home, 'Alice Andersson')
  await page.goto(PARTNER)
  t.same(await sessionOf(page), { status: 403, code: 'csrf_refused' }, 'and may read why')
  await page.evaluate(
    `(async () => { ${fetchOf(FILES, { method: 'POST', body: '{}', ...JSON_TYPE })} })()`,
  )
  t.same(await sessionOf(home), ALICE)
  t.same(listener.api.record, [])
})

t.test('a sibling can plant no cookie of the broker', { skip: withoutChromium }, async (t) => {
  const { listener, context } = await startSites(t)
  const [home, sibling] = [await context.newPage(), await context.newPage()]
  await home.goto(`${BROKER}/app`)

  const mallory = listener.browser()
  await mallory.logIn('mallory')
  const callback = `${BROKER}${await mallory.authorize('mallory')}`
  const cookies = ['__Host-broker-session', '__Host-broker-login'].flatMap((name) =>
    disguisesOf(name, mallory.cookies.get(name)?.value ?? ''),
  )
  const asBytes = cookies.map((cookie) => Buffer.from(cookie, 'utf8').toString('latin1'))
  const query = new URLSearchParams(asBytes.map((cookie): [string, string] => ['plant', cookie]))
  await sibling.goto(`${SIBLING}/?${query.toString()}`)
  await sibling.evaluate(`
    for (const cookie of ${JSON.stringify(cookies)}) document.cookie = cookie`)
  const planted = (await context.cookies()).map(({ name }) => name)
  t.ok(planted.length > 20, 'most of them are taken by the browser, as other cookies')
  t.notOk(
    planted.some((name) => /^__Host-broker-(?:session|login)$/i.test(name)),
    planted.join(),
  )

  t.same(await sessionOf(home), { status: 401, code: 'session_required' })
  t.equal((await home.goto(callback))?.status(), 400, 'her browser has not begun that login')
  await logInAs(home, 'Alice Andersson')
  t.same(await sessionOf(home), ALICE, 'nor is she kept from logging in')
  t.equal((await mallory.open(callback.slice(BROKER.length), 'cross-site')).status, 303)
})

/** Cookies that a browser may take for other ones than the broker does. */
function disguisesOf(name: string, value: string): string[] {
  const pair = `${name}=${value}`
  const blanks = ['\u0085', '\u00a0', '\ufeff', '\u2000', '\u3000']
  return [
    pair,
    `${name.toLowerCase()}=${value}`,
    `${name.replace('__Host-', '__Secure-')}=${value}`,
    `=${pair}`,
    ` =${pair}`,
    `x=y, ${pair}`,
    `$Version=1,${pair}`,
    `"${pair}"`,
    ...blanks.flatMap((blank) => [`${blank}${pair}`, `${name}${blank}=${value}`]),
  ].flatMap((disguise) => [
    `${disguise}; Domain=example.test; Path=/; Secure`,
    `${disguise}; Domain=example.test; Path=/auth`,
  ])
}
