"""From a template to a machine that is ready for a sandbox.

Cold: start, run the template's start command, wait for its ready command. Where the runtime has memory snapshots that
is done once: the machine is saved when it is ready, and later ones are restored from it. What is saved counts when its
`meta.json`, written last, is there, and names the runtime's parts as they are now: after an upgrade sandboxes get the
new agent and kernel.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from emberbox.linux.writing import write_file
from emberbox.node import identity
from emberbox.node.errors import NodeError
from emberbox.node.hosting import Hosted, Hosting, Origin
from emberbox.node.identity import Introduction
from emberbox.node.model import OPEN_NETWORK, Image, Network
from emberbox.node.pool import PoolKey
from emberbox.node.records import SavedFacts
from emberbox.node.tasks import Tasks, finish
from emberbox.runtime.base import Limits, Saved
from emberbox.runtime.errors import RuntimeFailure, SavedDamaged, SavedUnfit
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.node")

_META = "meta.json"
_FAILURE_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TemplateMemory:
    """`meta.json` of a template's memory."""

    saved: SavedFacts
    parts: str
    """The runtime's, when it was saved."""


_ADAPTER = TypeAdapter(TemplateMemory)


class Preparing:
    """Makes ready machines, and keeps the memory of templates in `directory`."""

    def __init__(self, hosting: Hosting, directory: Path, *, starts_at_once: int) -> None:
        self._hosting = hosting
        self._directory = directory
        self._turn = asyncio.Semaphore(starts_at_once)
        self._remembers = hosting.runtime.capabilities.memory_snapshots
        self._making: dict[PoolKey, asyncio.Task[None]] = {}
        self._made: set[PoolKey] = set()
        """What this process has saved: when it does not load, another will not either."""
        self._rest_until: dict[PoolKey, float] = {}
        self._forgotten: set[str] = set()
        """IDs of builds that were deleted: a create that began before may still ask for their memory."""
        self._tasks = Tasks()

    @property
    def waits_paused(self) -> bool:
        """Whether machines in the pool wait with their clock stopped."""
        return self._remembers

    async def warm(self, image: Image, limits: Limits) -> Hosted:
        """Bring up a machine for the pool."""
        if self._remembers:
            await asyncio.wait({self._make_soon(PoolKey.of(image, limits), image, limits)})
        hosted = await self.machine(image, limits, identity.unclaimed(image, limits), background=self.waits_paused)
        if self.waits_paused:
            try:
                # A restored machine's memory comes page by page as it is touched: what a claim and a first command
                # touch is touched here.
                await self._hosting.rehearse(hosted, image)
                await hosted.machine.pause()
            except BaseException:
                await self._hosting.end(hosted)
                raise
        return hosted

    async def machine(
        self,
        image: Image,
        limits: Limits,
        introduction: Introduction,
        *,
        saved: Saved | None = None,
        saved_secret: str = "",
        upper: Path | None = None,
        network: Network = OPEN_NETWORK,
        background: bool = False,
    ) -> Hosted:
        """Bring up a machine, ready and introduced.

        Args:
            saved: start from this instead of the template.
            upper: use this disk, in place.
            background: see `MachineSpec`.
        """
        if saved is None and self._remembers:
            key = PoolKey.of(image, limits)
            if (found := await asyncio.to_thread(self._find, key)) is not None:
                try:
                    origin = Origin(image.layers, found[0], found[1])
                    hosted = await self._start(origin, limits, introduction, network, background)
                    hosted.machine.answered()
                    return hosted
                except (SavedDamaged, SavedUnfit) as error:
                    log.error("template_memory.not_restored", build_id=image.build_id, error=str(error))
                    if key in self._made:
                        self._rest_until[key] = time.monotonic() + _FAILURE_PAUSE_SECONDS
                    await asyncio.to_thread(shutil.rmtree, self._directory / str(key), ignore_errors=True)
            self._make_soon(key, image, limits)
        origin = Origin(image.layers, saved, saved_secret, upper)
        remembers = saved is not None and saved.memory
        if remembers or not (image.start_command or image.ready_command):
            return await self._start(origin, limits, introduction, network, background)
        hosted = await self._start(origin, limits, identity.unclaimed(image, limits), network, background)
        try:
            await self._hosting.run_template_commands(hosted, image)
            return await self._hosting.introduce(hosted, introduction)
        except BaseException:
            await self._hosting.end(hosted, keep_upper=upper is not None)
            raise

    async def _start(
        self,
        origin: Origin,
        limits: Limits,
        introduction: Introduction,
        network: Network = OPEN_NETWORK,
        background: bool = False,
    ) -> Hosted:
        async with self._turn:
            return await self._hosting.start(
                origin,
                limits,
                hostname="sandbox",
                introduction=introduction,
                network=network,
                background=background,
            )

    # ---- template memory

    def _find(self, key: PoolKey) -> tuple[Saved, str] | None:
        directory = self._directory / str(key)
        facts = self._read(directory)
        return None if facts is None else (facts.within(directory), facts.secret)

    def _read(self, directory: Path) -> SavedFacts | None:
        """What is saved in `directory`; None when that is nothing, or nothing that is good any more."""
        try:
            found = _ADAPTER.validate_json((directory / _META).read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            log.warning("template_memory.unreadable", path=str(directory), error=str(error))
            return None
        return found.saved if found.parts == self._hosting.runtime.parts else None

    def _make_soon(self, key: PoolKey, image: Image, limits: Limits) -> asyncio.Task[None]:
        """Save the template's memory in the background, once; the task never fails."""
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = self._tasks.start(self._make_quietly(key, image, limits), name=f"remember {key}")
            task.add_done_callback(lambda _: self._making.pop(key, None))
        return task

    async def _make_quietly(self, key: PoolKey, image: Image, limits: Limits) -> None:
        if key.build_id in self._forgotten or time.monotonic() < self._rest_until.get(key, 0.0):
            return
        try:
            await self.remember(image, limits)
        except (NodeError, RuntimeFailure, OSError) as error:
            self._rest_until[key] = time.monotonic() + _FAILURE_PAUSE_SECONDS
            log.warning("template_memory.failed", build_id=image.build_id, error=str(error))

    async def remember(self, image: Image, limits: Limits) -> None:
        """Save a ready machine of this image, which later ones are restored from. Does nothing where that cannot be.

        Raises:
            AgentFailure, RuntimeFailure: it could not be started or saved; nothing is left.
        """
        if not self._remembers:
            return
        key = PoolKey.of(image, limits)
        directory = self._directory / str(key)
        if await asyncio.to_thread(self._read, directory) is not None:
            return
        hosted = await self._start(Origin(image.layers), limits, identity.unclaimed(image, limits))
        try:
            await self._hosting.run_template_commands(hosted, image)
            await self._hosting.rehearse(hosted, image)
            await to_thread_whole(_fresh_directory, directory)
            await hosted.freeze_programs()
            await hosted.machine.pause()
            saved = await hosted.machine.save(directory, memory=True, final=True)
            data = _ADAPTER.dump_json(TemplateMemory(SavedFacts.of(saved, hosted.secret), self._hosting.runtime.parts))
            await to_thread_whole(write_file, directory / _META, data, flush=True)
            self._made.add(key)
        except BaseException:
            await finish(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))
            raise
        finally:
            await self._hosting.end(hosted)
        log.info("template_memory.saved", build_id=image.build_id, key=str(key))

    async def forget(self, build_id: str) -> None:
        """Remove what is kept of a build, and stop making it."""
        self._forgotten.add(build_id)
        making = [task for key, task in self._making.items() if key.build_id == build_id]
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)
        for path in await asyncio.to_thread(lambda: list(self._directory.glob(f"{build_id}-*"))):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def sweep(self, builds: Sequence[str]) -> list[str]:
        """Remove what is half-made or made with other parts, and what is of other builds than these; blocks."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = tuple(f"{build_id}-" for build_id in builds)
        removed = [
            path for path in self._directory.iterdir() if self._read(path) is None or not path.name.startswith(wanted)
        ]
        for path in removed:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in removed]

    async def close(self) -> None:
        await self._tasks.close()


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)
