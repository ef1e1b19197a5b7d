"""Networks for tests, each one test's at a time: test processes run side by side on a host, also of several checkouts.

Slot networks are of 198.18.0.0/15, which is set aside for tests of networks (RFC 2544). The client tests claim theirs
from 198.18.64.0/18 (`tests.clients.support.instance`); an Emberbox with the defaults begins at 198.18.0.0.
"""

from __future__ import annotations

import fcntl
import secrets
import tempfile
from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import BinaryIO

# Large enough for addresses to rest after each of many machines.
NODES = tuple(IPv4Network(f"198.18.{third}.0/22") for third in range(128, 256, 4))
WORLDS = tuple(IPv4Network(f"198.19.{third}.0/24") for third in range(224))
SMALL = tuple(IPv4Network("198.19.240.0/21").subnets(new_prefix=28))
# TEST-NET-2 (RFC 5737), which no instance routes. The other two documentation networks are the real network of some
# hosts, which a route of ours there would cut off.
AGENTS = tuple(IPv4Network("198.51.100.0/25").subnets(new_prefix=31))
INTERNETS = tuple(IPv4Network("198.51.100.128/25").subnets(new_prefix=30))


class Claim:
    """A network that is this process's until `release`, or until the process ends."""

    def __init__(self, candidates: Sequence[IPv4Network]) -> None:
        """
        Raises:
            RuntimeError: every candidate is claimed.
        """
        folder = Path(tempfile.gettempdir()) / "emberbox-test-networks"
        folder.mkdir(exist_ok=True)
        for network in secrets.SystemRandom().sample(candidates, len(candidates)):
            file = (folder / str(network).replace("/", "_")).open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            self.network = network
            self._file: BinaryIO = file
            return
        raise RuntimeError(f"every network from {candidates[0]} to {candidates[-1]} is claimed, see {folder}")

    def release(self) -> None:
        self._file.close()
