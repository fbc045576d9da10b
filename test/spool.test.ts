// The spool, on a real directory: what was confirmed is still there after a kill, and nothing unreadable stops it.

import { spawn } from 'node:child_process'
import { randomBytes, randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  utimes,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { createSpool } from '../src/spool.ts'
import { entryText } from '../src/spool-entry.ts'
import { parseUserKey, type UserKey } from '../src/grant.ts'
import type { Log, LogFields, Spool } from '../src/ports.ts'
import type { Successor } from '../src/grant-stores.ts'

interface Line {
  event: string
  fields: LogFields | undefined
}

function recordingLog(): { log: Log; lines: Line[] } {
  const lines: Line[] = []
  const record = (event: string, fields?: LogFields): void => void lines.push({ event, fields })
  return { log: { trace: record, debug: record, info: record, warn: record, error: record }, lines }
}

const { log: unread } = recordingLog()
const ALICE = parseUserKey('acme-alice') as UserKey

function successor(changes: Partial<Successor> = {}): Successor {
  return {
    user: ALICE,
    loginId: randomUUID(),
    attemptId: randomUUID(),
    generation: 8,
    refreshTokenSealed: randomBytes(90),
    keyId: 'k1',
    accessToken: {
      sealed: randomBytes(120),
      requestedAt: new Date('2026-11-20T10:00:00.000Z'),
      expiresAt: new Date('2026-11-20T10:10:00.000Z'),
      fingerprint: randomBytes(32).toString('base64url'),
    },
    scope: '',
    httpStatus: 200,
    durationMs: 12.5,
    ...changes,
  }
}

/** What it holds, none of which it could not read. */
async function entriesIn(spool: Spool): Promise<Successor[]> {
  const { entries, isWhole } = await spool.list()
  if (!isWhole) throw new Error('Some entry could not be read.')
  const found: Successor[] = []
  for (const { attemptId } of entries) {
    const entry = await spool.read(attemptId)
    if (entry !== undefined) found.push(entry)
  }
  return found
}

t.test(
  'entries come back whole, in the order they were granted, from a spool opened anew too',
  async (t) => {
    const directory = t.testdir()
    const spool = await createSpool(directory, unread)
    const second = successor({ generation: 9, accessToken: null, scope: 'all openid' })
    const first = successor({ generation: 8 })
    await spool.write(second)
    await spool.write(first)
    t.strictSame(await entriesIn(spool), [first, second])
    t.strictSame(await entriesIn(await createSpool(directory, unread)), [first, second])
  },
)

/** The names of the files with several entries. */
const batchesIn = (directory: string): string[] =>
  readdirSync(directory).filter((name) => name.endsWith('.jsonl'))

/** Writes an entry, and three more that wait while it is written, and are then written together. */
async function writeFour(spool: Spool): Promise<Successor[]> {
  const entries = [1, 2, 3, 4].map((generation) => successor({ generation }))
  await Promise.all(entries.map((entry) => spool.write(entry)))
  return entries
}

t.test('entries that come together share a file, which goes with the last of them', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  const entries = await writeFour(spool)
  const [alone, first, second, third] = entries.map(({ attemptId }) => attemptId)
  const [batch = ''] = batchesIn(directory)
  t.strictSame((await readdir(directory)).toSorted(), [`${alone}.json`, batch].toSorted())
  t.equal((await stat(join(directory, batch))).mode & 0o777, 0o600)
  t.strictSame(await entriesIn(spool), entries)
  t.strictSame(await entriesIn(await createSpool(directory, unread)), entries)

  for (const attemptId of [third, first]) await spool.remove(attemptId as string)
  t.strictSame(await entriesIn(spool), [entries[0], entries[2]])
  t.strictSame(await entriesIn(await createSpool(directory, unread)), entries, 'until it is gone')
  await spool.remove(second as string)
  t.strictSame(await readdir(directory), [`${alone}.json`])
  await spool.remove(alone as string)
  t.equal(spool.isEmpty(), true)
})

