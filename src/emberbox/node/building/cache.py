"""What steps left, kept for the next build: one folder an entry, named by the key of the step's chain.

    steps/<key>/upper.ext4   the machine's disk after the step; absent: still blank
    steps/<key>/meta.json    written last: a folder without it is half-made, never used, and swept
    made/<key>.json          the layer that a chain packs into

An entry is never written again. Its last use is the date of its `meta.json`. When the whole grows beyond its bound
the least recently used entries go; those that a build works with stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from emberbox.linux.writing import write_file
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

UPPER = "upper.ext4"
_META = "meta.json"
_DRAFT = "draft-"


@dataclass(frozen=True, slots=True)
class MadeLayer:
    """A packed layer; an empty digest: the chain changes no file."""

    digest: str
    size_bytes: int
    whole: bool = False
    """It stands for the layers below it, too."""


class StepCache:
    """The cache in one directory. Entries are shared as hard links by steps that change no file."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self._steps = directory / "steps"
        self._made = directory / "made"
        self._max_bytes = max_bytes
        self._used: Counter[str] = Counter()

    # ---- steps

    def has(self, key: str) -> bool:
        """Whether the result of a step is here; blocks for one look at the disk."""
        return (self._steps / key / _META).exists()

    def upper(self, key: str) -> Path | None:
        """The disk that a step left; None for a blank one."""
        path = self._steps / key / UPPER
        return path if path.exists() else None

    @contextlib.contextmanager
    def held(self, *keys: str) -> Iterator[None]:
        """Entries that stay until the end of the block."""
        self._used.update(keys)
        try:
            yield
        finally:
            for key in keys:
                self._used[key] -= 1
                if not self._used[key]:
                    del self._used[key]

    async def touch(self, *keys: str) -> None:
        """Note that entries were used."""

        def touch() -> None:
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._steps / key / _META)

        await asyncio.to_thread(touch)

    @contextlib.asynccontextmanager
    async def new(self, key: str, step: str, *, replace: bool = False) -> AsyncIterator[Path]:
        """A folder to put `upper.ext4` into. It becomes the entry at the end of the block, or is removed when that
        fails.

        Args:
            replace: it counts more than an entry that is there, or that another build makes at the same time.
        """
        draft = self._steps / f"{_DRAFT}{secrets.token_hex(8)}"
        await to_thread_whole(draft.mkdir, mode=0o700, parents=True)
        try:
            yield draft
            await to_thread_whole(self._keep, draft, key, step, replace)
        except BaseException:
            await to_thread_whole(shutil.rmtree, draft, ignore_errors=True)
            raise

    async def share(self, before: str, key: str, step: str, *, replace: bool = False) -> None:
        """The step changed no file: its entry has the disk of the one before."""
        async with self.new(key, step, replace=replace) as folder:
            upper = self.upper(before)
            if upper is not None:
                await to_thread_whole(os.link, upper, folder / UPPER)

    def _keep(self, draft: Path, key: str, step: str, replace: bool) -> None:
        target = self._steps / key
        write_file(draft / _META, json.dumps({"step": step[:200]}).encode(), flush=False)
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if replace:  # a build may be reading the old disk at this moment: there is always a whole one
                if (draft / UPPER).exists():
                    (draft / UPPER).replace(target / UPPER)
                else:
                    (target / UPPER).unlink(missing_ok=True)
                (draft / _META).replace(target / _META)
            shutil.rmtree(draft, ignore_errors=True)

    # ---- layers

    async def made(self, key: str) -> MadeLayer | None:
        """The layer that a chain packed into, if it is known."""

        def read() -> MadeLayer | None:
            path = self._made / f"{key}.json"
            try:
                found = MadeLayer(**json.loads(path.read_bytes()))
                os.utime(path)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError) as error:
                log.warning("build_cache.unreadable", path=str(path), error=str(error))
                return None
            return found

        return await asyncio.to_thread(read)

    async def keep_made(self, key: str, layer: MadeLayer) -> None:
        def write() -> None:
            self._made.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._made / f"{key}.json", json.dumps(asdict(layer)).encode(), flush=False)

        await to_thread_whole(write)

    def layers(self) -> set[str]:
        """Digests of the layers that the cache stands for; blocks."""
        found = set()
        for path in self._made.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.add(json.loads(path.read_bytes())["digest"])
        return found - {""}

    # ---- upkeep

    def sweep(self) -> list[str]:
        """Remove half-made entries of an earlier process; blocks."""
        self._steps.mkdir(mode=0o700, parents=True, exist_ok=True)
        removed = []
        for path in self._steps.iterdir():
            if path.name.startswith(_DRAFT) or not (path / _META).exists():
                shutil.rmtree(path, ignore_errors=True)
                removed.append(f"build cache {path.name}")
        return removed

    async def trim(self, layer_size: Callable[[str], int], layer_wanted: Callable[[str], bool]) -> set[str]:
        """Remove the least recently used until the rest is within its bound.

        Args:
            layer_size: bytes of a layer on the disk.
            layer_wanted: whether a build stands on a layer; such a one costs the cache nothing.

        Returns:
            Digests of the layers that the cache no longer stands for.
        """
        return await to_thread_whole(self._trim, layer_size, layer_wanted)

    def _trim(self, layer_size: Callable[[str], int], layer_wanted: Callable[[str], bool]) -> set[str]:
        entries = sorted([*self._step_sizes(), *self._made_sizes(layer_size, layer_wanted)], reverse=True)
        total = 0
        before = self.layers()
        for _, path, size in entries:  # the most recently used first
            total += size
            if total <= self._max_bytes or self._used[path.name]:
                continue
            total -= size
            log.info("build_cache.removed", entry=path.name, bytes=size)
            if path.is_dir():
                (path / _META).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return before - self.layers()

    def _step_sizes(self) -> Iterator[tuple[float, Path, int]]:
        for path in self._steps.iterdir() if self._steps.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                used = (path / _META).stat().st_mtime
                upper = self.upper(path.name)
                facts = upper.stat() if upper is not None else None
                yield used, path, (facts.st_blocks * 512 // facts.st_nlink if facts is not None else 0)

    def _made_sizes(
        self, layer_size: Callable[[str], int], layer_wanted: Callable[[str], bool]
    ) -> Iterator[tuple[float, Path, int]]:
        for path in self._made.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                digest = json.loads(path.read_bytes())["digest"]
                yield path.stat().st_mtime, path, 0 if not digest or layer_wanted(digest) else layer_size(digest)
