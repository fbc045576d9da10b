// Debian's nginx as a program that is measured, or that stands where Pagero's API stands.

import { spawnSync } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { hasNginx, NGINX, nginxConfiguration } from '../../test/support/nginx.ts'
import { answers, type Place, type Program, startProgram } from './processes.ts'

/** What `nginx -v` says. @throws Error with what to do where nginx is missing */
export function nginxVersion(): string {
  if (!hasNginx) throw new Error('Install nginx first: apt-get install nginx')
  return spawnSync(NGINX, ['-v'], { encoding: 'utf8' }).stderr.trim()
}

/** Starts nginx with these directives in its http context; its files are in a folder of its name. */
export async function startNginx(options: {
  directory: string
  name: string
  place: Place
  http: string
  /** A URL that it answers with 200 when it is ready. */
  probe: string
}): Promise<Program> {
  const home = join(options.directory, options.name)
  await mkdir(home)
  const file = join(home, 'nginx.conf')
  await writeFile(file, nginxConfiguration(home, options.http))
  return startProgram({
    place: options.place,
    program: NGINX,
    parameters: ['-c', file, '-e', join(home, 'error.log')],
    env: {},
    outputFile: join(home, 'output.log'),
    ready: answers(options.probe),
  })
}