t.test('a file is read only while something in it is not known', async (t) => {
  const directory = t.testdir()
  const { log, lines } = recordingLog()
  const spool = await createSpool(directory, log)
  const entries = await writeFour(spool)
  const [alone = '', ...others] = entries.map(({ attemptId }) => attemptId)
  const listed = async (known: readonly string[]) =>
    (await spool.list(new Set(known))).entries.map(({ attemptId }) => attemptId)
  t.strictSame(await listed([]), [alone, ...others])
  t.strictSame(await listed([alone]), others)
  t.strictSame(await listed(others.slice(1)), [alone, ...others], 'with what stands beside it')

  const paths = [`${alone}.json`, ...batchesIn(directory)].map((name) => join(directory, name))
  for (const path of paths) await writeFile(path, 'damaged')
  t.strictSame(await listed([alone, ...others]), [])
  t.strictSame(lines, [], 'nor found damaged')
  t.strictSame(await listed([]), [])
  t.strictSame(
    lines.map(({ event }) => event),
    ['spool_entry_unreadable', 'spool_entry_unreadable'],
  )
  t.equal(spool.has(alone), false)
})

t.test('which entries stand together nobody knows who has not read it', async (t) => {
  const directory = t.testdir()
  const [alone, ...others] = await writeFour(await createSpool(directory, unread))
  const known = new Set([alone, ...others].map((entry) => entry?.attemptId ?? ''))
  t.strictSame(await (await createSpool(directory, unread)).list(known), {
    entries: others.map(({ user, loginId, attemptId, generation }) => ({
      user,
      loginId,
      attemptId,
      generation,
    })),
    isWhole: true,
  })
})

t.test('one entry is read, whatever stands beside it', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  const [alone, first, ...others] = await writeFour(spool)
  if (alone === undefined || first === undefined) throw new Error('four were written')
  const [batch = ''] = batchesIn(directory)
  const [text, , last] = (await readFile(join(directory, batch), 'utf8')).split('\n')
  await writeFile(join(directory, batch), [text, 'damaged', last].join('\n'))
  t.strictSame(await spool.read(first.attemptId), first)
  t.strictSame(await spool.read(alone.attemptId), alone)
  t.equal(await spool.read(randomUUID()), undefined)
  await rm(join(directory, batch))
  t.equal(spool.has(first.attemptId), true, 'for all that is known')
  t.equal(await spool.read(first.attemptId), undefined)
  await spool.list(new Set([alone, first, ...others].map(({ attemptId }) => attemptId)))
  t.equal(spool.has(first.attemptId), false)
  t.equal(spool.has(alone.attemptId), true)
  await mkdir(join(directory, 'away'))
  const path = join(directory, `${alone.attemptId}.json`)
  await rename(path, join(directory, 'away', 'kept'))
  await symlink(path, path)
  await t.rejects(spool.read(alone.attemptId), { code: 'ELOOP' })
})

t.test('those that stand beside one that is found damaged when it is read stay', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  const [alone, first, ...others] = await writeFour(spool)
  const [batch = ''] = batchesIn(directory)
  const text = await readFile(join(directory, batch), 'utf8')
  await writeFile(join(directory, batch), text.replace('"version":1', '"version":9'))
  t.equal(await spool.read(first?.attemptId ?? ''), undefined)
  t.strictSame(await entriesIn(spool), [alone, ...others])
  t.strictSame(await entriesIn(await createSpool(directory, unread)), [alone, ...others])
})

t.test('a spool that was opened anew removes from files as the one that wrote them', async (t) => {
  const directory = t.testdir()
  const entries = await writeFour(await createSpool(directory, unread))
  const spool = await createSpool(directory, unread, 4)
  t.equal(spool.isEmpty(), false)
  await entriesIn(spool)
  await t.rejects(spool.write(successor()), { code: 'SPOOL_FULL' })
  for (const { attemptId } of entries) await spool.remove(attemptId)
  t.equal(spool.isEmpty(), true)
  t.strictSame(await readdir(directory), [])
})

t.test('an entry written again stands in the newer file alone', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  const entries = await writeFour(spool)
  const again = entries.slice(1).map((entry) => ({ ...entry, httpStatus: 201 }))
  for (const entry of again) await spool.write(entry)
  t.strictSame(await entriesIn(spool), [entries[0], ...again])
  t.strictSame(batchesIn(directory), [], 'nothing was left in it')
  t.equal((await readdir(directory)).length, 4)

  const together = again.map((entry) => ({ ...entry, httpStatus: 202 }))
  await Promise.all([successor({ generation: 9 }), ...together].map((entry) => spool.write(entry)))
  t.equal(batchesIn(directory).length, 1)
  t.strictSame((await entriesIn(spool)).slice(1, 4), together)
})

