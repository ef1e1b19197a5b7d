"""Builds of this node: each a task with a journal that can be followed, and the layers that builds stand on.

A build outlives the call that started it, not the node's process: `start` removes what an earlier one left half-made.
What a build does is in `building/`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from emberbox.images.base import base_key
from emberbox.images.errors import ImageError, RecipeError
from emberbox.images.layers import LayerStore
from emberbox.images.oci import Images
from emberbox.linux import mounts
from emberbox.linux.writing import write_file
from emberbox.node.building.builder import Builder
from emberbox.node.building.cache import StepCache
from emberbox.node.building.journal import Journal
from emberbox.node.building.model import FINAL_STEP, BuildEvent, Done, Failed, NewBuild, Outcome, StepFailed
from emberbox.node.building.sources import Sources
from emberbox.node.errors import AlreadyHere, BadValue, NodeError, NoSuchBuild
from emberbox.node.hosting import Hosting
from emberbox.node.model import Image
from emberbox.node.preparing import Preparing
from emberbox.node.tasks import Tasks, finish
from emberbox.runtime.base import MIB, Limits
from emberbox.runtime.errors import RuntimeFailure
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

_KEPT_SECONDS = 900.0
"""How long an ended build can still be followed."""
_KEPT_BUILDS = 20


@dataclass(slots=True)
class _Job:
    new: NewBuild
    journal: Journal = field(default_factory=Journal)
    task: asyncio.Task[None] | None = None
    layers: set[str] = field(default_factory=set)
    """What it stands on so far."""
    ended: float = 0.0


class Builds:
    """Builds under way and lately ended, and the layers that wait to be removed."""

    def __init__(
        self,
        settings: Settings,
        hosting: Hosting,
        preparing: Preparing,
        layers_used: Callable[[], AsyncIterator[str]],
        *,
        ready: Callable[[Image, Limits], None],
        removed: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
            layers_used: every digest that a sandbox or snapshot of this node stands on.
            ready: told of every finished build.
            removed: called after layers were removed.
        """
        directory = settings.node_dir
        self._settings = settings
        self._layers_dir = directory / "layers"
        self._records = directory / "builds"
        self._work_dir = directory / "building"
        self._store = LayerStore(self._layers_dir)
        self._preparing = preparing
        self._layers_used = layers_used
        self._ready = ready
        self._removed = removed
        self._unwanted_path = self._layers_dir / "unwanted.json"
        self._cache = StepCache(directory / "cache", max_bytes=settings.build_cache_max_mb * MIB)
        self._images = Images(settings, self._store, directory / "cache" / "made", self._work_dir)
        sources = Sources(settings, self._layers_dir, self._images)
        self._builder = Builder(settings, hosting, self._store, sources, self._cache, self._work_dir)
        self._jobs: dict[str, _Job] = {}
        self._tasks = Tasks()
        self._tending = asyncio.Lock()
        self._closed = False
        self._base_key: str | None = None

    def sweep(self) -> list[str]:
        """Remove what builds of an earlier process left half-made; blocks. Machines are the runtime's to sweep."""
        for directory in (self._layers_dir, self._records, self._work_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        removed = [*self._images.sweep(), *self._cache.sweep()]
        for path in (*self._layers_dir.glob(".build-*"), *self._layers_dir.glob(".draft-*")):
            mounts.unmount_below(path)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(f"layers/{path.name}")
        return removed

    async def base_key(self) -> str:
        """What a build of `base` would be made of, as it was when it was first asked for; empty without a recipe."""
        if self._base_key is None:
            try:
                self._base_key = await asyncio.to_thread(base_key, self._settings)
            except RecipeError as error:
                log.error("recipe.unreadable", error=str(error))
                self._base_key = ""
        return self._base_key

    def known(self) -> list[str]:
        """IDs of the builds that are here; blocks."""
        return [path.stem for path in self._records.glob("*.json")]

    # ---- builds

    def start(self, new: NewBuild) -> None:
        """Begin a build; `follow` tells how it goes.

        Raises:
            AlreadyHere: it runs already.
            BadValue: its ID cannot be the name of a file.
        """
        if not new.build_id.replace("-", "").replace("_", "").isalnum() or len(new.build_id) > 64:
            raise BadValue(f"build ID {new.build_id[:80]!r} must be 1 to 64 letters, digits, '-' and '_'")
        self._forget_old()
        known = self._jobs.get(new.build_id)
        if known is not None and known.journal.outcome is None:
            raise AlreadyHere(f"build '{new.build_id}' is already running")
        job = self._jobs[new.build_id] = _Job(new)
        job.task = self._tasks.start(self._work(job), name=f"build {new.build_id}")

    def follow(self, build_id: str, position: int = 0) -> AsyncIterator[BuildEvent]:
        """The events of a build, its log from `position` on. Leaving it does not end the build.

        Raises:
            NoSuchBuild: it neither runs nor ended lately.
        """
        return self._find(build_id).journal.follow(position)

    async def cancel(self, build_id: str) -> None:
        """End a build and remove what it made; returns when that is done. One that has ended is left alone.

        Raises:
            NoSuchBuild
        """
        job = self._find(build_id)
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait((job.task,))

    def _find(self, build_id: str) -> _Job:
        job = self._jobs.get(build_id)
        if job is None:
            raise NoSuchBuild(f"build '{build_id}' is not known on this node")
        return job

    def _forget_old(self) -> None:
        ended = [build_id for build_id, job in self._jobs.items() if job.ended]
        for number, build_id in enumerate(ended):
            old = time.monotonic() - self._jobs[build_id].ended > _KEPT_SECONDS
            if old or number < len(ended) - _KEPT_BUILDS:
                del self._jobs[build_id]

    async def _work(self, job: _Job) -> None:
        new, journal = job.new, job.journal
        log.info("build.started", build_id=new.build_id, steps=len(new.steps))
        began = time.monotonic()
        outcome: Outcome | None = None
        try:
            outcome = await self._outcome(job)
        except asyncio.CancelledError:
            if self._closed:
                journal.close()
            else:
                outcome = Failed("the build was cancelled", journal.step)
            raise
        finally:
            job.ended = time.monotonic()
            if outcome is not None:
                _log_end(new.build_id, outcome, time.monotonic() - began)
                journal.end(outcome)
            job.layers.clear()
        if isinstance(outcome, Done):
            self._ready(outcome.image, new.limits)
        await self._trim()

    async def _outcome(self, job: _Job) -> Outcome:
        journal = job.journal
        seconds = float(self._settings.build_seconds)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._build(job)
        except TimeoutError as error:
            if limit.expired():
                return Failed(f"the build took longer than {seconds / 60:g} minutes and was given up", journal.step)
            log.error("build.timeout", build_id=job.new.build_id, step=journal.step, exc_info=error)
            return Failed("a part of the node did not answer in time", journal.step)
        except StepFailed as error:
            return Failed(str(error), error.step or journal.step)
        except (ImageError, NodeError, RuntimeFailure) as error:
            return Failed(str(error), journal.step)
        except OSError as error:
            log.error("build.failed", build_id=job.new.build_id, step=journal.step, exc_info=error)
            return Failed(f"the node could not write or read a file: {error.strerror or error}", journal.step)
        except Exception as error:
            log.error("build.failed", build_id=job.new.build_id, step=journal.step, exc_info=error)
            return Failed("the node failed; its log says why", journal.step)

    async def _build(self, job: _Job) -> Done:
        new = job.new
        made = await self._builder.build(new, job.journal, job.layers.add)
        job.journal.step = FINAL_STEP
        await self._preparing.remember(made.image, new.limits)
        try:
            await finish(self._record(made.image))
        except BaseException:
            await finish(self._unmake(new.build_id))
            raise
        return Done(made.image, made.size_bytes)

    async def _unmake(self, build_id: str) -> None:
        """What was written down of a build that was given up in its last moment."""
        await asyncio.to_thread((self._records / f"{build_id}.json").unlink, missing_ok=True)
        await self._preparing.forget(build_id)

    async def _record(self, image: Image) -> None:
        """Write down that a build stands on its layers; older word that one is unwanted no longer counts."""

        def write() -> None:
            self._write_unwanted(self._unwanted() - set(image.layers))
            data = json.dumps({"layers": image.layers}).encode()
            write_file(self._records / f"{image.build_id}.json", data, flush=False)

        await to_thread_whole(write)

    async def close(self) -> None:
        """End every build; the machines of unfinished ones go with them."""
        self._closed = True
        for job in self._jobs.values():
            if job.journal.outcome is None:
                job.journal.close()
        await self._tasks.close()

    # ---- layers

    async def digests(self) -> list[str]:
        """Layers that are here."""
        return await asyncio.to_thread(self._store.digests)

    async def delete(self, build_id: str, layers: list[str]) -> None:
        """Forget a build. Layers that a sandbox, a snapshot or the build cache still stands on go when it does.

        Args:
            layers: digests that no build uses any more.

        Raises:
            NoSuchBuild: nothing of it is here.
        """
        here = set(await self.digests())
        found = {digest for digest in layers if digest in here}
        if layers and not found:
            raise NoSuchBuild(f"build '{build_id}' is not on this node")
        await self._preparing.forget(build_id)
        await to_thread_whole(self._forget_records, build_id, found)
        await self._trim()
        await self.tend()

    def _forget_records(self, build_id: str, unused: set[str]) -> None:
        (self._records / f"{build_id}.json").unlink(missing_ok=True)
        for path in self._records.glob("*.json"):
            if unused & self._recorded_layers(path):  # of a build whose layers were all in use when it went
                path.unlink(missing_ok=True)
        self._write_unwanted(self._unwanted() | unused)

    async def tend(self) -> None:
        """Remove unwanted layers that nothing stands on any more."""
        async with self._tending:
            unwanted = await asyncio.to_thread(self._unwanted)
            if not unwanted:
                return
            used = {digest async for digest in self._layers_used()}
            used |= await asyncio.to_thread(lambda: self._cache.layers() | self._recorded())
            used.update(*(job.layers for job in self._jobs.values()))
            gone = unwanted - used
            for digest in gone:
                await asyncio.to_thread(self._store.remove, digest)
                log.info("layer.removed", digest=digest)
            if gone:
                await self._removed()
                await to_thread_whole(lambda: self._write_unwanted(self._unwanted() - gone))

    async def _trim(self) -> None:
        """Keep the cache within its bound; layers that only it stood on become unwanted."""
        recorded = await asyncio.to_thread(self._recorded)
        recorded.update(*(job.layers for job in self._jobs.values()))
        dropped = await self._cache.trim(self._layer_size, recorded.__contains__)
        if dropped - recorded:
            await to_thread_whole(lambda: self._write_unwanted(self._unwanted() | (dropped - recorded)))
            await self.tend()

    def _layer_size(self, digest: str) -> int:
        path = self._store.path(digest)
        return path.stat().st_blocks * 512 if path is not None else 0

    def _recorded(self) -> set[str]:
        found: set[str] = set()
        for path in self._records.glob("*.json"):
            found |= self._recorded_layers(path)
        return found

    @staticmethod
    def _recorded_layers(path: Path) -> set[str]:
        try:
            return set(json.loads(path.read_bytes())["layers"])
        except FileNotFoundError:
            return set()
        except (ValueError, KeyError, TypeError) as error:
            log.error("build.record_damaged", path=str(path), error=str(error))
            return set()

    def _unwanted(self) -> set[str]:
        try:
            return set(json.loads(self._unwanted_path.read_bytes()))
        except FileNotFoundError:
            return set()

    def _write_unwanted(self, digests: set[str]) -> None:
        if digests or self._unwanted_path.exists():
            write_file(self._unwanted_path, json.dumps(sorted(digests)).encode(), flush=False)


def _log_end(build_id: str, outcome: Outcome, seconds: float) -> None:
    if isinstance(outcome, Done):
        layers = len(outcome.image.layers)
        log.info(
            "build.done", build_id=build_id, layers=layers, size_bytes=outcome.size_bytes, seconds=round(seconds, 1)
        )
    else:
        # Only the step: messages quote commands, and commands may hold secrets.
        log.warning("build.failed", build_id=build_id, step=outcome.step, seconds=round(seconds, 1))
