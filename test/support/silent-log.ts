// A log that keeps nothing.

import type { Log } from '../../src/ports.ts'

export const silentLog: Log = {
  trace() {},
  debug() {},
  info() {},
  warn() {},
  error() {},
}
