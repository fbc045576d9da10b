// The documents of the look-alike's companies: invented invoices, and whatever is uploaded, in memory.
// The shape is that of Pagero's document list; the names of the parties are an addition of the look-alike.

import { createHash, randomUUID } from 'node:crypto'
import type { Account } from './accounts.ts'

export interface Document {
  id: string
  fileId: string
  createTime: string
  isFetched: boolean
  isSelfBilled: boolean
  sendMode: string
  distribution: string
  documentInfo: {
    direction: 'Received' | 'Sent'
    documentType: string
    documentSubType: string
    documentIdentifier: string
    issueDate: string
    dueDate: string
    sender: { name: string }
    receiver: { name: string }
    amounts: { currency: string; netAmount: string; vatAmount: string; totalAmount: string }
  }
  attachments: unknown[]
  documentReferences: unknown[]
  eventDetails: unknown[]
  validationErrors: { noOfErrors: number }
}

export interface Upload {
  filename: string
  documentType: string
  sendMode: string
  senderReference: string
}

interface FilePart {
  id: string
  fileId: string
  status: 'Processing' | 'AwaitingInteraction' | 'Error'
  error?: { description: string[] }
}

interface File {
  companyId: string
  upload: Upload
  part: FilePart
  /** When processing ends, of `performance.now()`. */
  readyAtMs: number
  isFinished: boolean
}

/** A year of purchases: supplier, document type, net amount in minor units, days before the newest. */
const PURCHASES: ReadonlyArray<readonly [string, string, number, number]> = [
  ['Kontorsgiganten AB', 'Invoice', 184_250, 0],
  ['Elbolaget Mälardalen', 'Invoice', 1_267_000, 2],
  ['Norrfrakt Logistik AB', 'Invoice', 743_980, 3],
  ['Berg & Dal Redovisning', 'Invoice', 950_000, 7],
  ['Telekompaniet Norden', 'Invoice', 328_900, 9],
  ['Kontorsgiganten AB', 'PaymentReminder', 184_250, 11],
  ['Snickarlaget i Falun', 'Invoice', 4_412_500, 16],
  ['Molnverket AB', 'Invoice', 1_599_000, 21],
  ['Norrfrakt Logistik AB', 'Invoice', 698_140, 24],
  ['Sjöstadens Städ', 'Invoice', 412_000, 30],
  ['Elbolaget Mälardalen', 'Invoice', 1_388_400, 33],
  ['Grafiska Punkten', 'Invoice', 267_350, 41],
  ['Molnverket AB', 'Invoice', 1_599_000, 52],
  ['Hotell Vasa, Uppsala', 'Invoice', 359_600, 58],
]

const SALES: ReadonlyArray<readonly [string, string, number, number]> = [
  ['Västkustens Livs AB', 'Invoice', 2_340_000, 1],
  ['Kommunförbundet Mitt', 'Invoice', 8_725_000, 5],
  ['Havsbris Rederi', 'Invoice', 1_114_900, 14],
  ['Kommunförbundet Mitt', 'Invoice', 8_725_000, 35],
  ['Västkustens Livs AB', 'Invoice', 1_976_500, 44],
]

/** Creation of the newest invoice; fixed, so that a list looks the same in every run. */
const NEWEST_AT = Date.UTC(2026, 10, 20, 8, 41, 12, 347)
const DAY_MS = 86_400_000
const PAYMENT_DAYS = 30
const VAT = 0.25

export interface Documents {
  /** Documents of a company, newest first. */
  of(account: Account): Document[]
  /** Takes a file in; its document appears when processing ends. */
  upload(account: Account, upload: Upload): { fileId: string }
  /** Parts of a file that are not finished, or undefined when the company has no such file. */
  parts(account: Account, fileId: string): FilePart[] | undefined
  /** Restarts or cancels a part; false when there is none. */
  act(account: Account, partId: string, action: 'Restart' | 'Cancel'): boolean
}

