// As much of a browser as a login needs: a cookie jar that knows SameSite, Fetch Metadata, redirects followed by hand.
// It speaks to one listener, whatever host an address names: that is what the name's DNS entry would do.

import { request } from 'undici'
import { type CookieJar, logIn } from '../../demo/look-alike/log-in.ts'

export interface Answer {
  status: number
  headers: Readonly<Record<string, string | string[] | undefined>>
  setCookies: readonly string[]
  body: string
  /** The body as JSON. */
  json(): Record<string, unknown>
}

export interface Ask {
  method?: string
  headers?: Record<string, string>
  body?: string
}

export interface Browser {
  /** Value and attributes of each cookie, by name. */
  cookies: Map<string, { value: string; sameSite: string }>
  /** Cookies of the browser at the authorization server. */
  pageroCookies: CookieJar
  /** Sends exactly this, with every cookie unless `headers` has its own. */
  send(target: string, ask?: Ask): Promise<Answer>
  /** Opens an address as a person does; coming from another site, Strict cookies stay at home. */
  open(target: string, from?: 'typed' | 'same-origin' | 'cross-site'): Promise<Answer>
  /** `fetch` from a page of the broker's own origin, with X-CSRF. */
  fetch(target: string, ask?: Ask): Promise<Answer>
  /** Opens `/auth/login` and logs in at Pagero; returns the callback's target, which is not opened yet. */
  authorize(subject: string | undefined, query?: string): Promise<string>
  /** The whole login. */
  logIn(subject: string, query?: string): Promise<Answer>
}

/** Makes a browser with an empty jar. */
export function createBrowser(listener: string): Browser {
  const browser: Browser = {
    cookies: new Map(),
    pageroCookies: new Map(),

    async send(target, ask = {}) {
      return exchange(browser, listener, target, ask, () => true)
    },

    async open(target, from = 'typed') {
      const site = from === 'typed' ? 'none' : from
      const headers = {
        'sec-fetch-site': site,
        'sec-fetch-mode': 'navigate',
        'sec-fetch-dest': 'document',
        'sec-fetch-user': '?1',
      }
      return exchange(browser, listener, target, { headers }, (sameSite) =>
        from === 'cross-site' ? sameSite !== 'strict' : true,
      )
    },

    async fetch(target, ask = {}) {
      const headers = {
        'x-csrf': '1',
        'sec-fetch-site': 'same-origin',
        'sec-fetch-mode': 'cors',
        'sec-fetch-dest': 'empty',
        ...ask.headers,
      }
      return exchange(browser, listener, target, { ...ask, headers }, () => true)
    },

    async authorize(subject, query = '') {
      const answer = await browser.open(`/auth/login${query}`, 'same-origin')
      const { location } = answer.headers
      if (answer.status !== 302 || typeof location !== 'string') {
        throw new Error(`/auth/login answered ${answer.status}: ${answer.body}`)
      }
      const callback = new URL(await logIn(location, subject, browser.pageroCookies))
      return callback.pathname + callback.search
    },

    async logIn(subject, query = '') {
      return browser.open(await browser.authorize(subject, query), 'cross-site')
    },
  }
  return browser
}

async function exchange(
  browser: Browser,
  listener: string,
  target: string,
  { method = 'GET', headers = {}, body }: Ask,
  isSent: (sameSite: string) => boolean,
): Promise<Answer> {
  const jar = [...browser.cookies].filter(([, { sameSite }]) => isSent(sameSite))
  const cookie = jar.map(([name, { value }]) => `${name}=${value}`).join('; ')
  const answer = await request(`${listener}${target}`, {
    method: method as 'GET',
    headers: { ...(cookie === '' ? {} : { cookie }), ...headers },
    body: body ?? null,
  })
  const text = await answer.body.text()
  const setCookies = [answer.headers['set-cookie'] ?? []].flat()
  for (const setCookie of setCookies) keepCookie(browser.cookies, setCookie)
  return {
    status: answer.statusCode,
    headers: answer.headers,
    setCookies,
    body: text,
    json: () => JSON.parse(text) as Record<string, unknown>,
  }
}

function keepCookie(cookies: Browser['cookies'], setCookie: string): void {
  const [pair = '', ...attributes] = setCookie.split('; ')
  const equals = pair.indexOf('=')
  const name = pair.slice(0, equals)
  const value = pair.slice(equals + 1)
  const sameSite =
    attributes
      .find((attribute) => attribute.startsWith('SameSite='))
      ?.slice(9)
      .toLowerCase() ?? ''
  if (value === '') cookies.delete(name)
  else cookies.set(name, { value, sameSite })
}
