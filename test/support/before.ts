// Run by tap once, before the first test file: the server that all of them share.
// It outlives this process; after.ts stops it.

import { startServer } from './database.ts'

await startServer(process.ppid)
