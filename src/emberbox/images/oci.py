"""OCI images as layers: looked up in their registry, copied, unpacked and packed into one layer, once per content.

An image is unpacked onto a disk of limited size, so that one which grows out of all proportion fills that and nothing
else; umoci keeps what the image's layers say inside of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog

from emberbox.commands import CommandFailed, run
from emberbox.images.credentials import Credentials
from emberbox.images.errors import ImageError
from emberbox.images.layers import LayerStore
from emberbox.images.references import host_architecture, parse
from emberbox.images.registry import MIB, Manifest, Registry, registry
from emberbox.linux import loops, mounts
from emberbox.room import RESERVE_BYTES
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.images")

_UNPACK_SECONDS = 1800.0
_FORMAT_SECONDS = 120.0
_PREFIX = "pull-"


@dataclass(frozen=True, slots=True)
class Pulled:
    """An image that is here."""

    digest: str
    """Of its layer: hex SHA-256."""
    size_bytes: int
    env: dict[str, str] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        return self.digest


class Images:
    """Images by the digest of their manifest, remembered in `index_dir`."""

    def __init__(self, settings: Settings, store: LayerStore, index_dir: Path, work_dir: Path) -> None:
        self._settings = settings
        self._store = store
        self._index = index_dir
        self._work = work_dir
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def pull(
        self,
        name: str,
        credentials: Credentials | None,
        tell: Callable[[str], None],
        progress: Callable[[str, float], None],
        keep: Callable[[str], None],
    ) -> Pulled:
        """Have an image's layer in the store. Its registry is asked each time, also for leave to use it.

        Args:
            tell: called with a line for the log.
            progress: called with what is being done and the fraction (0..1) of the whole build.
            keep: told of the layer as soon as it is there.

        Raises:
            ImageError: the image cannot be had or used; says why.
        """
        reference = parse(name)
        allowed = self._settings.allowed_registries
        if allowed and reference.registry not in allowed:
            raise ImageError(
                f"images do not come from '{reference.registry}' here, only from {', '.join(allowed)} "
                "(EMBERBOX_ALLOWED_REGISTRIES)"
            )
        await asyncio.to_thread(self._work.mkdir, mode=0o700, parents=True, exist_ok=True)
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=_PREFIX, dir=self._work))
        try:
            async with registry(
                reference,
                credentials,
                folder,
                mirrors=self._settings.registry_mirrors,
                insecure=self._settings.insecure_registries,
                limit_mb=self._settings.image_max_compressed_mb,
            ) as source:
                progress(f"Looking up {reference}", 0.01)
                manifest = await source.manifest()
                async with self._turns.setdefault(manifest.digest, asyncio.Lock()):
                    if (found := await asyncio.to_thread(self._find, manifest)) is not None:
                        keep(found.digest)
                        tell(f"CACHED {reference} ({manifest.digest[:19]})")
                        return found
                    tell(f"Pulling {reference} ({manifest.compressed_bytes / MIB:.0f} MiB compressed)")
                    return await self._pull(source, manifest, str(reference), folder, tell, progress, keep)
        finally:
            await to_thread_whole(shutil.rmtree, folder, ignore_errors=True)

    async def _pull(
        self,
        source: Registry,
        manifest: Manifest,
        name: str,
        folder: Path,
        tell: Callable[[str], None],
        progress: Callable[[str, float], None],
        keep: Callable[[str], None],
    ) -> Pulled:
        await asyncio.to_thread(self._check_room, manifest)
        layout = folder / "oci"
        await source.copy(manifest, layout, lambda part: progress(f"Pulling {name}", 0.02 + 0.13 * part))
        config = await asyncio.to_thread(_config, layout, name)
        tell("Unpacking the image")
        progress("Unpacking the image", 0.15)
        async with self._limited_disk(folder) as disk:
            root = disk / "root"
            await self._unpack(layout, root, name)
            await to_thread_whole(shutil.rmtree, layout)
            progress("Packing the image's layer", 0.22)
            layer = await self._store.pack(root)
            keep(layer.digest)
        pulled = Pulled(layer.digest, layer.size_bytes, _environment(config))
        with contextlib.suppress(OSError):  # costs the next build time, nothing else
            await asyncio.to_thread(self._remember, manifest, pulled)
        log.info("image.pulled", image=name, layer=layer.digest, size_bytes=layer.size_bytes)
        return pulled

    async def _unpack(self, layout: Path, root: Path, name: str) -> None:
        try:
            command = ("umoci", "raw", "unpack", "--image", f"{layout}:image", root)
            await run(command, timeout=_UNPACK_SECONDS, dies_with_us=True)
        except CommandFailed as error:
            if error.returncode is None and not error.stderr and "could not be started" in str(error):
                raise ImageError("umoci is not installed; `apt install umoci` (see `emberbox doctor`)") from error
            if "no space left" in error.stderr:
                raise ImageError(
                    f"image '{name}' has more than {self._settings.image_max_mb} MiB unpacked, or more files than fit "
                    "there (EMBERBOX_IMAGE_MAX_MB)"
                ) from error
            last = (error.stderr.strip().splitlines() or [str(error)])[-1]
            raise ImageError(f"image '{name}' could not be unpacked: {last[-500:]}") from error

    @contextlib.asynccontextmanager
    async def _limited_disk(self, folder: Path) -> AsyncIterator[Path]:
        """An empty mounted file system of `image_max_mb`."""
        image, point = folder / "disk", folder / "mounted"
        await asyncio.to_thread(_sparse_file, image, self._settings.image_max_mb * MIB)
        features = "^has_journal,^resize_inode"
        options = ("-m", "0", "-E", "lazy_itable_init=1,nodiscard")
        try:
            await run(("mkfs.ext4", "-q", "-F", "-O", features, *options, image), timeout=_FORMAT_SECONDS)
        except CommandFailed as error:
            raise ImageError(f"a disk to unpack the image on could not be made: {error}") from error
        try:
            await to_thread_whole(_mount, image, point)
            yield point
        finally:
            await to_thread_whole(mounts.unmount_below, point)

    def _check_room(self, manifest: Manifest) -> None:
        free = shutil.disk_usage(self._work).free
        # The copy, the unpacked files (three times as large as a rule) and the layer.
        needed = 5 * manifest.compressed_bytes + RESERVE_BYTES
        if free < needed:
            raise ImageError(
                f"this node's disk has {free // MIB} MiB free, and the image may need {needed // MIB}; delete "
                "templates or snapshots, or enlarge the disk"
            )

    def _find(self, manifest: Manifest) -> Pulled | None:
        path = self._entry(manifest)
        try:
            found = Pulled(**json.loads(path.read_bytes()))
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("image.entry_unreadable", path=str(path), error=str(error))
            return None
        return found if self._store.path(found.digest) is not None else None

    def _remember(self, manifest: Manifest, pulled: Pulled) -> None:
        path = self._entry(manifest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(pulled)))
        draft.chmod(0o600)
        draft.rename(path)

    def _entry(self, manifest: Manifest) -> Path:
        return self._index / f"image-{manifest.digest.removeprefix('sha256:')}.json"

    def sweep(self) -> list[str]:
        """Remove what an earlier process was pulling; blocks."""
        if not self._work.is_dir():
            return []
        removed = mounts.unmount_below(self._work)
        for path in self._work.iterdir():
            removed.append(f"{self._work.name}/{path.name}")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return removed


def _sparse_file(path: Path, size: int) -> None:
    path.touch(mode=0o600)
    os.truncate(path, size)


def _mount(image: Path, point: Path) -> None:
    point.mkdir(mode=0o700)
    with loops.attach(image) as device:
        flags = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
        mounts.mount(device.path, point, "ext4", flags, "noinit_itable")


def _config(layout: Path, name: str) -> dict[str, Any]:
    """The image's configuration, by the layout's index and manifest."""
    try:
        index = json.loads((layout / "index.json").read_bytes())
        manifest = json.loads(_blob(layout, index["manifests"][0]["digest"]))
        config = json.loads(_blob(layout, manifest["config"]["digest"]))
        architecture = config.get("architecture", "")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ImageError(f"image '{name}' has no configuration that can be read: {error}") from error
    if architecture and architecture != host_architecture():
        raise ImageError(f"image '{name}' is for {architecture}, and this node is {host_architecture()}")
    return dict(config.get("config") or {})


def _blob(layout: Path, digest: str) -> bytes:
    kind, _, value = digest.partition(":")
    if kind != "sha256" or len(value) != 64 or not value.isalnum():
        raise OSError(errno.EINVAL, f"unexpected digest {digest[:80]!r}")
    return (layout / "blobs" / kind / value).read_bytes()


def _environment(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for word in config.get("Env") or ():
        name, sign, value = str(word).partition("=")
        if sign and name:
            found[name] = value
    return found
