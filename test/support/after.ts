// Run by tap once, after the last test file: stops the server that before.ts started and removes its data.

import { removeServer } from './database.ts'

await removeServer(process.ppid)
