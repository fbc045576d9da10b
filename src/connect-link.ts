// Connect links: an application sends the browser of its own user to Pagero. What comes back is the business of
// `login.ts`, and until the application has confirmed whose browser it was, of `pending-grant.ts`.

import { BrokerError } from './errors.ts'
import {
  type BegunLogin,
  LOGIN_LIMITS,
  type LoginRequest,
  type LoginSettings,
  startLogin,
} from './login.ts'
import type { UserKey } from './grant.ts'
import { hashOpaqueToken, isOpaqueToken, newOpaqueToken } from './opaque-token.ts'
import type { Ports } from './ports.ts'
import type { ConnectRequest } from './login-stores.ts'
import { parseReturnTo, type ReturnOrigins } from './return-to.ts'

/**
 * Makes a link that sends one browser to Pagero, once, and returns its address.
 *
 * @throws BrokerError `request_invalid` when `returnTo` is neither a path of ours nor on a listed origin,
 *   `temporarily_unavailable`
 */
export async function createConnectLink(
  ports: Pick<Ports, 'connectLinks'>,
  settings: ReturnOrigins,
  request: ConnectRequest & { returnTo: string; ttlSeconds: number },
): Promise<{ url: string; expiresAt: Date }> {
  const { ttlSeconds, ...link } = request
  // A login falls back to the front page. A backend can be told, and its user would be lost there.
  const returnTo = parseReturnTo(link.returnTo, settings)
  if (returnTo === undefined) {
    throw new BrokerError(
      'request_invalid',
      'return_to is neither a path of the broker’s own origin nor an address on an origin that is listed.',
      { errors: [{ pointer: 'body/return_to', detail: 'leads elsewhere, or is too long' }] },
    )
  }
  const ticket = newOpaqueToken()
  const { expiresAt } = await ports.connectLinks.create(
    { ...link, returnTo, ticketHash: hashOpaqueToken(ticket) },
    ttlSeconds,
  )
  return { url: `${settings.publicUrl}/auth/connect/${ticket}`, expiresAt }
}

/**
 * Opens a link: uses it up, begins its login in this browser, and returns where to send it. Of two that open it at once,
 * on whatever replica, one gets through.
 *
 * @throws BrokerError `login_transaction_invalid`, with a sentence for the person who opened it; `temporarily_unavailable`
 */
export async function openConnectLink(
  ports: Pick<Ports, 'sealer' | 'connectLinks' | 'authorizationServer'>,
  settings: Pick<LoginSettings, 'pkce' | 'scope'>,
  request: LoginRequest & { ticket: string },
): Promise<BegunLogin & { user: UserKey }> {
  if (!isOpaqueToken(request.ticket)) throw linkInvalid('This is no link that the broker has made.')
  const ticketHash = hashOpaqueToken(request.ticket)
  const { login, ...begun } = startLogin(ports, settings, request)
  const opened = await ports.connectLinks.open(ticketHash, login, LOGIN_LIMITS)
  if (opened === undefined) {
    const link = await ports.connectLinks.find(ticketHash)
    if (link === undefined) throw linkInvalid('This link is not known, or no longer.')
    throw linkInvalid(
      link.isUsed
        ? "This link has been opened before, and works once. If Pagero's page is still open, go on there."
        : 'This link is too old.',
      link.returnTo,
    )
  }
  return { ...begun, ...opened }
}

function linkInvalid(reason: string, returnTo?: string): BrokerError {
  return new BrokerError(
    'login_transaction_invalid',
    `${reason} To begin again, go back to the application: it makes a new link.`,
    returnTo === undefined ? {} : { returnTo },
  )
}