t.test('an entry that stands in two files is one', async (t) => {
  const directory = t.testdir()
  const first = await createSpool(directory, unread)
  const entries = await writeFour(first)
  const [batch = ''] = batchesIn(directory)
  const copy = `${randomUUID()}.jsonl`
  await copyFile(join(directory, batch), join(directory, copy))
  const spool = await createSpool(directory, unread)
  t.strictSame(await entriesIn(spool), entries)
  t.strictSame(await entriesIn(spool), entries)
  // Once from each file, as both are durable.
  for (let round = 0; round < 2; round += 1) {
    for (const { attemptId } of await entriesIn(spool)) await spool.remove(attemptId)
  }
  t.strictSame(await readdir(directory), [])
  t.equal(spool.isEmpty(), true)
})

t.test('what is damaged or deleted behind its back is not counted any more', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  const [alone, ...others] = await writeFour(spool)
  const [batch = ''] = batchesIn(directory)
  const lines = (await readFile(join(directory, batch), 'utf8')).split('\n')
  await writeFile(join(directory, batch), ['damaged', ...lines.slice(1)].join('\n'))
  await rm(join(directory, `${alone?.attemptId}.json`))
  t.strictSame(await entriesIn(spool), others.slice(1))
  for (const { attemptId } of others.slice(1)) await spool.remove(attemptId)
  t.strictSame(batchesIn(directory), [])
  t.equal(spool.isEmpty(), true)
})

t.test('of a file with several entries those that do not parse are set aside', async (t) => {
  const directory = t.testdir()
  const { log, lines } = recordingLog()
  const entries = await writeFour(await createSpool(directory, unread))
  const [batch = ''] = batchesIn(directory)
  const text = await readFile(join(directory, batch), 'utf8')
  const [first = '', ...others] = text.split('\n')
  const damaged = [first.slice(0, -20), ...others].join('\n')
  await writeFile(join(directory, batch), damaged)

  const spool = await createSpool(directory, log)
  const sound = [entries[0], ...entries.slice(2)]
  t.strictSame(await entriesIn(spool), sound)
  t.strictSame(await entriesIn(spool), sound)
  t.equal(lines.length, 1)
  const [aside = '', ...more] = readdirSync(directory).filter((name) =>
    name.endsWith('.unreadable'),
  )
  t.strictSame(more, [])
  t.match(aside, batch)
  t.equal(await readFile(join(directory, aside), 'utf8'), damaged)
  t.equal(await readFile(join(directory, batch), 'utf8'), others.join('\n'))
  t.strictSame(await entriesIn(await createSpool(directory, log)), sound)

  await writeFile(join(directory, batch), 'nothing\nof it')
  t.strictSame(await entriesIn(spool), [entries[0]])
  t.strictSame(batchesIn(directory), [])
  t.equal(lines.length, 2)
})

t.test('what could not be set aside does not go with the entries beside it', async (t) => {
  const directory = t.testdir()
  const entries = await writeFour(await createSpool(directory, unread))
  const [batch = ''] = batchesIn(directory)
  const [first = '', ...others] = (await readFile(join(directory, batch), 'utf8')).split('\n')
  const damaged = [first.replace('"version":1', '"version":2'), ...others].join('\n')
  await writeFile(join(directory, batch), damaged)
  const child = startProcess(
    directory,
    successor(),
    `
    process.on('SIGXFSZ', () => {})
    for (let pass = 0; pass < 3; pass += 1) {
      for (const { attemptId } of (await spool.list()).entries) await spool.remove(attemptId)
    }
    process.stdout.write(spool.isEmpty() + ' ' + reported.length + ' ' + fs.readdirSync(directory))
    process.exit()`,
    { limits: 'ulimit -f 1' },
  )
  t.equal(await outputOf(child), `false 6 ${batch}`, 'two words about it in each pass')
  t.equal(await readFile(join(directory, batch), 'utf8'), damaged)

  const spool = await createSpool(directory, unread)
  t.strictSame(await entriesIn(spool), entries.slice(2), 'not known to have been removed')
  for (const { attemptId } of entries.slice(2)) await spool.remove(attemptId)
  const left = await readdir(directory)
  t.equal(left.length, 1)
  t.equal(await readFile(join(directory, left[0] ?? ''), 'utf8'), damaged)
  t.equal(spool.isEmpty(), true)
})

