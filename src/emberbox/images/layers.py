"""The store of layers: read-only images, named by the SHA-256 of their bytes.

A layer is written beside the store and renamed into it when it is whole, so that what has a name is complete.
Layers carry ordinary ids (0, 1000); a runtime shifts them when it mounts. They are EROFS images, but for disks that a
guest's kernel has written: those stay ext4, and only guests mount them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from emberbox.commands import CommandFailed, run
from emberbox.images.errors import ImageError
from emberbox.linux import sparse
from emberbox.room import RESERVE_BYTES, mib
from emberbox.threads import to_thread_whole

SUFFIX = ".erofs"
DISK_SUFFIX = ".ext4"
_SUFFIXES = (SUFFIX, DISK_SUFFIX)
_PACK_SECONDS = 1800.0
_SUPERBLOCK, _BUILD_TIME, _EROFS_MAGIC = 1024, 24, 0xE0F5E1E2  # seconds (8 bytes) and nanoseconds (4): erofs_fs.h
_UUID = "00000000-0000-0000-0000-000000000000"
"""A random one would give equal content another digest."""


@dataclass(frozen=True, slots=True)
class Layer:
    digest: str
    """Hex SHA-256."""
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """The ordinary files of a folder and those below it."""

    size_bytes: int
    """Of all, holes counted: what they take in a layer."""
    sparsest: str
    """The one with the largest holes; empty: none has any."""


_packing: dict[Path, int] = {}
"""Drafts that are being packed, by any store of this process, and what their files come to."""
_check = threading.Lock()
"""Two that look for room at the same time must not find the same."""


class LayerStore:
    """Layers in one folder, as `<digest>.erofs` or `<digest>.ext4`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: str) -> Path | None:
        """Where a layer is; None when it is not here."""
        for suffix in _SUFFIXES:
            path = self.directory / f"{digest}{suffix}"
            if path.is_file():
                return path
        return None

    def digests(self) -> list[str]:
        """Every layer here."""
        return sorted(path.stem for suffix in _SUFFIXES for path in self.directory.glob(f"*{suffix}"))

    def remove(self, digest: str) -> bool:
        """Delete a layer; False when it is not here. Machines that have it mounted keep it until they end."""
        path = self.path(digest)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    async def pack(self, root: Path, *, below_bytes: int = 0) -> Layer:
        """Make a layer of the folder `root`, owners, times and extended attributes included.

        The same content gives the same digest, whatever the folder is called and whenever it is packed.

        Args:
            below_bytes: what may be in `root` besides what its own disk holds: the layers that it is joined with.

        Raises:
            ImageError: the files' holes would make it larger than their disk, the node's disk is full, or mkfs.erofs
                failed.
        """
        async with self._draft() as draft:
            try:
                await to_thread_whole(_make_room, draft, root, below_bytes)
                # A date given with -T would be that of every file.
                command = ("mkfs.erofs", "--quiet", "--preserve-mtime", "-Enosbcrc", f"-U{_UUID}", draft, root)
                await run(command, timeout=_PACK_SECONDS, dies_with_us=True)
            except (CommandFailed, OSError) as error:
                raise ImageError(f"the layer could not be packed: {error}") from error
            finally:
                _packing.pop(draft, None)
            await asyncio.to_thread(_clear_build_time, draft)
            return await asyncio.to_thread(self._keep, draft)

    async def take_copy(self, source: Path) -> Layer:
        """Put a finished layer file from elsewhere into the store; a hard link where that is possible."""
        async with self._draft() as draft:
            await asyncio.to_thread(link_or_copy, source, draft)
            return await asyncio.to_thread(self._keep, draft)

    async def take_disk(self, source: Path) -> Layer:
        """Make a layer of the disk that a guest's kernel has written, as it is: a copy of its own, holes kept."""
        async with self._draft() as draft:
            await to_thread_whole(sparse.clone, source, draft)
            return await asyncio.to_thread(self._keep_disk, draft)

    @contextlib.asynccontextmanager
    async def _draft(self) -> AsyncIterator[Path]:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=self.directory) as folder:
            yield Path(folder) / "layer"

    def _keep(self, draft: Path) -> Layer:
        return self._place(draft, file_digest(draft), SUFFIX)

    def _keep_disk(self, draft: Path) -> Layer:
        sparse.dig_holes(draft)
        layer = self._place(draft, sparse.digest(draft), DISK_SUFFIX)
        return Layer(layer.digest, layer.path, sparse.allocated(layer.path))

    def _place(self, draft: Path, digest: str, suffix: str) -> Layer:
        target = self.directory / f"{digest}{suffix}"
        if not target.exists():
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            draft.chmod(0o400)
            draft.rename(target)
        return Layer(digest, target, target.stat().st_size)


def _make_room(draft: Path, root: Path, below_bytes: int) -> None:
    """See that a layer of `root` is no larger than it may be, and keep room for it until it is packed.

    mkfs.erofs writes holes as zeros: a file of none but a hole, which costs a machine nothing, could fill the node's
    disk, and with it the machines' that stand on it.

    Raises:
        ImageError: the files are more than their disk holds, or than fits on the one of `draft`.
        OSError: a folder could not be read.
    """
    files = _files_below(root)
    disk = os.statvfs(root)
    most = disk.f_blocks * disk.f_frsize + below_bytes
    holes = "files with holes are written out in a layer"
    if files.sparsest:
        holes += f" (the largest holes are in {files.sparsest[:200]!r})"
    if files.size_bytes > most:
        raise ImageError(
            f"the files come to {mib(files.size_bytes)}, more than the {mib(most)} of their disk: {holes}; remove "
            "them, or make them smaller, in the step that makes them"
        )
    with _check:
        others = [(path, size) for path, size in list(_packing.items()) if path.parents[1] == draft.parents[1]]
        coming = sum(max(0, size - _allocated(path)) for path, size in others)
        needed = files.size_bytes + coming + RESERVE_BYTES
        free = shutil.disk_usage(draft.parent).free
        if needed > free:
            raise ImageError(
                f"this node's disk has {mib(free)} free, and {mib(needed)} are needed: {holes}; make them smaller, "
                "delete templates or snapshots, or enlarge the disk"
            )
        _packing[draft] = files.size_bytes


def _files_below(root: Path) -> _Files:
    """
    Raises:
        OSError: a folder could not be read.
    """
    total = most = 0
    sparsest = ""
    folders = [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                seen = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(seen.st_mode):
                    continue
                # A file with several names counts in parts: to remember which were seen could take the node's memory.
                total += -(-seen.st_size // seen.st_nlink)
                holes = seen.st_size - seen.st_blocks * 512
                if holes > most:
                    most, sparsest = holes, entry.path.removeprefix(os.fspath(root))
    return _Files(total, sparsest)


def _allocated(path: Path) -> int:
    try:
        return sparse.allocated(path)
    except FileNotFoundError:
        return 0


def _clear_build_time(image: Path) -> None:
    """Date an EROFS image 1970, for equal content to give equal bytes. Its files keep their dates."""
    with image.open("r+b") as file:
        file.seek(_SUPERBLOCK)
        (magic,) = struct.unpack("<I", file.read(4))
        if magic != _EROFS_MAGIC:
            raise ImageError("mkfs.erofs wrote something that is not an EROFS image")
        file.seek(_SUPERBLOCK + _BUILD_TIME)
        file.write(bytes(12))


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it on another file system."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
