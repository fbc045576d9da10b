// What outlives a process: the disk with its spool. And the seal of the simulation, which hides nothing but opens only
// in its own place, so that a value that strays is told.

import { BrokerError } from '../../../src/errors.ts'
import type { SealContext, Sealer, Spool } from '../../../src/ports.ts'
import { successorIdOf } from '../../../src/spool-entry.ts'
import type { Successor } from '../../../src/grant-stores.ts'
import type { Faults } from './faults.ts'
import type { Life } from './life.ts'
import type { Scheduler } from './scheduler.ts'
import type { Witness } from './witness.ts'

/** Spool entries by attempt: those whose write is durable. */
export type Disk = Map<string, Successor>

/** Opens the spool on a disk for one process. */
export function createSimulatedSpool(
  world: { scheduler: Scheduler; faults: Faults; witness: Witness },
  life: Life,
  disk: Disk,
): Spool {
  const { scheduler, faults, witness } = world
  return {
    write: (successor) =>
      life.call((settle) => {
        const fault = faults.spoolWrite(life)
        if (fault !== 'none') witness.spoolFailed(life, successor)
        scheduler.after(faults.diskMs(), () => {
          if (life.dead) return
          if (fault !== 'lost') {
            disk.set(successor.attemptId, successor)
            witness.spooled(successor)
          }
          if (fault === 'none') settle.resolve()
          else settle.reject(new Error('no space left on device'))
        })
      }),
    remove: (attemptId) =>
      life.call((settle) => {
        disk.delete(attemptId)
        scheduler.after(faults.diskMs(), () => settle.resolve())
      }),
    list: (known) =>
      life.call((settle) => {
        const entries = [...disk.values()]
          .filter(({ attemptId }) => known?.has(attemptId) !== true)
          .map(successorIdOf)
          .toSorted((a, b) => a.generation - b.generation)
        scheduler.after(faults.diskMs(), () => settle.resolve({ entries, isWhole: true }))
      }),
    has: (attemptId) => disk.has(attemptId),
    read: (attemptId) =>
      life.call((settle) => {
        scheduler.after(faults.diskMs(), () => settle.resolve(disk.get(attemptId)))
      }),
    isEmpty: () => disk.size === 0,
    hasRoom: () => true,
    surplus: () => (faults.crowdedSpool ? disk.size : 0),
    checkWritable: () =>
      life.call((settle) => {
        const writable = faults.spoolWritable()
        scheduler.after(faults.diskMs(), () =>
          writable ? settle.resolve() : settle.reject(new Error('no space left on device')),
        )
      }),
  }
}

const SEPARATOR = '\n'

/** Seals by writing the place in front of the secret. */
export function createSimulatedSealer(): Sealer {
  const place = ({ table, column, row, salt, generation }: SealContext) =>
    `${table} ${column} ${row} ${salt} ${generation}${SEPARATOR}`
  return {
    primaryKeyId: 'simulated',
    seal: (context, secret) => Buffer.from(place(context) + secret),
    open(context, sealed) {
      const text = sealed.toString()
      if (!text.startsWith(place(context))) {
        throw new BrokerError('integrity_failure', 'The value belongs elsewhere.')
      }
      return secretOf(sealed)
    },
    digest: (_context, secret) => Buffer.from(secret),
  }
}

/** What was sealed: for the witness, which knows everything. */
export function secretOf(sealed: Buffer): string {
  const text = sealed.toString()
  return text.slice(text.indexOf(SEPARATOR) + 1)
}
