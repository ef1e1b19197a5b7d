"""Sparse files: cloning them cheaply, and laying the changed pages of one over another.

Disks and guest memory are large files with few bytes in them. A clone shares blocks where the file system can
(reflink) and copies only what is not a hole elsewhere. Everything here blocks; callers on an event loop use a thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_CHUNK = 4 * 1024 * 1024
_READ = 256 * 1024
"""Of a file that is only looked at: stays in the processor's cache. A multiple of `_HOLE`."""
_WINDOW = 1024 * 1024
"""Most that a checksum takes as one: several are summed up at once."""
_WINDOW_SUM = struct.Struct("<QQI")
_MOST_SUMMERS = 4
_HOLE = 64 * 1024
"""Smallest hole that is dug: more and smaller ones cost each clone and checksum a few system calls apiece."""
_ZEROS = bytes(_HOLE)
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def clone(source: Path, target: Path, *, mode: int = 0o600) -> bool:
    """Make the new file `target` an independent copy of `source`, with the same holes; tells whether blocks are shared.

    Raises:
        OSError: `target` exists, or the disk is full; a half-made `target` is removed.
    """
    with source.open("rb") as reader:
        writer = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        try:
            shared = _reflink(reader.fileno(), writer)
            if not shared:
                os.ftruncate(writer, os.fstat(reader.fileno()).st_size)
                _copy_data(reader.fileno(), writer)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(writer)
    return shared


def overlay(changes: Path, onto: Path) -> int:
    """Write every data range of the sparse file `changes` over the same range of `onto`; returns the bytes written."""
    with changes.open("rb") as reader, onto.open("r+b") as writer:
        return _copy_data(reader.fileno(), writer.fileno())


def flush(path: Path) -> None:
    """Return when the file's data is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what is not a hole, in order."""
    with path.open("rb") as reader:
        yield from _ranges(reader.fileno())


def checksum(path: Path) -> str:
    """Return a checksum of the file's size and contents that holes do not change the cost of.

    It finds damage, not forgery: CRC-32 of every window of what is not a hole, and over those with their places.
    Windows of a large file are read by several threads.
    """
    value = 0
    with path.open("rb") as reader:
        descriptor = reader.fileno()
        windows = list(_windows(descriptor))
        for (offset, length), part in zip(windows, _window_sums(descriptor, windows), strict=True):
            value = zlib.crc32(_WINDOW_SUM.pack(offset, length, part), value)
        size = os.fstat(descriptor).st_size
    return f"crc32:{size}:{value:08x}"


def digest(path: Path) -> str:
    """Return the hex SHA-256 of the file's size and of every range that is not a hole, with its offset."""
    total = hashlib.sha256()
    with path.open("rb") as reader:
        descriptor = reader.fileno()
        total.update(b"%d" % os.fstat(descriptor).st_size)
        for offset, length in _ranges(descriptor):
            total.update(b"\n%d+%d\n" % (offset, length))
            for block in _blocks(descriptor, offset, offset + length):
                total.update(block)
    return total.hexdigest()


def allocated(path: Path) -> int:
    """Return the bytes that the file takes on its disk."""
    return path.stat().st_blocks * 512


def dig_holes(path: Path) -> None:
    """Turn the file's 64 KiB blocks of zeros into holes, so that clones and checksums skip them."""
    with path.open("r+b") as handle:
        descriptor = handle.fileno()
        for offset, length in list(_ranges(descriptor)):
            for start, end in _zero_runs(descriptor, offset, offset + length):
                _punch(descriptor, start, end - start)


def _windows(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what is not a hole, in order, cut at `_WINDOW`."""
    for offset, length in _ranges(descriptor):
        for start in range(offset, offset + length, _WINDOW):
            yield start, min(_WINDOW, offset + length - start)


def _window_sums(descriptor: int, windows: Sequence[tuple[int, int]]) -> list[int]:
    """Return each window's CRC-32."""
    sums = [0] * len(windows)
    # Threads that read little at a time wait for each other instead.
    count = min(_MOST_SUMMERS, os.cpu_count() or 1, sum(length for _, length in windows) // (4 * _WINDOW))

    def sum_up(which: slice) -> None:
        buffer = _buffer(_READ)
        sums[which] = [_crc(descriptor, offset, offset + length, buffer) for offset, length in windows[which]]

    if count < 2:
        sum_up(slice(None))
    else:
        with ThreadPoolExecutor(count, "checksum") as threads:
            list(threads.map(sum_up, (slice(number, None, count) for number in range(count))))
    return sums


def _crc(descriptor: int, position: int, end: int, buffer: memoryview) -> int:
    value = 0
    for block in _blocks(descriptor, position, end, buffer):
        value = zlib.crc32(block, value)
    return value


def _zero_runs(descriptor: int, position: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of neighbouring blocks of zeros, as long as they get: each costs a system call."""
    began: int | None = None
    for block in _blocks(descriptor, position, end):
        for at in range(0, len(block), _HOLE):
            part = bytes(block[at : at + _HOLE])
            zeros = part == _ZEROS or part == _ZEROS[: len(part)]
            if zeros and began is None:
                began = position + at
            elif not zeros and began is not None:
                yield began, position + at
                began = None
        position += len(block)
    if began is not None:
        yield began, position


def _buffer(size: int) -> memoryview:
    return memoryview(bytearray(size))


def _blocks(descriptor: int, position: int, end: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """Yield the bytes from `position` to `end`, or to the end of the file, in pieces; each until the next is read."""
    buffer = buffer or _buffer(min(_READ, end - position))
    while position < end and (got := os.preadv(descriptor, [buffer[: end - position]], position)):
        yield buffer[:got]
        position += got


def _reflink(reader: int, writer: int) -> bool:
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _copy_data(reader: int, writer: int) -> int:
    written = 0
    for offset, length in _ranges(reader):
        done = 0
        while done < length:
            step = _copy_range(reader, writer, offset + done, min(_CHUNK, length - done))
            if step == 0:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            done += step
        written += length
    return written


def _copy_range(reader: int, writer: int, offset: int, length: int) -> int:
    try:
        return os.copy_file_range(reader, writer, length, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return os.pwrite(writer, os.pread(reader, length, offset), offset)


def _ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    size = os.fstat(descriptor).st_size
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end - start
        position = end


def _punch(descriptor: int, offset: int, length: int) -> None:
    # Python has no fallocate(2) with flags. A file system that cannot punch keeps its zeros: larger, not wrong.
    _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
