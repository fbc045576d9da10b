// What goes over the wire, member for member as the OpenAPI document has it.

/** An access token, and how long it lives. */
export interface AccessToken {
  access_token: string
  token_type: 'Bearer'
  /** Seconds that it still lived when the broker answered. */
  expires_in: number
  expires_at: string
  /** As Pagero granted it; empty is normal there. */
  scope: string
  /** base64url of SHA-256 of the access token. */
  fingerprint: string
}

/** What a user gave the broker at Pagero. Instants are RFC 3339 in UTC. */
export interface Grant {
  user: string
  state: string
  /** Why it is in another state than `active`. */
  cause: string | null
  scope: string
  generation: number
  key_id: string | null
  rolling_expires_at: string
  absolute_expires_at: string
  /** The earlier of the two. */
  expires_at: string
  authenticated_at: string
  rotated_at: string
  last_used_at: string | null
  next_retry_at: string | null
  pagero: { issuer: string | null; subject: string | null }
}

/** One line of the ledger of refreshes. */
export interface RefreshAttempt {
  attempt_id: string
  generation: number
  cause: string
  replica: string
  armed_at: string
  finished_at: string | null
  outcome: string | null
  http_status: number | null
  duration_ms: number | null
}

/** A page of a list; `next` is the cursor of the one behind it, for `after`. */
export interface Page<T> {
  items: T[]
  next: string | null
}

/** A link that sends one browser to Pagero, once. */
export interface ConnectLink {
  url: string
  expires_at: string
}

/** What a connect link is made of; see `POST /v1/users/{user}/connect-links`. */
export interface ConnectLinkOptions {
  return_to: string
  confirm?: boolean
  start_session?: boolean
  allow_account_change?: boolean
  /** Seconds within which it has to be opened. */
  ttl?: number
}

/** A grant that was confirmed, and where its browser begins a session. */
export interface ConfirmedGrant extends Grant {
  session_url?: string
}
