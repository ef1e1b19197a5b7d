"""The memory of another process, where it maps a file: finding the mapping, and writing into it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emberbox.linux import sparse

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a file in a process's memory. Bytes."""

    start: int
    end: int
    offset: int
    """In the file, of what lies at `start`."""


def mappings(pid: int, file: os.stat_result) -> list[Mapping]:
    """Return where the process maps a file, lowest offset first; found by inode alone.

    The device that proc_pid_maps(5) names is not always the one that stat(2) does, as on btrfs.

    Raises:
        OSError: the process is gone, or may not be looked at.
    """
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, offset, _, inode = line.split()[:5]
        if int(inode) == file.st_ino:
            start, _, end = span.partition("-")
            found.append(Mapping(int(start, 16), int(end, 16), int(offset, 16)))
    return sorted(found, key=lambda mapping: mapping.offset)


def lay_over(pid: int, memory: Path, changes: Iterable[Path]) -> int:
    """Write the data of sparse files over a process's private mapping of the file `memory`; returns the bytes written.

    Each file's data goes where the same offset of `memory` is mapped, the later over the earlier. The file stays as it
    is. Costs the process its own copy of each page that is written.

    Raises:
        OSError: the process is gone, does not map all of the file once, or its memory may not be written.
    """
    file = memory.stat()
    spans = mappings(pid, file)
    if sum(span.end - span.start for span in spans) != file.st_size:
        raise OSError(errno.ENXIO, f"process {pid} does not map all of {memory.name} once")
    written = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as target:
        for change in changes:
            with change.open("rb") as reader:
                for offset, length in sparse.data_ranges(change):
                    for span, at, size in _pieces(spans, offset, length):
                        data = os.pread(reader.fileno(), size, at)
                        _write(target.fileno(), data, span.start + at - span.offset)
                        written += len(data)
    return written


def _pieces(spans: list[Mapping], offset: int, length: int) -> Iterator[tuple[Mapping, int, int]]:
    """Cut a range of the file at the ends of mappings, and into chunks: (mapping, offset in the file, length)."""
    for span in spans:
        at = max(offset, span.offset)
        end = min(offset + length, span.offset + span.end - span.start)
        while at < end:
            size = min(_CHUNK, end - at)
            yield span, at, size
            at += size


def _write(descriptor: int, data: bytes, address: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, address)
        view = view[done:]
        address += done
