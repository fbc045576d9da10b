// What a document downloads as: UBL XML, or a PDF of one page that any viewer opens.

import type { Document } from './documents.ts'

/** Returns the document as a UBL 2.1 invoice. */
export function invoiceXml({ documentInfo: invoice }: Document): Buffer {
  const { amounts } = invoice
  const amount = (name: string, value: string) =>
    `<cbc:${name} currencyID="${amounts.currency}">${value}</cbc:${name}>`
  const party = (role: string, name: string) =>
    `<cac:${role}><cac:Party><cac:PartyName><cbc:Name>${escapeXml(name)}</cbc:Name></cac:PartyName></cac:Party></cac:${role}>`
  return Buffer.from(`<?xml version="1.0" encoding="UTF-8"?>
<Invoice xmlns="urn:oasis:names:specification:ubl:schema:xsd:Invoice-2"
  xmlns:cac="urn:oasis:names:specification:ubl:schema:xsd:CommonAggregateComponents-2"
  xmlns:cbc="urn:oasis:names:specification:ubl:schema:xsd:CommonBasicComponents-2">
  <cbc:ID>${escapeXml(invoice.documentIdentifier)}</cbc:ID>
  <cbc:IssueDate>${invoice.issueDate}</cbc:IssueDate>
  <cbc:DueDate>${invoice.dueDate}</cbc:DueDate>
  <cbc:DocumentCurrencyCode>${amounts.currency}</cbc:DocumentCurrencyCode>
  ${party('AccountingSupplierParty', invoice.sender.name)}
  ${party('AccountingCustomerParty', invoice.receiver.name)}
  <cac:TaxTotal>${amount('TaxAmount', amounts.vatAmount)}</cac:TaxTotal>
  <cac:LegalMonetaryTotal>
    ${amount('TaxExclusiveAmount', amounts.netAmount)}
    ${amount('PayableAmount', amounts.totalAmount)}
  </cac:LegalMonetaryTotal>
</Invoice>
`)
}

/** Returns the document as a PDF 1.4 file. */
export function invoicePdf({ documentInfo: invoice }: Document): Buffer {
  const { amounts } = invoice
  const money = (value: string) => `${value} ${amounts.currency}`
  const content = [
    '0.04 0.43 0.36 rg 0 806 595 36 re f',
    textAt(56, 740, 26, 'F2', `${invoice.documentType} ${invoice.documentIdentifier}`),
    '0.36 0.41 0.46 rg',
    ...['From', 'To', 'Issued', 'Due'].map((label, row) =>
      textAt(56, 690 - row * 24, 11, 'F1', label),
    ),
    '0.09 0.13 0.17 rg',
    ...[invoice.sender.name, invoice.receiver.name, invoice.issueDate, invoice.dueDate].map(
      (value, row) => textAt(140, 690 - row * 24, 11, 'F1', value),
    ),
    '0.85 0.87 0.89 RG 56 590 m 539 590 l S',
    '0.09 0.13 0.17 rg',
    textAt(56, 562, 11, 'F1', 'Net amount'),
    textAt(400, 562, 11, 'F1', money(amounts.netAmount)),
    textAt(56, 538, 11, 'F1', 'VAT 25 %'),
    textAt(400, 538, 11, 'F1', money(amounts.vatAmount)),
    textAt(56, 506, 14, 'F2', 'To pay'),
    textAt(400, 506, 14, 'F2', money(amounts.totalAmount)),
  ].join('\n')
  return pdfOf([
    '<< /Type /Catalog /Pages 2 0 R >>',
    '<< /Type /Pages /Kids [3 0 R] /Count 1 >>',
    '<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources << /Font << /F1 5 0 R /F2 6 0 R >> >> >>',
    `<< /Length ${content.length} >>\nstream\n${content}\nendstream`,
    fontNamed('Helvetica'),
    fontNamed('Helvetica-Bold'),
  ])
}

/** Numbers the objects from 1 and writes the table of their places (ISO 32000-1 section 7.5). */
function pdfOf(objects: readonly string[]): Buffer {
  let text = '%PDF-1.4\n'
  const places = objects.map((object, index) => {
    const place = text.length
    text += `${index + 1} 0 obj\n${object}\nendobj\n`
    return `${String(place).padStart(10, '0')} 00000 n \n`
  })
  const tableAt = text.length
  text += `xref\n0 ${objects.length + 1}\n0000000000 65535 f \n${places.join('')}`
  text += `trailer\n<< /Size ${objects.length + 1} /Root 1 0 R >>\nstartxref\n${tableAt}\n%%EOF\n`
  // One byte a character: what is above Latin-1 has been replaced, so places in the text are places in the file.
  return Buffer.from(text, 'latin1')
}

function fontNamed(name: string): string {
  return `<< /Type /Font /Subtype /Type1 /BaseFont /${name} /Encoding /WinAnsiEncoding >>`
}

function textAt(x: number, y: number, size: number, font: string, text: string): string {
  const latin = text.replaceAll(/[^\u0020-\u007e\u00a0-\u00ff]/g, '?').replaceAll(/[\\()]/g, '\\$&')
  return `BT /${font} ${size} Tf ${x} ${y} Td (${latin}) Tj ET`
}

function escapeXml(text: string): string {
  return text.replaceAll(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`)
}
