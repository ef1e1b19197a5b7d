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
from collections.abc import Iterator
from pathlib import Path

import xxhash

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_CHUNK = 4 * 1024 * 1024
_READ = 256 * 1024
"""Of a file that is only looked at: stays in the processor's cache. A multiple of `_HOLE` and of `_PAGE`."""
LAYOUT, CONTENTS = "xxh64", "xxh64-contents"
"""Kinds of checksums."""
_PAGE = 4096
_HOLE = 64 * 1024
"""Smallest hole that is dug: more and smaller ones cost each clone and checksum a few system calls apiece."""
_ZEROS = bytes(_HOLE)
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class TooMuchToCopy(Exception):
    """Blocks cannot be shared, and there are more than were to be copied."""


def clone(source: Path, target: Path, *, mode: int = 0o600, most: int | None = None) -> bool:
    """Make the new file `target` an independent copy of `source`, with the same holes; tells whether blocks are shared.

    Where they are not, `source` is flushed first: while ext4 finds places for what is not on the disk yet, Linux before
    6.9 may call it a hole. Nobody may write to it meanwhile.

    Args:
        most: bytes that may be copied; None: as many as there are.

    Raises:
        OSError: `target` exists, or the disk is full; a half-made `target` is removed.
        TooMuchToCopy: there are more than `most`; there is no `target`.
    """
    with source.open("rb") as reader:
        writer = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        try:
            shared = _reflink(reader.fileno(), writer)
            if not shared:
                if most is not None and allocated(source) > most:
                    raise TooMuchToCopy
                os.fdatasync(reader.fileno())
                os.ftruncate(writer, os.fstat(reader.fileno()).st_size)
                _copy_data(reader.fileno(), writer)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(writer)
    return shared


def clone_cheaply(source: Path, target: Path, *, most: int) -> bool:
    """`clone`, unless blocks cannot be shared and more than `most` bytes were to be copied; tells whether it was made.

    Raises:
        OSError: as `clone`.
    """
    try:
        clone(source, target, most=most)
    except TooMuchToCopy:
        return False
    return True


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


def checksum(path: Path, kind: str = LAYOUT) -> str:
    """Return a checksum of the file's size and of what is in it, that holes do not change the cost of.

    It finds damage, not forgery: XXH64, as fast as memory on any processor.

    Args:
        kind: `LAYOUT`: a hole is not the same as zeros. `CONTENTS`: it is. A file system turns one into the other when
            it likes: tmpfs when somebody who has mapped the file reads there, others when it is copied.
    """
    total = xxhash.xxh64()
    with path.open("rb") as reader:
        descriptor = reader.fileno()
        for part in _contents(descriptor) if kind == CONTENTS else _layout(descriptor):
            total.update(part)
        size = os.fstat(descriptor).st_size
    return f"{kind}:{size}:{total.hexdigest()}"


def checksum_kind(text: str) -> str | None:
    """The kind of a checksum; None when it is of none that is made today."""
    kind = text.partition(":")[0]
    return kind if kind in (LAYOUT, CONTENTS) else None


def _layout(descriptor: int) -> Iterator[bytes | memoryview]:
    """Every range that is not a hole, with its place."""
    buffer = memoryview(bytearray(_READ))
    for offset, length in _ranges(descriptor):
        yield b"%d+%d" % (offset, length)
        yield from _blocks(descriptor, offset, offset + length, buffer)


def _contents(descriptor: int) -> Iterator[bytes | memoryview]:
    """Every run of pages that are not all zeros, with its place."""
    buffer = memoryview(bytearray(_READ))
    ended = -1
    for offset, length in _whole_pages(descriptor):
        position = offset
        for block in _blocks(descriptor, offset, offset + length, buffer):
            for start, end in _filled(block):
                if position + start != ended:
                    yield b"@%d" % (position + start)
                yield block[start:end]
                ended = position + end
            position += len(block)


def _whole_pages(descriptor: int) -> Iterator[tuple[int, int]]:
    """The ranges that are not holes, extended to whole pages: blocks of a file system may be smaller."""
    size = os.fstat(descriptor).st_size
    ended = 0
    for offset, length in _ranges(descriptor):
        start = max(ended, offset - offset % _PAGE)
        ended = min(size, -(-(offset + length) // _PAGE) * _PAGE)
        if start < ended:
            yield start, ended - start


def _filled(block: memoryview, unit: int = _PAGE) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the runs of units in `block` that are not all zeros; its last one may be a part of one."""
    whole = len(block) - len(block) % unit
    firsts = block[:whole].cast("Q")[:: unit // 8].tolist()
    if whole == len(block) and all(firsts):  # most do not begin with zeros
        yield 0, whole
        return
    began: int | None = None
    for number, at in enumerate(range(0, len(block), unit)):
        part = block[at : at + unit]
        zeros = not (number < len(firsts) and firsts[number]) and bytes(part) == _ZEROS[: len(part)]
        if zeros and began is not None:
            yield began, at
            began = None
        elif not zeros and began is None:
            began = at
    if began is not None:
        yield began, len(block)


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


def _zero_runs(descriptor: int, position: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of neighbouring blocks of zeros, as long as they get: each costs a system call."""
    began = position
    for block in _blocks(descriptor, position, end):
        for start, stop in _filled(block, _HOLE):
            if began < position + start:
                yield began, position + start
            began = position + stop
        position += len(block)
    if began < position:
        yield began, position


def _blocks(descriptor: int, position: int, end: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """Yield the bytes from `position` to `end`, or to the end of the file, in pieces; each until the next is read.

    Args:
        buffer: where they are read to; one of its own when None.
    """
    buffer = buffer or memoryview(bytearray(min(_READ, end - position)))
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
