// The page of the demonstration. It holds no token and reads no cookie: every call goes to its own origin with the
// header X-CSRF, and what comes back is documents and problems. State is fetched, never taken from the navigation:
// the one that follows a login arrives without the session cookie, which is Strict.

const PAGE_SIZE = 10
/** How often a sent file is looked after, and for how long. */
const POLL_MS = 700
const POLLS_MAX = 20

/** Companies of the two people at the look-alike, so that nobody has to look them up. */
const COMPANY_OF = { 'pagero:alice': '1204551', 'pagero:bob': '1209874' }

const element = (id) => document.getElementById(id)
/** The part of the list that is shown. */
let offset = 0
let lastShown = 0
let documentCount = 0

// ── Calls ──────────────────────────────────────────────────────────────────────────────────────

/** What a problem document says (RFC 9457), or the little that is known without one. */
class Problem extends Error {
  constructor(status, body) {
    super(body?.title ?? `Pagero answered ${status}`)
    this.status = status
    this.code = body?.code
    this.detail = body?.detail ?? reasonOf(body)
    this.reconnectUrl = body?.reconnect_url
  }
}

/** Pagero documents no form of its API's errors; the look-alike gives a code. */
function reasonOf(body) {
  const code = body?.error?.code
  return code === undefined
    ? 'It gave no reason.'
    : `The reason it gave: ${code.replaceAll('_', ' ')}.`
}

async function call(path, { headers, ...init } = {}) {
  const response = await fetch(path, { ...init, headers: { 'X-CSRF': '1', ...headers } }).catch(
    () => {
      throw new Problem(0, {
        title: 'The broker cannot be reached',
        detail: 'Check that it runs, and try again.',
      })
    },
  )
  if (!response.ok) throw new Problem(response.status, parseJson(await response.text()))
  return response
}

function parseJson(text) {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

// ── What is shown ──────────────────────────────────────────────────────────────────────────────

function show(view) {
  for (const id of ['waiting', 'welcome', 'workspace']) element(id).hidden = id !== view
  element('identity').hidden = view !== 'workspace'
}

function announce(text) {
  element('announcement').textContent = text
}

function showProblem(error) {
  // Without a session there is nothing to say but how to begin.
  if (error.code === 'session_required') {
    show('welcome')
    return
  }
  element('problem-title').textContent = error.message
  element('problem-detail').textContent = error.detail ?? ''
  element('problem-remedy').hidden = error.reconnectUrl === undefined
  if (error.reconnectUrl !== undefined) element('problem-link').href = error.reconnectUrl
  element('problem').hidden = false
}

/** Runs what a click asked for; a failure is shown, and the control is free again. */
async function attempt(control, action) {
  control.disabled = true
  element('problem').hidden = true
  try {
    await action()
  } catch (error) {
    showProblem(error)
  } finally {
    control.disabled = false
    showPaging()
  }
}

function showTime(node, iso) {
  node.textContent = new Intl.DateTimeFormat(undefined, {
    dateStyle: 'medium',
    timeStyle: 'short',
  }).format(new Date(iso))
  node.dateTime = iso
}

// ── Session and grant ──────────────────────────────────────────────────────────────────────────

async function loadSession() {
  const response = await call('/auth/session')
  const { user, expires_at: expiresAt, grant } = await response.json()
  element('identity-user').textContent = user
  element('session-user').textContent = user
  showTime(element('session-expires'), expiresAt)
  element('upload').elements.sendingCompanyId.value ||= COMPANY_OF[user] ?? ''
  showGrant(grant)
  show('workspace')
}

function showGrant(grant) {
  const state = grant?.state ?? 'none'
  element('grant-state').textContent = state.replaceAll('_', ' ')
  element('grant-state').classList.toggle('active', state === 'active')
  element('disconnect').disabled = grant === null
  element('grant-cause-row').hidden = !grant?.cause
  element('grant-cause').textContent = (grant?.cause ?? '').replaceAll('_', ' ')
  if (grant === null) return
  showTime(element('grant-authenticated'), grant.authenticated_at)
  showTime(element('grant-rotated'), grant.rotated_at)
  showTime(element('grant-rolling'), grant.rolling_expires_at)
  showTime(element('grant-absolute'), grant.absolute_expires_at)
}

async function logOut(query) {
  await call(`/auth/logout${query}`, { method: 'POST' })
  show('welcome')
  announce(query === '' ? 'You have logged out.' : 'Pagero is disconnected.')
  element('content').focus()
}

// ── Documents ──────────────────────────────────────────────────────────────────────────────────

async function loadDocuments(from = offset) {
  const response = await call(`/api/document/v1/documents?limit=${PAGE_SIZE}&offset=${from}`, {
    headers: { Accept: 'application/json' },
  })
  const { items, meta } = await response.json()
  offset = from
  lastShown = from + items.length
  documentCount = meta.total
  element('documents').replaceChildren(...items.map(rowOf))
  const position =
    documentCount === 0 ? 'No documents yet' : `${offset + 1} to ${lastShown} of ${documentCount}`
  element('page-position').textContent = position
  showPaging()
  announce(`Documents: ${position}`)
}

/** The ends of the list: there the buttons rest. */
function showPaging() {
  element('newer').disabled = offset === 0
  element('older').disabled = lastShown >= documentCount
}

async function turnPage(step) {
  await loadDocuments(Math.max(0, offset + step))
}

function rowOf({ id, documentInfo }) {
  const row = element('document-row').content.cloneNode(true)
  const { documentIdentifier, documentType, direction, issueDate, amounts } = documentInfo
  const isReceived = direction === 'Received'
  const party = isReceived ? documentInfo.sender : documentInfo.receiver
  const write = (selector, text) => {
    row.querySelector(selector).textContent = text
  }
  write('.number', documentIdentifier)
  write('.type', documentType.replaceAll(/(?<=[a-z])(?=[A-Z])/g, ' '))
  write('.arrow', isReceived ? '↓' : '↑')
  write('.party', party?.name ?? direction)
  row.querySelector('.arrow').title = direction
  write('.issued', issueDate)
  write('td.amount', amountOf(amounts))
  for (const [format, type] of [
    ['pdf', 'application/pdf'],
    ['xml', 'application/xml'],
  ]) {
    const button = row.querySelector(`.${format}`)
    button.setAttribute('aria-label', `Download ${documentIdentifier} as ${format.toUpperCase()}`)
    button.addEventListener('click', () => attempt(button, () => download(id, type)))
  }
  return row
}

/** Amounts come as strings of decimals; Intl takes them without going through a float. */
function amountOf({ totalAmount, currency }) {
  return new Intl.NumberFormat(undefined, { style: 'currency', currency }).format(totalAmount)
}

async function download(id, type) {
  const path = `/api/document/v1/documents/${encodeURIComponent(id)}/targetdocument`
  const response = await call(path, { headers: { Accept: type } })
  const disposition = response.headers.get('Content-Disposition') ?? ''
  const link = document.createElement('a')
  link.href = URL.createObjectURL(await response.blob())
  link.download = /filename="([^"]+)"/.exec(disposition)?.[1] ?? id
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1_000)
  announce(`${link.download} was downloaded.`)
}

