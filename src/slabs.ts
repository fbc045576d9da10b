// Records outside V8's heap: some numbers and some texts each, in slabs of a MiB. As objects and strings a hundred thousand
// tokens cost their size once more, in what V8 holds in reserve for them, and it goes through them all whenever it collects.
// What is freed is overwritten with zeros.

/** Where a record stands. Once it has been freed, another may stand there. */
export type Place = number & { readonly __brand: 'Place' }

export interface Slabs {
  /**
   * Keeps a record. Texts come back as they are, of any length; lone surrogates do not.
   * @throws TypeError when there are not as many numbers and texts as a record has
   */
  put(numbers: readonly number[], texts: readonly string[]): Place
  number(place: Place, index: number): number
  setNumber(place: Place, index: number, value: number): void
  text(place: Place, index: number): string
  /** Wipes a record. */
  free(place: Place): void
  /** Of all slabs, whether there is anything in them or not. */
  sizeBytes(): number
}

const SLAB_BYTES = 1_048_576
const NUMBER_BYTES = 8
/** Of a length. */
const LENGTH_BYTES = 4
/**
 * What tokens are made of: base64url, or some of it with dots between as in a JWT (RFC 7515 section 7.1). It is kept as the
 * bytes that it stands for, a quarter less.
 */
const PACKABLE = /^[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){0,4}$/
/** Shorter texts are kept as they are. */
const PACKED_CHARACTERS_MIN = 32
/** Stands in the length of a text that is packed. */
const PACKED = 0x80_00_00_00
const CELL_BYTES_MIN = 128
/** Sizes of cells until they are twice as large: of each a sixteenth at most is not used. */
const SIZES_TO_TWICE = 16
/** In a place the number of the slab stands above that of the cell in it, which has so many bits: for the smallest cells. */
const CELL_BITS = 13

/** Cells of one size. A record that is larger than a slab has one of its own. */
interface Slab {
  bytes: Buffer
  numbers: Float64Array
  cellBytes: number
  cells: number
  /** Cells that have been used so far, from the first on. */
  begun: number
  /** Those of them that are free again. */
  freed: number[]
}

/** Makes slabs for records of so many numbers and texts each. */
export function createSlabs(record: { numbers: number; texts: number }): Slabs {
  const lengthsFrom = record.numbers * NUMBER_BYTES
  const headBytes = lengthsFrom + record.texts * LENGTH_BYTES
  const slabs: Array<Slab | undefined> = []
  /** By the size of their cells, the numbers of the slabs that have room. */
  const roomy = new Map<number, number[]>()
  let sizeBytes = 0

  function slabOf(place: Place): Slab {
    const slab = slabs[place >>> CELL_BITS]
    if (slab === undefined) throw new RangeError('There is no record at this place.')
    return slab
  }

  function withRoomFor(cellBytes: number): number {
    const known = roomy.get(cellBytes)?.at(-1)
    if (known !== undefined) return known
    const gone = slabs.indexOf(undefined)
    const number = gone === -1 ? slabs.length : gone
    slabs[number] = newSlab(cellBytes)
    sizeBytes += slabs[number].bytes.length
    roomy.set(cellBytes, [number])
    return number
  }

  function drop(number: number, { bytes, cellBytes }: Slab): void {
    slabs[number] = undefined
    sizeBytes -= bytes.length
    roomy.set(cellBytes, roomy.get(cellBytes)?.filter((other) => other !== number) ?? [])
  }

  return {
    put(numbers, texts) {
      if (numbers.length !== record.numbers || texts.length !== record.texts) {
        throw new TypeError('This record has not as many numbers and texts as the others.')
      }
      const packed = texts.map((text) => (isPackable(text) ? text.split('.') : undefined))
      const textBytes = texts.map((text, index) => {
        const parts = packed[index]
        return parts === undefined ? Buffer.byteLength(text, 'utf8') : packedBytes(parts)
      })
      const cellBytes = cellBytesFor(textBytes.reduce((sum, length) => sum + length, headBytes))
      const number = withRoomFor(cellBytes)
      const place = ((number << CELL_BITS) | takeCell(slabs[number] as Slab)) as Place
      const slab = slabOf(place)
      if (isFull(slab)) roomy.get(cellBytes)?.pop()
      const offset = offsetOf(slab, place)
      slab.numbers.set(numbers, offset / NUMBER_BYTES)
      let end = offset + headBytes
      texts.forEach((text, index) => {
        const length = textBytes[index] ?? 0
        const parts = packed[index]
        if (parts === undefined) slab.bytes.write(text, end, 'utf8')
        else pack(parts, slab.bytes, end)
        const flag = parts === undefined ? 0 : PACKED
        slab.bytes.writeUInt32LE(flag + length, offset + lengthsFrom + index * LENGTH_BYTES)
        end += length
      })
      return place
    },

    number(place, index) {
      const slab = slabOf(place)
      return slab.numbers[offsetOf(slab, place) / NUMBER_BYTES + index] ?? Number.NaN
    },

    setNumber(place, index, value) {
      const slab = slabOf(place)
      slab.numbers[offsetOf(slab, place) / NUMBER_BYTES + index] = value
    },

    text(place, index) {
      const slab = slabOf(place)
      const { bytes } = slab
      const offset = offsetOf(slab, place)
      let from = offset + headBytes
      let lengthAt = offset + lengthsFrom
      for (let before = 0; before < index; before += 1, lengthAt += LENGTH_BYTES) {
        from += bytes.readUInt32LE(lengthAt) % PACKED
      }
      const length = bytes.readUInt32LE(lengthAt)
      return length < PACKED
        ? bytes.toString('utf8', from, from + length)
        : unpack(bytes, from, from + length - PACKED)
    },

    free(place) {
      const slab = slabOf(place)
      const number = place >>> CELL_BITS
      const offset = offsetOf(slab, place)
      slab.bytes.fill(0, offset, offset + slab.cellBytes)
      const others = roomy.get(slab.cellBytes) ?? []
      if (isFull(slab)) roomy.set(slab.cellBytes, [number, ...others])
      slab.freed.push(cellOf(place))
      // One with room stays: the next record may well be as large.
      if (slab.freed.length === slab.begun && others.some((other) => other !== number)) {
        drop(number, slab)
      }
    },

    sizeBytes: () => sizeBytes,
  }
}

