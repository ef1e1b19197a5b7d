"""Saved machines on disk: whole or refused, merged without a moment in which they are neither."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from emberbox.linux import sparse
from emberbox.runtime.errors import SavedDamaged
from emberbox.runtime.firecracker import snapshots
from emberbox.runtime.firecracker.chain import Chain
from emberbox.runtime.firecracker.snapshots import Manifest, Piece, Trusted, next_name

PAGE = 4096


def piece(folder: Path, number: int, content: dict[int, bytes], kind: str = sparse.LAYOUT) -> Piece:
    path = folder / f"memory.{number}"
    with path.open("wb") as out:
        out.truncate(64 * PAGE)
        for page, value in content.items():
            out.seek(page * PAGE)
            out.write(value * PAGE)
    return Piece(path.name, sparse.checksum(path, kind))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Manifest]:
    """A saved machine with a base and two changes over it."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state").write_bytes(b"devices")
    (folder / "upper").write_bytes(b"disk")
    manifest = Manifest(
        firecracker="1.12.1",
        cpu_count=1,
        memory_mb=128,
        layers=1,
        pieces=(
            piece(folder, 0, {0: b"a", 1: b"a", 2: b"a"}, sparse.CONTENTS),
            piece(folder, 1, {1: b"b", 2: b"b"}),
            piece(folder, 2, {2: b"c"}),
        ),
        state_checksum=sparse.checksum(folder / "state"),
    )
    manifest.write(folder)
    return folder, manifest


def test_a_manifest_comes_back_as_it_was_written(saved: tuple[Path, Manifest]) -> None:
    folder, manifest = saved

    assert snapshots.read_manifest(folder) == manifest


def pages(path: Path) -> list[bytes]:
    memory = path.read_bytes()
    return [memory[page * PAGE : page * PAGE + 1] for page in range(4)]


def test_a_machine_is_loaded_from_all_its_pieces_laid_over_each_other(saved: tuple[Path, Manifest]) -> None:
    folder, manifest = saved
    trusted = Trusted()

    whole = snapshots.make_whole(folder, manifest.pieces, trusted)

    assert pages(whole) == [b"a", b"b", b"c", b"\0"]
    assert snapshots.read_manifest(folder) == manifest
    made = whole.stat()
    assert snapshots.make_whole(folder, manifest.pieces, trusted).stat() == made, "made twice"
    assert pages(folder / "memory.0") == [b"a", b"a", b"a", b"\0"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_merged_for_the_last_save_is_brought_up_to_date(
    saved: tuple[Path, Manifest], tmp_path: Path, shared: bool
) -> None:
    folder, manifest = saved
    trusted = Trusted()
    earlier = snapshots.make_whole(folder, manifest.pieces[:2], trusted)
    inode = earlier.stat().st_ino
    other = tmp_path / "mapped"
    if shared:
        other.hardlink_to(earlier)

    whole = snapshots.make_whole(folder, manifest.pieces, trusted)

    assert pages(whole) == [b"a", b"b", b"c", b"\0"]
    assert (whole.stat().st_ino == inode) is not shared
    assert not shared or pages(other) == [b"a", b"b", b"b", b"\0"], "changed under the machine that has it mapped"


def test_what_another_process_had_merged_is_not_believed(saved: tuple[Path, Manifest]) -> None:
    folder, manifest = saved
    (folder / snapshots.WHOLE).write_bytes(b"half")

    whole = snapshots.make_whole(folder, manifest.pieces, Trusted())

    assert pages(whole) == [b"a", b"b", b"c", b"\0"]


@pytest.mark.parametrize("step", ["clone", "overlay"])
def test_a_load_that_cannot_be_prepared_leaves_the_saved_machine_as_it_was(
    saved: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder, manifest = saved

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sparse, step, full)
    with pytest.raises(OSError, match="No space left"):
        snapshots.make_whole(folder, manifest.pieces, Trusted())
    monkeypatch.undo()

    assert snapshots.read_manifest(folder) == manifest
    assert not (folder / snapshots.WHOLE).exists()
    snapshots.verify(folder, manifest, Trusted())
    assert pages(snapshots.make_whole(folder, manifest.pieces, Trusted())) == [b"a", b"b", b"c", b"\0"]


def damage_state(folder: Path) -> None:
    (folder / "state").write_bytes(b"Devices")


def lose_disk(folder: Path) -> None:
    (folder / "upper").unlink()


def lose_piece(folder: Path) -> None:
    (folder / "memory.1").unlink()


def flip_byte(folder: Path) -> None:
    with (folder / "memory.2").open("r+b") as handle:
        handle.seek(2 * PAGE + 1)
        handle.write(b"?")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (damage_state, "state should have"),
        (lose_disk, "disk is missing"),
        (lose_piece, r"memory\.1 is missing"),
        (flip_byte, r"memory\.2 should have"),
    ],
)
def test_a_damaged_machine_is_refused_and_the_file_named(
    saved: tuple[Path, Manifest], break_it: Callable[[Path], None], words: str
) -> None:
    folder, manifest = saved
    break_it(folder)

    with pytest.raises(SavedDamaged, match=words):
        snapshots.verify(folder, manifest, Trusted())


