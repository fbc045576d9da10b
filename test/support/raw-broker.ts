// A broker process, as it is run, between raw sockets: an upstream that keeps every byte, and users who may call through
// either listener. What reaches the upstream is told apart by the access token, which no client can choose.

import type { Test } from 'tap'
import { issueSession } from '../../src/session.ts'
import { createSessionStore } from '../../src/postgres/session-store.ts'
import { type Fleet, setFleet, userKeyOf } from './fleet.ts'
import type { Replica } from './replica.ts'
import { answer, startUpstream, type Upstream, type UpstreamCall } from './upstream.ts'

/** Longer than any run: a renewed token would be another one. */
const TOKEN_LIFE_SECONDS = 86_400

/** One user at one listener. */
export interface Seat {
  listener: 'public' | 'internal'
  port: number
  /** Path that stands for the API's root. */
  prefix: string
  /** The field lines that say who calls. */
  who: string
  /** The session cookie, where there is one. */
  cookie: string
  /** What the upstream sees of the user. */
  accessToken: string
}

export interface RawBroker {
  fleet: Fleet
  replica: Replica
  upstream: Upstream
  /** Seats one more user at each listener. */
  seat(user: string): Promise<Seat[]>
}

/** Starts the process with everything around it; all of it ends with the test, or with the `teardown` that is given. */
export async function startRawBroker(
  t: Pick<Test, 'teardown'>,
  options: {
    databaseUrl: string
    env?: Readonly<Record<string, string>>
    respond?: (call: UpstreamCall) => unknown
  },
): Promise<RawBroker> {
  const upstream = await startUpstream(t, options.respond ?? answerWhole)
  const fleet = await setFleet({
    url: options.databaseUrl,
    accessTokenLifeSeconds: TOKEN_LIFE_SECONDS,
    env: { PAGERO_API_URL: upstream.url, TOKEN_CACHE_TRUST_MS: '1000', ...options.env },
  })
  t.teardown(() => fleet.stop())
  const replica = await fleet.add()
  const sessions = createSessionStore(fleet.database.db)
  const { authorization } = replica
  return {
    fleet,
    replica,
    upstream,
    async seat(user) {
      await fleet.connect([user])
      const { token } = await issueSession({ sessions }, userKeyOf(user), {
        settings: { idleSeconds: 86_400, absoluteSeconds: 86_400, perUserMax: 20 },
        replacesHash: null,
      })
      const accessToken = String((await replica.token(user)).body['access_token'])
      return [
        {
          listener: 'public',
          port: Number(new URL(replica.publicOrigin).port),
          prefix: '/api',
          cookie: `__Host-broker-session=${token}`,
          who: `Cookie: __Host-broker-session=${token}\r\nX-CSRF: 1\r\nSec-Fetch-Site: same-origin`,
          accessToken,
        },
        {
          listener: 'internal',
          port: Number(new URL(replica.origin).port),
          prefix: `/v1/users/${user}/pagero`,
          cookie: '',
          who: `Authorization: ${authorization}`,
          accessToken,
        },
      ]
    },
  }
}

/** Answers when the whole request is there, with a body where one may be. */
function answerWhole(call: UpstreamCall): void {
  const isHead = call.line.startsWith('HEAD ')
  void call.body.then(() =>
    answer(call, 200, isHead ? '' : '{"ok":true}', ['Content-Type: application/json']),
  )
}