t.test('what is written while it is being listed is known', async (t) => {
  const child = startProcess(
    t.testdir(),
    successor(),
    `
    process.on('SIGXFSZ', () => {})
    const small = parseEntry(text)
    const large = { ...small, refreshTokenSealed: Buffer.alloc(200_000, 7) }
    const write = (entry) => spool.write({ ...entry, attemptId: crypto.randomUUID() })
    let refused = 0
    for (let round = 0; round < 40; round += 1) {
      let isWriting = true
      const listing = (async () => { while (isWriting) await spool.list() })()
      // The last three wait for the first, do not fit into one file, and are written one by one.
      await Promise.allSettled([small, small, small, large].map(write))
      isWriting = false
      await listing
      await write(small).catch(({ code }) => (refused += code === 'SPOOL_FULL' ? 1 : 0))
      for (const { attemptId } of (await spool.list()).entries) await spool.remove(attemptId)
    }
    process.stdout.write(refused + ' ' + spool.isEmpty() + ' ' + fs.readdirSync(directory))
    process.exit()`,
    { limits: 'ulimit -f 64', open: OPEN.replace('unread', 'unread, 3') },
  )
  t.equal(await outputOf(child), '40 true ')
})

t.test('of entries that are written together one that fails takes no other with it', async (t) => {
  const directory = t.testdir()
  const child = startProcess(
    directory,
    successor(),
    `
    // Or the limit of 32 KiB a file would end the process.
    process.on('SIGXFSZ', () => {})
    const small = parseEntry(text)
    const large = { ...small, refreshTokenSealed: Buffer.alloc(200_000, 7) }
    const ids = Array.from({ length: 4 }, () => crypto.randomUUID())
    const [first, second, , fourth] = ids.map((attemptId) => ({ ...small, attemptId }))
    const ends = await Promise.allSettled([first, second, { ...large, attemptId: ids[2] }, fourth].map((entry) => spool.write(entry)))
    const { entries } = await spool.list()
    const found = ids.map((id) => entries.some((entry) => entry.attemptId === id))
    process.stdout.write(ends.map((end) => end.reason?.code ?? end.status) + ' ' + found)
    process.exit()`,
    { limits: 'ulimit -f 64' },
  )
  t.equal(await outputOf(child), 'fulfilled,fulfilled,EFBIG,fulfilled true,true,false,true')
})

t.test('a spool that has written comes to rest', async (t) => {
  const spool = await createSpool(t.testdir(), unread)
  await spool.write(successor())
  await new Promise((resolve) => setImmediate(resolve))
  t.notOk(process.getActiveResourcesInfo().includes('FSReqPromise'))
})

t.test('files are for their owner alone and hold no temporary remains', async (t) => {
  const directory = join(t.testdir(), 'not', 'yet', 'there')
  const spool = await createSpool(directory, unread)
  const entry = successor()
  await spool.write(entry)
  await spool.checkWritable()
  t.strictSame(await readdir(directory), [`${entry.attemptId}.json`])
  t.equal((await stat(join(directory, `${entry.attemptId}.json`))).mode & 0o777, 0o600)
  t.equal((await stat(directory)).mode & 0o777, 0o700)
})

t.test('a directory that is open to others is closed', async (t) => {
  const directory = t.testdir()
  await chmod(directory, 0o755)
  await createSpool(directory, unread)
  t.equal((await stat(directory)).mode & 0o777, 0o700)
})

t.test('a directory that is private already is left alone', async (t) => {
  const directory = t.testdir()
  await chmod(directory, 0o700)
  const { ctimeMs } = await stat(directory)
  await createSpool(directory, unread)
  t.equal((await stat(directory)).ctimeMs, ctimeMs)
})

t.test('whether it is empty is known without asking the disk', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  t.equal(spool.isEmpty(), true)
  const entry = successor()
  await spool.write(entry)
  t.equal(spool.isEmpty(), false)
  t.equal((await createSpool(directory, unread)).isEmpty(), false, 'from the start')
  await spool.remove(entry.attemptId)
  t.equal(spool.isEmpty(), true)
})

t.test('an entry written twice is there once; one removed twice is gone', async (t) => {
  const spool = await createSpool(t.testdir(), unread)
  const entry = successor()
  await spool.write(entry)
  await spool.write({ ...entry, httpStatus: 201 })
  t.strictSame(await entriesIn(spool), [{ ...entry, httpStatus: 201 }])
  await spool.remove(entry.attemptId)
  await spool.remove(entry.attemptId)
  t.strictSame(await entriesIn(spool), [])
})

t.test('fifty writes at once are fifty entries', async (t) => {
  const spool = await createSpool(t.testdir(), unread)
  const entries = Array.from({ length: 50 }, (_, index) => successor({ generation: index + 1 }))
  await Promise.all(entries.map((entry) => spool.write(entry)))
  t.strictSame(await entriesIn(spool), entries)
})

