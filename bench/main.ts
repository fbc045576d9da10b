// The command line of the measurements: `npm run bench -- token`. Each prints a table of ratios, taken side by side in
// one run on one machine: absolute figures do not carry over from one machine to another, ratios nearly do.

import { measureForwardAuth } from './forward-auth.ts'
import { measureTokenPath } from './token.ts'

const MEASUREMENTS: Readonly<Record<string, () => Promise<void>>> = {
  token: measureTokenPath,
  'forward-auth': measureForwardAuth,
}

const [name = ''] = process.argv.slice(2)
const measure = MEASUREMENTS[name]
if (measure === undefined) {
  process.stderr.write(`Say which: npm run bench -- ${Object.keys(MEASUREMENTS).join(' | ')}\n`)
  process.exitCode = 2
} else {
  await measure()
}
