// An authorization server with rotating refresh tokens, and the way to it. A login is a family of refresh tokens, of
// which the newest is accepted; its parent is answered with the same successor within the grace, if there is one.
// What reaches the engine has gone through the production code that reads token answers.

import { DEFAULT_ACCESS_TOKEN_LIFE_SECONDS, type TokenOutcome } from '../../../src/grant.ts'
import type { AuthorizationServer } from '../../../src/ports.ts'
import type { SendResult } from '../../../src/send-once.ts'
import { readTokenAnswer } from '../../../src/token-answer.ts'
import type { Faults, Step, TokenCallFault } from './faults.ts'
import type { Life } from './life.ts'
import type { Scheduler } from './scheduler.ts'
import type { Witness } from './witness.ts'

/** All refresh tokens of one login at the server. */
export interface Family {
  id: number
  user: string
  /** Number of the refresh token that is accepted now. */
  current: number
  consumedAtMs: number
  ended: 'reuse' | 'client' | 'user' | undefined
}

export interface IssuedAccessToken {
  family: Family
  /** The refresh token that came with it. */
  refreshToken: string
  issuedAtMs: number
  expiresAtMs: number
}

/** One presentation of a refresh token, from the client's first byte to what the client made of it. */
export interface TokenCall {
  life: Life
  token: string
  fault: TokenCallFault
  sentAtMs: number
  /** The client waits for the answer. */
  open: boolean
  /** The server has it in hand. */
  atServer: boolean
}

type Answer = Extract<SendResult, { kind: 'answered' }>

export type SimulatedServer = ReturnType<typeof createSimulatedServer>

