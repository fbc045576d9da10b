// Why the refresh protocol is as it is: each variant explored in all its interleavings, those that lose a grant beside
// those that cannot. The production engine is the last but one kind: it takes over only when the call is over and the
// spool is empty, stores on the version alone, and lets a late success overrule a verdict.

import t from 'tap'
import { explore, type Variant } from './support/protocol-model.ts'

/** Take-over only after the owner's deadline; compare-and-set on the version; a strict server; nothing fails. */
const SOUND: Variant = {
  lock: true,
  takeOver: 'when the call is over',
  store: 'version',
  verdictFinal: false,
  punishesReuse: true,
  grace: false,
  spool: false,
  crashes: [],
  crashesMax: 0,
  losses: [],
  lossesMax: 0,
}
const LEASE_TOO_SHORT: Partial<Variant> = { takeOver: 'at any time' }
const CRASH_AFTER_ANSWER: Partial<Variant> = { crashes: ['after the answer'], crashesMax: 1 }
const ANYWHERE: Partial<Variant> = {
  crashes: ['before sending', 'while the call is out', 'after the answer'],
  crashesMax: 2,
  losses: ['request', 'answer'],
  lossesMax: 2,
}

const VARIANTS: ReadonlyArray<readonly [name: string, variant: Partial<Variant>, loses: boolean]> =
  [
    ['no lock, the last write wins', { lock: false, store: 'nothing' }, true],
    ['no lock, compare-and-set, re-read on refusal', { lock: false }, true],
    ['a lease that may expire during the call', LEASE_TOO_SHORT, true],
    [
      'the same at a server that does not punish reuse',
      { ...LEASE_TOO_SHORT, punishesReuse: false },
      false,
    ],
    [
      'the same with a verdict that is final',
      { ...LEASE_TOO_SHORT, punishesReuse: false, verdictFinal: true },
      true,
    ],
    [
      'the same with a store that is fenced on the lease',
      { ...LEASE_TOO_SHORT, punishesReuse: false, store: 'version and lease' },
      true,
    ],
    ['take-over only after the deadline of the owner', {}, false],
    ['a death before sending', { crashes: ['before sending'], crashesMax: 1 }, false],
    [
      'a death while the call is out, without grace (irreducible)',
      { crashes: ['while the call is out'], crashesMax: 1 },
      true,
    ],
    ['a death between answer and store', CRASH_AFTER_ANSWER, true],
    [
      'the same with a spool that the take-over waits for',
      {
        ...CRASH_AFTER_ANSWER,
        spool: true,
        takeOver: 'when the call is over and the spool is empty',
      },
      false,
    ],
    [
      'the same with a spool that it does not wait for',
      { ...CRASH_AFTER_ANSWER, spool: true },
      true,
    ],
    ['one request lost', { losses: ['request'], lossesMax: 1 }, false],
    ['one answer lost, without grace (irreducible)', { losses: ['answer'], lossesMax: 1 }, true],
    ['two deaths and two losses anywhere, with grace', { ...ANYWHERE, grace: true }, false],
    [
      'the same with a lease that may expire during the call',
      { ...ANYWHERE, ...LEASE_TOO_SHORT, grace: true },
      true,
    ],
  ]

for (const [name, variant, loses] of VARIANTS) {
  t.test(`${name}: ${loses ? 'a grant can be lost' : 'no grant can be lost'}`, async (t) => {
    const { states, lossReachable } = explore({ ...SOUND, ...variant })
    t.equal(lossReachable, loses, `${states} states`)
  })
}
