"""Lets many connections wait at the ports of another process.

QEMU lets one wait at a forwarded port. Of a hundred that come at once some then wait longer than their client does. The
kernel takes a new length for a socket that listens already, from whoever has it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
from collections.abc import Iterable

_PIDFD_GETFD = 438  # asm-generic/unistd.h, and x86-64's own table

_libc = ctypes.CDLL(None, use_errno=True)


def raise_backlog(pid: int, ports: Iterable[int], *, waiting: int = 512) -> None:
    """Let `waiting` connections wait at each of these TCP ports, at which the process `pid` listens.

    Raises:
        OSError: the process is not ours to look into.
        LookupError: it does not listen at one of them.
    """
    left = set(ports)
    process = os.pidfd_open(pid)
    try:
        for number in map(int, os.listdir(f"/proc/{pid}/fd")):
            descriptor = _libc.syscall(_PIDFD_GETFD, process, number, 0)
            if descriptor < 0:
                if ctypes.get_errno() == errno.EBADF:  # closed meanwhile
                    continue
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            with socket.socket(fileno=descriptor) as found:
                if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.family == socket.AF_INET:
                    port = found.getsockname()[1]
                    if port in left:
                        found.listen(waiting)
                        left.discard(port)
    finally:
        os.close(process)
    if left:
        raise LookupError(f"process {pid} does not listen at {sorted(left)}")
