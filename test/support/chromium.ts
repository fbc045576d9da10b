// The real browser, without what it would do on the network by itself.

import { existsSync } from 'node:fs'
import { type Browser, chromium } from 'playwright-core'
import type { Test } from 'tap'

const CHROMIUM = '/usr/bin/chromium'

/** Why a test that needs Chromium is skipped, or false. */
export const withoutChromium =
  !existsSync(CHROMIUM) && `${CHROMIUM} is missing: install the package chromium`

const ARGUMENTS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]

/** Starts Chromium with further arguments; it ends with the test. */
export async function launchChromium(test: Test, args: readonly string[] = []): Promise<Browser> {
  const browser = await chromium.launch({
    executablePath: CHROMIUM,
    headless: true,
    args: [...ARGUMENTS, ...args],
  })
  test.teardown(() => browser.close())
  return browser
}
