// What a read leaves behind is freed while it is young. By who refers to whom V8's quick collections, dozens in a second,
// can be made to keep all of it until the next slow one; reading tokens then costs half as much again.

import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { createTestDatabase } from './support/database.ts'

const PROGRAM = fileURLToPath(new URL('support/measure-short-lived.ts', import.meta.url))

t.test('rows of statements, and grants that were read together, leave nothing', async (t) => {
  const { url } = await createTestDatabase(t)
  const { stdout } = await promisify(execFile)(process.execPath, ['--expose-gc', PROGRAM], {
    env: { DATABASE_URL: url },
  })
  const { ofRows, ofGrants } = JSON.parse(stdout) as { ofRows: number; ofGrants: number }
  // All of a row is some 300 bytes, all of a grant 700.
  t.ok(ofRows < 60, `${ofRows} bytes of a row`)
  t.ok(ofGrants < 60, `${ofGrants} bytes of a grant`)
})
