"""Writing changes into a process's private mapping of a file; the process is this one."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberbox.linux.memory import lay_over, mappings

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 8


def fill(letter: str) -> bytes:
    return letter.encode() * PAGE


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory.0"
    path.write_bytes(fill("a") * PAGES)
    return path


@pytest.fixture
def mapped(memory: Path) -> Iterator[mmap.mmap]:
    with memory.open("r+b") as handle, mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapping:
        yield mapping


def changes(path: Path, **pages: int) -> Path:
    """A sparse file with a page of the letter at each number."""
    with path.open("wb") as out:
        out.truncate(PAGES * PAGE)
        for letter, number in pages.items():
            out.seek(number * PAGE)
            out.write(fill(letter))
    return path


def letters(content: bytes | mmap.mmap) -> str:
    return "".join(chr(content[number * PAGE]) for number in range(PAGES))


def test_the_later_lies_over_the_earlier_and_the_file_stays(memory: Path, mapped: mmap.mmap, tmp_path: Path) -> None:
    first, second = changes(tmp_path / "1", b=1, c=2), changes(tmp_path / "2", d=2, e=7)

    written = lay_over(os.getpid(), memory, (first, second))

    assert letters(mapped) == "abdaaaae"
    assert mapped[2 * PAGE : 3 * PAGE] == fill("d")
    assert letters(memory.read_bytes()) == "a" * PAGES
    assert written == 4 * PAGE


def test_a_file_mapped_in_two_parts_gets_both(memory: Path, tmp_path: Path) -> None:
    half = PAGES // 2 * PAGE
    with (
        memory.open("r+b") as handle,
        mmap.mmap(handle.fileno(), half, flags=mmap.MAP_PRIVATE) as low,
        mmap.mmap(handle.fileno(), half, flags=mmap.MAP_PRIVATE, offset=half) as high,
    ):
        with (tmp_path / "1").open("wb") as out:  # one range over the border
            out.truncate(PAGES * PAGE)
            out.seek(half - PAGE)
            out.write(fill("b") + fill("c"))

        lay_over(os.getpid(), memory, (tmp_path / "1",))

        assert letters(low[:] + high[:]) == "aaabcaaa"
        assert sum(one.end - one.start for one in mappings(os.getpid(), memory.stat())) == PAGES * PAGE


def test_memory_that_is_not_mapped_or_only_in_part_is_an_error(memory: Path, tmp_path: Path) -> None:
    change = changes(tmp_path / "1", b=1)

    with pytest.raises(OSError, match="does not map all"):
        lay_over(os.getpid(), memory, (change,))
    with memory.open("r+b") as handle, mmap.mmap(handle.fileno(), PAGE, flags=mmap.MAP_PRIVATE) as part:
        with pytest.raises(OSError, match="does not map all"):
            lay_over(os.getpid(), memory, (change,))
        assert part[0:1] == b"a"


def test_a_process_that_is_gone_is_an_error(memory: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)

    with pytest.raises(OSError, match="No such"):
        lay_over(gone.pid, memory, (changes(tmp_path / "1", b=1),))
