"""One build from its source to its layers.

The steps form a chain of links, each with the key of what it leaves. The build takes up the chain behind the last
link whose result is in the cache, does the rest in one machine, and keeps what each link left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from emberbox.images.layers import LayerStore
from emberbox.node.building.cache import MadeLayer, StepCache
from emberbox.node.building.commands import try_commands
from emberbox.node.building.journal import Journal
from emberbox.node.building.machine import BuildMachine, build_machine
from emberbox.node.building.model import BASE_STEP, FINAL_STEP, NewBuild, StepFailed
from emberbox.node.building.pack import pack, pack_all, written_by_guests
from emberbox.node.building.plan import BuildState, Work, base_key, chain, final_key
from emberbox.node.building.provision import fingerprint, provision
from emberbox.node.building.sources import Base, Sources
from emberbox.node.building.steps import do
from emberbox.node.hosting import Hosting
from emberbox.node.model import Image
from emberbox.runtime.base import Rates
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.node")

_MOST_LAYERS = 10
"""In a template: a microVM has about a dozen places for disks, and a longer stack makes every file look-up slower."""


@dataclass(frozen=True, slots=True)
class Link:
    """A part of the chain that happens in the machine."""

    key: str
    name: str
    """Of the step: "base", "1", ..."""
    label: str
    forced: bool
    do: Callable[[BuildMachine], Awaitable[bool]]
    """Returns whether files may have changed."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a build gave."""

    image: Image
    size_bytes: int


