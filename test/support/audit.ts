// Reading the audit record of a test's database.

import type { AuditRow } from '../../src/audit-event.ts'
import type { AuditFilter } from '../../src/record-stores.ts'
import type { Engine } from './engine.ts'

/** The newest thousand events. */
export const EVERY_EVENT: AuditFilter = {
  users: ['*'],
  user: undefined,
  action: undefined,
  after: undefined,
  limit: 1_000,
}

/** Everything on record of access tokens that were given out, the newest first. */
export async function handOutsOf({ audit, ports }: Engine): Promise<AuditRow[]> {
  await audit.flush()
  return ports.auditEvents.list({ ...EVERY_EVENT, action: 'token_handed_out' })
}
