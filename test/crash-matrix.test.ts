// A process dies at every step of a rotation. What can be recovered is, and what cannot is reported as lost by us.

import t from 'tap'
import { matrixMarkdown, runCrashMatrix } from './support/crash-matrix.ts'
import { createTestDatabase } from './support/database.ts'
import { setFleet } from './support/fleet.ts'
import { readHistory } from './support/history.ts'

t.setTimeout(500_000)

t.test('only what died between the server and the spool is lost, and it is said so', async (t) => {
  const { url } = await createTestDatabase(t)
  const fleet = await setFleet({ url, test: t })
  const rows = await runCrashMatrix(fleet)
  t.comment(matrixMarkdown(rows))
  for (const { moment, step, restarted, gone, expected } of rows) {
    t.equal(restarted, expected.restarted, `${moment}: ${step}, restarted with its disk`)
    t.equal(gone, expected.gone, `${moment}: ${step}, gone for good`)
  }
  const { overlaps, unarmed } = await readHistory(fleet)
  t.strictSame([overlaps, unarmed], [[], []])
})
