// Every setting: its name, its default as text, and what it is. The one place where a default stands.
// README's table is made from this one. What a value may be is said by config.ts.

export interface Setting {
  name: string
  /** As it would stand in the environment. Undefined: there is none, and `meaning` says what that brings. */
  default: string | undefined
  /** Without it the broker does not start. */
  required?: true
  /** What it is and, for a number, why this one. Markdown. */
  meaning: string
}

/** In the order of the documentation. The environment variable `NAME_FILE` names a file that holds the value instead. */
export const SETTINGS = [
  {
    name: 'DATABASE_URL',
    default: undefined,
    meaning:
      '`postgres://…`. Unset, an embedded PostgreSQL runs under `./data/postgres`: for development only.',
  },
  {
    name: 'MIGRATE_AT_START',
    default: 'true',
    meaning:
      '`false`: `broker migrate` is run apart, and a start without its migrations is refused.',
  },
  {
    name: 'ALLOW_UNSAFE_DATABASE',
    default: 'false',
    meaning:
      '`true` starts on a PostgreSQL that may forget a commit (`fsync`, `full_page_writes` or `synchronous_commit` off). Every refresh is then a grant at risk: for tests alone.',
  },
  {
    name: 'ENCRYPTION_KEYS',
    default: undefined,
    required: true,
    meaning:
      '`kid:base64` of 32 random bytes each, separated by commas or lines; `broker keys generate` makes one. The first seals, all of them open.',
  },
  {
    name: 'PAGERO_CLIENT_ID',
    default: undefined,
    required: true,
    meaning: 'Id of the client that Pagero has registered for you.',
  },
  {
    name: 'PAGERO_CLIENT_SECRET',
    default: undefined,
    required: true,
    meaning: 'Secret of that client.',
  },
  {
    name: 'PAGERO_CLIENT_SECRET_NEXT',
    default: undefined,
    meaning: 'A second secret, tried when Pagero refuses the first: for changing it without a gap.',
  },
  {
    name: 'PAGERO_REDIRECT_URI',
    default: undefined,
    required: true,
    meaning:
      'Redirect URI exactly as registered; sent byte for byte. `http://` on a loopback host only, as for every URL here.',
  },
  {
    name: 'PAGERO_CLIENT_AUTH',
    default: 'client_secret_basic',
    meaning: 'Or `client_secret_post`.',
  },
  { name: 'PAGERO_PKCE', default: 'off', meaning: 'Or `S256`, which Pagero recommends.' },
  {
    name: 'PAGERO_SCOPE',
    default: 'all openid',
    meaning:
      'Sent as it is. Empty: not sent. `openid` brings the ID token that says who logged in.',
  },
  {
    name: 'PAGERO_ISSUER',
    default: undefined,
    meaning:
      "Set, the `iss` of every answer and ID token must be it (RFC 9207). Pagero's is not published.",
  },
  {
    name: 'PAGERO_JWKS_URL',
    default: undefined,
    meaning: 'Set, the signature of ID tokens is checked with the keys found there.',
  },
  {
    name: 'PAGERO_AUTHORIZE_URL',
    default: 'https://sso.pageroonline.com/oauth/v2/oauth-authorize',
    meaning: 'Where browsers are sent to log in.',
  },
  {
    name: 'PAGERO_TOKEN_URL',
    default: 'https://sso.pageroonline.com/oauth/v2/oauth-token',
    meaning: 'Where codes and refresh tokens are presented.',
  },
  {
    name: 'PAGERO_REVOKE_URL',
    default: 'https://sso.pageroonline.com/oauth/v2/oauth-revoke',
    meaning: 'Where refresh tokens are revoked.',
  },
  {
    name: 'PAGERO_API_URL',
    default: 'https://api.pageroonline.com',
    meaning: 'Origin of the API behind the proxy.',
  },
  {
    name: 'ALLOW_PRIVATE_UPSTREAMS',
    default: 'false',
    meaning:
      'Or `true`: the hosts of these URLs may have addresses of private networks, where your way out or a stand-in of Pagero is. Else such an answer of a resolver is refused, so that nobody who turns a name gets a token.',
  },
  {
    name: 'SUBJECT_CLAIM',
    default: 'sub',
    meaning: 'Claim of the ID token that names the user.',
  },
  {
    name: 'REFRESH_TOKEN_LIFETIME',
    default: 'P3Y',
    meaning: "ISO 8601 duration in years, months and days. Three years is Pagero's.",
  },
  {
    name: 'PUBLIC_URL',
    default: undefined,
    meaning:
      'Origin that browsers see, on the host of `PAGERO_REDIRECT_URI`. Unset: the origin of that.',
  },
  { name: 'PUBLIC_HOST', default: '0.0.0.0', meaning: 'Address that the public listener binds.' },
  { name: 'PUBLIC_PORT', default: '3000', meaning: 'Its port.' },
  {
    name: 'INTERNAL_HOST',
    default: '0.0.0.0',
    meaning: 'Address that the internal listener binds. Keep it off the internet.',
  },
  { name: 'INTERNAL_PORT', default: '3001', meaning: 'Its port.' },
  {
    name: 'CALLERS_FILE',
    default: undefined,
    meaning: 'JSON file of the services that may call the internal listener. Unset: nobody may.',
  },
  {
    name: 'ALLOWED_ORIGINS',
    default: undefined,
    meaning: 'Origins besides our own whose pages may call, separated by commas. Unset: none.',
  },
  {
    name: 'TRUSTED_PROXIES',
    default: undefined,
    meaning:
      'Addresses and CIDR blocks, separated by commas, whose `X-Forwarded-For` is believed. Unset: nobody.',
  },
  {
    name: 'RATE_LIMIT_PER_CALLER',
    default: '0',
    meaning:
      'Requests a second of one caller, for each replica. 0: no limit, because what a service needs is known to whoever listed it, and a token from memory costs next to nothing.',
  },
  {
    name: 'RATE_LIMIT_PER_USER',
    default: '0',
    meaning:
      "The same of one user, from all callers together on the internal listener, and from all of his browsers on the public one. Set it where one user's storm must leave the proxied calls of others alone.",
  },
  {
    name: 'RATE_LIMIT_PER_ADDRESS',
    default: '50',
    meaning:
      'The same of one address (IPv6: a /64) for what comes without a good credential: logins, calls without a session, wrong keys. 50: an office of a thousand behind one address logs in within a minute.',
  },
  {
    name: 'SPOOL_DIR',
    default: './data/spool',
    meaning:
      'Directory of this replica alone, on a disk that outlives its restart: token answers on their way into the database.',
  },
  {
    name: 'REPLICA_NAME',
    default: undefined,
    meaning: 'Name of this replica, the same after each restart. Unset: the host name.',
  },
  { name: 'LOG_LEVEL', default: 'info', meaning: '`trace`, `debug`, `info`, `warn` or `error`.' },
  {
    name: 'OTEL_EXPORTER_OTLP_ENDPOINT',
    default: undefined,
    meaning:
      'Where traces go: an OpenTelemetry collector that takes OTLP over HTTP, such as `http://collector:4318`; `/v1/traces` is put behind it. Unset: no traces.',
  },
  {
    name: 'OTEL_EXPORTER_OTLP_HEADERS',
    default: undefined,
    meaning:
      'Fields that the collector wants with each request, such as `x-api-key=…`: pairs separated by commas, values percent-encoded.',
  },
  {
    name: 'OTEL_SERVICE_NAME',
    default: 'pagero-token-broker',
    meaning: 'What traces call the broker.',
  },
  {
    name: 'OTEL_TRACES_SAMPLER_ARG',
    default: '1',
    meaning:
      'Of the requests that bring no decision along, the share that is traced, from 0 to 1. What a calling service has decided, by its `traceparent`, holds.',
  },
  {
    name: 'AUDIT_RETENTION_DAYS',
    default: '400',
    meaning: 'How long the audit record is kept: a year, and a month to look into it. 0: for good.',
  },
  {
    name: 'SHUTDOWN_LISTEN_SECONDS',
    default: '5',
    meaning: 'After SIGTERM, how long requests are still accepted, for a balancer to notice.',
  },
  {
    name: 'OVERLOAD_DELAY_MS',
    default: '200',
    meaning:
      'A process that comes to its timers later than this, three times in a row, refuses so much of what costs work that it is on time again; a healthy one is late by a few milliseconds. 0: nothing is refused for that, nor for statements that pile up.',
  },
  {
    name: 'SESSION_IDLE_SECONDS',
    default: '3600',
    meaning: 'A browser session ends after so long without a request: an hour.',
  },
  {
    name: 'SESSION_ABSOLUTE_SECONDS',
    default: '43200',
    meaning:
      'A browser session ends so long after its login, used or not: a working day, 12 hours.',
  },
  {
    name: 'SESSIONS_PER_USER_MAX',
    default: '10',
    meaning:
      'The oldest session of a user ends when there would be more: some browsers on some devices.',
  },
  {
    name: 'TOKEN_CACHE_TRUST_MS',
    default: '1000',
    meaning:
      'How long an access token is served from memory without asking the database: a revocation holds everywhere within it.',
  },
  {
    name: 'STALE_LIMIT_SECONDS',
    default: '60',
    meaning: 'How long known tokens are served while the database is away. 0: not at all.',
  },
  {
    name: 'REFRESH_DEADLINE_SECONDS',
    default: '45',
    meaning:
      "A token request has failed after this: longer than the 30 s of usual gateways before Pagero's server.",
  },
  {
    name: 'REFRESH_SEND_DEADLINE_SECONDS',
    default: '5',
    meaning: 'A refresh token that has not been sent by then is not sent any more.',
  },
  {
    name: 'REFRESH_LEASE_SECONDS',
    default: '60',
    meaning: 'Nobody else presents the token for so long: the deadline and a margin of 15 s.',
  },
  {
    name: 'REFRESH_AHEAD_SECONDS',
    default: '120',
    meaning:
      'Renewal begins when this much life is left: enough to sit out a lease and a margin unnoticed.',
  },
  {
    name: 'REFRESH_AHEAD_JITTER_SECONDS',
    default: '30',
    meaning: 'Spread of that moment, so that many users are not renewed at once.',
  },
  {
    name: 'DEFAULT_MIN_TTL_SECONDS',
    default: '30',
    meaning: 'Life that a token handed out has left at least, when the request does not say.',
  },
  {
    name: 'CALLER_WAIT_SECONDS',
    default: '10',
    meaning: 'How long a request waits for a refresh, which itself goes on. At most 30.',
  },
  {
    name: 'FORCED_REFRESH_INTERVAL_SECONDS',
    default: '30',
    meaning: 'A reported token is renewed at most once in this time for a user.',
  },
  {
    name: 'REFUSAL_CONFIRM_SECONDS',
    default: '3',
    meaning: 'A first refusal is asked again after this, before a login is asked for.',
  },
  {
    name: 'ZOMBIE_WAIT_SECONDS',
    default: '600',
    meaning:
      'How long a late answer of a lost replica may still come: the life of an access token.',
  },
  {
    name: 'UNKNOWN_SETTLE_SECONDS',
    default: '5',
    meaning: 'Pause after an attempt of unknown end, for the server to have finished it.',
  },
  {
    name: 'DATABASE_SETTLE_SECONDS',
    default: '15',
    meaning:
      'After a database outage, how long others may first store what they hold: three heartbeats.',
  },
  {
    name: 'ANTI_ENTROPY_SECONDS',
    default: '30',
    meaning: 'How often the spool is compared with the database.',
  },
  {
    name: 'SPOOL_RETENTION_SECONDS',
    default: '900',
    meaning:
      'How long an entry is kept once stored, or until a later one of its login is: longer than a database failover takes. Of more than 90,000 the oldest go after a minute.',
  },
  {
    name: 'HEARTBEAT_SECONDS',
    default: '5',
    meaning: 'How often a replica says that it lives.',
  },
  {
    name: 'HEARTBEAT_STALE_SECONDS',
    default: '20',
    meaning: 'A replica silent for so long counts as lost: three heartbeats missed.',
  },
  {
    name: 'BREAKER_PROBE_SECONDS',
    default: '5',
    meaning: 'While Pagero is away, one attempt in this time.',
  },
  {
    name: 'RETRY_BACKOFF_SECONDS',
    default: '2',
    meaning: 'First pause after a failed attempt; doubles up to 900.',
  },
  {
    name: 'REFRESH_GRACE_SECONDS',
    default: undefined,
    meaning:
      "Pagero's grace for a used refresh token, when known. Under 70, deadline and lease must fit into it.",
  },
  {
    name: 'REFRESH_CONCURRENCY',
    default: '20',
    meaning:
      'Token requests at a time, for a replica: a hundred users a second at 200 ms each. Others wait for their turn. Until Pagero has accepted the client once, ten at most.',
  },
  {
    name: 'WEBHOOK_URL',
    default: undefined,
    meaning:
      'Where events of grants are posted to: an `https://` URL, or `http://` on a loopback host. Unset: nobody is told, and nothing is kept.',
  },
  {
    name: 'WEBHOOK_SECRET',
    default: undefined,
    meaning:
      '`whsec_` and the base64 of 24 to 64 random bytes, to sign with; two, separated by a comma or a space, while one replaces the other. Required with `WEBHOOK_URL`.',
  },
  {
    name: 'WEBHOOK_TIMEOUT_SECONDS',
    default: '10',
    meaning:
      'A delivery without an answer has failed after this: receivers should answer first and work afterwards.',
  },
  {
    name: 'WEBHOOK_BACKOFF_SECONDS',
    default: '5',
    meaning: 'First pause after a failed delivery; doubles up to 3600.',
  },
  {
    name: 'PROXY_REQUEST_BYTES_MAX',
    default: '2147483648',
    meaning:
      'Largest request body that is forwarded: 2 GiB, so that a file of 1 GiB passes in its form.',
  },
  {
    name: 'PROXY_RESPONSE_BYTES_MAX',
    default: '2147483648',
    meaning: 'Largest response body that is forwarded.',
  },
  {
    name: 'PROXY_CONNECT_TIMEOUT_MS',
    default: '3000',
    meaning: 'For a connection to the API: room for one lost SYN and TLS.',
  },
  {
    name: 'PROXY_HEADERS_TIMEOUT_MS',
    default: '60000',
    meaning:
      'For the first byte of its answer, and before that for a free connection: what most gateways allow.',
  },
  {
    name: 'PROXY_IDLE_TIMEOUT_MS',
    default: '30000',
    meaning:
      'Between two pieces of a body; and, on both listeners, how long a client may read nothing of an answer that waits for it.',
  },
  {
    name: 'PROXY_TOTAL_TIMEOUT_MS',
    default: '900000',
    meaning: 'For a whole call: 2 GiB at 20 Mbit/s take a little less.',
  },
  {
    name: 'PROXY_REQUEST_BYTES_PER_SECOND_MIN',
    default: '500',
    meaning:
      'A request body that comes more slowly, on the average over `PROXY_IDLE_TIMEOUT_MS`, is given up: half a kilobyte a second passes on the worst of mobile networks. 0: no limit.',
  },
  {
    name: 'PROXY_CONNECTIONS',
    default: '64',
    meaning: 'Connections to the API at a time, for a replica.',
  },
  {
    name: 'PROXY_CONNECTIONS_PER_USER',
    default: '32',
    meaning:
      "How many of them calls of one user hold at a time: half, so that one user's slow transfers leave the rest to others. Raise it to `PROXY_CONNECTIONS` where all calls are one user's.",
  },
  {
    name: 'PROXY_WAITING_MAX',
    default: '256',
    meaning:
      "Calls that wait for one of them, as large a part of them one user's as of the connections; further ones are `503`. Four for each connection: at 200 ms a call, the last waits a second.",
  },
] as const satisfies readonly Setting[]

export type SettingName = (typeof SETTINGS)[number]['name']

/** Returns the settings as a Markdown table, for README. */
export function settingsMarkdown(): string {
  const rows = SETTINGS.map((setting: Setting) => {
    const fallback = setting.required ? 'required' : setting.default && `\`${setting.default}\``
    return `| \`${setting.name}\` | ${fallback ?? ''} | ${setting.meaning} |`
  })
  return ['| variable | default | |', '| --- | --- | --- |', ...rows, ''].join('\n')
}
