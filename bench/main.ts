// The command line of the measurements: `npm run bench -- token`, for example. Each prints a table of ratios, taken side by side in
// one run on one machine: absolute figures do not carry over from one machine to another, ratios nearly do.

import { parseArgs } from 'node:util'
import { measureForwardAuth } from './forward-auth.ts'
import { measureOverload } from './overload.ts'
import { measureProxy } from './proxy.ts'
import { measureTokenPath } from './token.ts'

const MEASUREMENTS: Readonly<Record<string, (options: { quick: boolean }) => Promise<void>>> = {
  token: measureTokenPath,
  'forward-auth': measureForwardAuth,
  proxy: measureProxy,
  overload: measureOverload,
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    /** For those that know it: a run that shows that everything works, with figures that are not worth quoting. */
    quick: { type: 'boolean', default: false },
  },
})
const [name = ''] = positionals
const measure = MEASUREMENTS[name]
if (measure === undefined) {
  process.stderr.write(`Say which: npm run bench -- ${Object.keys(MEASUREMENTS).join(' | ')}\n`)
  process.exitCode = 2
} else {
  await measure(values)
}
