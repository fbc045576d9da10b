// What a command knows of the process that it runs in.

/** As much of the process as a command needs. */
export interface Terminal {
  environment: Readonly<Record<string, string | undefined>>
  /** Standard input to its end. */
  readInput(): Promise<string>
  print(line: string): void
  /** The command has done what it should, and what it found is bad: the exit code is 1. */
  answerNo(): void
}

/** Thrown at a command that there is not, or of which a part is missing. */
export class UsageError extends Error {}