/** Creates the archive of every company. A file whose name contains "error" fails until it is restarted. */
export function createDocuments(processingMs: number): Documents {
  const archives = new Map<string, Document[]>()
  const files = new Map<string, File>()
  let lastNumber = 700_100

  function archiveOf(account: Account): Document[] {
    const archive = archives.get(account.company.id) ?? inventedDocuments(account)
    archives.set(account.company.id, archive)
    return archive
  }

  function finishWhatIsReady(account: Account): void {
    for (const [fileId, file] of files) {
      const isReady = file.companyId === account.company.id && performance.now() >= file.readyAtMs
      if (!isReady || file.isFinished || file.part.status !== 'Processing') continue
      if (/error/i.test(file.upload.filename)) {
        file.part.status = 'Error'
        file.part.error = { description: ['The document could not be read by the receiver.'] }
      } else {
        file.isFinished = true
        archiveOf(account).unshift(documentOf(account, fileId, file.upload))
      }
    }
  }

  return {
    of(account) {
      finishWhatIsReady(account)
      return archiveOf(account)
    },
    upload(account, upload) {
      const fileId = String((lastNumber += 1))
      files.set(fileId, {
        companyId: account.company.id,
        upload,
        part: { id: String((lastNumber += 1)), fileId, status: 'Processing' },
        readyAtMs: performance.now() + processingMs,
        isFinished: false,
      })
      return { fileId }
    },
    parts(account, fileId) {
      finishWhatIsReady(account)
      const file = files.get(fileId)
      if (file?.companyId !== account.company.id) return undefined
      return file.isFinished ? [] : [file.part]
    },
    act(account, partId, action) {
      const file = [...files.values()].find(({ part }) => part.id === partId)
      if (file?.companyId !== account.company.id || file.isFinished) return false
      if (action === 'Cancel') {
        file.isFinished = true
      } else {
        file.upload.filename = 'restarted.xml'
        file.part = { id: partId, fileId: file.part.fileId, status: 'Processing' }
        file.readyAtMs = performance.now() + processingMs
      }
      return true
    },
  }
}

function inventedDocuments(account: Account): Document[] {
  const own = account.company.name
  const received = PURCHASES.map(([supplier, type, net, daysAgo], index) =>
    invented(account, 'Received', supplier, own, type, net, daysAgo, 48_210 + index * 37),
  )
  const sent = SALES.map(([customer, type, net, daysAgo], index) =>
    invented(account, 'Sent', own, customer, type, net, daysAgo, 20_260 + index),
  )
  return [...received, ...sent].toSorted((a, b) => b.createTime.localeCompare(a.createTime))
}

function invented(
  account: Account,
  direction: 'Received' | 'Sent',
  sender: string,
  receiver: string,
  documentType: string,
  netMinor: number,
  daysAgo: number,
  number: number,
): Document {
  const createdAt = new Date(NEWEST_AT - daysAgo * DAY_MS - ((number * 7_919) % 36_000_000))
  return {
    id: uuidOf(`${account.company.id}/${direction}/${number}`),
    fileId: String(9_870_000_000 + number),
    createTime: createdAt.toISOString(),
    isFetched: direction === 'Received' && daysAgo > 20,
    isSelfBilled: false,
    sendMode: 'Production',
    distribution: 'Electronic',
    documentInfo: {
      direction,
      documentType,
      documentSubType: 'Debit',
      documentIdentifier: String(number),
      issueDate: dateOf(createdAt),
      dueDate: dateOf(new Date(createdAt.getTime() + PAYMENT_DAYS * DAY_MS)),
      sender: { name: sender },
      receiver: { name: receiver },
      amounts: amountsOf(netMinor, account),
    },
    attachments: [],
    documentReferences: [],
    eventDetails: [],
    validationErrors: { noOfErrors: 0 },
  }
}

function documentOf(account: Account, fileId: string, upload: Upload): Document {
  const now = new Date()
  return {
    ...invented(account, 'Sent', account.company.name, '', upload.documentType, 0, 0, 0),
    id: randomUUID(),
    fileId,
    createTime: now.toISOString(),
    sendMode: upload.sendMode,
    documentInfo: {
      direction: 'Sent',
      documentType: upload.documentType,
      documentSubType: 'Debit',
      documentIdentifier: upload.senderReference || upload.filename,
      issueDate: dateOf(now),
      dueDate: dateOf(new Date(now.getTime() + PAYMENT_DAYS * DAY_MS)),
      sender: { name: account.company.name },
      receiver: { name: 'As addressed in the file' },
      amounts: amountsOf(0, account),
    },
  }
}

function amountsOf(netMinor: number, account: Account): Document['documentInfo']['amounts'] {
  const vatMinor = Math.round(netMinor * VAT)
  return {
    currency: account.company.vatNumber.startsWith('NO') ? 'NOK' : 'SEK',
    netAmount: decimal(netMinor),
    vatAmount: decimal(vatMinor),
    totalAmount: decimal(netMinor + vatMinor),
  }
}

/** Minor units as the string with two decimals that Pagero prints. */
function decimal(minor: number): string {
  return (minor / 100).toFixed(2)
}

function dateOf(instant: Date): string {
  return instant.toISOString().slice(0, 10)
}

/** A UUID that is the same in every run. */
function uuidOf(name: string): string {
  const hex = createHash('sha256').update(name).digest('hex')
  return [
    hex.slice(0, 8),
    hex.slice(8, 12),
    `4${hex.slice(13, 16)}`,
    `a${hex.slice(17, 20)}`,
    hex.slice(20, 32),
  ].join('-')
}
