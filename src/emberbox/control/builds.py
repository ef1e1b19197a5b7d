"""Builds: registered, started, carried out by a node, cancelled.

A build goes `waiting` (registered, then queued), `building`, and ends as `ready` or `error`. Its node carries it out
and keeps its journal; whoever follows may go away and come back, so builds outlive the api process that started them.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from emberbox.control.build_plan import BuildPlan, check_plan, own_template
from emberbox.control.build_queue import BuildQueue
from emberbox.control.build_work import UNFINISHED, BuildWork, Progress
from emberbox.control.clock import now_ms
from emberbox.control.errors import Conflict, ControlError, Forbidden, Invalid, NotFound
from emberbox.control.names import DEFAULT_TAG, check_tag, parse_ref
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.templates import Templates
from emberbox.control.tokens import new_template_id
from emberbox.control.uploads import Uploads
from emberbox.store import templates as rows
from emberbox.store.errors import DuplicateName
from emberbox.store.records import BuildRecord, TeamRecord, TemplateRecord

log = structlog.get_logger()

BASE = "base"
RESERVED_WORDS = "comes with the installation; choose another name"

_STALE_MS = 90_000
"""A build that nobody has touched for so long is nobody's any more, where several processes share a database."""
_NEVER_STARTED_MS = 24 * 3600 * 1000
_CANCEL_PAUSES = (0.0, 0.5)
_TAGS = 100


@dataclass(frozen=True, slots=True)
class NewTemplate:
    """What a user registers. `name` is `[namespace/]alias[:tag]`; None: as the installation has it."""

    name: str
    tags: tuple[str, ...] = ()
    cpu_count: int | None = None
    memory_mb: int | None = None
    min_free_disk_mb: int | None = None
    rates: Mapping[str, int] = field(default_factory=dict)
    """By the names of `rates.py`."""


@dataclass(frozen=True, slots=True)
class Registered:
    template: TemplateRecord
    build: BuildRecord
    names: list[tuple[str, str]]
    tags: list[str]


