// One call of the broker: credential, deadline, and when it is made again. A call that is safe to repeat is repeated while
// the deadline lasts; `Retry-After` is waited for, and an answer that asks for more patience than is left is the answer.

import { BrokerProblemError, BrokerUnreachableError, readProblem } from './problems.ts'

export interface RequestSettings {
  /** Internal listener of the broker, without a slash at its end. */
  base: string
  apiKey: string | (() => string | Promise<string>)
  /** For a whole call, with its repetitions. */
  timeoutMs: number
  fetch: typeof globalThis.fetch
}

export interface BrokerCall {
  method: 'GET' | 'POST' | 'PUT' | 'DELETE'
  path: string
  body?: object
  /** Whether it may be made again without harm. */
  repeatable: boolean
  signal?: AbortSignal | undefined
}

/** Attempts at one call: the first, and two for a replica that restarts. */
const ATTEMPTS_MAX = 3
/** Before the next attempt where the answer names no time. */
const PAUSE_MS = 250

/** A failure, and after which pause another attempt may end otherwise; undefined: it will not. */
interface Failed {
  error: unknown
  retryInMs: number | undefined
}

/** The value of the Authorization header; asked for each time, so that keys can be changed. */
export async function authorizationOf({ apiKey }: RequestSettings): Promise<string> {
  return `Bearer ${typeof apiKey === 'function' ? await apiKey() : apiKey}`
}

/**
 * Makes the call and returns its JSON, or undefined for 204. What it holds is the caller's to know.
 * @throws BrokerProblemError, BrokerUnreachableError; the signal's own reason when it fires
 */
export async function callBroker<T>(settings: RequestSettings, call: BrokerCall): Promise<T> {
  const deadlineMs = performance.now() + settings.timeoutMs
  for (let attempt = 1; ; attempt += 1) {
    const end = await attemptCall(settings, call, deadlineMs)
    if ('value' in end) return end.value as T
    const { error, retryInMs } = end
    if (!call.repeatable || retryInMs === undefined || attempt === ATTEMPTS_MAX) throw error
    if (performance.now() + retryInMs >= deadlineMs) throw error
    await pause(retryInMs, call.signal)
  }
}

async function attemptCall(
  settings: RequestSettings,
  { method, path, body, signal }: BrokerCall,
  deadlineMs: number,
): Promise<{ value: unknown } | Failed> {
  const timeout = AbortSignal.timeout(Math.max(1, Math.ceil(deadlineMs - performance.now())))
  try {
    const authorization = await authorizationOf(settings)
    const response = await settings.fetch(settings.base + path, {
      method,
      headers: {
        authorization,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      redirect: 'error',
      signal: signal === undefined ? timeout : AbortSignal.any([signal, timeout]),
    })
    if (!response.ok) return await readFailure(response)
    return { value: response.status === 204 ? undefined : await response.json() }
  } catch (error) {
    signal?.throwIfAborted()
    const message = timeout.aborted
      ? `The broker has not answered within ${settings.timeoutMs} ms.`
      : 'The broker cannot be reached.'
    return {
      error: new BrokerUnreachableError(message, { cause: error }),
      retryInMs: timeout.aborted ? undefined : PAUSE_MS,
    }
  }
}

async function readFailure(response: Response): Promise<Failed> {
  const { status } = response
  const problem = await readProblem(response)
  const retryInMs =
    status === 429 || status >= 502 ? (retryAfterMs(response) ?? PAUSE_MS) : undefined
  if (problem !== undefined) return { error: new BrokerProblemError(problem), retryInMs }
  await response.body?.cancel()
  return {
    error: new BrokerUnreachableError(`Something before the broker has answered ${status}.`, {
      status,
    }),
    retryInMs,
  }
}

/** The seconds that the broker names; a date, which others may send, counts as none named. */
function retryAfterMs(response: Response): number | undefined {
  const value = response.headers.get('retry-after') ?? ''
  return /^\d{1,6}$/.test(value) ? Number(value) * 1000 : undefined
}

/** Waits; the signal ends it with its own reason. */
function pause(delayMs: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted()
    const onAbort = () => {
      clearTimeout(timer)
      reject(signal?.reason as Error)
    }
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', onAbort)
      resolve()
    }, delayMs)
    signal?.addEventListener('abort', onAbort, { once: true })
  })
}

/** Waits for a call that others wait for too: a signal ends this wait, and not the call. */
export function waitFor<T>(shared: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return shared
  signal.throwIfAborted()
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason as Error)
    signal.addEventListener('abort', onAbort, { once: true })
    void shared.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort))
  })
}
