"""Packing and keeping layers with mkfs.erofs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberbox.images import layers
from emberbox.images.errors import ImageError
from emberbox.images.layers import LayerStore, file_digest
from emberbox.linux import loops, mounts

pytestmark = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs mkfs.erofs (erofs-utils)")


def _tree(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc/file").write_text("content")
    (root / "link").symlink_to("etc/file")
    (root / "etc/file").chmod(0o640)
    for path in (root / "etc/file", root / "etc", root):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    os.utime(root / "link", (1_000_000_000, 1_000_000_000), follow_symlinks=False)
    os.utime(root, (1_000_000_000, 1_000_000_000))
    return root


DISK_BYTES = 32 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk like that of a build."""
    image, point = tmp_path / "disk.ext4", tmp_path / "disk"
    image.touch()
    os.truncate(image, DISK_BYTES)
    options = ("-O", "^has_journal,^resize_inode", "-m", "0")
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, image], check=True)
    point.mkdir()
    with loops.attach(image) as device:
        mounts.mount(device.path, point, "ext4", mounts.MS_NODEV)
    yield point
    mounts.unmount(point)


async def test_equal_content_gives_the_same_layer(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")

    first = await store.pack(_tree(tmp_path / "a"))
    second = await store.pack(_tree(tmp_path / "b"))

    assert first.digest == second.digest == file_digest(first.path)
    assert store.digests() == [first.digest]
    assert first.path.stat().st_mode & 0o777 == 0o400


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts the layer")
async def test_files_keep_their_dates(tmp_path: Path) -> None:
    layer = await LayerStore(tmp_path / "layers").pack(_tree(tmp_path / "a"))
    point = tmp_path / "mounted"
    point.mkdir()

    with loops.attach(layer.path, read_only=True) as device:
        mounts.mount(device.path, point, "erofs", mounts.MS_RDONLY)
    try:
        dates = [(point / name).lstat().st_mtime for name in ("etc", "etc/file", "link")]
    finally:
        mounts.unmount(point)

    assert dates == [1_000_000_000] * 3


async def test_a_layer_can_be_copied_between_stores(tmp_path: Path) -> None:
    layer = await LayerStore(tmp_path / "one").pack(_tree(tmp_path / "a"))
    other = LayerStore(tmp_path / "two")

    copy = await other.take_copy(layer.path)

    assert copy.digest == layer.digest
    assert other.path(layer.digest) == copy.path


async def test_a_guests_disk_becomes_a_layer_as_it_is(tmp_path: Path) -> None:
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(64 << 20)
            file.seek(8 << 20)
            file.write(b"data" * 1024)
    with disks[1].open("r+b") as file:  # zeros that were written are no content
        file.seek(32 << 20)
        file.write(bytes(1 << 20))
    store = LayerStore(tmp_path / "layers")

    first, second = [await store.take_disk(disk) for disk in disks]

    assert first.digest == second.digest
    assert store.digests() == [first.digest]
    assert store.path(first.digest) == first.path == tmp_path / f"layers/{first.digest}.ext4"
    assert first.path.read_bytes() == disks[0].read_bytes()
    assert first.size_bytes < 1 << 20
    assert store.remove(first.digest)
    assert store.digests() == []


async def test_a_failed_pack_leaves_nothing(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")

    with pytest.raises(ImageError, match="could not be packed"):
        await store.pack(tmp_path / "missing")

    assert list(store.directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes and mounts a disk")
async def test_files_with_holes_that_are_more_than_their_disk_are_not_packed(disk: Path, tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")
    _tree(disk / "root")
    (disk / "root/x").touch()
    os.truncate(disk / "root/x", 1 << 30)

    with pytest.raises(ImageError, match=r"1025 MiB, more than .* files with holes .* in '/x'\); remove them"):
        await store.pack(disk / "root")

    assert list(store.directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes and mounts a disk")
async def test_a_disk_that_is_full_of_files_is_packed(disk: Path, tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")
    with (disk / "large").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(1 << 16))
    for number in range(5):
        os.link(disk / "large", disk / f"name{number}")

    layer = await store.pack(disk)

    assert layer.size_bytes > 0.8 * DISK_BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes and mounts a disk")
async def test_what_lies_below_a_disk_counts_for_itself(disk: Path, tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")
    (disk / "x").touch()
    os.truncate(disk / "x", 2 * DISK_BYTES)

    with pytest.raises(ImageError, match="more than"):
        await store.pack(disk)
    layer = await store.pack(disk, below_bytes=DISK_BYTES + DISK_BYTES // 2)

    assert layer.size_bytes > 2 * DISK_BYTES


async def test_a_layer_leaves_some_of_the_nodes_disk_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayerStore(tmp_path / "layers")
    root = _tree(tmp_path / "a")
    (root / "x").touch()
    os.truncate(root / "x", 1 << 20)
    monkeypatch.setattr(layers, "RESERVE_BYTES", shutil.disk_usage(tmp_path).total)

    with pytest.raises(ImageError, match=r"this node's disk has .* free, .* files with holes .* in '/x'"):
        await store.pack(root)

    assert list(store.directory.iterdir()) == []


async def test_layers_that_are_packed_at_the_same_time_do_not_count_on_the_same_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = asyncio.Event()

    async def pack(*_: object, **__: object) -> None:
        packing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(layers, "run", pack)
    roots = [_tree(tmp_path / name) for name in "ab"]
    for root in roots:
        (root / "x").touch()
        os.truncate(root / "x", (shutil.disk_usage(tmp_path).free - (512 << 20)) * 2 // 3)
    first = asyncio.create_task(LayerStore(tmp_path / "layers").pack(roots[0]))
    await packing.wait()

    with pytest.raises(ImageError, match="this node's disk"):
        await LayerStore(tmp_path / "layers").pack(roots[1])

    first.cancel()
    await asyncio.wait([first])
    assert list((tmp_path / "layers").iterdir()) == []


async def test_a_removed_layer_is_gone_and_removing_again_is_no_error(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")
    layer = await store.pack(_tree(tmp_path / "a"))

    assert store.remove(layer.digest)
    assert not store.remove(layer.digest)
    assert store.path(layer.digest) is None