class Builds:
    def __init__(self, plane: Plane, templates: Templates, uploads: Uploads) -> None:
        self._plane = plane
        self._templates = templates
        self._uploads = uploads
        settings = plane.settings
        self._queue = BuildQueue(
            at_once=settings.builds_at_once,
            per_team=settings.builds_per_team,
            waiting_per_team=settings.builds_waiting_per_team,
        )
        self._work = BuildWork(plane, uploads)
        self.reserved: frozenset[str] = frozenset({BASE})
        """Names that the team of the shipped templates cannot give to its own."""

    # ---- what a user asks for

    async def register(self, team: TeamRecord, wanted: NewTemplate) -> Registered:
        """A new build of a template, which is made when the team has none of the name.

        Raises:
            Invalid: the name, a tag or a size cannot be used.
            Forbidden: the name is in another team's namespace, or comes with the installation.
            Conflict: the name is a snapshot's.
        """
        ref = parse_ref(wanted.name)
        tags = _tags(ref.tag, wanted.tags)
        build = self._sized(wanted, tags, team)
        if ref.namespace not in (None, team.slug):
            raise Forbidden(f"names in {ref.namespace!r} are another team's; yours are in {team.slug!r}")
        for _ in range(2):
            existing = await self._own(team, ref.name)
            if existing is not None:
                build = replace(build, template_id=existing.id)
                await rows.add_build(self._plane.store, build)
                return await self._registered(existing, build, tags)
            template = self.new_template(team, public=False)
            build = replace(build, template_id=template.id)
            # Somebody registers the same name at the same time: then it exists in the second round.
            with contextlib.suppress(DuplicateName):
                await rows.add(self._plane.store, template, aliases=[(team.slug, ref.name)], build=build)
                log.info("template.registered", template_id=template.id, team_id=team.id, name=ref.name)
                return await self._registered(template, build, tags)
        raise Conflict(f"the name {ref.name!r} is being registered by another request; try again")

    async def start(self, team: TeamRecord, template: str, build_id: str, plan: BuildPlan) -> None:
        """Queue a registered build.

        Raises:
            Invalid: the plan cannot be built, its files are not uploaded, or its template has no ready build.
            NotFound: no such template or build.
            Forbidden: the template is another team's.
            Conflict: the build was started before.
            TooMany: too many builds of the team wait.
        """
        found = await self._templates.find_own(team, template)
        build = await self._templates.build_of(found, build_id)
        if build.status != "waiting" or build.worker is not None:
            raise Conflict(f"build {build_id!r} was started before; register another one")
        check_plan(plan)
        source = await self._source(team, plan)
        missing = plan.files - await self._uploads.present(team.id, plan.files)
        for number, step in enumerate(plan.steps, start=1):
            if step.files_hash in missing:
                raise Invalid(f"step {number} (COPY): the files with hash {step.files_hash} were not uploaded")
        await self._enqueue(build, team.id, plan, source)

    async def cancel(self, build: BuildRecord, message: str) -> bool:
        """Give up a build that is not finished. Returns whether it was one."""
        if not await self._work.fail(build.id, {"message": message}):
            return False
        await self._queue.remove(build.id)
        # It may have been sent to a node since it was looked up.
        now = await rows.get_build(self._plane.store, build.id)
        if now is not None and now.node_id:
            await self._cancel_on(now.node_id, build.id)
        return True

    async def cancel_all(self, team_id: str) -> int:
        """Give up a team's builds that are not finished; returns how many."""
        unfinished = await rows.builds_in(self._plane.store, UNFINISHED, team_id=team_id)
        return await self._cancel_each(unfinished, "the build was cancelled by the administrator")

    async def cancel_of(self, template_id: str) -> None:
        """Give up the builds of a template that is about to be deleted."""
        unfinished = await rows.builds_in(self._plane.store, UNFINISHED)
        await self._cancel_each(
            [build for build in unfinished if build.template_id == template_id], "the template was deleted"
        )

    @property
    def load(self) -> tuple[int, int]:
        """How many builds wait here, and how many are followed."""
        return self._queue.load

    # ---- for the templates that come with the installation

    async def start_own(self, build: BuildRecord, team_id: str, plan: BuildPlan, source: BuildRecord | None) -> None:
        """Queue a build that was prepared here."""
        await self._enqueue(build, team_id, plan, source)

    def start_recipe(self, build: BuildRecord, team_id: str, plan: BuildPlan) -> None:
        """Build a recipe of the node's, before everything else."""
        self._queue.add(build.id, team_id, lambda: self._work.carry_out(build.id, team_id, plan), now=True)

    def running(self, build_id: str) -> asyncio.Task[None] | None:
        """The task of a build that this process follows."""
        return self._queue.running(build_id)

    def progress(self, build_id: str) -> Progress | None:
        """How far a build is that this process follows."""
        return self._work.progress(build_id)

    def new_template(self, team: TeamRecord, *, public: bool, is_default: bool = False) -> TemplateRecord:
        now = now_ms()
        return TemplateRecord(
            id=new_template_id(),
            team_id=team.id,
            kind="template",
            public=public,
            is_default=is_default,
            description=None,
            created_at=now,
            updated_at=now,
            last_spawned_at=None,
            spawn_count=0,
        )

    def new_build(
        self,
        *,
        cpu_count: int,
        memory_mb: int,
        disk_size_mb: int,
        rates: Mapping[str, int],
        request: Mapping[str, Any],
    ) -> BuildRecord:
        """A build that waits to be started. The caller sets `template_id`."""
        now = now_ms()
        return BuildRecord(
            id=str(uuid.uuid4()),
            template_id="",
            status="waiting",
            cpu_count=cpu_count,
            memory_mb=memory_mb,
            disk_size_mb=disk_size_mb,
            rates=dict(rates),
            layers=[],
            env_vars={},
            default_user="",
            default_workdir="",
            start_command="",
            ready_command="",
            snapshot_id=None,
            memory_kept=None,
            node_id=None,
            source_sandbox_id=None,
            size_bytes=None,
            agent_version="",
            request=dict(request),
            reason=None,
            worker=None,
            created_at=now,
            updated_at=now,
            finished_at=None,
        )

    async def connected_node(self) -> Node:
        """The first node that is up."""
        waits = [asyncio.create_task(node.connected.wait()) for node in self._plane.nodes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._plane.nodes.place()

    # ---- over restarts

    async def adopt(self) -> None:
        """Go on with the builds of a process that is gone: queue those that wait, follow those that are built."""
        store = self._plane.store
        for build in await rows.builds_in(store, UNFINISHED):
            if build.snapshot_id is not None or build.worker in (None, self._plane.worker):
                continue  # `snapshots.py` undoes those; registered only; our own.
            if not store.is_sqlite and now_ms() - build.updated_at < _STALE_MS:
                continue
            request = build.request or {}
            mine = {"worker": self._plane.worker, "updated_at": now_ms()}
            claimed = await rows.claim_build(store, build.id, mine, status=build.status, worker=build.worker)
            if claimed is None:
                continue
            log.info("build.adopted", build_id=build.id, template_id=build.template_id, status=build.status)
            if build.status == "waiting" and request.get("registry"):
                reason = (
                    "the server restarted while the build waited, and registry credentials are not kept; start it again"
                )
                await self._work.fail(build.id, {"message": reason})
                continue
            now = build.status != "waiting" or "recipe" in request
            self._add(claimed, request.get("team_id", ""), BuildPlan.from_stored(request), now=now)

    async def interrupted(self) -> list[BuildRecord]:
        """Snapshots that were being made by a process that is gone."""
        limit_ms = self._plane.settings.build_seconds * 1000
        return [
            build
            for build in await rows.builds_in(self._plane.store, ["building"])
            if build.snapshot_id is not None
            and build.worker != self._plane.worker
            # With PostgreSQL another api process may be at it.
            and (self._plane.store.is_sqlite or now_ms() - build.updated_at > limit_ms)
        ]

    async def tend(self) -> None:
        """Say that queued builds are looked after; give up what was registered long ago and never started."""
        store, now = self._plane.store, now_ms()
        if mine := self._queue.build_ids():
            await rows.touch_builds(store, mine, now)
        for build in await rows.builds_in(store, ["waiting"]):
            if build.worker is None and now - build.created_at > _NEVER_STARTED_MS:
                await self._work.fail(build.id, {"message": "the build was registered and never started"})
        if not store.is_sqlite:
            await self.adopt()
        await self._templates.remove_superseded()
        unfinished = await rows.builds_in(store, UNFINISHED)
        in_use = [
            ((build.request or {}).get("team_id", ""), files_hash)
            for build in unfinished
            if build.snapshot_id is None
            for files_hash in BuildPlan.from_stored(build.request or {}).files
        ]
        await self._uploads.tend(in_use)

    async def close(self) -> None:
        """Follow no build any more. They go on, and `adopt` finds them."""
        await self._queue.close()

    # ---- inside

    async def _cancel_each(self, builds: list[BuildRecord], message: str) -> int:
        # Those that wait first, or they would begin in the places of those that end.
        in_order = sorted(builds, key=lambda build: build.status != "waiting")
        return sum([await self.cancel(build, message) for build in in_order if build.snapshot_id is None])

    async def _cancel_on(self, node_id: str, build_id: str) -> None:
        for pause in _CANCEL_PAUSES:
            await asyncio.sleep(pause)
            try:
                await self._plane.nodes.get(node_id).cancel_build(build_id)
                return
            except NotFound:
                continue  # The call that starts it may still be on its way.
            except ControlError as error:
                log.warning("build.left_on_node", build_id=build_id, node_id=node_id, reason=error.message)
                return

    def _sized(self, wanted: NewTemplate, tags: list[str], team: TeamRecord) -> BuildRecord:
        settings = self._plane.settings
        cpu_count = wanted.cpu_count or settings.default_cpu_count
        memory_mb = wanted.memory_mb or settings.default_memory_mb
        disk_size_mb = max(settings.default_disk_size_mb, wanted.min_free_disk_mb or 0)
        for name, value, limit, setting in (
            ("cpuCount", cpu_count, settings.max_cpu_count, "EMBERBOX_MAX_CPU_COUNT"),
            ("memoryMB", memory_mb, settings.max_memory_mb, "EMBERBOX_MAX_MEMORY_MB"),
            ("minFreeDiskMb", disk_size_mb, settings.max_disk_size_mb, "EMBERBOX_MAX_DISK_SIZE_MB"),
        ):
            if value > limit:
                raise Invalid(f"{name} {value} is more than the {limit} that a template may have ({setting})")
        return self.new_build(
            cpu_count=cpu_count,
            memory_mb=memory_mb,
            disk_size_mb=disk_size_mb,
            rates=wanted.rates,
            request={"tags": tags, "team_id": team.id},
        )

    async def _own(self, team: TeamRecord, name: str) -> TemplateRecord | None:
        """The team's template that a new build of `name` belongs to."""
        store = self._plane.store
        existing = await rows.alias_owner(store, team.slug, name)
        if existing is None and (by_id := await rows.get(store, name)) is not None and by_id.team_id == team.id:
            existing = by_id
        # A template that the team had before one of its name was shipped stays its own.
        reserved = existing.is_default if existing is not None else team.is_default and name in self.reserved
        if reserved:
            raise Forbidden(f"the template {name!r} {RESERVED_WORDS}")
        if existing is not None and existing.kind != "template":
            raise Conflict(f"{name!r} is the name of a snapshot; choose another one, or delete it first")
        return existing

    async def _registered(self, template: TemplateRecord, build: BuildRecord, tags: list[str]) -> Registered:
        return Registered(template, build, await self._templates.names(template.id), tags)

    async def _source(self, team: TeamRecord, plan: BuildPlan) -> BuildRecord | None:
        """The ready build that a plan starts from; None for an image."""
        if plan.from_template:
            source = (await self._templates.resolve(team, plan.from_template)).build
        elif plan.credentials is None and (own := own_template(plan.from_image)) in self.reserved:
            assert own is not None
            source = (await self._templates.resolve_default(own)).build
        else:
            return None
        if source.snapshot_id is not None:
            raise Invalid(f"{plan.from_template!r} is a snapshot; a build starts from a template or an image")
        return source

    async def _enqueue(self, build: BuildRecord, team_id: str, plan: BuildPlan, source: BuildRecord | None) -> None:
        self._queue.check_room(team_id)
        changes: dict[str, Any] = {
            "worker": self._plane.worker,
            "updated_at": now_ms(),
            "request": {**(build.request or {}), **plan.stored(), "source_build": source.id if source else ""},
            # The layers that it stands on are in use from now on, whatever happens to their template.
            "layers": source.layers if source else [],
        }
        queued = await rows.claim_build(self._plane.store, build.id, changes, status="waiting", worker=None)
        if queued is None:
            raise Conflict(f"build {build.id!r} was started before; register another one")
        log.info("build.queued", build_id=build.id, template_id=build.template_id, steps=len(plan.steps))
        self._add(queued, team_id, plan)

    def _add(self, build: BuildRecord, team_id: str, plan: BuildPlan, *, now: bool = False) -> None:
        self._queue.add(build.id, team_id, lambda: self._work.carry_out(build.id, team_id, plan), now=now)


def _tags(tag: str | None, further: tuple[str, ...]) -> list[str]:
    """The tags of a build: the name's, the further ones; `default` when there is none."""
    tags = list(dict.fromkeys(check_tag(one) for one in ([tag] if tag else []) + list(further)))
    if len(tags) > _TAGS:
        raise Invalid(f"a build has at most {_TAGS} tags, this one has {len(tags)}")
    return tags or [DEFAULT_TAG]