t.test('what does not parse is set aside, reported once, and hides no other entry', async (t) => {
  const directory = t.testdir()
  const { log, lines } = recordingLog()
  const spool = await createSpool(directory, log)
  const good = successor()
  await spool.write(good)
  const text = await readFile(join(directory, `${good.attemptId}.json`), 'utf8')
  const whole = JSON.parse(text) as Record<string, unknown>
  const accessToken = whole['accessToken'] as Record<string, unknown>
  const broken: Record<string, string> = {
    'cut off': text.slice(0, -20),
    empty: '',
    'not an object': '[]',
    null: 'null',
    'another version': JSON.stringify({ ...whole, version: 2 }),
    'a member too many': JSON.stringify({ ...whole, note: 'x' }),
    'a member too few': JSON.stringify({ ...whole, scope: undefined }),
    'a user that is none': JSON.stringify({ ...whole, user: 'a b' }),
    'a login that is no UUID': JSON.stringify({ ...whole, loginId: 'x' }),
    'a generation that is a text': JSON.stringify({ ...whole, generation: '8' }),
    'a generation below zero': JSON.stringify({ ...whole, generation: -8 }),
    'base64 that is none': JSON.stringify({ ...whole, refreshTokenSealed: 'a$b' }),
    'no refresh token': JSON.stringify({ ...whole, refreshTokenSealed: '' }),
    'no key id': JSON.stringify({ ...whole, keyId: '' }),
    'an access token that is a text': JSON.stringify({ ...whole, accessToken: 'x' }),
    'an instant that is none': JSON.stringify({
      ...whole,
      accessToken: { ...accessToken, expiresAt: 'soon' },
    }),
    'a short fingerprint': JSON.stringify({
      ...whole,
      accessToken: { ...accessToken, fingerprint: 'abc' },
    }),
  }
  const names: string[] = []
  for (const content of Object.values(broken)) {
    const attemptId = randomUUID()
    // The entry's own id is made to fit, so that each file has just the one fault.
    const fitting = content.replaceAll(good.attemptId, attemptId)
    await writeFile(join(directory, `${attemptId}.json`), fitting)
    names.push(`${attemptId}.json.unreadable`)
  }
  const misnamed = randomUUID()
  await writeFile(join(directory, `${misnamed}.json`), text)
  names.push(`${misnamed}.json.unreadable`)
  const asDirectory = randomUUID()
  await mkdir(join(directory, `${asDirectory}.json`))
  names.push(`${asDirectory}.json.unreadable`)

  t.strictSame(await entriesIn(spool), [good])
  t.strictSame(await entriesIn(spool), [good])
  t.strictSame(
    (await readdir(directory)).toSorted(),
    [`${good.attemptId}.json`, ...names].toSorted(),
  )
  t.equal(lines.length, names.length)
  t.ok(lines.every(({ event }) => event === 'spool_entry_unreadable'))
})

t.test('files of other names are left alone', async (t) => {
  const directory = t.testdir({ 'README.json': '{}', 'notes.txt': 'x' })
  const { log, lines } = recordingLog()
  const backup = `${randomUUID()}.jsom`
  await writeFile(join(directory, backup), '{}')
  t.strictSame(await entriesIn(await createSpool(directory, log)), [])
  t.strictSame(
    (await readdir(directory)).toSorted(),
    [backup, 'README.json', 'notes.txt'].toSorted(),
  )
  t.equal(lines.length, 0)
})

t.test('temporary files are cleared at the start once they are old', async (t) => {
  const directory = t.testdir({ '.old.tmp': 'x', '.young.tmp': 'x' })
  const longAgo = new Date(Date.now() - 120_000)
  await utimes(join(directory, '.old.tmp'), longAgo, longAgo)
  const entry = successor()
  await (await createSpool(directory, unread)).write(entry)
  const file = `${entry.attemptId}.json`
  await utimes(join(directory, file), longAgo, longAgo)
  await createSpool(directory, unread)
  t.strictSame(await readdir(directory), ['.young.tmp', file], 'entries never are')
})

t.test('an attempt id that is no UUID never becomes a path', async (t) => {
  const directory = join(t.testdir({ 'victim.json': '{}' }), 'spool')
  const spool = await createSpool(directory, unread)
  for (const attemptId of ['../victim', '', 'x', randomUUID().toUpperCase()]) {
    await t.rejects(spool.write(successor({ attemptId })), TypeError)
    await t.rejects(spool.remove(attemptId), TypeError)
  }
  t.ok(await stat(join(directory, '..', 'victim.json')))
  t.strictSame(await readdir(directory), [])
})

