"""What a restored guest touches until it first answers, so that it can be read ahead of the next restore.

A memory file that nobody has read for long is on the disk alone, and each page that the guest touches first is a read
of its own. The pages of the first restore's memory that were touched until its agent answered are written down beside
the saved machine; every later restore asks for them in a few large reads, while Firecracker is still being started. The
first restore after a reboot of the host sums the file up, and so has read all of it.
"""

from __future__ import annotations

import array
import json
import os
from collections.abc import Iterator
from pathlib import Path

from emberbox.linux.writing import write_file

NAME = "working-set.json"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GAP = 16
"""Pages. Ranges that are closer than this are one: reading a few pages more costs less than another request."""
_PRESENT = 1 << 63  # proc_pid_pagemap(5)

Ranges = list[tuple[int, int]]
"""(offset, length) in bytes, in order."""


def record(pid: int, memory: Path, folder: Path) -> Ranges:
    """Write down which pages of the file `memory` the process has touched in its mapping of it, and return them.

    When none is found nothing is written, and the next restore may try again.

    Args:
        folder: where `NAME` is put, in one step.

    Raises:
        OSError: the process is gone, or the file cannot be written.
    """
    found = _joined(_touched(pid, memory))
    if not found:
        return []
    write_file(folder / NAME, json.dumps(found).encode(), flush=True)
    return found


def is_known(folder: Path) -> bool:
    return (folder / NAME).exists()


def read_ahead(memory: Path, folder: Path) -> int:
    """Ask for what `folder`'s note says of the file `memory`; returns the bytes asked for. Does not wait for them.

    A missing or broken note asks for nothing: it only makes things faster.
    """
    try:
        ranges = [(int(offset), int(length)) for offset, length in json.loads((folder / NAME).read_text())]
    except (OSError, ValueError, TypeError):
        return 0
    with memory.open("rb") as reader:
        for offset, length in ranges:
            os.posix_fadvise(reader.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
    return sum(length for _, length in ranges)


def _touched(pid: int, memory: Path) -> Iterator[tuple[int, int]]:
    """Yield ranges of the file that are in the process's page tables."""
    file = memory.stat()
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end, offset in mappings(pid, file):
            entries = array.array("Q")
            entries.frombytes(os.pread(pagemap.fileno(), (end - start) // _PAGE * 8, start // _PAGE * 8))
            for index, entry in enumerate(entries):
                if entry & _PRESENT:
                    yield offset + index * _PAGE, _PAGE


def mappings(pid: int, file: os.stat_result) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, offset in the file) of the process's mappings of a file, lowest offset first."""
    found = []
    number = f" {file.st_ino} "
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if number not in line:
            continue
        span, _, offset, _, inode = line.split()[:5]
        start, end = (int(part, 16) for part in span.split("-"))
        # The device in this list is another one than stat(2) says on Btrfs and overlayfs.
        if int(inode) == file.st_ino and os.path.samestat(os.stat(f"/proc/{pid}/map_files/{start:x}-{end:x}"), file):
            found.append((start, end, int(offset, 16)))
    yield from sorted(found, key=lambda mapping: mapping[2])


def _joined(pages: Iterator[tuple[int, int]]) -> Ranges:
    ranges: Ranges = []
    for offset, length in pages:
        if ranges and offset - (ranges[-1][0] + ranges[-1][1]) <= _GAP * _PAGE:
            ranges[-1] = (ranges[-1][0], offset + length - ranges[-1][0])
        else:
            ranges.append((offset, length))
    return ranges
