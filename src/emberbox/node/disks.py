"""Disk images on the node: layers by digest, uppers from pre-formatted blanks, clones that cost what differs.

Nothing here mounts anything; that is the runtime's business.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from emberbox.commands import CommandFailed, run
from emberbox.images.layers import LayerStore
from emberbox.linux import sparse
from emberbox.node.errors import DiskFailure, DiskFull, LayerMissing
from emberbox.room import RESERVE_BYTES
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

MIB = 1024 * 1024

_FORMAT_SECONDS = 120.0
_CHEAP_BYTES = 512 * MIB


class Disks:
    """Layers in `node/layers`, blanks in `node/blanks`; uppers are wherever the caller says, on the same disk."""

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.node_dir
        self._layers = LayerStore(settings.node_dir / "layers")
        self._blanks = settings.node_dir / "blanks"
        self._formatting: dict[int, asyncio.Lock] = {}

    def layer(self, digest: str) -> Path:
        """The image file of a layer.

        Raises:
            LayerMissing: it is not on this node.
        """
        path = self._layers.path(digest)
        if path is None:
            raise LayerMissing(digest)
        return path

    async def new_upper(self, path: Path, size_mb: int) -> None:
        """Make `path` an empty ext4 image of `size_mb` MiB; it takes up what is written to it.

        Raises:
            DiskFull: the node's disk is nearly full.
            DiskFailure: the image could not be made.
        """
        await self.ensure_free(0)
        blank = await self._blank(size_mb)
        await self._clone(blank, path)

    async def clone(self, source: Path, target: Path) -> None:
        """Make `target` an independent copy of the image `source`: shared blocks where the file system can, holes
        kept where it cannot.

        Raises:
            DiskFull: the copy does not fit.
            DiskFailure: the copy could not be made.
        """
        await self.ensure_free(0)
        await self._clone(source, target)

    async def clone_cheaply(self, source: Path, target: Path) -> bool:
        """`clone`, where that is a matter of at most a second; tells whether it was made.

        Raises:
            DiskFull: the copy does not fit.
            DiskFailure: the copy could not be made.
        """
        await self.ensure_free(0)
        return await self._clone(source, target, partial(sparse.clone_cheaply, most=_CHEAP_BYTES))

    async def used_bytes(self, path: Path) -> int:
        """What an image takes up on the node's disk. Blocks shared with other images count in each."""
        return (await asyncio.to_thread(path.stat)).st_blocks * 512

    async def ensure_free(self, bytes: int) -> None:
        """Raise `DiskFull` unless `bytes` more fit on the node's disk, with the reserve left over."""
        free = await asyncio.to_thread(self._free_bytes)
        if free < bytes + RESERVE_BYTES:
            raise DiskFull(
                f"the node's disk has {free // MIB} MiB free and {(bytes + RESERVE_BYTES) // MIB} are needed; "
                f"delete snapshots or templates, or enlarge the disk of {self._directory}"
            )

    def _free_bytes(self) -> int:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = os.statvfs(self._directory)
        return state.f_bavail * state.f_frsize

    async def _clone(self, source: Path, target: Path, how: Callable[[Path, Path], bool] = sparse.clone) -> bool:
        try:
            return await to_thread_whole(how, source, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"the node's disk became full while {source.name} was copied") from error
            raise DiskFailure(f"{source} could not be copied to {target}: {error}") from error

    async def _blank(self, size_mb: int) -> Path:
        path = self._blanks / f"{size_mb}.ext4"
        async with self._formatting.setdefault(size_mb, asyncio.Lock()):
            if not await asyncio.to_thread(path.exists):
                await self._format(path, size_mb)
        return path

    async def _format(self, path: Path, size_mb: int) -> None:
        self._blanks.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=self._blanks) as folder:
            draft = Path(folder) / "blank"
            draft.touch(mode=0o600)
            os.truncate(draft, size_mb * MIB)
            # No journal: an upper is never used again after a crash of the host that it was mounted on.
            features = "^has_journal,^resize_inode"
            argv = ("mkfs.ext4", "-q", "-F", "-O", features, "-m", "0", "-E", "lazy_itable_init=1,nodiscard", draft)
            try:
                await run(argv, timeout=_FORMAT_SECONDS)
            except CommandFailed as error:
                raise DiskFailure(f"a disk of {size_mb} MiB could not be formatted: {error}") from error
            draft.rename(path)
