"""Images that the node makes and copies."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from emberbox.commands import run
from emberbox.linux.sparse import clone
from emberbox.node import disks as disks_module
from emberbox.node.disks import Disks
from emberbox.node.errors import DiskFailure, DiskFull, LayerMissing
from emberbox.settings import Settings


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(Settings(data_dir=tmp_path))


async def test_an_upper_has_the_asked_size_and_takes_little(disks: Disks, tmp_path: Path) -> None:
    upper = tmp_path / "upper.ext4"

    await disks.new_upper(upper, 512)

    assert upper.stat().st_size == 512 << 20
    assert await disks.used_bytes(upper) < 2 << 20
    assert upper.stat().st_mode & 0o077 == 0
    await run(["e2fsck", "-fn", upper], timeout=30)


async def test_a_clone_is_equal_and_independent(disks: Disks, tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.write(b"head")
        file.seek(50 << 20)
        file.write(b"middle")
        file.truncate(100 << 20)

    await disks.clone(source, target)
    with target.open("r+b") as file:
        file.write(b"HEAD")

    assert target.stat().st_size == source.stat().st_size
    assert target.read_bytes()[50 << 20 :][:6] == b"middle"
    assert source.read_bytes()[:4] == b"head"
    assert await disks.used_bytes(target) < 1 << 20


async def test_an_existing_target_is_not_overwritten(disks: Disks, tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    with pytest.raises(DiskFailure):
        await disks.clone(source, target)

    assert target.read_bytes() == b"old"


def test_a_copy_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 10)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr("emberbox.linux.sparse._FICLONE", 0)

    with pytest.raises(OSError, match="No space"):
        clone(source, target)
    assert not target.exists()


async def test_a_full_disk_is_refused_with_numbers(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_free_bytes", lambda: 600 << 20)

    await disks.ensure_free(50 << 20)
    with pytest.raises(DiskFull, match="600 MiB free and 612 are needed"):
        await disks.ensure_free(100 << 20)


def test_a_missing_layer_is_named(disks: Disks) -> None:
    with pytest.raises(LayerMissing, match="abcdef"):
        disks.layer("abcdef" + "0" * 58)


async def test_a_blank_is_made_once(disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = []

    async def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        formats.append(args)
        return await run(*args, **kwargs)

    monkeypatch.setattr(disks_module, "run", counted)

    await asyncio.gather(*(disks.new_upper(tmp_path / f"u{n}", 512) for n in range(5)))

    assert len(formats) == 1
