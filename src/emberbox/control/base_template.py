"""The `base` template: built at the first start, and again when what goes into it has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from emberbox.control.build_plan import BuildPlan
from emberbox.control.builds import BASE, Builds
from emberbox.control.default_templates import DefaultTemplates
from emberbox.control.errors import ControlError, NodeFailed
from emberbox.control.names import DEFAULT_TAG
from emberbox.control.plane import Plane
from emberbox.store import teams as team_rows
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

_LOOK_SECONDS = 0.2

StartupStatus = Literal["waiting", "building", "ready", "error"]


@dataclass(frozen=True, slots=True)
class Startup:
    """How far the `base` template is. `fraction` is 0..1 of the build.

    `message` says why there is none, or, when it is ready, why it is still the one of before.
    """

    status: StartupStatus = "waiting"
    stage: str = ""
    fraction: float = 0.0
    message: str = ""


class BaseTemplate:
    def __init__(self, plane: Plane, builds: Builds, defaults: DefaultTemplates) -> None:
        self._plane = plane
        self._builds = builds
        self._defaults = defaults
        self._starting = asyncio.Lock()
        self._startup = Startup()
        self._build_id: str | None = None
        self.usable = False
        """Whether there is one, be it that of before."""

    @property
    def startup(self) -> Startup:
        """How far it is."""
        progress = self._builds.progress(self._build_id) if self._build_id else None
        if self._startup.status == "building" and progress is not None:
            return Startup("building", progress.stage, progress.fraction)
        return self._startup

    async def ensure(self) -> None:
        """See to it that `base` is there and as it should be. Tells in `startup`.

        Waits for a node. Builds it when it is missing, and when it was made of something else than would be taken now;
        if that fails, the one of before stays in use.
        """
        try:
            node = await self._builds.connected_node()
            await self._first_team()
            await self._builds.adopt()
            description = await node.describe()
            current = await self._current(description)
            message = ""
            if current is None:
                await self._build_and_wait({}, "starting")
            self.usable = True
            if current is not None and (changed := self._changed(current, description)):
                message = await self._renew(current, changed)
            self._startup = Startup("ready", fraction=1.0, message=message)
        except ControlError as error:
            log.error("base.failed", reason=error.message)
            shown = self.startup
            self._startup = Startup("error", shown.stage, shown.fraction, error.message)

    async def build(self, *, rates: Mapping[str, int], force: bool = False) -> BuildRecord:
        """Start a build, unless one is under way; returns it. Until it is ready the one of before stays in use.

        Args:
            rates: by the names of `rates.py`.
            force: with the newest packages, also when the host has a result of the same recipe.

        Raises:
            NotFound: there is no team yet.
            Conflict: rates are asked for, and a build with others is under way.
        """
        async with self._starting:
            team = await self._defaults.team()
            if (joined := await self._defaults.under_way(team, BASE, rates)) is not None:
                return joined
            settings = self._plane.settings
            plan = BuildPlan(force=force)
            build = self._builds.new_build(
                cpu_count=settings.default_cpu_count,
                memory_mb=settings.default_memory_mb,
                disk_size_mb=settings.default_disk_size_mb,
                rates=rates,
                request={"recipe": BASE, "tags": [DEFAULT_TAG], "team_id": team.id, "force": force},
            )
            added = await self._defaults.add(team, BASE, replace(build, worker=self._plane.worker))
            self._builds.start_recipe(added, team.id, plan)
            return added

    async def _current(self, node: pb.NodeDescription) -> BuildRecord | None:
        """The build in use, if the node still has its layers."""
        template = await rows.default_template(self._plane.store, BASE)
        if template is None:
            return None
        build = await rows.tagged_build(self._plane.store, template.id, DEFAULT_TAG)
        if build is None or build.status != "ready":
            return None
        return build if set(build.layers) <= set(node.layers) else None

    def _changed(self, build: BuildRecord, node: pb.NodeDescription) -> str:
        """What would be otherwise in a build of now, for people; empty when nothing would."""
        settings = self._plane.settings
        sizes = (settings.default_cpu_count, settings.default_memory_mb, settings.default_disk_size_mb)
        if (build.cpu_count, build.memory_mb, build.disk_size_mb) != sizes:
            return "the sizes that templates have by default"
        if node.base_key and node.base_key != (build.request or {}).get("made_of"):
            return "its recipe, or what it inherits from the host"
        return ""

    async def _renew(self, current: BuildRecord, changed: str) -> str:
        """Build it again; returns why it is still the one of before, for people, or nothing."""
        log.info("base.outdated", build_id=current.id, changed=changed)
        try:
            await self._build_and_wait(current.rates, f"building it again, as {changed} changed")
        except ControlError as error:
            log.error("base.not_renewed", reason=error.message)
            return (
                f"{changed} changed, and the base template could not be built again: {error.message}\n"
                "The one of before stays in use; try again with `emberbox template build base`"
            )
        return ""

    async def _build_and_wait(self, rates: Mapping[str, int], stage: str) -> None:
        """Build it, or go on with a build of an earlier process.

        Args:
            stage: what is told until the node tells more.

        Raises:
            NodeFailed: the build failed.
        """
        build = await self.build(rates=rates)
        self._build_id = build.id
        self._startup = Startup("building", stage)
        while build.status in ("waiting", "building"):
            running = self._builds.running(build.id)
            await (asyncio.wait([running]) if running is not None else asyncio.sleep(_LOOK_SECONDS))
            found = await rows.get_build(self._plane.store, build.id)
            if found is None:
                raise NodeFailed("the build was deleted")
            build = found
        if build.status != "ready":
            raise NodeFailed(str((build.reason or {}).get("message")))

    async def _first_team(self) -> None:
        """Wait for it: `emberbox up` makes it in a process beside this one."""
        while await team_rows.default_team(self._plane.store) is None:
            self._startup = Startup("waiting", "waiting for the first team")
            await asyncio.sleep(_LOOK_SECONDS)
