// The demonstration from the first start to the second, as a person meets it: a process of its own, and its page in
// Chromium. Leaves pictures of the page in screenshots/.

import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { BrowserContext, Page } from 'playwright-core'
import t, { type Test } from 'tap'
import { launchChromium, withoutChromium } from './support/chromium.ts'
import { freePorts } from './support/free-ports.ts'
import { type Program, ROOT, startProgram } from './support/program.ts'

const PICTURES = join(ROOT, 'screenshots')
/** Far above what a first start takes, the making of the database included, and a stop: on a busy machine too. */
const READY_LIMIT_MS = 60_000
const STOP_LIMIT_MS = 30_000
/** Slow enough to see an upload advance. */
const UPLOAD_BYTES = 3_000_000
const UPLOAD_BYTES_PER_SECOND = 2_000_000

const skip =
  withoutChromium ||
  (!existsSync('/usr/bin/curl') && '/usr/bin/curl is missing: install the package curl')

t.test('the demonstration does what it says, twice', { skip }, async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'broker-demo-'))
  // Under root the database runs under another account, which has to get through.
  await chmod(directory, 0o755)
  t.teardown(() => rm(directory, { recursive: true, force: true }))
  await mkdir(PICTURES, { recursive: true })
  const [publicPort, internalPort, lookAlikePort, apiPort] = await freePorts(4)
  const origin = `http://localhost:${publicPort}`
  const internal = `http://127.0.0.1:${internalPort}/v1/users`
  const start = () =>
    startProgram(t, ['demo/main.ts'], {
      PUBLIC_PORT: String(publicPort),
      INTERNAL_PORT: String(internalPort),
      LOOK_ALIKE_PORT: String(lookAlikePort),
      LOOK_ALIKE_API_PORT: String(apiPort),
      DEMO_DATA_DIR: directory,
    })

  const first = start()
  await first.said(/Ctrl-C stops/, READY_LIMIT_MS)
  const commands = printedCommands(first)
  const { page, complaints } = await openBrowser(t)
  const picture = (name: string) =>
    page.screenshot({ path: join(PICTURES, `${name}.png`), fullPage: true })

  await t.test('a stranger is shown the way to the login', async (t) => {
    await page.goto(origin)
    await page.getByRole('link', { name: 'Log in with Pagero' }).waitFor()
    t.notOk(await page.locator('#workspace').isVisible())
    t.notOk(await page.locator('#problem').isVisible())
    await picture('1-logged-out')
  })

  await t.test('Alice logs in, and sees her session and both ends of her access', async (t) => {
    await page.getByRole('link', { name: 'Log in with Pagero' }).click()
    await page.getByRole('button', { name: 'Alice Andersson' }).waitFor()
    await picture('2-login-form')
    await page.getByRole('button', { name: 'Alice Andersson' }).click()
    await page.locator('#documents tr').first().waitFor()
    t.equal(page.url(), `${origin}/`)
    t.equal(await page.locator('#session-user').textContent(), 'pagero:alice')
    t.equal(await page.locator('#grant-state').textContent(), 'active')
    const inThreeYears = new Date()
    inThreeYears.setUTCFullYear(inThreeYears.getUTCFullYear() + 3)
    for (const id of ['grant-rolling', 'grant-absolute']) {
      const expiresAt = new Date((await page.locator(`#${id}`).getAttribute('datetime')) ?? '')
      const offMs = Math.abs(expiresAt.getTime() - inThreeYears.getTime())
      t.ok(offMs < 60_000, `${id} is ${expiresAt.toISOString()}`)
      t.match(await page.locator(`#${id}`).textContent(), String(inThreeYears.getUTCFullYear()))
    }
    t.equal(await page.evaluate('document.cookie'), '', 'no script can read the cookie')
    await picture('3-logged-in')
  })

  await t.test('her documents are listed, page by page', async (t) => {
    const position = page.locator('#page-position')
    const newer = page.locator('#newer')
    const older = page.locator('#older')
    const firstNumber = await page.locator('#documents .number').first().textContent()
    t.equal(await position.textContent(), '1 to 10 of 19')
    t.equal(await page.locator('#documents tr').count(), 10)
    t.ok(await newer.isDisabled())
    await older.click()
    await position.filter({ hasText: '11 to 19 of 19' }).waitFor()
    t.equal(await page.locator('#documents tr').count(), 9)
    t.ok(await older.isDisabled())
    await newer.click()
    await position.filter({ hasText: '1 to 10 of 19' }).waitFor()
    t.equal(await page.locator('#documents .number').first().textContent(), firstNumber)
  })

  await t.test('an invoice is downloaded as PDF and as XML', async (t) => {
    const row = page.locator('#documents tr').first()
    for (const [format, beginning] of [
      ['PDF', '%PDF-'],
      ['XML', '<?xml'],
    ] as const) {
      const downloading = page.waitForEvent('download')
      await row.getByRole('button', { name: format }).click()
      const download = await downloading
      t.match(download.suggestedFilename(), new RegExp(`^\\w+-\\d+\\.${format.toLowerCase()}$`))
      const content = await readFile(await download.path())
      t.equal(content.subarray(0, beginning.length).toString('latin1'), beginning)
    }
  })

  await t.test('a file is sent, its progress shown, and its document appears', async (t) => {
    await slowDownUploads(page)
    await page.evaluate(WATCH_PROGRESS)
    await page.getByLabel('File').setInputFiles({
      name: 'invoice.xml',
      mimeType: 'application/xml',
      buffer: Buffer.alloc(UPLOAD_BYTES, '<!-- -->'),
    })
    t.equal(await page.getByLabel('Sending company').inputValue(), '1204551')
    await page.getByLabel('Your reference').fill('PO 4711')
    await page.getByRole('button', { name: 'Send' }).click()
    while (((await page.evaluate('Math.max(0, ...progressSeen)')) as number) < 0.3) {
      await page.waitForTimeout(20)
    }
    await picture('4-upload')
    await page.locator('#upload-state', { hasText: 'is processed' }).waitFor()
    const seen = (await page.evaluate('globalThis.progressSeen')) as number[]
    t.ok(
      new Set(seen).size >= 3,
      `progress was shown as ${seen.map((value) => value.toFixed(2)).join(' ')}`,
    )
    t.strictSame(
      seen,
      seen.toSorted((a, b) => a - b),
      'and only ever grew',
    )
    t.equal(seen.at(-1), 1)
    t.ok(await page.locator('#upload-progress').isHidden())
    t.equal(await page.locator('#documents .number').first().textContent(), 'PO 4711')
    t.equal(await page.locator('#page-position').textContent(), '1 to 10 of 20')
  })

  await t.test('what Pagero refuses is said on the page', async (t) => {
    await page.getByLabel('File').setInputFiles({
      name: 'invoice.xml',
      mimeType: 'application/xml',
      buffer: Buffer.from('<Invoice/>'),
    })
    await page.getByLabel('Sending company').fill('1209874')
    await page.getByRole('button', { name: 'Send' }).click()
    await page.locator('#problem').waitFor()
    t.match(await page.locator('#problem').textContent(), /company not allowed/)
    await picture('5-refused')
    t.match(complaints.splice(0), [/status of 403.* \/api\/file\/v1\/files$/])
    await page.getByRole('button', { name: 'Dismiss this message' }).click()
    t.notOk(await page.locator('#problem').isVisible())
  })

  await t.test('the page fits the dark and the small screen', async (t) => {
    await page.emulateMedia({ colorScheme: 'dark' })
    await picture('6-dark')
    await page.emulateMedia({ colorScheme: 'light' })
    const { width: wide = 0, height = 0 } = page.viewportSize() ?? {}
    for (const width of [390, 320]) {
      await page.setViewportSize({ width, height: 844 })
      t.strictSame(await page.evaluate(STICKING_OUT), [0, 0], `nothing sticks out at ${width} px`)
      await picture(`7-mobile-${width}`)
    }
    await page.setViewportSize({ width: wide, height })
  })

  await t.test('logging out ends the session and leaves the access', async (t) => {
    await page.getByRole('button', { name: 'Log out' }).click()
    await page.getByRole('link', { name: 'Log in with Pagero' }).waitFor()
    t.match(await fetchSession(page), { status: 401, body: { code: 'session_required' } })
    t.match(await askInternally(directory, `${internal}/pagero:alice/grant`), {
      status: 200,
      body: { state: 'active' },
    })
  })

  await t.test('Bob disconnects, and nothing of his is served any more', async (t) => {
    await page.getByRole('link', { name: 'As somebody else' }).click()
    await page.getByRole('button', { name: 'Bob Berg' }).click()
    await page.locator('#documents tr').first().waitFor()
    t.equal(await page.locator('#session-user').textContent(), 'pagero:bob')
    t.equal(
      (await askInternally(directory, `${internal}/pagero:bob/access-token`)).status,
      200,
      'before it there is a token',
    )
    await page.getByRole('button', { name: 'Disconnect…' }).click()
    const dialog = page.getByRole('dialog')
    await dialog.waitFor()
    await page.screenshot({ path: join(PICTURES, '8-disconnect.png') })
    await dialog.getByRole('button', { name: 'Disconnect' }).click()
    await page.getByRole('link', { name: 'Log in with Pagero' }).waitFor()
    t.match(await fetchSession(page), { status: 401, body: { code: 'session_required' } })
    t.match(await askInternally(directory, `${internal}/pagero:bob/grant`), {
      status: 200,
      body: { state: 'revoked' },
    })
    // What a replica knows is trusted for a second.
    await page.waitForTimeout(1_100)
    for (const path of ['access-token', 'pagero/document/v1/documents']) {
      const answer = await askInternally(directory, `${internal}/pagero:bob/${path}`)
      t.match(answer, { status: 404, body: { code: 'grant_not_found' } }, path)
    }
  })

  await t.test('the commands work as they are printed', async (t) => {
    t.equal(commands.length, 3)
    const [token, documents, grant] = await Promise.all(commands.map(runCommand))
    t.match(token, { token_type: 'Bearer', access_token: /^[\w-]+\.[\w-]+\.[\w-]+$/ })
    t.match(documents, { meta: { count: 2, limit: 2, total: 20 } })
    t.match(grant, { user: 'pagero:alice', state: 'active' })
  })

  await t.test('the documentation is shown', async (t) => {
    await page.goto(`http://127.0.0.1:${internalPort}/docs`)
    await page.locator('.opblock').first().waitFor()
    t.ok((await page.locator('.opblock').count()) > 10)
    t.strictSame(complaints, [], 'within its own policy')
    await page.goto(origin)
  })

  await t.test('the browser has nothing to complain about', async (t) => {
    t.strictSame(complaints, [])
    await page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
    await page.waitForTimeout(100)
    t.match(complaints, [/Content Security Policy/], 'it would have said so')
  })

  await t.test('Ctrl-C ends it, and the next run goes on with the data', async (t) => {
    await stop(t, first)
    const second = start()
    const { tookMs } = await second.said(/Ctrl-C stops/, READY_LIMIT_MS)
    t.ok(tookMs < READY_LIMIT_MS, `a second start takes ${Math.round(tookMs)} ms`)
    t.strictSame(printedCommands(second), commands)
    const [tokenCommand = '', documentsCommand = ''] = commands
    const token = await runCommand(tokenCommand)
    t.match(token, { token_type: 'Bearer' })
    t.match(await runCommand(documentsCommand), { meta: { count: 2 } })
    // The access token may be the old one; that a new one can be had shows that the refresh token was kept.
    const renewed = await askInternally(directory, `${internal}/pagero:alice/access-token`, {
      rejected: token['fingerprint'],
    })
    t.equal(renewed.status, 200)
    t.not(renewed.body['access_token'], token['access_token'])
    await stop(t, second)
  })
})

