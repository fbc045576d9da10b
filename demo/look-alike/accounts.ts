// Who can log in at the look-alike: two people to click, and any other subject for tests.

export interface Account {
  /** The `sub` of its tokens. */
  subject: string
  name: string
  company: { id: string; name: string; vatNumber: string }
}

/** The two on the login form. */
export const ACCOUNTS: readonly Account[] = [
  {
    subject: 'alice',
    name: 'Alice Andersson',
    company: { id: '1204551', name: 'Nordvik AB', vatNumber: 'SE556677889901' },
  },
  {
    subject: 'bob',
    name: 'Bob Berg',
    company: { id: '1209874', name: 'Fjellheim AS', vatNumber: 'NO987654321MVA' },
  },
]

/** Returns the account of a subject. Any subject has one, so that a test can have as many users as it likes. */
export function accountOf(subject: string): Account {
  return (
    ACCOUNTS.find((account) => account.subject === subject) ?? {
      subject,
      name: subject,
      company: { id: '1200000', name: 'Provbolaget AB', vatNumber: 'SE556000000001' },
    }
  )
}
