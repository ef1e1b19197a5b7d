"""From the disk that a build's machine wrote to a layer."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from emberbox.images.layers import Layer, LayerStore
from emberbox.linux import loops, mounts
from emberbox.runtime.base import Runtime
from emberbox.runtime.container.root import opened_upper
from emberbox.threads import to_thread_whole

_DRAFT = "pack-"


async def pack(runtime: Runtime, store: LayerStore, upper: Path, work_dir: Path) -> Layer:
    """Make a layer of what lies on `upper`.

    What a container wrote was written by the host's kernel, and becomes an EROFS image. What a guest's kernel wrote
    is never mounted by the host: the disk itself becomes the layer, for guests alone.

    Raises:
        ImageError: the disk is full, or packing failed.
    """
    if written_by_guests(runtime):
        return await store.take_disk(upper)
    async with _folder(work_dir) as folder, _entered(opened_upper(upper, folder)) as root:
        return await store.pack(root)


async def pack_all(store: LayerStore, layers: Sequence[Path], upper: Path, work_dir: Path) -> Layer:
    """Make one layer of a whole stack that containers wrote.

    Args:
        layers: EROFS images, lowest first.

    Raises:
        ImageError, OSError: packing failed, or a layer could not be mounted.
    """
    async with (
        _folder(work_dir) as folder,
        _entered(opened_upper(upper, folder)) as top,
        _entered(_joined(layers, top, folder / "all")) as root,
    ):
        below_bytes = await asyncio.to_thread(lambda: sum(layer.stat().st_size for layer in layers))
        return await store.pack(root, below_bytes=below_bytes)


def written_by_guests(runtime: Runtime) -> bool:
    """Whether the disks of this runtime's machines are written by kernels that are not the host's."""
    return runtime.capabilities.memory_snapshots


@contextlib.contextmanager
def _joined(layers: Sequence[Path], top: Path, folder: Path) -> Iterator[Path]:
    """Show a stack of layers with `top` over it, read-only, as machines see it."""
    folder.mkdir(mode=0o700)
    flags = mounts.MS_RDONLY | mounts.MS_NODEV | mounts.MS_NOSUID
    try:
        lower = [str(top)]
        for number, layer in enumerate(layers):
            point = folder / str(number)
            point.mkdir(mode=0o700)
            with loops.attach(layer, read_only=True) as device:
                mounts.mount(device.path, point, "erofs", flags)
            lower.insert(1, str(point))
        root = folder / "root"
        root.mkdir(mode=0o700)
        mounts.mount("overlay", root, "overlay", flags, f"lowerdir={':'.join(lower)},redirect_dir=follow,metacopy=off")
        yield root
    finally:
        mounts.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)  # mount points only


@contextlib.asynccontextmanager
async def _folder(work_dir: Path) -> AsyncIterator[Path]:
    folder = Path(await to_thread_whole(tempfile.mkdtemp, prefix=_DRAFT, dir=work_dir))
    try:
        yield folder
    finally:
        await to_thread_whole(folder.rmdir)


@contextlib.asynccontextmanager
async def _entered(manager: contextlib.AbstractContextManager[Path]) -> AsyncIterator[Path]:
    """Enter and leave in a thread what mounts and unmounts."""
    path = await to_thread_whole(manager.__enter__)
    try:
        yield path
    finally:
        await to_thread_whole(manager.__exit__, None, None, None)