/** Sends the Ctrl-C of a terminal and waits for a clean end. */
async function stop(t: Test, program: Program): Promise<void> {
  const askedAtMs = performance.now()
  program.signal('SIGINT')
  t.equal(await program.exited, 0)
  const tookMs = performance.now() - askedAtMs
  t.ok(tookMs < STOP_LIMIT_MS, `a stop takes ${Math.round(tookMs)} ms`)
  t.match(program.output(), /Stopped\.\n$/)
}

/** Opens a page in Chromium that collects errors of the console and uncaught ones. */
async function openBrowser(t: Test): Promise<{ page: Page; complaints: string[] }> {
  const browser = await launchChromium(t)
  const context: BrowserContext = await browser.newContext({
    locale: 'en-GB',
    timezoneId: 'Europe/Stockholm',
    viewport: { width: 1100, height: 800 },
  })
  context.setDefaultTimeout(15_000)
  const page = await context.newPage()
  const complaints: string[] = []
  page.on('pageerror', (error) => complaints.push(error.message))
  page.on('console', (message) => {
    const { pathname } = new URL(message.location().url || 'about:blank')
    // Who is not logged in is told so by a 401, and Chromium writes each of them on the console.
    const isExpected = pathname === '/auth/session' && message.text().includes('status of 401')
    if (message.type() === 'error' && !isExpected) complaints.push(`${message.text()} ${pathname}`)
  })
  return { page, complaints }
}