class Builder:
    """Carries out builds; several at once."""

    def __init__(
        self,
        settings: Settings,
        hosting: Hosting,
        store: LayerStore,
        sources: Sources,
        cache: StepCache,
        work_dir: Path,
    ) -> None:
        self._settings = settings
        self._hosting = hosting
        self._store = store
        self._sources = sources
        self._cache = cache
        self._work_dir = work_dir
        self._rates = Rates(
            settings.max_disk_mb_per_second,
            settings.max_disk_operations_per_second,
            settings.max_network_mbit_per_second,
        )
        """Of the machines in which steps run: the installation's ceilings alone."""

    async def build(self, new: NewBuild, journal: Journal, keep: Callable[[str], None]) -> Made:
        """
        Args:
            keep: told of every layer as soon as the build stands on it.

        Raises:
            StepFailed, NodeError, RuntimeFailure, ImageError, OSError: the build failed at `journal.step`.
        """
        journal.step = BASE_STEP
        base = await self._sources.base(new, journal, keep)
        links, works = await self._links(new, base, journal)
        state = works[-1].after if works else base.state
        made = MadeLayer("", 0)
        if links:
            with self._cache.held(*(link.key for link in links)):
                made = await self._chain(new, base, links, state, journal, keep)
        journal.step = FINAL_STEP
        layers = base.layers
        if made.digest:
            layers = (made.digest,) if made.whole else (*layers, made.digest)
        inherit = not new.start_command and not new.ready_command
        image = Image(
            build_id=new.build_id,
            layers=layers,
            env_vars=dict(state.env),
            default_user=state.user,
            default_workdir=state.workdir,
            start_command=base.start_command if inherit else new.start_command,
            ready_command=base.ready_command if inherit else new.ready_command,
        )
        # Where memory can be saved the commands are tried when that is done.
        if (image.start_command or image.ready_command) and not self._hosting.runtime.capabilities.memory_snapshots:
            limits = replace(new.limits, rates=self._rates)
            await try_commands(self._hosting, image, limits, journal, self._settings.ready_seconds)
        return Made(image, made.size_bytes if made.whole else base.size_bytes + made.size_bytes)

    # ---- the chain

    async def _links(self, new: NewBuild, base: Base, journal: Journal) -> tuple[list[Link], list[Work]]:
        """The parts that happen in the machine, and the steps whose last one has the state at the end."""
        links: list[Link] = []
        more = ""
        disk = new.limits.disk_size_mb
        if base.raw:
            host = await self._sources.host_network()
            more = base_key(base.layers, disk, more=fingerprint(host, base.path))

            async def make_template(machine: BuildMachine) -> bool:
                await provision(machine, host, base.path, self._work_dir, journal)
                return True

            links.append(Link(more, BASE_STEP, "Preparing the image", new.force, make_template))
        start = base_key(base.layers, disk, team_id=new.team_id, more=more)
        works = chain(new.steps, start, base.state, force=new.force)
        links += [self._link(work, len(works), new, journal) for work in works if work.in_machine]
        return links, works

    def _link(self, work: Work, count: int, new: NewBuild, journal: Journal) -> Link:
        async def do_step(machine: BuildMachine) -> bool:
            return await do(work, machine, new.files_dir, float(self._settings.build_seconds), journal)

        return Link(work.key, work.step.name, f"[{work.step.name}/{count}] {work.step}", work.forced, do_step)

    async def _chain(
        self,
        new: NewBuild,
        base: Base,
        links: Sequence[Link],
        state: BuildState,
        journal: Journal,
        keep: Callable[[str], None],
    ) -> MadeLayer:
        """Do what the cache does not have, and return the layer that it comes to."""
        done = await asyncio.to_thread(self._cached, links)
        for link in links[:done]:
            journal.step = link.name
            journal.log(f"CACHED {link.label}")
        await self._cache.touch(*(link.key for link in links[:done]))
        packed = final_key(links[-1].key, state)
        if done == len(links):
            known = await self._cache.made(packed)
            if known is not None and not known.digest:
                return known
            if known is not None and self._store.path(known.digest) is not None:
                keep(known.digest)
                return known
        else:
            await self._do(new, base, links, done, journal)
        made = await self._pack(base, links[-1].key, journal)
        if made.digest:
            keep(made.digest)
        with contextlib.suppress(OSError):  # costs the next build time, nothing else
            await self._cache.keep_made(packed, made)
        return made

    def _cached(self, links: Sequence[Link]) -> int:
        """How many links need not be done: a key stands for the whole chain before it."""
        free = next((number for number, link in enumerate(links) if link.forced), len(links))
        return next((number for number in range(free, 0, -1) if self._cache.has(links[number - 1].key)), 0)

    async def _do(self, new: NewBuild, base: Base, links: Sequence[Link], done: int, journal: Journal) -> None:
        before = links[done - 1].key if done else ""
        upper = self._cache.upper(before) if before else None
        image = Image(new.build_id, base.layers, dict(base.state.env), default_user="root", default_workdir="/")
        journal.step = links[done].name
        limits = replace(new.limits, rates=self._rates)
        async with build_machine(self._hosting, image, limits, upper) as machine:
            for number, link in enumerate(links[done:], start=done):
                journal.step = link.name
                journal.log(link.label)
                journal.progress(link.label[:200], 0.3 + 0.6 * number / len(links))
                if await link.do(machine):
                    async with self._cache.new(link.key, link.label, replace=link.forced) as folder:
                        await machine.save(folder)
                else:
                    await self._cache.share(before, link.key, link.label, replace=link.forced)
                before = link.key

    async def _pack(self, base: Base, key: str, journal: Journal) -> MadeLayer:
        journal.step = FINAL_STEP
        upper = self._cache.upper(key)
        if upper is None:
            return MadeLayer("", 0)
        journal.log("Packing the layer")
        journal.progress("Packing the layer", 0.92)
        if len(base.layers) < _MOST_LAYERS:
            layer = await pack(self._hosting.runtime, self._store, upper, self._work_dir)
            return MadeLayer(layer.digest, layer.size_bytes)
        if written_by_guests(self._hosting.runtime):
            raise StepFailed(
                f"the template that this one is built from stands on {len(base.layers)} layers, and "
                f"{_MOST_LAYERS} are the most; build it from an earlier one"
            )
        stack = [self._hosting.disks.layer(digest) for digest in base.layers]
        layer = await pack_all(self._store, stack, upper, self._work_dir)
        return MadeLayer(layer.digest, layer.size_bytes, whole=True)
