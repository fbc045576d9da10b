// One variable of the environment at a time: from itself, from the file that NAME_FILE names, or by its default.
// What is wrong is collected, never thrown, so that an operator sees all of it at once. No value is ever part of it.

import { numberBetween, type Reading } from './setting-values.ts'
import { SETTINGS, type SettingName } from './settings.ts'

type NameWithDefault = Extract<(typeof SETTINGS)[number], { default: string }>['name']

const DEFAULTS: ReadonlyMap<SettingName, string | undefined> = new Map(
  SETTINGS.map((setting) => [setting.name, setting.default]),
)
/** What each variable is, as in README's table but without its marks. */
const MEANINGS: ReadonlyMap<SettingName, string> = new Map(
  SETTINGS.map(({ name, meaning }) => [name, meaning.replaceAll('`', '')]),
)
/** An empty scope is one that is not sent. */
const MAY_BE_EMPTY: ReadonlySet<SettingName> = new Set(['PAGERO_SCOPE'])
/** Its value is the name of a file already. */
const NAMES_A_FILE: ReadonlySet<SettingName> = new Set(['CALLERS_FILE'])

export type SettingReader = ReturnType<typeof createSettingReader>

/**
 * Creates the ways to read a variable of `env`, or the file that `NAME_FILE` names.
 *
 * Each adds what is wrong to `problems` and goes on. What it returns then only keeps the reading going: a number is
 * NaN, which violates no relation, a text is empty.
 */
export function createSettingReader(
  env: Readonly<Record<string, string | undefined>>,
  readFile: (path: string) => string,
  problems: string[],
) {
  /** The text of the variable or of its file; `failed` when there should be one and it cannot be had. */
  function textOf(name: SettingName): { text: string | undefined; failed: boolean } {
    const direct = env[name]
    const path = NAMES_A_FILE.has(name) ? undefined : env[`${name}_FILE`]
    if (path === undefined) return { text: direct, failed: false }
    if (direct !== undefined) {
      problems.push(`${name} and ${name}_FILE are both set; set one of them.`)
      return { text: undefined, failed: true }
    }
    try {
      return { text: readFile(path).replace(/\r?\n$/, ''), failed: false }
    } catch {
      problems.push(`${name}_FILE must name a file that can be read.`)
      return { text: undefined, failed: true }
    }
  }

  function read<T>(
    name: SettingName,
    readText: (text: string) => Reading<T>,
    fallback: string | undefined,
    required: boolean,
  ): T | undefined {
    const { text, failed } = textOf(name)
    if (failed) return undefined
    if (text !== undefined && text.trim() === '' && !MAY_BE_EMPTY.has(name)) {
      problems.push(`${name} is empty.${required ? '' : ' Leave it unset for its default.'}`)
      return undefined
    }
    const given = text ?? fallback
    if (given === undefined) {
      if (required) problems.push(`${name} is required: ${MEANINGS.get(name)}`)
      return undefined
    }
    const reading = readText(given)
    if ('value' in reading) return reading.value
    problems.push(...reading.problems.map((problem) => `${name} ${problem}.`))
    return undefined
  }

  return {
    required: <T>(name: SettingName, readText: (text: string) => Reading<T>) =>
      read(name, readText, undefined, true),

    optional: <T>(name: SettingName, readText: (text: string) => Reading<T>, fallback?: string) =>
      read(name, readText, fallback, false),

    withDefault: <T extends string>(
      name: NameWithDefault,
      readText: (text: string) => Reading<T>,
    ) =>
      // The empty text stands for what could not be read: by then there is a problem, and no Config.
      read(name, readText, DEFAULTS.get(name), false) ?? ('' as T),

    seconds: (name: NameWithDefault, min: number, max: number) =>
      read(name, numberBetween(min, max, 'fraction'), DEFAULTS.get(name), false) ?? Number.NaN,

    /** Of something that is no time, in fractions too. */
    number: (name: NameWithDefault, min: number, max: number) =>
      read(name, numberBetween(min, max, 'fraction'), DEFAULTS.get(name), false) ?? Number.NaN,

    whole: (name: NameWithDefault, min: number, max: number) =>
      read(name, numberBetween(min, max, 'whole'), DEFAULTS.get(name), false) ?? Number.NaN,
  }
}
