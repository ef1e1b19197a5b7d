"""Which pages of a memory file a process has touched."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from unittest import mock

import pytest

from emberbox.runtime.firecracker import working_set

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 4096
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: page tables are shown to root alone")


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory.0"
    path.write_bytes(os.urandom(PAGE) * PAGES)
    return path


def covered(ranges: working_set.Ranges, page: int) -> bool:
    return any(offset <= page * PAGE < offset + length for offset, length in ranges)


@needs_root
def test_pages_that_were_read_or_written_are_noted_and_others_are_not(memory: Path, tmp_path: Path) -> None:
    with memory.open("r+b") as handle, mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        assert mapped[100 * PAGE] >= 0
        mapped[3000 * PAGE] = 1

        found = working_set.record(os.getpid(), memory, tmp_path)

    assert covered(found, 100)
    assert covered(found, 3000)
    assert not covered(found, 1500)
    assert not covered(found, 4000)
    assert working_set.is_known(tmp_path)
    assert working_set.read_ahead(memory, tmp_path) == sum(length for _, length in found)


def test_a_process_that_is_gone_leaves_no_note(memory: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such"):
        working_set.record(2**22 + 1, memory, tmp_path)

    assert not working_set.is_known(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.0"]


@needs_root
def test_a_memory_file_that_is_not_mapped_leaves_no_note(memory: Path, tmp_path: Path) -> None:
    assert working_set.record(os.getpid(), memory, tmp_path) == []

    assert [path.name for path in tmp_path.iterdir()] == ["memory.0"]


@needs_root
def test_a_mapping_that_the_process_list_shows_on_another_device_leaves_no_note(memory: Path, tmp_path: Path) -> None:
    """As on btrfs, whose files have another device number in stat(2)."""
    shown = os.stat_result([*memory.stat()[:2], memory.stat().st_dev + 1, *memory.stat()[3:]])
    with memory.open("r+b") as handle, mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        assert mapped[0] >= 0
        with mock.patch.object(Path, "stat", return_value=shown):
            found = working_set.record(os.getpid(), memory, tmp_path)

    assert found == []
    assert not working_set.is_known(tmp_path)


@pytest.mark.parametrize("note", ["", "{", "3", '[["a", 1]]', "[[1]]"])
def test_a_note_that_cannot_be_read_asks_for_nothing(memory: Path, tmp_path: Path, note: str) -> None:
    (tmp_path / working_set.NAME).write_text(note)

    assert working_set.read_ahead(memory, tmp_path) == 0


def test_no_note_asks_for_nothing(memory: Path, tmp_path: Path) -> None:
    assert working_set.read_ahead(memory, tmp_path) == 0


def test_what_lies_close_together_is_one_range(memory: Path, tmp_path: Path) -> None:
    pages = iter([(0, PAGE), (PAGE, PAGE), (10 * PAGE, PAGE), (100 * PAGE, PAGE)])

    assert working_set._joined(pages) == [(0, 11 * PAGE), (100 * PAGE, PAGE)]
    assert json.dumps(working_set._joined(iter([]))) == "[]"
