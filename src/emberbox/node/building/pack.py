"""From the disk that a build's machine wrote to a layer."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from emberbox.images.layers import Layer, LayerStore
from emberbox.linux import mounts
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
    if runtime.capabilities.memory_snapshots:
        return await store.take_disk(upper)
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=_DRAFT, dir=work_dir))
    opened = opened_upper(upper, folder)
    try:
        root = await to_thread_whole(opened.__enter__)
        try:
            return await store.pack(root)
        finally:
            await to_thread_whole(opened.__exit__, None, None, None)
    finally:
        await to_thread_whole(folder.rmdir)


def sweep(work_dir: Path) -> list[str]:
    """Unmount and remove what an earlier process was packing; blocks."""
    removed = mounts.unmount_below(work_dir) if work_dir.is_dir() else []
    return [f"mount {point}" for point in removed]
