// Which access tokens are alive, for the API of the look-alike. One way for JWT and opaque ones alike:
// the digest of each token that was handed out is kept until it runs out, or its login is revoked.

import { createHash } from 'node:crypto'
import type { Adapter } from 'oidc-provider'
import { type Account, accountOf } from './accounts.ts'

interface Issued {
  subject: string
  grantId: string
  expiresAtMs: number
}

export interface IssuedAccessTokens {
  add(accessToken: string, issued: Issued): Promise<void>
  /** Returns whose token it is, or undefined when it is unknown, expired, revoked or rejected. */
  find(accessToken: string): Promise<Account | undefined>
  reject(accessToken: string): Promise<void>
  revokeGrant(grantId: string): Promise<void>
}

/** Keeps the digests in the adapter's store, so that they last as long as the refresh tokens do. */
export function createIssuedAccessTokens(adapter: Adapter): IssuedAccessTokens {
  return {
    async add(accessToken, { subject, grantId, expiresAtMs }) {
      const lifeSeconds = Math.max(1, (expiresAtMs - Date.now()) / 1000)
      const payload = { accountId: subject, grantId, exp: expiresAtMs / 1000 }
      await adapter.upsert(idOf(accessToken), payload, lifeSeconds)
    },
    async find(accessToken) {
      const issued = await adapter.find(idOf(accessToken))
      if (!issued || (issued.exp ?? 0) * 1000 <= Date.now()) return undefined
      return accountOf(issued.accountId ?? '')
    },
    async reject(accessToken) {
      await adapter.destroy(idOf(accessToken))
    },
    async revokeGrant(grantId) {
      await adapter.revokeByGrantId(grantId)
    },
  }
}

function idOf(accessToken: string): string {
  return createHash('sha256').update(accessToken).digest('base64url')
}
