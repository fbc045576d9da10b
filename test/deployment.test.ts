// A copy of the database, or one restored from a dump, is told from the original, and refreshes nothing by itself.

import { Client } from 'pg'
import t from 'tap'
import { acceptDatabase, claimDatabase, findUnsafeSettings } from '../src/postgres/deployment.ts'
import { openDatabase } from '../src/postgres/database.ts'
import { Secret } from '../src/secret.ts'
import { silentLog } from './support/database.ts'
import { setScene } from './support/engine.ts'

t.test('a copy is not the deployment’s own database until an operator accepts it', async (t) => {
  const scene = await setScene(t)
  t.equal(await claimDatabase(scene.database), 'ours', 'the first one to ask claims it')
  t.equal(await claimDatabase(scene.database), 'ours')

  const original = new URL(scene.url).pathname.slice(1)
  await scene.database.close()
  const admin = new Client({
    connectionString: scene.url.replace(`/${original}`, '/postgres'),
  })
  await admin.connect()
  await admin.query(`create database ${original}_copy template ${original}`)
  t.teardown(async () => {
    await admin.query(`drop database ${original}_copy with (force)`)
    await admin.end()
  })
  const copy = openDatabase(
    { url: new Secret(`${scene.url}_copy`), poolMax: 1, applicationName: 'test' },
    silentLog,
  )
  t.teardown(() => copy.close())
  t.equal(await claimDatabase(copy), 'another')
  t.equal(await claimDatabase(copy), 'another', 'asking does not accept it')
  await acceptDatabase(copy)
  t.equal(await claimDatabase(copy), 'ours')
})

t.test(
  'in a copy nothing is armed and nobody is called; tokens that live are served',
  async (t) => {
    const scene = await setScene(t)
    const original = await scene.startEngine()
    const user = await scene.connect(original, 'acme-1')
    const copy = await scene.startEngine({ held: true })
    t.ok(await copy.accessTokens.fresh(user))
    await scene.expire(user)
    await t.rejects(copy.accessTokens.fresh(user), { code: 'temporarily_unavailable' })
    t.equal(scene.refreshes().length, 0)
    const { rows } = await scene.database.pool.query('select 1 from refresh_attempts')
    t.equal(rows.length, 0)
  },
)

t.test(
  'settings under which a commit may be forgotten are named, also those of the database alone',
  async (t) => {
    const { database, url } = await setScene(t)
    // The tests' own server runs with all three off, for speed.
    t.strictSame(await findUnsafeSettings(database), [
      'fsync',
      'full_page_writes',
      'synchronous_commit',
    ])
    await database.pool.query(
      `do $$ begin execute format('alter database %I set synchronous_commit = on', current_database()); end $$`,
    )
    const later = openDatabase(
      { url: new Secret(url), poolMax: 1, applicationName: 'test' },
      silentLog,
    )
    t.teardown(() => later.close())
    t.strictSame(await findUnsafeSettings(later), ['fsync', 'full_page_writes'])
  },
)
