"""The templates that ship with Emberbox: `base` at the first start, the others on their first use."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import structlog

from emberbox.control.builds import BASE, Builds
from emberbox.control.clock import now_ms
from emberbox.control.errors import Conflict, ControlError, Forbidden, Invalid, NodeFailed, NodeUnavailable, NotFound
from emberbox.control.names import DEFAULT_TAG, TemplateRef
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.shipped_folder import ShippedTemplate, load_shipped, pack, shipped_folder, shipped_names
from emberbox.control.templates import Templates
from emberbox.control.uploads import Uploads
from emberbox.store import teams as team_rows
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord, TeamRecord, TemplateRecord

log = structlog.get_logger()

_LOOK_SECONDS = 0.2
_FAILED_FOR_MS = 60_000
"""A build on first use that failed is not begun again by the next create right away."""

StartupStatus = Literal["waiting", "building", "ready", "error"]


@dataclass(frozen=True, slots=True)
class Startup:
    """How far the `base` template is. `fraction` is 0..1 of the build."""

    status: StartupStatus = "waiting"
    stage: str = ""
    fraction: float = 0.0
    message: str = ""


class Shipped:
    def __init__(self, plane: Plane, templates: Templates, builds: Builds, uploads: Uploads) -> None:
        self._plane = plane
        self._templates = templates
        self._builds = builds
        self._uploads = uploads
        self._folder = plane.settings.templates_dir or shipped_folder()
        self._starting: dict[str, asyncio.Lock] = {}
        self._startup = Startup()
        self._base_build: str | None = None
        self.names = shipped_names(self._folder)
        """All but `base`."""

    @property
    def startup(self) -> Startup:
        """How far `base` is."""
        progress = self._builds.progress(self._base_build) if self._base_build else None
        if self._startup.status == "building" and progress is not None:
            return Startup("building", progress.stage, progress.fraction)
        return self._startup

    # ---- base

    async def ensure_base(self) -> None:
        """See to it that `base` is there: wait for a node, build it when it is missing. Tells in `startup`."""
        try:
            node = await self._builds.connected_node()
            await self._first_team()
            await self._builds.adopt()
            if not await self._ready_base(node):
                await self._build_base()
            self._startup = Startup("ready", fraction=1.0)
        except ControlError as error:
            log.error("base.failed", reason=error.message)
            shown = self.startup
            self._startup = Startup("error", shown.stage, shown.fraction, error.message)

    async def _ready_base(self, node: Node) -> bool:
        """Whether `base` has a ready build whose layers the node still has."""
        template = await rows.default_template(self._plane.store, BASE)
        if template is None:
            return False
        found = (await rows.latest_builds(self._plane.store, [template.id])).get(template.id)
        if found is None or found[0].status != "ready":
            return False
        description = await node.describe()
        return set(found[0].layers) <= set(description.layers)

    async def _build_base(self) -> None:
        settings = self._plane.settings
        team = await self._team()
        going_on = await self._going_on(team)
        if going_on is None:
            build = self._builds.new_build(
                cpu_count=settings.default_cpu_count,
                memory_mb=settings.default_memory_mb,
                disk_size_mb=settings.default_disk_size_mb,
                rates={},
                request={"recipe": BASE, "tags": [DEFAULT_TAG], "team_id": team.id},
            )
            going_on = await self._add(team, BASE, replace(build, worker=self._plane.worker))
            self._base_build = going_on.id
            self._startup = Startup("building", "starting")
            task = self._builds.start_recipe(going_on, team.id)
        else:
            self._base_build = going_on.id
            self._startup = Startup("building", "going on")
            running = self._builds.running(going_on.id)
            assert running is not None, "an unfinished build of this process has a task"
            task = running
        await asyncio.wait([task])
        finished = await rows.get_build(self._plane.store, going_on.id)
        if finished is None or finished.status != "ready":
            raise NodeFailed(str((finished.reason or {}).get("message")) if finished else "the build is gone")

    async def _going_on(self, team: TeamRecord) -> BuildRecord | None:
        """A build of `base` that was adopted from an earlier process."""
        template = await rows.alias_owner(self._plane.store, team.slug, BASE)
        if template is None:
            return None
        builds = await rows.builds_page(self._plane.store, template.id)
        return next((build for build in builds if self._builds.running(build.id) is not None), None)

    # ---- the others

    async def use(self, ref: TemplateRef) -> bool:
        """Have what a reference means built when it ships with Emberbox and is missing; waits a while for it.

        Returns whether it is one of them, and is ready now.

        Raises:
            NodeUnavailable: it is being built; says how far it is.
            NodeFailed: its build failed a moment ago.
        """
        team = await self._team()
        if ref.name not in self.names or ref.tag_or_default != DEFAULT_TAG or ref.namespace not in (None, team.slug):
            return False
        build = await self._latest(team, ref.name)
        if build is None or (build.status == "error" and now_ms() - (build.finished_at or 0) > _FAILED_FOR_MS):
            build = await self.build(ref.name)
        end = asyncio.get_running_loop().time() + self._plane.settings.first_build_wait_seconds
        while build is not None and build.status in ("waiting", "building"):
            if asyncio.get_running_loop().time() >= end:
                raise _still_building(ref.name, build, await self._last_word(build))
            await asyncio.sleep(_LOOK_SECONDS)
            build = await rows.get_build(self._plane.store, build.id)
        if build is None or build.status == "error":
            reason = (build.reason or {}).get("message") if build else "it was deleted"
            raise NodeFailed(
                f"template {ref.name!r} could not be built: {reason}; see `emberbox template build {ref.name}`"
            )
        return True

    def check_owner(self, team: TeamRecord) -> None:
        """
        Raises:
            Forbidden: the shipped templates are not this team's.
        """
        if not team.is_default:
            raise Forbidden("the templates that ship with Emberbox are built by its first team")

    async def build(self, name: str, *, rates: Mapping[str, int] | None = None, force: bool = False) -> BuildRecord:
        """Start a build of a shipped template, unless one is under way; returns it.

        Args:
            rates: by the names of `rates.py`.

        Raises:
            NotFound: no such template ships with Emberbox.
            Conflict: rates are asked for, and a build with others is under way.
            Invalid: its folder cannot be built.
            NodeUnavailable: `base` is not there yet.
        """
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise NotFound(f"no template {name[:128]!r} ships with this installation; there are: {known}")
        async with self._starting.setdefault(name, asyncio.Lock()):
            team = await self._team()
            latest = await self._latest(team, name)
            if latest is not None and latest.status in ("waiting", "building") and latest.worker is not None:
                if rates and dict(rates) != dict(latest.rates):
                    raise Conflict(
                        f"a build of template {name!r} with other rates is under way; "
                        "ask again when it has ended, or without rates to follow it"
                    )
                return latest
            shipped = await asyncio.to_thread(load_shipped, self._folder, name)
            source = await self._source(team, shipped)
            await self._upload(team, shipped)
            settings = self._plane.settings
            build = self._builds.new_build(
                cpu_count=shipped.cpu_count or settings.default_cpu_count,
                memory_mb=shipped.memory_mb or settings.default_memory_mb,
                disk_size_mb=shipped.disk_size_mb or settings.default_disk_size_mb,
                rates=rates or {},
                request={"tags": [DEFAULT_TAG], "team_id": team.id},
            )
            added = await self._add(team, name, build, description=shipped.description)
            await self._builds.start_own(added, team.id, replace(shipped.plan, force=force), source)
            return added

    async def _source(self, team: TeamRecord, shipped: ShippedTemplate) -> BuildRecord:
        wanted = shipped.plan.from_template
        if wanted == BASE and self._startup.status != "ready":
            raise NodeUnavailable(f"template {shipped.name!r} is built on 'base', which is not there yet; try again")
        if wanted == BASE or wanted in self.names:
            return (await self._templates.resolve_default(wanted)).build
        return (await self._templates.resolve(team, wanted)).build

    async def _upload(self, team: TeamRecord, shipped: ShippedTemplate) -> None:
        """Put the archives of its COPY steps where uploads lie."""
        present = await self._uploads.present(team.id, shipped.plan.files)
        for step in shipped.plan.steps:
            if step.type != "COPY" or step.files_hash in present:
                continue
            await self._uploads.pack(team.id, step.files_hash, partial(pack, shipped.folder, step.args[0]))

    # ---- both

    async def _first_team(self) -> None:
        """Wait for it: `emberbox up` makes it in a process beside this one."""
        while await team_rows.default_team(self._plane.store) is None:
            self._startup = Startup("waiting", "waiting for the first team")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _team(self) -> TeamRecord:
        """
        Raises:
            NotFound: there is no team yet.
        """
        team = await team_rows.default_team(self._plane.store)
        if team is None:
            raise NotFound("there is no default team yet; run `emberbox up`, or `python -m emberbox.control.bootstrap`")
        return team

    async def _latest(self, team: TeamRecord, name: str) -> BuildRecord | None:
        """The newest build that was started."""
        template = await rows.default_template(self._plane.store, name)
        if template is None or template.team_id != team.id:
            return None
        builds = await rows.builds_page(self._plane.store, template.id)
        return next((build for build in builds if build.worker is not None or build.status != "waiting"), None)

    async def _add(self, team: TeamRecord, name: str, build: BuildRecord, *, description: str = "") -> BuildRecord:
        """Add a build to a default template, which is made when it is missing."""
        store = self._plane.store
        existing: TemplateRecord | None = await rows.alias_owner(store, team.slug, name)
        if existing is None:
            template = self._builds.new_template(team, public=True, is_default=True)
            template = replace(template, description=description or None)
            build = replace(build, template_id=template.id)
            await rows.add(store, template, aliases=[(team.slug, name)], build=build)
            return build
        if not existing.is_default:
            raise Invalid(
                f"the team {team.slug!r} has a template {name!r} of its own; delete it, or name that one in another way"
            )
        build = replace(build, template_id=existing.id)
        await rows.add_build(store, build)
        return build

    async def _last_word(self, build: BuildRecord) -> str:
        """What the build's log says last, at which step."""
        entries = await rows.last_logs(self._plane.store, build.id, step=None, limit=1)
        return f"step {entries[0].step}: {entries[0].message}" if entries else ""


def _still_building(name: str, build: BuildRecord, last_word: str) -> NodeUnavailable:
    steps = len((build.request or {}).get("steps", ()))
    seconds = (now_ms() - build.created_at) // 1000
    how_far = "waits for other builds" if build.status == "waiting" else f"has run for {seconds} s of {steps} steps"
    error = NodeUnavailable(
        f"template {name!r} is being built for its first use; the build {how_far}"
        + (f" ({last_word[:200]})" if last_word else "")
        + f"; try again in a moment, or watch it with `emberbox template build {name}`"
    )
    # Clients would ask again three times at once, and each waits as long.
    error.should_retry = False
    return error
