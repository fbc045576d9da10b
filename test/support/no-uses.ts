// Where uses of credentials are noted by a test that has no database and does not ask for them.

import type { CredentialUseStore } from '../../src/record-stores.ts'

export const noUses: CredentialUseStore = {
  note: async () => undefined,
  list: async () => [],
}
