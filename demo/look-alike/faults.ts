// Faults on demand. A test appends to the list; each request takes the first one meant for it, and it is used up.

import { setTimeout } from 'node:timers/promises'
import { resetSocket } from '../../src/reset-socket.ts'
import { type Context, type Middleware, recordedRequest } from './record.ts'

/** Which requests a fault is for. */
interface Aim {
  endpoint: 'authorize' | 'token' | 'revoke'
  /** Only token requests of this grant type. */
  grantType?: 'authorization_code' | 'refresh_token'
  /** How many requests it befalls; 1 unless said otherwise. */
  times?: number
}

type Effect =
  /** Wait, before or after the token is consumed: for a time, or until a promise is fulfilled. */
  | { kind: 'delay'; when: 'before' | 'after'; ms: number }
  | { kind: 'delay'; when: 'before' | 'after'; until: Promise<unknown> }
  /** Answer this without consuming anything. An object is sent as JSON. */
  | { kind: 'status'; status: number; body?: string | object; headers?: Record<string, string> }
  /** Reset the connection without consuming anything. */
  | { kind: 'reset_before' }
  /** Consume, then reset the connection without an answer. */
  | { kind: 'reset_after' }
  /** Consume, then change the answer. */
  | { kind: 'mutate'; change: (answer: Record<string, unknown>) => unknown }
  /** Consume, then answer this text whatever the result was. */
  | { kind: 'raw_body'; body: string; status?: number; headers?: Record<string, string> }

export type Fault = Aim & Effect

/** Applies the faults of the list. Waits end with `stopping`. */
export function applyFaults(faults: Fault[], stopping: AbortSignal): Middleware {
  return async (context, next) => {
    const fault = takeFault(faults, context)
    if (fault === undefined) {
      await next()
      return
    }
    recordedRequest(context).fault = fault.kind
    switch (fault.kind) {
      case 'delay':
        if (fault.when === 'after') await next()
        await ('until' in fault
          ? fault.until
          : setTimeout(fault.ms, undefined, { signal: stopping }).catch(() => undefined))
        if (fault.when === 'before') await next()
        return
      case 'status':
        context.set(fault.headers ?? {})
        context.body = fault.body ?? ''
        context.status = fault.status
        return
      case 'reset_before':
        resetConnection(context)
        return
      case 'reset_after':
        await next()
        resetConnection(context)
        return
      case 'mutate':
        await next()
        context.body = fault.change(context.body as Record<string, unknown>)
        return
      case 'raw_body':
        await next()
        context.set(fault.headers ?? {})
        context.body = fault.body
        if (fault.status !== undefined) context.status = fault.status
    }
  }
}

function takeFault(faults: Fault[], context: Context): Fault | undefined {
  const { endpoint, form } = recordedRequest(context)
  const index = faults.findIndex(
    (fault) =>
      fault.endpoint === endpoint &&
      (fault.grantType === undefined || fault.grantType === form['grant_type']),
  )
  const fault = faults[index]
  if (fault === undefined) return undefined
  const timesLeft = (fault.times ?? 1) - 1
  if (timesLeft > 0) faults[index] = { ...fault, times: timesLeft }
  else faults.splice(index, 1)
  return fault
}

function resetConnection(context: Context): void {
  context.respond = false
  resetSocket(context.req.socket)
}
