// Loaded before a program (`node --import`): from one SIGWINCH to the next its event loop is busy with something else, and
// comes to its timers and sockets in between only. A signal that means nothing to the program itself.

/** Longer than a timer may be late, and one that is due at once besides. */
const SLICE_MS = 400

let isBusy = false

function burn(): void {
  const endMs = performance.now() + SLICE_MS
  while (performance.now() < endMs);
  if (isBusy) setTimeout(burn, 0)
}

process.on('SIGWINCH', () => {
  isBusy = !isBusy
  if (isBusy) burn()
})
