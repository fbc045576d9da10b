// What concerns the database as a whole: which deployment it belongs to, and which keys its rows need.

import { sql } from 'kysely'
import { type Database, throughDatabase } from './database.ts'

/** Returns the id that is bound into every sealed value of this database. */
export function readDeploymentId({ db }: Pick<Database, 'db'>): Promise<string> {
  return throughDatabase(async () => {
    const { deployment_id: deploymentId } = await db
      .selectFrom('deployment')
      .select('deployment_id')
      .executeTakeFirstOrThrow()
    return deploymentId
  })
}

/** Returns the ids of the keys that grants are sealed with. Reads the whole table: for the start, not for each request. */
export function readKeyIdsInUse({ db }: Pick<Database, 'db'>): Promise<string[]> {
  return throughDatabase(async () => {
    const { rows } = await sql<{ key_id: string }>`
      select distinct key_id from grants where key_id is not null`.execute(db)
    return rows.map(({ key_id: keyId }) => keyId)
  })
}
