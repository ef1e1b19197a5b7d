"""Makes the names under TEST_DOMAIN resolve to this host, as a wildcard DNS entry would.

For releases of the SDK that cannot be given an address and find everything by name. Installed as the
`sitecustomize` module of their environments.
"""

import os
import socket

_domain = os.environ.get("TEST_DOMAIN", "")
_original = socket.getaddrinfo


def _getaddrinfo(host, *arguments, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if _domain and name and (name == _domain or name.endswith("." + _domain)):
        host = "127.0.0.1"
    return _original(host, *arguments, **options)


socket.getaddrinfo = _getaddrinfo