/** Makes a server without logins. */
export function createSimulatedServer(
  world: { scheduler: Scheduler; faults: Faults; witness: Witness },
  settings: { graceSeconds: number; punishesReuse: boolean; accessTokenLifeSeconds: number },
) {
  const { scheduler, faults, witness } = world
  const families: Family[] = []
  const accessTokens = new Map<string, IssuedAccessToken>()

  const refreshTokenOf = (family: Family, number: number) => `rt.${family.id}.${number}`

  function find(token: string): { family: Family; number: number } {
    const [, id, number] = token.split('.')
    const family = families[Number(id)]
    if (family === undefined) throw new Error(`The server never issued ${token}.`)
    return { family, number: Number(number) }
  }

  /** An answer of which `expires_in` may be cut off is taken to say what the server documents. */
  function issue(family: Family, fault: TokenCallFault = 'none') {
    const accessToken = `at.${family.user}.${family.id}.${accessTokens.size}`
    const refreshToken = refreshTokenOf(family, family.current)
    const lifeSeconds =
      fault === 'answer_cut' ? DEFAULT_ACCESS_TOKEN_LIFE_SECONDS : settings.accessTokenLifeSeconds
    const issuedAtMs = scheduler.nowMs()
    const expiresAtMs = issuedAtMs + lifeSeconds * 1000
    accessTokens.set(accessToken, { family, refreshToken, issuedAtMs, expiresAtMs })
    return { access_token: accessToken, refresh_token: refreshToken }
  }

  /** Decides on a presented refresh token. */
  function redeem(call: TokenCall): Answer {
    const { family, number } = find(call.token)
    const nowMs = scheduler.nowMs()
    if (family.ended !== undefined) return refusal()
    if (number === family.current) {
      family.current += 1
      family.consumedAtMs = nowMs
      witness.consumed(call, family, refreshTokenOf(family, family.current))
      return success(issue(family, call.fault))
    }
    const isParent = number === family.current - 1
    if (isParent && nowMs <= family.consumedAtMs + settings.graceSeconds * 1000) {
      witness.replayed(call, refreshTokenOf(family, family.current))
      return success(issue(family, call.fault))
    }
    if (settings.punishesReuse) family.ended = 'reuse'
    witness.reused(call, family, refreshTokenOf(family, number + 1))
    return refusal()
  }

  function answerTo(call: TokenCall): Answer {
    switch (call.fault) {
      case 'lie':
        witness.lied(call)
        return refusal()
      case 'fails_before':
        return { ...refusal(), status: 502, body: '<html>Bad gateway</html>' }
      case 'garbled':
        return { ...refusal(), status: 200, body: '<html>All is well</html>' }
      case 'too_many_requests':
        return { ...refusal(), status: 429, headers: { 'retry-after': '7' }, body: '' }
      case 'unavailable':
        return { ...refusal(), status: 503, body: '' }
      case 'invalid_client':
        return { ...refusal(), status: 401, body: '{"error":"invalid_client"}' }
      case 'fails_after':
        redeem(call)
        return { ...refusal(), status: 504, body: '' }
      default:
        return redeem(call)
    }
  }

  function success(tokens: { access_token: string; refresh_token: string }): Answer {
    const body = { ...tokens, expires_in: settings.accessTokenLifeSeconds, scope: '' }
    return { kind: 'answered', status: 200, headers: {}, body: JSON.stringify(body) }
  }

  function present(
    life: Life,
    token: string,
    limits: { sendBeforeMs: number; deadlineMs: number },
  ): Promise<TokenOutcome> {
    return life.call<TokenOutcome>((settle) => {
      const call: TokenCall = {
        ...{ life, token, fault: faults.tokenCall(token) },
        ...{ sentAtMs: 0, open: false, atServer: false },
      }
      /** What waits in the socket; a deadline that fires reads it first. */
      let received: SendResult | undefined
      const end = (result: SendResult) => {
        const outcome = readTokenAnswer(result)
        call.open = false
        witness.ended(call, outcome)
        settle.resolve(outcome)
      }
      const receive = (result: SendResult) => {
        if (life.dead || !call.open || received !== undefined) {
          witness.lost(call)
          return
        }
        received = result
        life.deliver(() => {
          if (call.open) end(result)
        })
      }
      const lose = (reason: string) =>
        receive({ kind: 'unknown', reason, status: undefined, partialBody: '' })

      if (call.fault === 'connection_refused') {
        life.after(faults.troubleMs(), () => end({ kind: 'not_sent', reason: 'econnrefused' }))
        return
      }
      const connectMs = call.fault === 'connects_late' ? faults.lateMs() / 4 : faults.networkMs()
      life.after(Math.min(connectMs, limits.sendBeforeMs - life.clock.monotonicMs() + 1), () => {
        if (life.clock.monotonicMs() > limits.sendBeforeMs) {
          end({ kind: 'not_sent', reason: 'send_deadline' })
          return
        }
        call.open = true
        call.sentAtMs = scheduler.nowMs()
        witness.sent(call)
        life.after(limits.deadlineMs - life.clock.monotonicMs(), () => {
          if (!call.open) return
          witness.lost(call)
          end(
            received ?? {
              kind: 'unknown',
              reason: 'deadline',
              status: undefined,
              partialBody: '',
            },
          )
        })
        if (call.fault === 'request_lost') {
          scheduler.after(faults.troubleMs(), () => lose('econnreset'))
          return
        }
        if (call.fault === 'request_lost_silently') return
        const arrivesInMs = call.fault === 'request_late' ? faults.lateMs() : faults.networkMs()
        scheduler.after(arrivesInMs, () => arrive(call, receive, lose))
      })
    })
  }

  /** The request is at the server; whether anybody waits for the answer is not known there. */
  function arrive(
    call: TokenCall,
    receive: (result: SendResult) => void,
    lose: (reason: string) => void,
  ): void {
    call.atServer = true
    const answer = answerTo(call)
    switch (call.fault) {
      case 'answer_lost':
        witness.lost(call)
        scheduler.after(faults.troubleMs(), () => lose('econnreset'))
        return
      case 'answer_lost_silently':
        witness.lost(call)
        return
      case 'answer_cut': {
        const partialBody = answer.body.slice(0, Math.floor(faults.cutAt() * answer.body.length))
        const { status } = answer
        scheduler.after(faults.networkMs(), () =>
          receive({ kind: 'unknown', reason: 'econnreset', status, partialBody }),
        )
        return
      }
      default:
        scheduler.after(call.fault === 'answer_late' ? faults.lateMs() : faults.networkMs(), () =>
          receive(answer),
        )
    }
  }

  return {
    families,
    accessTokens,

    /** A user logs in: a new family. */
    logIn(user: string) {
      const family: Family = {
        ...{ id: families.length, user, current: 1, consumedAtMs: -Infinity },
        ended: undefined,
      }
      families.push(family)
      return { family, ...issue(family) }
    },

    /** Whether the refresh token would be accepted now. */
    accepts(token: string): boolean {
      const { family, number } = find(token)
      if (family.ended !== undefined) return false
      if (number === family.current) return true
      return (
        number === family.current - 1 &&
        scheduler.nowMs() <= family.consumedAtMs + settings.graceSeconds * 1000
      )
    },

    familyOf: (token: string) => find(token).family,

    /** The server as one process reaches it. */
    connect(
      life: Life,
      step: (life: Life, step: Step) => void,
    ): Pick<AuthorizationServer, 'refresh' | 'revoke'> {
      return {
        async refresh(refreshToken, limits) {
          step(life, 'before_send')
          const outcome = await present(life, refreshToken, limits)
          step(life, 'after_send')
          return life.call((settle) => settle.resolve(outcome))
        },
        revoke: (refreshToken) =>
          life.call((settle) => {
            const { family, number } = find(refreshToken)
            const fails = faults.revocationFails()
            scheduler.after(faults.networkMs(), () => {
              if (!fails && family.ended === undefined && number === family.current) {
                witness.revoked(life, family, refreshToken)
                family.ended = 'client'
              }
              scheduler.after(faults.networkMs(), () => settle.resolve(!fails))
            })
          }),
      }
    },
  }
}

function refusal(): Answer {
  return { kind: 'answered', status: 400, headers: {}, body: '{"error":"invalid_grant"}' }
}