t.test('an entry that could not be read back is not written', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread)
  await t.rejects(spool.write(successor({ durationMs: Number.NaN })), TypeError)
  await t.rejects(spool.write(successor({ loginId: 'x' })), TypeError)
  t.strictSame(await readdir(directory), [])
})

t.test(
  'a directory that cannot be made fails the start, one that is gone fails the check',
  async (t) => {
    const root = t.testdir({ file: '' })
    await t.rejects(createSpool(join(root, 'file', 'spool'), unread), { code: 'ENOTDIR' })
    await t.rejects(createSpool(join(root, 'file'), unread), { code: 'EEXIST' })

    const directory = join(root, 'spool')
    const spool = await createSpool(directory, unread)
    await rename(directory, join(root, 'elsewhere'))
    await t.rejects(spool.checkWritable(), { code: 'ENOENT' })
    await t.rejects(spool.write(successor()), { code: 'ENOENT' })
  },
)

t.test(
  'a full spool refuses, says so before it is full, and takes entries again when it drains',
  async (t) => {
    const spool = await createSpool(t.testdir(), unread, 20)
    const entries = Array.from({ length: 20 }, () => successor())
    for (const entry of entries.slice(0, 18)) await spool.write(entry)
    await t.resolves(spool.checkWritable())
    t.equal(spool.hasRoom(), true)
    await spool.write(entries[18] as Successor)
    await t.rejects(spool.checkWritable(), { code: 'SPOOL_FULL' })
    t.equal(spool.hasRoom(), false)
    await t.resolves(spool.write(entries[19] as Successor), 'what is in flight still finds room')
    await t.rejects(spool.write(successor()), { code: 'SPOOL_FULL' })
    await t.resolves(
      spool.write(entries[19] as Successor),
      'an entry that is there may be replaced',
    )
    for (const { attemptId } of entries.slice(0, 2)) await spool.remove(attemptId)
    await t.resolves(spool.checkWritable())
    t.equal((await entriesIn(spool)).length, 18)
  },
)

t.test('a spool says how many entries it holds above nine tenths', async (t) => {
  const spool = await createSpool(t.testdir(), unread, 10)
  const entries = Array.from({ length: 10 }, () => successor())
  const surpluses: number[] = []
  // All but the first stand in one file.
  await Promise.all(entries.slice(0, 8).map((entry) => spool.write(entry)))
  for (const entry of entries.slice(8)) {
    surpluses.push(spool.surplus())
    await spool.write(entry)
  }
  surpluses.push(spool.surplus())
  t.strictSame(surpluses, [0, 0, 1])
  await spool.remove(entries[3]?.attemptId ?? '')
  t.equal(spool.surplus(), 0, 'its file stays, and does not count')
})

t.test(
  'every file is closed again',
  { skip: existsSync('/proc/self/fd') ? false : 'there is no /proc here' },
  async (t) => {
    const spool = await createSpool(t.testdir(), unread)
    const before = readdirSync('/proc/self/fd').length
    for (let i = 0; i < 20; i += 1) {
      await spool.write(successor())
      await spool.checkWritable()
    }
    await spool.list()
    t.ok(readdirSync('/proc/self/fd').length < before + 20)
  },
)

t.test('an entry that was set aside makes room', async (t) => {
  const directory = t.testdir()
  const spool = await createSpool(directory, unread, 1)
  const entry = successor()
  await spool.write(entry)
  await t.rejects(spool.write(successor()), { code: 'SPOOL_FULL' })
  await writeFile(join(directory, `${entry.attemptId}.json`), 'unreadable')
  t.strictSame(await entriesIn(spool), [])
  await t.resolves(spool.write(successor()))
})

// ── In a process of its own ──────────────────────────────────────────────────────────────────────

const IMPORTS = `
  import fs from 'node:fs'
  import { syncBuiltinESMExports } from 'node:module'
  import { createSpool } from ${JSON.stringify(new URL('../src/spool.ts', import.meta.url).href)}
  import { parseEntry } from ${JSON.stringify(new URL('../src/spool-entry.ts', import.meta.url).href)}
  const { DIRECTORY: directory, ENTRY: text } = process.env
  const reported = []
  const unread = { error: (event, { error }) => reported.push(event, error.code), warn() {} }
  const becomeNobody = () => process.getuid() === 0 && process.seteuid(65534)
`
const OPEN = 'const spool = await createSpool(directory, unread)\n'

