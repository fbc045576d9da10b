// What the log says of security, the audit record says as well: one table of the log's events that go on record, so that
// neither can forget what the other tells.

import type { AuditDetails, AuditEvent } from './audit-event.ts'
import { BrokerError } from './errors.ts'
import type { UserKey } from './grant.ts'
import type { Log, LogFields } from './ports.ts'
import type { Audit } from './record-stores.ts'

/** Events of the log that are also events of the record, and by whom they are where no caller is named. */
const ON_RECORD: Readonly<Record<string, Pick<AuditEvent, 'action' | 'actor' | 'outcome'>>> = {
  grant_condemned: { action: 'grant_condemned', actor: 'broker', outcome: 'failed' },
  import_refused: { action: 'import_refused', actor: 'broker', outcome: 'refused' },
  import_overtaken: { action: 'import_refused', actor: 'broker', outcome: 'refused' },
  rate_limited: { action: 'rate_limited', actor: 'anyone', outcome: 'refused' },
  database_not_accepted: { action: 'database_not_accepted', actor: 'broker', outcome: 'refused' },
  encryption_key_unusable: {
    action: 'encryption_key_unusable',
    actor: 'broker',
    outcome: 'failed',
  },
  callers_file_loaded: { action: 'callers_loaded', actor: 'operator' },
  callers_file_invalid: { action: 'callers_refused', actor: 'operator', outcome: 'refused' },
  caller_key_added: { action: 'caller_key_added', actor: 'operator' },
  caller_key_removed: { action: 'caller_key_removed', actor: 'operator' },
  breaker_opened: { action: 'breaker_opened', actor: 'broker', outcome: 'failed' },
  breaker_closed: { action: 'breaker_closed', actor: 'broker' },
  webhook_dead: { action: 'webhook_dead', actor: 'broker', outcome: 'failed' },
}

/** Members of a log line that go along, each a detail of the same name. */
const DETAILS = ['reason', 'cause', 'generation', 'address', 'keyId'] as const

/** Returns a log that also puts on record what belongs there. */
export function createAuditedLog(log: Log, audit: Audit): Log {
  const at =
    (level: 'info' | 'warn' | 'error') =>
    (event: string, fields: LogFields = {}): void => {
      log[level](event, fields)
      const known = Object.hasOwn(ON_RECORD, event) ? ON_RECORD[event] : undefined
      if (known !== undefined) audit.record(eventOf(known, fields))
      else if (tellsOfIntegrity(fields)) {
        audit.record(
          eventOf(
            { action: 'integrity_failure', actor: 'broker', outcome: 'failed' },
            { ...fields, reason: event },
          ),
        )
      }
    }
  return {
    ...log,
    trace: (event, fields) => log.trace(event, fields),
    debug: (event, fields) => log.debug(event, fields),
    info: at('info'),
    warn: at('warn'),
    error: at('error'),
  }
}

function eventOf(
  known: Pick<AuditEvent, 'action' | 'actor' | 'outcome'>,
  fields: LogFields,
): AuditEvent {
  const { caller, user, requestId, eventId } = fields
  const details: AuditDetails = { ...(eventId === undefined ? {} : { id: eventId }) }
  for (const name of DETAILS) {
    if (fields[name] !== undefined) Object.assign(details, { [name]: fields[name] })
  }
  return {
    ...known,
    ...(caller === undefined ? {} : { actor: 'caller', name: caller }),
    ...(user === undefined ? {} : { user: user as UserKey }),
    ...(requestId === undefined ? {} : { requestId }),
    details,
  }
}

/** A sealed value that did not open, whoever met it. */
function tellsOfIntegrity({ code, error }: LogFields): boolean {
  if (code === 'integrity_failure') return true
  return error instanceof BrokerError && error.code === 'integrity_failure'
}
