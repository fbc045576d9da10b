// The verdict on a refresh token that was refused, by the evidence of the ledger. A late success overrules any of them.

import { BrokerError, unavailable } from './errors.ts'
import type { Grant } from './grant.ts'
import { reauthenticationRequired } from './live-token.ts'
import type { Persist } from './persist.ts'
import type { Ports } from './ports.ts'
import type { Evidence, GrantStore } from './grant-stores.ts'
import { causeOfDeath, needsConfirming } from './verdict.ts'

export interface Judge {
  /** Gives the verdict on a refused token and returns the problem of it. */
  condemn(grant: Grant, evidence: Evidence): Promise<BrokerError>
  /**
   * A suspect grant is not presented: its owner comes back with the successor, or the wait ends and the verdict falls. Returns
   * the problem that tells of it.
   * @throws BrokerError `temporarily_unavailable` when the database cannot be asked
   */
  judgeSuspect(grant: Grant): Promise<BrokerError>
}

/** Makes the judge of a process. */
export function createJudge(
  { log, grants }: { log: Ports['log']; grants: Pick<GrantStore, 'condemn' | 'evidence'> },
  persist: Persist,
): Judge {
  async function condemn(grant: Grant, evidence: Evidence): Promise<BrokerError> {
    const cause = causeOfDeath(evidence)
    const state = evidence.successorMayComeBack ? 'suspect' : 'reauthentication_required'
    const given = await persist('grant_store_failed', grant.user, () =>
      grants.condemn(grant.user, grant.generation, {
        state,
        reason: cause,
        // A single refusal is enough only as long as that attempt has not turned out never to have been sent.
        whileUnknown: evidence.unknownBefore && evidence.refusals < 2,
      }),
    )
    // Nobody is told of a verdict that a late success, a login or the closing of the grant has overtaken.
    if (!given) return unavailable('The grant has just changed. Ask again.', 1)
    log.warn('grant_condemned', {
      user: grant.user,
      generation: grant.generation,
      state,
      cause,
    })
    return state === 'suspect' ? suspected() : reauthenticationRequired(cause)
  }

  return {
    condemn,
    async judgeSuspect(grant) {
      const evidence = await grants.evidence(grant.user, grant.loginId, grant.generation)
      if (evidence.successorMayComeBack) return suspected()
      if (!needsConfirming(evidence)) return condemn(grant, evidence)
      // The attempt that cast the doubt has turned out not to have spent the token.
      await grants.condemn(grant.user, grant.generation, { state: 'active', reason: null })
      return unavailable('The grant is being checked.', 1)
    },
  }
}

function suspected(): BrokerError {
  return unavailable('The grant is being checked: an answer from Pagero may still arrive.', 15)
}
