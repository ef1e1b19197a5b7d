"""Raw system calls through libc."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None, what: str) -> int:
    """Make one system call.

    Raises:
        OSError: the call failed; `what` (for people) is part of the message.
    """
    prepared = [
        ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) if isinstance(a, bytes) else a for a in arguments
    ]
    result = int(_libc.syscall(ctypes.c_long(number), *prepared))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


_libc.syscall.restype = ctypes.c_long
