// Makes the names under TEST_DOMAIN resolve to this host, as a wildcard DNS entry would. For releases of the SDK that
// cannot be given an address and find everything by name.
import dns from 'node:dns'

const domain = process.env.TEST_DOMAIN
const original = dns.lookup

dns.lookup = function (hostname, options, callback) {
  if (domain && (hostname === domain || hostname.endsWith(`.${domain}`))) return original.call(dns, '127.0.0.1', options, callback)
  return original.call(dns, hostname, options, callback)
}
