"""The templates that ship with Emberbox besides `base`: built on their first use, or when asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import structlog

from emberbox.control.base_template import BaseTemplate
from emberbox.control.builds import BASE, Builds
from emberbox.control.clock import now_ms
from emberbox.control.default_templates import DefaultTemplates
from emberbox.control.errors import Forbidden, NodeFailed, NodeUnavailable, NotFound
from emberbox.control.names import DEFAULT_TAG, TemplateRef
from emberbox.control.plane import Plane
from emberbox.control.shipped_folder import ShippedTemplate, load_shipped, pack, shipped_folder, shipped_names
from emberbox.control.templates import Templates
from emberbox.control.uploads import Uploads
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord, TeamRecord

log = structlog.get_logger()

_LOOK_SECONDS = 0.2
_FAILED_FOR_MS = 60_000
"""A build on first use that failed is not begun again by the next create right away."""


class Shipped:
    def __init__(self, plane: Plane, templates: Templates, builds: Builds, uploads: Uploads) -> None:
        self._plane = plane
        self._templates = templates
        self._builds = builds
        self._defaults = DefaultTemplates(plane, builds)
        self.base = BaseTemplate(plane, builds, self._defaults)
        self._uploads = uploads
        self._folder = plane.settings.templates_dir or shipped_folder()
        self._starting: dict[str, asyncio.Lock] = {}
        self.names = shipped_names(self._folder)
        """All but `base`."""

    async def use(self, ref: TemplateRef) -> bool:
        """Have what a reference means built when it ships with Emberbox and is missing; waits a while for it.

        Returns whether it is one of them, and is ready now.

        Raises:
            NodeUnavailable: it is being built; says how far it is.
            NodeFailed: its build failed a moment ago.
        """
        team = await self._defaults.team()
        if ref.name not in self.names or ref.tag_or_default != DEFAULT_TAG or ref.namespace not in (None, team.slug):
            return False
        build = await self._defaults.latest(team, ref.name)
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
        if name == BASE:
            return await self.base.build(rates=rates or {}, force=force)
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise NotFound(f"no template {name[:128]!r} ships with this installation; there are: {known}")
        async with self._starting.setdefault(name, asyncio.Lock()):
            team = await self._defaults.team()
            if (joined := await self._defaults.under_way(team, name, rates or {})) is not None:
                return joined
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
            added = await self._defaults.add(team, name, build, description=shipped.description)
            await self._builds.start_own(added, team.id, replace(shipped.plan, force=force), source)
            return added

    async def _source(self, team: TeamRecord, shipped: ShippedTemplate) -> BuildRecord:
        wanted = shipped.plan.from_template
        if wanted == BASE and not self.base.usable:
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
