// Load from outside: wrk where it is installed (`apt-get install wrk`), else a generator of our own, which costs more
// CPU than it measures when the server is a fast one. Both are told the same and say the same.

import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { has, placed } from './processes.ts'

/** Connections at once, as in a busy service of some replicas. */
export const CONNECTIONS = 64

export interface Load {
  port: number
  /** `{number}` in it stands for the user's number, of seven digits; so it does in the value of a field. */
  path: string
  /** The first number, and how many there are before they begin again. */
  first: number
  count: number
  /** Undefined: GET. */
  method?: 'GET' | 'POST'
  body?: string
  fields?: Readonly<Record<string, string>>
  /** Undefined: `CONNECTIONS`. */
  connections?: number
}

export interface LoadResult {
  answered: number
  seconds: number
  p50Us: number
  p99Us: number
  /** Answers other than 2xx, and connections that broke. */
  failed: number
}

export const generator = has('wrk') ? 'wrk' : 'own generator (wrk is not installed)'

const fileBeside = (name: string) => fileURLToPath(new URL(name, import.meta.url))

/**
 * Loads a server for some seconds.
 * @throws Error when any request failed: what fails is quick, and no measure of anything
 */
export async function load(seconds: number, target: Load): Promise<LoadResult> {
  const connections = target.connections ?? CONNECTIONS
  const origin = `http://127.0.0.1:${target.port}`
  const parameters = [
    target.path,
    String(target.first),
    String(target.count),
    target.method ?? 'GET',
    target.body ?? '',
    ...Object.entries(target.fields ?? {}).flat(),
  ]
  const command = has('wrk')
    ? [
        'wrk',
        '-t1',
        `-c${connections}`,
        `-d${seconds}s`,
        '-s',
        fileBeside('load.lua'),
        origin,
        '--',
      ]
    : [process.execPath, fileBeside('generator.ts'), String(connections), String(seconds), origin]
  const [program, ...rest] = placed('around', [...command, ...parameters])
  const { stdout } = await promisify(execFile)(program, rest)
  const result = /^RESULT (.*)$/m.exec(stdout)?.[1]
  if (result === undefined) throw new Error(`The load generator said:\n${stdout}`)
  const { failed, ...figures } = JSON.parse(result) as LoadResult
  if (failed > 0) throw new Error(`${failed} requests to ${origin}${target.path} failed.`)
  return { ...figures, failed }
}
