// A person at the login form, without a browser: follows the redirects, keeps the cookies, fills in the form.

/** Cookies of one browser, by name; they are the look-alike's alone. */
export type CookieJar = Map<string, { value: string; path: string }>

/** More redirects than any login takes. */
const STEPS_MAX = 10

/**
 * Logs in at the look-alike and returns the callback URL that the browser would be sent to, byte for byte.
 * A subject of undefined refuses access. With the jar of an earlier login the live session is used, as in a browser.
 */
export async function logIn(
  authorizeUrl: string,
  subject: string | undefined,
  cookies: CookieJar = new Map(),
): Promise<string> {
  const redirectUri = new URL(authorizeUrl).searchParams.get('redirect_uri') ?? ''
  let url = authorizeUrl
  let form: URLSearchParams | undefined
  for (let step = 0; step < STEPS_MAX; step += 1) {
    const response = await fetch(url, {
      method: form === undefined ? 'GET' : 'POST',
      body: form ?? null,
      redirect: 'manual',
      headers: { cookie: cookieHeader(cookies, new URL(url).pathname) },
    })
    keepCookies(cookies, response.headers.getSetCookie())
    const location = response.headers.get('location')
    if (location !== null) {
      await response.body?.cancel()
      if (redirectUri !== '' && location.startsWith(redirectUri)) return location
      url = new URL(location, url).href
      form = undefined
    } else if (response.status === 200 && form === undefined) {
      await response.body?.cancel()
      form = new URLSearchParams({ user: subject ?? '' })
    } else {
      throw new Error(`The look-alike answered ${response.status}: ${await response.text()}`)
    }
  }
  throw new Error('The look-alike redirects without end.')
}

function cookieHeader(cookies: CookieJar, path: string): string {
  return [...cookies]
    .filter(([, cookie]) => path.startsWith(cookie.path))
    .map(([name, cookie]) => `${name}=${cookie.value}`)
    .join('; ')
}

function keepCookies(cookies: CookieJar, setCookies: readonly string[]): void {
  for (const setCookie of setCookies) {
    const [pair = '', ...attributes] = setCookie.split(';').map((part) => part.trim())
    const equals = pair.indexOf('=')
    const path = attributes.find((attribute) => attribute.toLowerCase().startsWith('path='))
    const name = pair.slice(0, equals)
    const value = pair.slice(equals + 1)
    if (value === '') cookies.delete(name)
    else cookies.set(name, { value, path: path?.slice('path='.length) ?? '/' })
  }
}
