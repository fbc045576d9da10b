// The text at the head of the OpenAPI document: all that an integrator must know before the first call.

/** Markdown (CommonMark), as OpenAPI's `info.description` wants it. */
export const INTRODUCTION = `
The broker holds your company's access to [Pagero Online](https://www.pagero.com) on behalf of its users. A user
logs in at Pagero once; from then on the broker keeps the refresh token, renews it without loss, and gives your
services and pages what they need. No token ever reaches a browser.

## Two listeners

| listener | for | who calls is known by | paths |
| --- | --- | --- | --- |
| internal (port 3001) | backend services | API key or JWT | \`/v1/…\`, probes, this documentation |
| public (port 3000) | browsers | session cookie | \`/auth/…\`, \`/api/…\`, the login callback |

Neither serves a path of the other, but for \`/livez\`, which both have. Keep the internal one in a private network.

## Quick start for a backend

\`\`\`sh
curl -H "Authorization: Bearer $API_KEY" http://localhost:3001/v1/users/alice/access-token
\`\`\`

\`\`\`json
{ "access_token": "…", "token_type": "Bearer", "expires_in": 540, "expires_at": "2026-11-23T12:09:00.000Z",
  "scope": "", "fingerprint": "…" }
\`\`\`

Ask before each use and do not keep the token: the answer takes about a millisecond, and it is always fresh.
If you would rather not see a token at all, put \`/v1/users/alice/pagero\` before the path of the Pagero call and
send the call to the broker.

## Quick start for a page

1. Send the browser to \`/auth/login?return_to=/your/page\`.
2. It comes back to \`/your/page\` with a session cookie that scripts cannot read.
3. Call \`fetch('/api/…', { headers: { 'X-CSRF': '1' } })\`: the broker adds the token and passes the call to Pagero.
4. On a 401 with the code \`session_required\`, \`grant_not_found\` or \`reauthentication_required\`, begin again at 1.

## Authentication

**Internal listener.** \`Authorization: Bearer pgb_<id>_<secret>\`, or a JWT of an issuer that the operator has listed in its
place, and nothing else: a credential in a query, a body or a cookie does not count. The operator gives each caller its *rights*, and the *users* it may see:

| right | allows |
| --- | --- |
| \`token:read\` | to be given access tokens, and to report one that Pagero refused |
| \`proxy:call\` | calls to Pagero through the broker; for a gateway, to ask whether a call may pass and with which token |
| \`grant:read\` | to look at a grant |
| \`grant:manage\` | to connect and disconnect a user, to take over a refresh token, to end browser sessions, and to have a webhook event delivered again |
| \`ops:read\` | to list grants and webhook deliveries, and to read the ledger of refreshes and the audit record |

A user that does not exist and a user that the caller may not see are the same answer, \`grant_not_found\`.

**Public listener.** The cookie \`__Host-broker-session\`, and with every call the header \`X-CSRF: 1\`. The call
must come from a page of the same origin, or of one that the operator has listed.

## Users

\`{user}\` is a key of 1 to 255 characters of \`A-Z a-z 0-9 . _ ~ @ : + -\`, compared byte for byte. After a login it is
\`pagero:<sub>\`, with the subject that Pagero gives the user. A user of your own, under a key of your own, connects with a connect
link: \`POST /v1/users/{user}/connect-links\`, and \`POST /v1/users/{user}/grant/confirm\` when the browser has come back.

## The life of a token

- An **access token** lives 600 seconds at Pagero, until its \`expires_at\`. The broker renews it ahead of time, and never hands out one with less
  than \`min_ttl\` seconds left (30 unless you say otherwise).
- A **refresh token** works once; each use brings the next. The broker alone ever has it.
- If Pagero answers 401 to a token that should be good, report it: \`POST …/access-token\` with
  \`{"rejected": "<fingerprint>"}\`. The token is replaced if it is still the current one; if somebody was faster, you are
  given theirs. The fingerprint is base64url(SHA-256(access token)), so you can compute it yourself.
- A **grant** lives three years from its last renewal, or from the last login: Pagero does not say which, so its \`expires_at\` is the
  earlier of the two. It ends sooner when Pagero refuses its refresh token for good; then the answer is
  \`reauthentication_required\`, with the \`cause\`, and only a login helps. No outage, time-out or wrong setting is ever reported
  with that code.

## Errors

Every error is a problem document ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)) of type
\`application/problem+json\`. Decide by \`code\`; \`title\` and \`detail\` are for people. \`type\` is the path of a page on
the internal listener that explains the code, and \`instance\` names the request in the broker's log.

| you get | do |
| --- | --- |
| 503 or 429 | try again after \`Retry-After\` seconds; nothing is lost |
| 409 \`reauthentication_required\` | let the user log in again |
| 404 \`grant_not_found\` | let the user log in or connect for the first time |
| 409 \`confirmation_pending\` | confirm what the user's connect link brought |
| 401, 403 on the internal listener | correct the key, or ask the operator for the right |
| other 4xx | correct the request; it fails again as it is |
| 502, 504 | Pagero did not answer a proxied call; before you repeat a POST, see whether it was carried out |

Answers of Pagero to a proxied call pass through as they are. The header \`Proxy-Status\`
([RFC 9209](https://www.rfc-editor.org/rfc/rfc9209)) says which side an error came from.

## Conventions

Times are RFC 3339 in UTC. Unknown members of a body and unknown query parameters are refused with 400. Lists answer
\`{items, next}\`; give \`next\` as \`after\` to read on. Send \`X-Request-Id\` with a UUID to find your request in the log,
and on the internal listener \`traceparent\` to find it in your trace, where the operator has them collected.
`.trim()
