// Figures of a run: medians of interleaved rounds, and the table that is printed.

import { cpus, loadavg, totalmem } from 'node:os'

/** The middle one; of an even number, the lower of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted[Math.floor((sorted.length - 1) / 2)]
  if (middle === undefined) throw new Error('There is no median of nothing.')
  return middle
}

/** One taking of a measure. */
export interface Taken {
  perSecond: number
  /** CPU time of the measured process for each of what it did. Less disturbed than the rate by whatever else runs. */
  cpuUs?: number
}

/** The medians of all takings of a measure, and the rate of each. */
export interface Measured extends Taken {
  perSecondOfRounds: readonly number[]
}

/** Takes each measure once a round, so that whatever else the machine does falls on all of them alike. */
export async function interleave<Name extends string>(
  rounds: number,
  measures: Readonly<Record<Name, () => Promise<Taken>>>,
): Promise<Record<Name, Measured>> {
  const taken = new Map<Name, Taken[]>()
  const names = Object.keys(measures) as Name[]
  for (let round = 0; round < rounds; round += 1) {
    for (const name of names) {
      taken.set(name, [...(taken.get(name) ?? []), await measures[name]()])
    }
  }
  const medians = names.map((name) => {
    const all = taken.get(name) ?? []
    const cpuTimesUs = all.flatMap(({ cpuUs }) => cpuUs ?? [])
    const perSecondOfRounds = all.map(({ perSecond }) => perSecond)
    const rate = { perSecond: median(perSecondOfRounds), perSecondOfRounds }
    return [name, cpuTimesUs.length === 0 ? rate : { ...rate, cpuUs: median(cpuTimesUs) }]
  })
  return Object.fromEntries(medians) as Record<Name, Measured>
}

export interface Row {
  what: string
  figure: string
  ratio?: Ratio & { to: string; goal?: { atLeast?: number; below?: number } }
}

interface Ratio {
  value: number
  /** The least and the most of any round, where each has one. */
  spread?: readonly [number, number]
}

/** The rows as a markdown table, the goals judged. */
export function tableOf(rows: readonly Row[]): string {
  const lines = rows.map(({ what, figure, ratio }) => {
    if (ratio === undefined) return `| ${what} | ${figure} | | |`
    const { value, spread, to, goal } = ratio
    const range =
      spread === undefined ? '' : ` (${spread.map((one) => one.toFixed(2)).join(' to ')})`
    return `| ${what} | ${figure} | ${value.toFixed(2)}${range} of ${to} | ${judged(value, goal)} |`
  })
  return ['| measure | figure | ratio | goal |', '| --- | --- | --- | --- |', ...lines].join('\n')
}

function judged(value: number, goal: NonNullable<Row['ratio']>['goal']): string {
  if (goal?.atLeast !== undefined) {
    return `${value >= goal.atLeast ? 'met' : 'MISSED'}: at least ${goal.atLeast}`
  }
  if (goal?.below !== undefined) {
    return `${value < goal.below ? 'met' : 'MISSED'}: below ${goal.below}`
  }
  return ''
}

/** The rate, and the CPU time where it was taken. */
export function rateText({ perSecond, cpuUs }: Taken): string {
  const rate = `${Math.round(perSecond).toLocaleString('en')}/s`
  return cpuUs === undefined ? rate : `${rate}, ${cpuUs.toFixed(1)} us CPU`
}

/** How many times as much as the other, round by round: the median, the least and the most. */
export function ratioOfRounds(one: Measured, other: Measured): Required<Ratio> {
  const ratios = one.perSecondOfRounds.map(
    (perSecond, round) => perSecond / (other.perSecondOfRounds[round] ?? 0),
  )
  return { value: median(ratios), spread: [Math.min(...ratios), Math.max(...ratios)] }
}

export function milliseconds(us: number): string {
  return `${(us / 1000).toFixed(1)} ms`
}

/** What a reader needs in order to compare: the machine, and how busy it was. */
export function machineFacts(notes: readonly string[]): string {
  const load = loadavg()
    .map((value) => value.toFixed(1))
    .join(' ')
  return [
    `${cpus().length} x ${cpus()[0]?.model ?? 'unknown CPU'}`,
    `${Math.round(totalmem() / 1024 ** 3)} GiB`,
    `Node ${process.versions.node}`,
    `load average ${load}`,
    ...notes,
  ].join(' · ')
}
