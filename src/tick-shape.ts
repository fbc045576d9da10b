// Node makes an object for each callback of `process.nextTick`, of which every request has some eight. V8 forgets how they
// are laid out when it collects garbage while there is none of them, as during a start; from then on each costs ten times
// as much, a tenth of what a request does. One that is kept keeps their layout. It is made before anything else is done;
// with the flags of `npm start` and of the image, loading the modules before that has not been seen to make it too late.

import { executionAsyncResource } from 'node:async_hooks'

/** With arguments and without: `args` may be laid out in two ways. */
const kept: object[] = []

process.nextTick(() => kept.push(executionAsyncResource()))
process.nextTick((_argument: number) => kept.push(executionAsyncResource()), 1)
