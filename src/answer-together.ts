// Answers that are at hand are written when all requests that have come in one turn of the event loop have been looked at.
// Written one by one between requests, each would wake its client's process anew, which costs about a quarter of what
// sending does.

import type { ServerResponse } from 'node:http'

/** Answers that wait for one another: what the first of them waits for the others is then less than two milliseconds. */
const TOGETHER_MAX = 64

/**
 * Makes what ends responses together. Their heads must have been given with `writeHead`; `text` is of Latin-1 characters.
 * To end one whose connection has gone by then does nothing.
 */
export function createEnding(): (response: ServerResponse, text: string) => void {
  let responses: ServerResponse[] = []
  let texts: string[] = []

  function endAll(): void {
    const ending = responses
    const ofEach = texts
    responses = []
    texts = []
    for (const [index, response] of ending.entries()) {
      response.end(ofEach[index], 'latin1')
    }
  }

  return (response, text) => {
    texts.push(text)
    const count = responses.push(response)
    if (count === 1) setImmediate(endAll)
    else if (count === TOGETHER_MAX) endAll()
  }
}
