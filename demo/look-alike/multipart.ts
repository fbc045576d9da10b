// Reads an upload of any size in constant memory: the fields stand around the payload, so the first and the last bytes are kept.

/** Room for the fields and part headers before, and after, the payload. */
const WINDOW_BYTES = 16_384

export interface MultipartForm {
  fields: Readonly<Record<string, string>>
  /** Of the part named `payload`. */
  filename: string | undefined
}

/** Keeps what is needed of a body that passes by. */
export function createMultipartReader(boundary: string) {
  let head = Buffer.alloc(0)
  let tail = Buffer.alloc(0)
  return {
    add(chunk: Buffer): void {
      const headRoom = WINDOW_BYTES - head.length
      if (headRoom > 0) head = Buffer.concat([head, chunk.subarray(0, headRoom)])
      const rest = chunk.subarray(Math.max(0, headRoom))
      if (rest.length > 0) tail = Buffer.concat([tail, rest]).subarray(-WINDOW_BYTES)
    },
    /** Returns the form, or undefined when the body does not end with its boundary. */
    read(): MultipartForm | undefined {
      const text = Buffer.concat([head, tail]).toString('utf8')
      if (!text.trimEnd().endsWith(`--${boundary}--`)) return undefined
      const fields: Record<string, string> = {}
      let filename: string | undefined
      for (const part of text.split(`--${boundary}`).slice(1, -1)) {
        const bodyAt = part.indexOf('\r\n\r\n')
        const header = part.slice(0, bodyAt)
        const name = /\bname="([^"]*)"/i.exec(header)?.[1]
        if (name === 'payload') filename = /\bfilename="([^"]*)"/i.exec(header)?.[1]
        else if (name !== undefined) fields[name] = part.slice(bodyAt + 4).replace(/\r\n$/, '')
      }
      return { fields, filename }
    },
  }
}

/** Returns the boundary of a multipart Content-Type, quoted or not (RFC 2046 section 5.1.1). */
export function boundaryOf(contentType: string): string | undefined {
  const match = /^multipart\/form-data\s*;.*?\bboundary=(?:"([^"]+)"|([^\s;]+))/i.exec(contentType)
  return match?.[1] ?? match?.[2]
}
