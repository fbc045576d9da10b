// A log that keeps its events for assertions.

import type { Log, LogFields } from '../../src/ports.ts'

export interface LoggedEvent extends LogFields {
  level: string
  event: string
}

export function keepingLog(): Log & { events: LoggedEvent[] } {
  const events: LoggedEvent[] = []
  const at =
    (level: string) =>
    (event: string, fields: LogFields = {}) => {
      events.push({ level, event, ...fields })
    }
  return {
    events,
    trace: at('trace'),
    debug: at('debug'),
    info: at('info'),
    warn: at('warn'),
    error: at('error'),
  }
}
