"""Holding a process in the moment in which it opens a file (fanotify(7), `FAN_OPEN_PERM`).

Needs root (CAP_SYS_ADMIN) and a regular file: nobody is told of devices.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_CLASS_CONTENT, _CLOEXEC, _NONBLOCK = 0x04, 0x01, 0x02  # linux/fanotify.h
_MARK_ADD, _OPEN_PERM = 0x01, 0x00010000
_ALLOW, _DENY = 0x01, 0x02
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_RESPONSE = struct.Struct("=iI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


class OpenGate:
    """Everybody who opens the file waits until `allow` or `deny`. Readable (`fileno`) when somebody waits.

    Closing it lets those through who wait.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: the kernel has no such gates, or the file is not there.
        """
        self._descriptor = _checked(
            _libc.fanotify_init(_CLASS_CONTENT | _CLOEXEC | _NONBLOCK, os.O_RDONLY | os.O_CLOEXEC)
        )
        try:
            _checked(_libc.fanotify_mark(self._descriptor, _MARK_ADD, _OPEN_PERM, _AT_FDCWD, os.fsencode(path)))
        except BaseException:
            os.close(self._descriptor)
            raise

    def fileno(self) -> int:
        return self._descriptor

    def who(self) -> tuple[int, int] | None:
        """Return (who waits, for `allow` and `deny`; its process ID), or None when nobody does."""
        try:
            event = os.read(self._descriptor, _EVENT.size)
        except BlockingIOError:
            return None
        _, _, _, _, _, waiting, pid = _EVENT.unpack(event)
        return waiting, pid

    def allow(self, waiting: int) -> None:
        self._answer(waiting, _ALLOW)

    def deny(self, waiting: int) -> None:
        """Its open fails with EPERM."""
        self._answer(waiting, _DENY)

    def _answer(self, waiting: int, answer: int) -> None:
        try:
            os.write(self._descriptor, _RESPONSE.pack(waiting, answer))
        finally:
            os.close(waiting)  # the file, opened for whoever decides

    def close(self) -> None:
        os.close(self._descriptor)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