async function slowDownUploads(page: Page): Promise<void> {
  const session = await page.context().newCDPSession(page)
  await session.send('Network.enable')
  await session.send('Network.emulateNetworkConditions', {
    offline: false,
    latency: 0,
    downloadThroughput: -1,
    uploadThroughput: UPLOAD_BYTES_PER_SECOND,
  })
}

/** Runs in the page: keeps what the progress bar has shown while it was visible. */
const WATCH_PROGRESS = `
  globalThis.progressSeen = []
  const bar = document.getElementById('upload-progress')
  new MutationObserver(() => {
    if (!bar.hidden) globalThis.progressSeen.push(bar.value)
  }).observe(bar, { attributes: true })
`

/** Runs in the page: by how many pixels the page and its table are wider than the place for them. */
const STICKING_OUT = `[document.documentElement, document.querySelector('.scroll')]
  .map(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)`

function fetchSession(page: Page): Promise<unknown> {
  return page.evaluate(`
    fetch('/auth/session', { headers: { 'X-CSRF': '1' } })
      .then(async (response) => ({ status: response.status, body: await response.json() }))
  `)
}

/** Asks the internal listener with the demonstration's own key; with a body it is a POST. */
async function askInternally(
  directory: string,
  url: string,
  body?: object,
): Promise<{ status: number; body: Record<string, unknown> }> {
  const header = await readFile(join(directory, 'caller.header'), 'utf8')
  const response = await fetch(url, {
    method: body === undefined ? 'GET' : 'POST',
    headers: {
      authorization: header.replace('Authorization:', '').trim(),
      'content-type': 'application/json',
    },
    body: body === undefined ? null : JSON.stringify(body),
  })
  return { status: response.status, body: (await response.json()) as Record<string, unknown> }
}

function printedCommands(program: Program): string[] {
  return [...program.output().matchAll(/^ *(curl .*)$/gm)].map(([, command = '']) => command)
}

async function runCommand(command: string): Promise<Record<string, unknown>> {
  const { stdout } = await promisify(execFile)('/bin/sh', ['-c', command], { cwd: ROOT })
  return JSON.parse(stdout) as Record<string, unknown>
}
