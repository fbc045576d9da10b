// What operators see of deliveries, and what they may do about them: of the users that a caller may see, and no others.

import t from 'tap'
import { buildListeners } from './support/internal-listener.ts'

const CALLERS = {
  reader: { rights: ['ops:read'], users: ['acme-*'] },
  keeper: { rights: ['grant:manage'], users: ['acme-*'] },
  all: { rights: ['ops:read', 'grant:manage'], users: ['*'] },
}

interface Item {
  id: string
  user: string
  state: string
  attempts: number
  next_attempt_at: string | null
}

async function start(t: Parameters<typeof buildListeners>[0]) {
  const listener = await buildListeners(t, { callers: CALLERS })
  const { pool } = listener.scene.database
  await pool.query(`
    insert into outbox (user_id, type, grant_state, generation, expires_at, state, attempt_count,
      last_failure, next_attempt_at)
    values
      ('acme-1', 'grant.connected', 'active', 1, now(), 'dead', 90, 'http_500', now() - interval '1 hour'),
      ('beta-1', 'grant.connected', 'active', 1, now(), 'dead', 90, 'http_500', now() - interval '1 hour'),
      ('acme-2', 'grant.connected', 'active', 1, now(), 'pending', 3, 'deadline', now() + interval '1 hour'),
      ('acme-3', 'grant.connected', 'active', 1, now(), 'pending', 1, null, now() + interval '1 hour')`)
  const ask = async (caller: keyof typeof CALLERS, url: string, method: 'GET' | 'POST' = 'GET') => {
    const answer = await listener.internalApp.inject({
      method,
      url,
      headers: listener.credentials[caller] ?? {},
    })
    return { status: answer.statusCode, body: answer.json<Record<string, unknown>>() }
  }
  const list = async (caller: keyof typeof CALLERS, query = '') => {
    const { body } = await ask(caller, `/v1/webhook-deliveries${query}`)
    return body as unknown as { items: Item[]; next: string | null }
  }
  const usersOf = async (caller: keyof typeof CALLERS, query = '') =>
    (await list(caller, query)).items.map(({ user }) => user)
  return { ask, list, usersOf }
}

t.test('the list is filtered, paged, and of visible users alone', async (t) => {
  const { ask, list, usersOf } = await start(t)
  t.strictSame(await usersOf('all'), ['acme-1', 'beta-1', 'acme-2', 'acme-3'])
  t.strictSame(await usersOf('reader'), ['acme-1', 'acme-2', 'acme-3'])
  t.strictSame(await usersOf('all', '?state=dead'), ['acme-1', 'beta-1'])
  t.strictSame(await usersOf('reader', '?user=beta-1'), [])
  t.strictSame(await usersOf('reader', '?user=acme-2'), ['acme-2'])
  const first = await list('reader', '?limit=2')
  t.strictSame(
    first.items.map(({ user }) => user),
    ['acme-1', 'acme-2'],
  )
  t.equal(first.items[0]?.next_attempt_at, null)
  const second = await list('reader', `?limit=2&after=${first.next}`)
  t.strictSame(
    second.items.map(({ user }) => user),
    ['acme-3'],
  )
  t.equal(second.next, null)
  for (const query of ['?state=late', '?after=x', '?after=0', '?limit=501', '?user=a%20b']) {
    t.equal((await ask('reader', `/v1/webhook-deliveries${query}`)).status, 400, query)
  }
  t.equal((await ask('keeper', '/v1/webhook-deliveries')).status, 403)
})

t.test('an event is delivered again by whoever may manage its user', async (t) => {
  const { ask, list } = await start(t)
  const [dead, foreign, waiting, underway] = (await list('all')).items
  const again = (caller: keyof typeof CALLERS, id = '') =>
    ask(caller, `/v1/webhook-deliveries/${id}/redeliver`, 'POST')
  const revived = await again('keeper', dead?.id)
  t.equal(revived.status, 202)
  t.match(revived.body, { id: dead?.id, state: 'pending', attempts: 0 })
  t.ok(Date.parse(String(revived.body['next_attempt_at'])) <= Date.now() + 1_000)
  const hurried = await again('keeper', waiting?.id)
  t.ok(Date.parse(String(hurried.body['next_attempt_at'])) <= Date.now() + 1_000)
  const left = await again('keeper', underway?.id)
  t.equal(left.body['next_attempt_at'], underway?.next_attempt_at, 'it is on its way')

  const invisible = await again('keeper', foreign?.id)
  const unknown = await again('keeper', '00000000-0000-0000-0000-000000000000')
  t.equal(invisible.status, 404)
  t.strictSame({ ...invisible.body, instance: '' }, { ...unknown.body, instance: '' })
  t.equal((await list('all', '?user=beta-1')).items[0]?.state, 'dead')
  t.equal((await again('reader', dead?.id)).status, 403)
  t.equal((await again('keeper', 'x')).status, 400)
})