function newSlab(cellBytes: number): Slab {
  // Not filled: what is not used yet takes no memory.
  const bytes = Buffer.allocUnsafeSlow(Math.max(SLAB_BYTES, cellBytes))
  return {
    bytes,
    numbers: new Float64Array(bytes.buffer, 0, Math.floor(bytes.length / NUMBER_BYTES)),
    cellBytes,
    cells: Math.floor(bytes.length / cellBytes),
    begun: 0,
    freed: [],
  }
}

/** Sizes are multiples of eight, so that numbers stand where they can be read. */
function cellBytesFor(recordBytes: number): number {
  const atLeast = Math.max(recordBytes, CELL_BYTES_MIN)
  const step = 2 ** Math.floor(Math.log2(atLeast)) / SIZES_TO_TWICE
  return Math.ceil(atLeast / step) * step
}

function isPackable(text: string): boolean {
  return text.length >= PACKED_CHARACTERS_MIN && PACKABLE.test(text)
}

/** Four characters are three bytes; a part is filled up with zeros. */
function bytesOfPart(characters: number): number {
  return Math.ceil(characters / 4) * 3
}

function packedBytes(parts: readonly string[]): number {
  return parts.reduce((sum, { length }) => sum + LENGTH_BYTES + bytesOfPart(length), 0)
}

/** Writes each part behind the number of its characters. */
function pack(parts: readonly string[], bytes: Buffer, from: number): void {
  let end = from
  for (const part of parts) {
    bytes.writeUInt32LE(part.length, end)
    end += LENGTH_BYTES
    bytes.write(part.padEnd(Math.ceil(part.length / 4) * 4, 'A'), end, 'base64url')
    end += bytesOfPart(part.length)
  }
}

function unpack(bytes: Buffer, from: number, end: number): string {
  const parts: string[] = []
  for (let at = from; at < end;) {
    const characters = bytes.readUInt32LE(at)
    at += LENGTH_BYTES
    const next = at + bytesOfPart(characters)
    parts.push(bytes.toString('base64url', at, next).slice(0, characters))
    at = next
  }
  return parts.length === 1 ? (parts[0] ?? '') : parts.join('.')
}

function isFull({ begun, cells, freed }: Slab): boolean {
  return begun === cells && freed.length === 0
}

function takeCell(slab: Slab): number {
  const cell = slab.freed.pop()
  if (cell !== undefined) return cell
  slab.begun += 1
  return slab.begun - 1
}

function cellOf(place: Place): number {
  return place & ((1 << CELL_BITS) - 1)
}

function offsetOf({ cellBytes }: Slab, place: Place): number {
  return cellOf(place) * cellBytes
}
