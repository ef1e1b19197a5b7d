"""Sparse files are cloned, laid over each other and checked without reading their holes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberbox.linux import sparse

PAGE = 4096
HOLE_PAGES = 16
"""Pages of the smallest hole that is dug."""

pages = st.dictionaries(st.integers(0, 63), st.integers(0, 255), max_size=12)


def write(path: Path, content: dict[int, int], pages_total: int = 64) -> bytes:
    """A file with a page of each given byte at each given page number and holes elsewhere; returns its bytes."""
    with path.open("wb") as out:
        out.truncate(pages_total * PAGE)
        for number, value in content.items():
            out.seek(number * PAGE)
            out.write(bytes([value]) * PAGE)
    return path.read_bytes()


def test_a_clone_is_equal_sparse_and_independent(tmp_path: Path) -> None:
    original = write(tmp_path / "a", {3: 1, 40: 2}, pages_total=16384)

    sparse.clone(tmp_path / "a", tmp_path / "b")

    write(tmp_path / "a", {3: 9}, pages_total=16384)
    assert (tmp_path / "b").read_bytes() == original
    assert sparse.allocated(tmp_path / "b") < 1024 * 1024


def test_a_cheap_clone_is_made_unless_much_is_to_be_copied(tmp_path: Path) -> None:
    original = write(tmp_path / "a", {3: 1, 40: 2}, pages_total=16384)
    sparse.clone(tmp_path / "a", tmp_path / "b")
    shared = sparse.clone(tmp_path / "b", tmp_path / "c")

    little = sparse.clone_cheaply(tmp_path / "a", tmp_path / "d", most=1024 * 1024)
    much = sparse.clone_cheaply(tmp_path / "a", tmp_path / "e", most=0)

    assert (little, much) == (True, shared)
    assert (tmp_path / "d").read_bytes() == original
    assert (tmp_path / "e").exists() == shared


def test_a_clone_never_replaces_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1})
    write(tmp_path / "b", {0: 2})

    with pytest.raises(FileExistsError):
        sparse.clone(tmp_path / "a", tmp_path / "b")

    assert (tmp_path / "b").read_bytes()[0] == 2


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60, deadline=None
)
@given(base=pages, changes=pages)
def test_changes_laid_over_a_base_win_where_they_have_data(
    tmp_path: Path, base: dict[int, int], changes: dict[int, int]
) -> None:
    write(tmp_path / "base", base)
    write(tmp_path / "changes", changes)

    written = sparse.overlay(tmp_path / "changes", tmp_path / "base")

    assert (tmp_path / "base").read_bytes() == write(tmp_path / "expected", {**base, **changes})
    assert written == len(changes) * PAGE


def test_a_page_of_zeros_is_data_and_wins(tmp_path: Path) -> None:
    write(tmp_path / "base", {5: 7})
    write(tmp_path / "changes", {5: 0})

    sparse.overlay(tmp_path / "changes", tmp_path / "base")

    assert not any((tmp_path / "base").read_bytes())


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=40, deadline=None
)
@given(content=pages)
def test_digging_holes_changes_no_byte_and_drops_blocks_of_zeros(tmp_path: Path, content: dict[int, int]) -> None:
    blocks = {number * HOLE_PAGES + page: value for number, value in content.items() for page in range(HOLE_PAGES)}
    before = write(tmp_path / "a", blocks, pages_total=64 * HOLE_PAGES)

    sparse.dig_holes(tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == before
    kept = sum(length for _, length in sparse.data_ranges(tmp_path / "a"))
    assert kept == HOLE_PAGES * PAGE * sum(1 for value in content.values() if value)


def test_a_file_is_flushed_before_its_holes_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While ext4 finds places for what is not on the disk yet, Linux before 6.9 may call it a hole."""
    write(tmp_path / "a", {1: 1})
    done: list[str] = []
    flush, look = os.fdatasync, sparse._ranges
    monkeypatch.setattr(sparse, "_reflink", lambda *_: False)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (done.append("flush"), flush(descriptor))[1])
    monkeypatch.setattr(sparse, "_ranges", lambda descriptor: (done.append("look"), look(descriptor))[1])

    sparse.clone(tmp_path / "a", tmp_path / "b")

    assert done == ["flush", "look"]
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_few_zeros_beside_data_are_no_hole(tmp_path: Path) -> None:
    before = write(tmp_path / "a", {3: 1, 4: 0})

    sparse.dig_holes(tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == before
    assert list(sparse.data_ranges(tmp_path / "a")) == [(3 * PAGE, 2 * PAGE)]


def test_a_checksum_is_the_same_for_a_clone_and_differs_for_one_changed_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", {1: 1, 9: 2})
    sparse.clone(tmp_path / "a", tmp_path / "b")
    same = sparse.checksum(tmp_path / "b")

    with (tmp_path / "b").open("r+b") as handle:
        handle.seek(9 * PAGE + 17)
        handle.write(b"x")

    assert same == sparse.checksum(tmp_path / "a")
    assert sparse.checksum(tmp_path / "b") != same


@given(
    content=st.dictionaries(st.integers(0, 140), st.integers(0, 2)),
    filled=st.sets(st.integers(0, 140)),
    tail=st.integers(0, PAGE - 1),
)
def test_a_checksum_of_contents_is_that_of_the_bytes_wherever_holes_are(
    content: dict[int, int], filled: set[int], tail: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        for path, pages in ((one, content), (other, {**dict.fromkeys(filled, 0), **content})):
            write(path, pages)
            os.truncate(path, 141 * PAGE + tail)

        assert one.read_bytes() == other.read_bytes()
        same = sparse.checksum(one, sparse.CONTENTS)
        assert sparse.checksum(other, sparse.CONTENTS) == same
        changed = max(content, default=3)
        with other.open("r+b") as handle:
            handle.seek(changed * PAGE + 17)
            byte = handle.read(1)
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte[0] ^ 1]))
        assert sparse.checksum(other, sparse.CONTENTS) != same


def test_a_checksum_of_contents_tells_where_the_bytes_are_and_one_of_the_layout_where_holes_are(tmp_path: Path) -> None:
    write(tmp_path / "a", {1: 1, 9: 2})
    write(tmp_path / "b", {2: 1, 9: 2})
    write(tmp_path / "c", {1: 1, 3: 0, 9: 2})

    contents = {name: sparse.checksum(tmp_path / name, sparse.CONTENTS) for name in "abc"}
    layouts = {sparse.checksum(tmp_path / name) for name in "abc"}

    assert contents["a"] == contents["c"] != contents["b"]
    assert len(layouts) == 3
    assert {sparse.checksum_kind(text) for text in contents.values()} == {sparse.CONTENTS}
    assert sparse.checksum_kind("crc32:1:ab") is None


def test_a_checksum_differs_when_the_file_was_cut(tmp_path: Path) -> None:
    write(tmp_path / "a", {1: 1})
    before = sparse.checksum(tmp_path / "a")

    with (tmp_path / "a").open("r+b") as handle:
        handle.truncate(32 * PAGE)

    assert sparse.checksum(tmp_path / "a") != before
