"""Builds: producing the layers of a template, and removing those that nobody needs any more.

Shipped recipes are made by `images`. Builds from an OCI image or from another build, and build steps, have their place
in `_build`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from emberbox.images.base import build_base
from emberbox.images.errors import ImageError
from emberbox.images.layers import LayerStore
from emberbox.node.errors import BadValue, NodeError, NoSuchBuild, Unsupported
from emberbox.node.model import Image
from emberbox.node.preparing import Preparing
from emberbox.node.records import write_file
from emberbox.runtime.base import Limits
from emberbox.runtime.errors import RuntimeFailure
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.node")


@dataclass(frozen=True, slots=True)
class NewBuild:
    """What `Build` asks for: one of `recipe`, `from_image` and `from_build` is set."""

    build_id: str
    template_id: str
    recipe: str
    from_image: str
    from_build: Image | None
    steps: int
    start_command: str
    ready_command: str
    limits: Limits
    force: bool


@dataclass(frozen=True, slots=True)
class Progress:
    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Done:
    image: Image
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    message: str
    step: str


BuildEvent = Progress | Done | Failed


@dataclass(frozen=True, slots=True)
class _Made:
    layers: tuple[str, ...]
    size_bytes: int
    env_vars: dict[str, str] = field(default_factory=dict)
    default_user: str = ""
    default_workdir: str = ""


class Builds:
    """Builds under way, and the layers that wait to be removed."""

    def __init__(
        self,
        settings: Settings,
        layers_dir: Path,
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
        self._settings = settings
        self._layers_dir = layers_dir
        self._store = LayerStore(layers_dir)
        self._preparing = preparing
        self._layers_used = layers_used
        self._ready = ready
        self._removed = removed
        self._unwanted_path = layers_dir / "unwanted.json"
        self._running: set[str] = set()

    async def run(self, new: NewBuild) -> AsyncIterator[BuildEvent]:
        """Produce a build; the last event is `Done` or `Failed`. Closing the iterator cancels the build."""
        if new.build_id in self._running:
            raise BadValue(f"build '{new.build_id}' is already running")
        self._running.add(new.build_id)
        events: asyncio.Queue[BuildEvent] = asyncio.Queue()
        work = asyncio.create_task(self._work(new, events), name=f"build {new.build_id}")
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, (Done, Failed)):
                    return
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._running.discard(new.build_id)

    async def _work(self, new: NewBuild, events: asyncio.Queue[BuildEvent]) -> None:
        step = "base"
        try:
            made = await self._build(new, lambda stage, fraction: events.put_nowait(Progress(stage, fraction)))
            step = "finalize"
            image = Image(
                build_id=new.build_id,
                layers=made.layers,
                env_vars=made.env_vars,
                default_user=made.default_user,
                default_workdir=made.default_workdir,
                start_command=new.start_command,
                ready_command=new.ready_command,
            )
            await self._preparing.remember(image, new.limits)
            await self._want(made.layers)
        except (ImageError, NodeError, RuntimeFailure) as error:
            log.warning("build.failed", build_id=new.build_id, step=step, error=str(error))
            events.put_nowait(Failed(str(error), step))
        except OSError as error:
            log.error("build.failed", build_id=new.build_id, step=step, exc_info=error)
            events.put_nowait(Failed(f"the node could not write or read a file: {error.strerror or error}", step))
        except Exception as error:
            log.error("build.failed", build_id=new.build_id, step=step, exc_info=error)
            events.put_nowait(Failed("the node failed; its log says why", step))
        else:
            log.info("build.done", build_id=new.build_id, layers=len(made.layers), size_bytes=made.size_bytes)
            events.put_nowait(Done(image, made.size_bytes))
            self._ready(image, new.limits)

    async def _build(self, new: NewBuild, progress: Callable[[str, float], None]) -> _Made:
        if new.steps or new.from_image or new.from_build is not None:
            raise Unsupported("this node builds the shipped recipes only; images and build steps are not supported yet")
        if not new.recipe:
            raise BadValue("a build needs a recipe, an image or another build to start from")
        built = await build_base(self._layers_dir, self._settings, progress, name=new.recipe, fresh=new.force)
        return _Made(built.layers, built.size_bytes, built.env, built.default_user, built.default_workdir)

    # ---- layers

    async def digests(self) -> list[str]:
        """Layers that are here."""
        return await asyncio.to_thread(self._store.digests)

    async def delete(self, build_id: str, layers: list[str]) -> None:
        """Forget a build. Layers that a sandbox or snapshot still stands on go when it does.

        Raises:
            NoSuchBuild: nothing of it is here.
        """
        here = set(await self.digests())
        found = [digest for digest in layers if digest in here]
        if layers and not found:
            raise NoSuchBuild(f"build '{build_id}' is not on this node")
        await self._preparing.forget(build_id)
        await asyncio.to_thread(self._mark_unwanted, found)
        await self.tend()

    async def tend(self) -> None:
        """Remove unwanted layers that nothing stands on any more."""
        unwanted = await asyncio.to_thread(self._unwanted)
        if not unwanted:
            return
        used = {digest async for digest in self._layers_used()}
        gone = unwanted - used
        for digest in gone:
            await asyncio.to_thread(self._store.remove, digest)
            log.info("layer.removed", digest=digest)
        if gone:
            await self._removed()
            await asyncio.to_thread(self._write_unwanted, unwanted - gone)

    async def _want(self, layers: tuple[str, ...]) -> None:
        """A new build may give a layer that an older one had and that waits to be removed."""
        await asyncio.to_thread(lambda: self._write_unwanted(self._unwanted() - set(layers)))

    def _mark_unwanted(self, digests: list[str]) -> None:
        self._write_unwanted(self._unwanted() | set(digests))

    def _unwanted(self) -> set[str]:
        try:
            return set(json.loads(self._unwanted_path.read_bytes()))
        except FileNotFoundError:
            return set()

    def _write_unwanted(self, digests: set[str]) -> None:
        if digests or self._unwanted_path.exists():
            write_file(self._unwanted_path, json.dumps(sorted(digests)).encode(), flush=False)
