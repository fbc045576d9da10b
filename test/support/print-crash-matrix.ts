// Prints the crash matrix as Markdown, for README.md: `npm run crash-matrix`. It takes about two minutes.

import { matrixMarkdown, runCrashMatrix } from './crash-matrix.ts'
import { setFleet } from './fleet.ts'
import { startOwnPostgres } from './own-postgres.ts'

const postgres = await startOwnPostgres()
const fleet = await setFleet({ url: postgres.url() })
try {
  process.stdout.write(matrixMarkdown(await runCrashMatrix(fleet)))
} finally {
  await fleet.stop()
  await postgres.remove()
}