// ── Upload ─────────────────────────────────────────────────────────────────────────────────────

/** Sends the form with XMLHttpRequest: fetch does not tell how much of a body has left. */
function send(form, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest()
    request.open('POST', '/api/file/v1/files')
    request.setRequestHeader('X-CSRF', '1')
    request.upload.addEventListener('progress', ({ loaded, total }) => onProgress(loaded / total))
    request.addEventListener('load', () => {
      const body = parseJson(request.responseText)
      if (request.status < 300) resolve(body)
      else reject(new Problem(request.status, body))
    })
    request.addEventListener('error', () =>
      reject(
        new Problem(0, {
          title: 'The upload broke off',
          detail: 'Look whether it arrived before you send it again.',
        }),
      ),
    )
    request.send(form)
  })
}

async function upload(form) {
  const state = element('upload-state')
  const progress = element('upload-progress')
  // In Pagero's order, the file first.
  const parts = new FormData()
  for (const name of [
    'payload',
    'documentType',
    'sendMode',
    'sendingCompanyId',
    'senderReference',
  ]) {
    parts.append(name, form.get(name))
  }
  progress.value = 0
  progress.hidden = false
  state.textContent = `Sending ${form.get('payload').name}…`
  try {
    const { id } = await send(parts, (share) => {
      progress.value = share
    })
    state.textContent = `File ${id} has arrived and is being processed…`
    state.textContent = await outcomeOf(id)
    await loadDocuments(0)
  } catch (error) {
    state.textContent = ''
    throw error
  } finally {
    progress.hidden = true
  }
}

/** A part that was processed disappears from the list; one that was not says why. */
async function outcomeOf(fileId) {
  for (let poll = 0; poll < POLLS_MAX; poll += 1) {
    const response = await call(`/api/file/v1/files/${encodeURIComponent(fileId)}/fileparts`)
    const { items } = await response.json()
    if (items.length === 0) return `File ${fileId} is processed: its document is in the list.`
    if (items[0].status === 'Error') {
      return `File ${fileId} failed: ${items[0].error?.description?.join(' ') ?? 'no reason given'}`
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS))
  }
  return `File ${fileId} is still being processed. Reload the list in a while.`
}

// ── Wiring ─────────────────────────────────────────────────────────────────────────────────────

function onClick(id, action) {
  element(id).addEventListener('click', ({ currentTarget }) => {
    void attempt(currentTarget, action)
  })
}

onClick('log-out', () => logOut(''))
onClick('reload', async () => {
  await loadSession()
  await loadDocuments()
})
onClick('newer', () => turnPage(-PAGE_SIZE))
onClick('older', () => turnPage(PAGE_SIZE))
element('problem-close').addEventListener('click', () => {
  element('problem').hidden = true
})
element('disconnect').addEventListener('click', () => element('disconnect-dialog').showModal())
element('disconnect-dialog').addEventListener('close', ({ currentTarget }) => {
  const answer = currentTarget.returnValue
  currentTarget.returnValue = ''
  if (answer === 'disconnect') void attempt(element('disconnect'), () => logOut('?disconnect=true'))
})
element('upload').addEventListener('submit', (event) => {
  event.preventDefault()
  const form = new FormData(event.target)
  void attempt(event.submitter, () => upload(form))
})

try {
  await loadSession()
  await loadDocuments()
} catch (error) {
  if (element('workspace').hidden) show('welcome')
  showProblem(error)
}
