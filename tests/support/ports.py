"""Ports of loopback for tests, each one test process's at a time.

A port that the kernel chooses for a socket that is closed again may be anybody's before it is used: the kernel gives it
to the next connection that asks. These are below the range from which it chooses.
"""

from __future__ import annotations

import fcntl
import random
import socket
import tempfile
from pathlib import Path
from typing import BinaryIO

# Linux chooses from 32768 on, unless told otherwise (ip-sysctl, ip_local_port_range).
_CANDIDATES = range(21_000, 31_000)
_claims: list[BinaryIO] = []
"""Locked until the process ends, whatever becomes of the port's user."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, and which no other test process is given.

    Raises:
        RuntimeError: there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_CANDIDATES, len(_CANDIDATES)):
        if len(found) == count:
            return found
        if _claim(port):
            found.append(port)
    raise RuntimeError(f"there are no {count} free ports from {_CANDIDATES.start} to {_CANDIDATES.stop - 1}")


def _claim(port: int) -> bool:
    folder = Path(tempfile.gettempdir()) / "emberbox-test-ports"
    folder.mkdir(exist_ok=True)
    file = (folder / str(port)).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError:
        file.close()
        return False
    _claims.append(file)
    return True
