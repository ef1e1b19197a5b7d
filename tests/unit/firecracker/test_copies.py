"""Copies of shared memory made ahead: taken once, made again, and never older than what they are of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from emberbox.linux import sparse
from emberbox.runtime.firecracker.copies import Copies

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _no_shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ext4, also where the tests' disk could share blocks."""
    monkeypatch.setattr(sparse, "_reflink", lambda *_: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copies"


@pytest.fixture
def copies(folder: Path) -> Copies:
    return Copies(folder)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A template's memory that a machine has, too."""
    path = tmp_path / "memory.0"
    with path.open("wb") as out:
        out.write(b"some pages")
        out.truncate(SIZE)
    (tmp_path / "of-a-machine").hardlink_to(path)
    return path


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir()) if folder.exists() else []


def make(copies: Copies, memory: Path) -> None:
    copies.want(memory)
    copies.make()


def test_a_copy_made_ahead_is_taken_as_it_is(copies: Copies, memory: Path, tmp_path: Path, folder: Path) -> None:
    make(copies, memory)
    made = next(folder.glob("*.copy")).stat()

    copies.provide(memory, tmp_path / "whole")

    taken = (tmp_path / "whole").stat()
    assert (taken.st_ino, taken.st_nlink) == (made.st_ino, 1)
    assert (tmp_path / "whole").read_bytes() == memory.read_bytes()
    assert kept(folder) == [".source"]


def test_a_copy_is_taken_once_and_made_again(copies: Copies, memory: Path, tmp_path: Path, folder: Path) -> None:
    make(copies, memory)

    copies.provide(memory, tmp_path / "first")
    copies.provide(memory, tmp_path / "second")

    assert not (tmp_path / "first").samefile(tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == memory.read_bytes()
    copies.make()
    assert kept(folder) == [".copy", ".source"]


def test_one_copy_is_kept(copies: Copies, memory: Path, folder: Path) -> None:
    make(copies, memory)
    made = next(folder.glob("*.copy")).stat().st_ino
    make(copies, memory)

    assert next(folder.glob("*.copy")).stat().st_ino == made
    assert kept(folder) == [".copy", ".source"]


def test_memory_that_only_one_has_is_not_copied(copies: Copies, memory: Path, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "of-a-machine").unlink()

    make(copies, memory)

    assert kept(folder) == []
    assert memory.stat().st_nlink == 1


@pytest.mark.parametrize("left", ["of-a-machine", "memory.0", None])
def test_a_copy_goes_when_the_memory_is_shared_no_more(
    copies: Copies, memory: Path, tmp_path: Path, folder: Path, left: str | None
) -> None:
    make(copies, memory)
    for name in {"of-a-machine", "memory.0"} - {left}:
        (tmp_path / name).unlink()

    copies.prune()

    assert kept(folder) == []


def test_a_copy_stays_while_the_memory_is_shared(copies: Copies, memory: Path, folder: Path) -> None:
    make(copies, memory)

    copies.prune()

    assert kept(folder) == [".copy", ".source"]


def test_memory_that_goes_while_it_is_copied_leaves_nothing(
    copies: Copies, memory: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = sparse.clone

    def clone_and_lose(source: Path, target: Path, *, mode: int) -> bool:
        shared = clone(source, target, mode=mode)
        memory.unlink()
        copies.prune()
        return shared

    monkeypatch.setattr(sparse, "clone", clone_and_lose)

    make(copies, memory)

    assert kept(folder) == []
    assert (tmp_path / "of-a-machine").exists()


def test_what_an_earlier_process_left_is_removed_and_not_used(memory: Path, tmp_path: Path, folder: Path) -> None:
    make(Copies(folder), memory)
    (folder / "copying").write_bytes(b"half")
    next_process = Copies(folder)

    next_process.clear()
    next_process.provide(memory, tmp_path / "whole")

    assert not folder.exists()
    assert (tmp_path / "whole").read_bytes() == memory.read_bytes()


def test_no_copy_takes_the_last_of_the_disk(
    copies: Copies, memory: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(memory)
    nearly_full = os.statvfs_result((*real[:4], int(real.f_blocks * 0.09), *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: nearly_full)

    make(copies, memory)

    assert kept(folder) == [".source"]


def test_a_full_disk_leaves_nothing(
    copies: Copies, memory: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sparse, "_copy_data", full)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with pytest.raises(OSError, match="No space left"):
        make(copies, memory)
    monkeypatch.undo()

    assert kept(folder) == [".source"]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    copies.provide(memory, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == memory.read_bytes()


def test_where_blocks_are_shared_none_is_kept(
    copies: Copies, memory: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_reflink", lambda *_: True)

    make(copies, memory)
    copies.want(memory)

    assert not folder.exists()
