// Which addresses Pagero's hosts may have: the broker connects nowhere else, whatever a resolver answers. One lookup
// for every connection that may carry a token or a secret. A name in private hands, or one that somebody has turned to
// an address of this network, would otherwise be sent both.

import dns from 'node:dns'
import { BlockList, type LookupFunction } from 'node:net'

/** How long a connection is used before the name is resolved anew: the time to live that load balancers' names have. */
export const CONNECTION_LIFE_MS = 60_000

/** Private networks and this machine: an operator may have Pagero's stand-in, or a way out, there. */
const PRIVATE_BLOCKS = [
  '10.0.0.0/8',
  '100.64.0.0/10',
  '127.0.0.0/8',
  '172.16.0.0/12',
  '192.168.0.0/16',
  '::/96', // ::1, and IPv4 addresses written as compatible ones
  'fc00::/7',
]

/** Nobody's server, or that of a cloud's credentials: refused even to operators (IANA's registries of RFC 6890). */
const IMPOSSIBLE_BLOCKS = [
  '0.0.0.0/8',
  '100.100.100.200/32', // metadata of Alibaba Cloud
  '168.63.129.16/32', // of Azure
  '169.254.0.0/16', // of most others
  '192.0.0.0/24',
  '192.0.2.0/24',
  '192.88.99.0/24',
  '198.18.0.0/15',
  '198.51.100.0/24',
  '203.0.113.0/24',
  '224.0.0.0/3',
  '::/128',
  '100::/64',
  '2001::/32', // Teredo and 6to4 lead to IPv4 addresses of any kind
  '2001:db8::/32',
  '2002::/16',
  'fd00:ec2::/32', // metadata of Amazon
  'fd20:ce::/32', // of Google
  'fe80::/10',
  'fec0::/10',
  'ff00::/8',
]

const PRIVATE = blockList(PRIVATE_BLOCKS)
const IMPOSSIBLE = blockList(IMPOSSIBLE_BLOCKS)
const LOOPBACK = blockList(['127.0.0.0/8', '::1/128'])

/** A name that has an address which the broker does not connect to. */
class AddressRefusedError extends Error {
  readonly code = 'ADDRESS_REFUSED'

  constructor() {
    super('A host has an address that the broker does not connect to.')
  }
}

/**
 * Makes the lookup for connections to Pagero's hosts. All addresses of a name must be public ones, or none is used;
 * `localhost`, which the settings allow for stand-ins, must be this machine. Hosts that are configured as addresses are
 * never looked up. Nothing is cached: each connection resolves again.
 *
 * With `allowPrivate`, names may have addresses of private networks, but never link-local ones or those at which clouds
 * hand out credentials.
 *
 * Failures have the code `ADDRESS_REFUSED`, or the resolver's. `resolve` is the system's resolver.
 */
export function createUpstreamLookup({
  allowPrivate,
  resolve = dns.lookup,
}: {
  allowPrivate: boolean
  resolve?: LookupFunction
}): LookupFunction {
  const isAllowed = (hostname: string, address: string) => {
    const family = address.includes(':') ? 'ipv6' : 'ipv4'
    if (hostname === 'localhost') return LOOPBACK.check(address, family)
    return !IMPOSSIBLE.check(address, family) && (allowPrivate || !PRIVATE.check(address, family))
  }
  return (hostname, options, callback) => {
    resolve(hostname, { ...options, all: true }, (error, answer, family) => {
      if (error !== null) {
        callback(error, '')
        return
      }
      const addresses = Array.isArray(answer) ? answer : [{ address: answer, family: family ?? 4 }]
      const [first] = addresses
      if (first === undefined || !addresses.every(({ address }) => isAllowed(hostname, address))) {
        callback(new AddressRefusedError(), '')
      } else if (options.all === true) callback(null, addresses)
      else callback(null, first.address, first.family)
    })
  }
}

/** Blocks of addresses; those of IPv4 also as IPv6 writes them, mapped (`::ffff:`) and for NAT64 (RFC 6052). */
function blockList(blocks: readonly string[]): BlockList {
  const list = new BlockList()
  for (const block of blocks) {
    const [address = '', prefix] = block.split('/')
    const bits = Number(prefix)
    if (address.includes(':')) list.addSubnet(address, bits, 'ipv6')
    else {
      // Node looks for mapped addresses among the IPv4 ones.
      list.addSubnet(address, bits, 'ipv4')
      list.addSubnet(`64:ff9b::${address}`, 96 + bits, 'ipv6')
    }
  }
  return list
}
