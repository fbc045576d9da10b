// Looks for secrets where they must not be: whole, or their first characters, in every form in which a program writes
// a text down. What is searched and what is looked for are the test's; nothing here knows the broker.

/** Something that only its holder may know. */
export interface Canary {
  /** What it is, for the report: `refresh token`. */
  kind: string
  value: string | Buffer
}

/** Random bytes in base64url: whoever has the bytes has the text. */
const OPAQUE = /^[A-Za-z0-9_-]{43}$/

/** A place to search, with a name for the report. */
export interface Haystack {
  name: string
  content: string | Buffer
}

export interface Finding {
  kind: string
  form: string
  haystack: string
}

/** A log that cuts a secret short has still told it: so many characters are enough to recognise one. */
const BEGINNING_CHARACTERS = 12

/** Returns each place where a canary stands, by kind, form and haystack; the canary itself is not in the report. */
export function findCanaries(
  canaries: readonly Canary[],
  haystacks: readonly Haystack[],
): Finding[] {
  const forms = canaries.map(({ kind, value }) => ({ kind, forms: formsOf(value) }))
  const findings = new Map<string, Finding>()
  for (const { name, content } of haystacks) {
    // One character for each byte, on both sides.
    const text = bytesOf(content).toString('latin1')
    const lowerCase = text.toLowerCase()
    for (const canary of forms) {
      for (const [form, needle] of canary.forms) {
        const found = text.includes(needle) || (form === 'hex' && lowerCase.includes(needle))
        const finding = { kind: canary.kind, form, haystack: name }
        if (found) findings.set(JSON.stringify(finding), finding)
      }
    }
  }
  return [...findings.values()]
}

/** Forms of a secret, each with the text to look for. */
export function formsOf(value: string | Buffer): Array<readonly [form: string, needle: string]> {
  const bytes = bytesOf(value)
  const forms: Array<readonly [string, string]> = [
    ['raw', bytes.toString('latin1')],
    ['hex', bytes.toString('hex')],
    ...[0, 1, 2].map((shift) => ['base64', insideBase64(bytes, shift)] as const),
    ...[0, 1, 2].map(
      (shift) =>
        [
          'base64url',
          insideBase64(bytes, shift).replaceAll('+', '-').replaceAll('/', '_'),
        ] as const,
    ),
  ]
  if (typeof value === 'string') {
    const inJson = JSON.stringify(value).slice(1, -1)
    forms.push(
      ['URL-encoded', encodeURIComponent(value)],
      ['form-encoded', new URLSearchParams([['', value]]).toString().slice(1)],
      ['JSON-escaped', latin1(inJson)],
      ['JSON within JSON', latin1(JSON.stringify(inJson).slice(1, -1))],
      ['beginning', latin1(value).slice(0, BEGINNING_CHARACTERS)],
    )
    if (OPAQUE.test(value)) {
      const decoded = formsOf(Buffer.from(value, 'base64url'))
      forms.push(...decoded.map(([, needle]) => ['decoded', needle] as const))
    }
  }
  return forms
}

/**
 * What base64 makes of these bytes when `shift` more stand before them, modulo three: as `id:secret` in a Basic header.
 * Characters that depend on the neighbours are left out.
 */
function insideBase64(bytes: Buffer, shift: number): string {
  const shifted = Buffer.concat([Buffer.alloc(shift), bytes])
  const begin = Math.ceil((shift * 8) / 6)
  const end = Math.floor((shifted.length * 8) / 6)
  return shifted.toString('base64').slice(begin, end)
}

function bytesOf(content: string | Buffer): Buffer {
  return typeof content === 'string' ? Buffer.from(content, 'utf8') : content
}

function latin1(text: string): string {
  return bytesOf(text).toString('latin1')
}