/** Starts a process that has the spool open, under the limits that the shell sets. */
function startProcess(
  directory: string,
  entry: Successor,
  script: string,
  { limits = ':', open = OPEN } = {},
) {
  const run = `${limits}; exec "$0" --input-type=module -e "$SCRIPT"`
  // Without what tap asks of its children.
  const { NODE_OPTIONS: _tap, ...inherited } = process.env
  return spawn('sh', ['-c', run, process.execPath], {
    env: {
      ...inherited,
      ...{ SCRIPT: IMPORTS + open + script, DIRECTORY: directory, ENTRY: entryText(entry) },
      // One thing after the other, in the order of asking.
      UV_THREADPOOL_SIZE: '1',
    },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
}

async function outputOf(child: ReturnType<typeof startProcess>): Promise<string> {
  let output = ''
  for await (const chunk of child.stdout as AsyncIterable<Buffer>) output += chunk.toString()
  return output
}

t.test('what write has confirmed survives SIGKILL', async (t) => {
  const directory = t.testdir()
  const entry = successor()
  const child = startProcess(
    directory,
    entry,
    `
    await spool.write(parseEntry(text))
    process.stdout.write('written')
    setInterval(() => {}, 1000)`,
  )
  await once(child.stdout, 'data')
  child.kill('SIGKILL')
  const [, signal] = await once(child, 'exit')
  t.equal(signal, 'SIGKILL')
  t.strictSame(await entriesIn(await createSpool(directory, unread)), [entry])
})

t.test('an entry that cannot be read for want of descriptors is left where it is', async (t) => {
  const directory = t.testdir()
  const entry = successor()
  const child = startProcess(
    directory,
    entry,
    `
    await spool.write(parseEntry(text))
    // What the write had open is closed behind it, and before this.
    await fs.promises.stat(directory)
    const taken = []
    try { for (;;) taken.push(fs.openSync('/dev/null')) } catch {}
    fs.closeSync(taken.pop())
    let listed
    // The process itself may use the last descriptor for a moment: the directory cannot be read then, and is read again.
    while (listed === undefined) {
      const asked = spool.list()
      // Takes the last descriptor between the reading of the directory and that of the entry.
      let last
      fs.open('/dev/null', (_error, descriptor) => (last = descriptor))
      listed = await asked.catch(() => undefined)
      if (last !== undefined) fs.closeSync(last)
    }
    process.stdout.write(JSON.stringify(listed) + ' ' + reported)
    process.exit()`,
    { limits: 'ulimit -n 64' },
  )
  t.equal(await outputOf(child), '{"entries":[],"isWhole":false} spool_entries_not_read,EMFILE')
  t.strictSame(await readdir(directory), [`${entry.attemptId}.json`])
  t.strictSame(await entriesIn(await createSpool(directory, unread)), [entry])
})

t.test('an entry that may not be read is left where it is, and hides no other', async (t) => {
  const parent = await mkdtemp(join(tmpdir(), 'spool-'))
  t.teardown(() => rm(parent, { recursive: true, force: true }))
  await chmod(parent, 0o777)
  const directory = join(parent, 'spool')
  const [hidden, seen] = [successor(), successor()]
  await (await createSpool(directory, unread)).write(hidden)
  await chmod(join(directory, `${hidden.attemptId}.json`), 0)
  const child = startProcess(
    directory,
    seen,
    `
    await spool.write(parseEntry(text))
    if (process.getuid() === 0) {
      for (const name of ['', ...fs.readdirSync(directory)]) fs.chownSync(directory + '/' + name, 65534, 65534)
      process.seteuid(65534)
    }
    const { entries, isWhole } = await spool.list()
    if (process.getuid() === 0) process.seteuid(0)
    process.stdout.write(entries.map((entry) => entry.attemptId) + ' ' + isWhole + ' ' + reported)
    process.exit()`,
  )
  t.equal(await outputOf(child), `${seen.attemptId} false spool_entries_not_read,EACCES`)
  t.strictSame(
    (await readdir(directory)).toSorted(),
    [`${hidden.attemptId}.json`, `${seen.attemptId}.json`].toSorted(),
  )
})

t.test('an entry that is removed while it is being listed is nothing to report', async (t) => {
  const child = startProcess(
    t.testdir(),
    successor(),
    `
    const entry = parseEntry(text)
    await spool.write(entry)
    const listed = spool.list()
    // Between the reading of the directory and that of the entry.
    fs.unlink(directory + '/' + entry.attemptId + '.json', () => {})
    process.stdout.write((await listed).entries.length + ' listed, ' + reported.length + ' reported')
    process.exit()`,
  )
  t.equal(await outputOf(child), '0 listed, 0 reported')
})

t.test('a write is not confirmed while its place in the directory is not durable', async (t) => {
  // Nobody's, under a parent that anybody may pass: a directory that its owner can write to and not open.
  const parent = await mkdtemp(join(tmpdir(), 'spool-'))
  t.teardown(() => rm(parent, { recursive: true, force: true }))
  await chmod(parent, 0o777)
  const child = startProcess(
    join(parent, 'spool'),
    successor(),
    `
    fs.chmodSync(directory, 0o300)
    if (process.getuid() === 0) fs.chownSync(directory, 65534, 65534)
    becomeNobody()
    const written = spool.write(parseEntry(text))
    process.stdout.write(await written.then(() => 'written', ({ code }) => code))
    process.exit()`,
  )
  t.equal(await outputOf(child), 'EACCES')
})

t.test('what write confirms was made durable, and its name after it', async (t) => {
  // Whether a disk has been asked to keep something shows nowhere but in the calls.
  const open = `
    const done = []
    const { open, rename } = fs.promises
    fs.promises.open = async (path, flags, mode) => {
      const handle = await open(path, flags, mode)
      const { sync, writeFile } = handle
      handle.sync = async () => { await sync.call(handle); done.push(path === directory ? 'directory synced' : 'file synced') }
      handle.writeFile = async (text) => {
        await writeFile.call(handle, text)
        done.push('written ' + ((flags & fs.constants.O_DSYNC) === fs.constants.O_DSYNC ? 'durably' : 'to memory'))
      }
      return handle
    }
    fs.promises.rename = async (...names) => { await rename(...names); done.push('named') }
    syncBuiltinESMExports()
    const spool = await createSpool(directory, unread)
    done.length = 0
    await spool.write(parseEntry(text))
    process.stdout.write(done.join())
    process.exit()`
  const child = startProcess(t.testdir(), successor(), '', { open })
  t.equal(await outputOf(child), 'written durably,named,directory synced')
})

t.test('entries do not wait for others that the disk keeps waiting', async (t) => {
  const directory = t.testdir()
  const open = `
    const { rename } = fs.promises
    const gate = Promise.withResolvers()
    let renames = 0
    fs.promises.rename = async (...names) => {
      renames += 1
      if (renames === 1) await gate.promise
      await rename(...names)
    }
    syncBuiltinESMExports()
    const spool = await createSpool(directory, unread)
    const done = []
    const write = async (name) => {
      await spool.write({ ...parseEntry(text), attemptId: crypto.randomUUID() })
      done.push(name)
    }
    const first = write('first')
    await Promise.all([write('second'), write('third')])
    gate.resolve()
    await first
    await Promise.all([write('fourth'), write('fifth'), write('sixth')])
    process.stdout.write(done.join())
    process.exit()`
  const child = startProcess(directory, successor(), '', { open })
  t.equal(await outputOf(child), 'second,third,first,fourth,fifth,sixth')
  const together = batchesIn(directory).map((name) => readFileSync(join(directory, name), 'utf8'))
  t.strictSame(
    together.map((file) => file.split('\n').length),
    [2, 2],
  )
})

t.test(
  'a new directory is not opened while its place in the one above is not durable',
  async (t) => {
    // Nobody may make something in the parent, and not open it.
    const parent = await mkdtemp(join(tmpdir(), 'spool-'))
    t.teardown(() => rm(parent, { recursive: true, force: true }))
    await chmod(parent, 0o333)
    const open = `
    becomeNobody()
    const opened = createSpool(directory, unread)
    process.stdout.write(await opened.then(() => 'opened', ({ code }) => code))`
    const entry = successor()
    const child = startProcess(join(parent, 'one', 'in', 'another'), entry, '', { open })
    t.equal(await outputOf(child), 'EACCES')
    await chmod(parent, 0o777)
    t.equal(await outputOf(startProcess(join(parent, 'two'), entry, '', { open })), 'opened')
  },
)

t.test('a directory that cannot be synced fails the check, until it can', async (t) => {
  const script = `
    const { open } = await import('node:fs/promises')
    const handle = await open(directory)
    const { prototype } = handle.constructor
    const { sync } = prototype
    const check = () => spool.checkWritable().then(() => 'fine', ({ code }) => code)
    prototype.sync = () => Promise.reject(Object.assign(new Error('the disk'), { code: 'EIO' }))
    console.log(await check())
    prototype.sync = sync
    console.log(await check())
    await handle.close()`
  const output = await outputOf(startProcess(t.testdir(), successor(), script))
  t.equal(output, 'EIO\nfine\n')
})