def fill_hole(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(7 * PAGE)
        handle.write(bytes(PAGE))


def test_a_hole_that_was_filled_is_no_damage_to_memory_and_is_to_changes_over_it(saved: tuple[Path, Manifest]) -> None:
    """tmpfs fills those that a mapping of the file reads; in changes zeros would hide what lies below."""
    folder, manifest = saved

    fill_hole(folder / "memory.0")
    snapshots.verify(folder, manifest, Trusted())

    fill_hole(folder / "memory.1")
    with pytest.raises(SavedDamaged, match=r"memory\.1 should have"):
        snapshots.verify(folder, manifest, Trusted())


def test_memory_found_right_once_is_not_read_again(
    saved: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = saved
    trusted = Trusted()
    snapshots.verify(folder, manifest, trusted)
    read: list[str] = []
    real = sparse.checksum

    def spy(path: Path, kind: str) -> str:
        read.append(path.name)
        return real(path, kind)

    monkeypatch.setattr(sparse, "checksum", spy)
    snapshots.verify(folder, manifest, trusted)

    assert read == ["state"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": 1}', "format 1, this version reads 2"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(saved: tuple[Path, Manifest], text: str, words: str) -> None:
    folder, _ = saved
    (folder / "manifest.json").write_text(text)

    with pytest.raises(SavedDamaged, match=words):
        snapshots.read_manifest(folder)


def test_a_manifest_without_memory_is_refused(saved: tuple[Path, Manifest]) -> None:
    folder, _ = saved
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**fields, "pieces": []}))

    with pytest.raises(SavedDamaged, match="names no memory"):
        snapshots.read_manifest(folder)


def test_a_chain_grows_by_links_and_forgets_what_it_no_longer_names(
    saved: tuple[Path, Manifest], tmp_path: Path
) -> None:
    folder, manifest = saved
    chain = Chain(tmp_path / "chain")
    chain.begin(manifest.pieces[:1], folder)

    chain.replace(manifest.pieces[:2], folder)
    chain.replace(manifest.pieces[1:], folder)

    assert Chain(tmp_path / "chain").pieces == manifest.pieces[1:]
    assert sorted(path.name for path in (tmp_path / "chain").glob("memory.*")) == ["memory.1", "memory.2"]
    assert next_name(manifest.pieces) == "memory.3"
    assert next_name(()) == "memory.0"


