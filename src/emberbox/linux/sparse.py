"""Copies of disk images: shared blocks where the file system can, holes kept where it cannot."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

_FICLONE = 0x40049409
_CHUNK = 4 * 1024 * 1024


def clone_image(source: Path, target: Path) -> None:
    """Copy an image; holes stay holes. `target` must not exist, and does not when this fails.

    Raises:
        OSError: the kernel's reason.
    """
    with contextlib.ExitStack() as stack:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, read)
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, write)
        try:
            _fill(read, write)
        except BaseException:
            os.unlink(target)
            raise


def _fill(read: int, write: int) -> None:
    try:
        fcntl.ioctl(write, _FICLONE, read)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
            raise
    else:
        return
    size = os.fstat(read).st_size
    os.ftruncate(write, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(read, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position = os.lseek(read, start, os.SEEK_HOLE)
        _copy_range(read, write, start, position)


def _copy_range(read: int, write: int, start: int, end: int) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(read, write, end - start, start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            copied = os.pwrite(write, os.pread(read, min(end - start, _CHUNK), start), start)
        if copied == 0:
            raise OSError(errno.EIO, "the image became shorter while it was copied")
        start += copied
