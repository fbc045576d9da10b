// A grace as some authorization servers give: for a while a spent refresh token is answered with its successor once
// more, so that an answer lost on the way costs nothing. Off, every token works once.

import type { Provider } from 'oidc-provider'
import { type Middleware, recordedRequest } from './record.ts'

interface Answer {
  /** Who asked: a replay goes to the same client alone. */
  asked: string
  body: Record<string, unknown>
  endsAtMs: number
}

/** Replays the answer of a spent refresh token within `graceSeconds`, as long as its successor is unspent. */
export function replayWithin(graceSeconds: number, provider: Provider): Middleware {
  const answers = new Map<string, Answer>()
  return async (context, next) => {
    const recorded = recordedRequest(context)
    const presented = recorded.form['refresh_token']
    if (recorded.endpoint !== 'token' || presented === undefined) {
      await next()
      return
    }
    const asked = `${context.get('authorization')} ${recorded.body}`
    const known = answers.get(presented)
    if (known !== undefined && known.asked === asked && performance.now() < known.endsAtMs) {
      const successor = await provider.RefreshToken.find(String(known.body['refresh_token']))
      if (successor !== undefined && successor.consumed === undefined) {
        recorded.replayed = true
        context.body = known.body
        return
      }
    }
    await next()
    if (context.status !== 200) return
    const body = context.body as Record<string, unknown>
    answers.set(presented, { asked, body, endsAtMs: performance.now() + graceSeconds * 1000 })
  }
}