def test_a_save_that_was_not_finished_makes_the_next_one_whole(saved: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = saved
    chain = Chain(tmp_path / "chain")
    chain.begin(manifest.pieces[:1], folder)

    chain.mark_unsure()

    assert Chain(tmp_path / "chain").pieces == ()
    chain.replace(manifest.pieces[:1], folder)
    assert Chain(tmp_path / "chain").pieces == manifest.pieces[:1]


def test_the_changes_in_a_long_chain_are_merged_while_it_grows(saved: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = saved
    chain = Chain(tmp_path / "chain")
    chain.begin(manifest.pieces, folder)
    trusted = Trusted()

    merged = chain.merge(manifest.pieces[1:])
    later = piece(folder, 3, {0: b"d"})
    chain.replace((*manifest.pieces, later), folder)
    after = chain.replace_merged(manifest.pieces[1:], merged)

    assert after == chain.pieces == (manifest.pieces[0], Piece("memory.2m", merged.checksum), later)
    assert next_name(chain.pieces) == "memory.4"
    assert pages(snapshots.make_whole(chain.folder, chain.pieces, trusted)) == [b"d", b"b", b"c", b"\0"]
    assert sorted(path.name for path in chain.folder.glob("memory.*")) == ["memory.0", "memory.2m", "memory.3"]


def test_what_was_merged_is_dropped_when_the_chain_began_anew(saved: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = saved
    chain = Chain(tmp_path / "chain")
    chain.begin(manifest.pieces[:2], folder)

    merged = chain.merge(manifest.pieces[:2])
    chain.replace(manifest.pieces[2:], folder)

    assert chain.replace_merged(manifest.pieces[:2], merged) is None
    assert chain.pieces == manifest.pieces[2:]
    assert sorted(path.name for path in (tmp_path / "chain").iterdir()) == ["chain.json", "memory.2"]


def test_what_was_checked_counts_for_the_next_process_until_the_host_boots_again(tmp_path: Path) -> None:
    path = tmp_path / "memory.0"
    path.write_bytes(b"x" * 4096)
    held = (Piece("memory.0", "crc32:0:0"), Piece("memory.1", "crc32:1:1"))

    Trusted("boot 1").add_whole(path, held)

    assert Trusted("boot 1").held(path) == held
    assert Trusted("boot 2").held(path) == ()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert Trusted("boot 1").held(path) == ()


def test_a_file_is_trusted_for_the_checksum_that_it_had_and_for_no_other(tmp_path: Path) -> None:
    path = tmp_path / "memory.0"
    path.write_bytes(b"x")

    Trusted("boot").add(path, "crc32:1:a")

    assert Trusted("boot").has(path, "crc32:1:a")
    assert not Trusted("boot").has(path, "crc32:1:b")
    trusted = Trusted("boot")
    trusted.forget(path)
    assert not trusted.has(path, "crc32:1:a")
    assert not Trusted("boot").has(path, "crc32:1:a")


def test_a_whole_save_after_one_that_failed_takes_the_place_of_a_piece_of_its_name(tmp_path: Path) -> None:
    template, saved = tmp_path / "template", tmp_path / "saved"
    for folder, content in ((template, b"template"), (saved, b"sandbox!")):
        folder.mkdir()
        (folder / "memory.0").write_bytes(content)
    old, new = (Piece("memory.0", sparse.checksum(folder / "memory.0")) for folder in (template, saved))
    chain = Chain(tmp_path / "chain")
    chain.begin((old,), template)
    chain.mark_unsure()

    chain.replace((new,), saved)

    assert chain.pieces == (new,)
    assert chain.path(new).read_bytes() == b"sandbox!"
    assert (template / "memory.0").read_bytes() == b"template"


def test_a_note_of_trust_that_cannot_be_read_is_no_trust(tmp_path: Path) -> None:
    path = tmp_path / "memory.0"
    path.write_bytes(b"x")
    for broken in (b"", b"{", b"[]", b'{"boot": "b"}'):
        os.setxattr(path, "user.emberbox.trusted", broken)
        assert Trusted("b").held(path) == ()
