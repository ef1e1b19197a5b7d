"""Builds: carried out by a node, followed and written down here.

A build belongs to the api process that started it; one that is found half-done after a crash is marked failed, since
nobody follows its stream any more (the node gives it up when the stream breaks). The templates that come with the
installation are built when they are missing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.errors import ControlError, NodeFailed, NotFound
from emberbox.control.names import DEFAULT_TAG
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.tokens import new_template_id
from emberbox.store import teams as team_rows
from emberbox.store import templates as rows
from emberbox.store.records import BuildLogRecord, BuildRecord, TagRecord, TeamRecord, TemplateRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

BASE = "base"
_BUILD_SECONDS = 3600.0
_FLUSH_SECONDS = 0.25
_UNFINISHED = ("waiting", "building")

StartupStatus = Literal["waiting", "building", "ready", "error"]


@dataclass(frozen=True, slots=True)
class Startup:
    """How far the `base` template is. `fraction` is 0..1 of the build."""

    status: StartupStatus = "waiting"
    stage: str = ""
    fraction: float = 0.0
    message: str = ""


class Builds:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._running: dict[str, asyncio.Task[None]] = {}
        self.startup = Startup()

    # ---- the templates that come with the installation

    async def ensure_base(self) -> None:
        """See to it that `base` is there: wait for a node, build it when it is missing. Tells in `startup`."""
        try:
            await self._give_up_unfinished()
            node = await self.connected_node()
            ready = await self._ready_base(node)
            if not ready:
                await self._build_base(node)
            self.startup = Startup("ready", fraction=1.0)
        except ControlError as error:
            log.error("base.failed", reason=error.message)
            self.startup = Startup("error", self.startup.stage, self.startup.fraction, error.message)

    async def _ready_base(self, node: Node) -> bool:
        """Whether `base` has a ready build whose layers the node still has."""
        store = self._plane.store
        for template in await rows.page(store, team_id=None, kind="template", only_default=True):
            names = (await rows.aliases_of(store, [template.id])).get(template.id, [])
            if all(alias != BASE for _, alias in names):
                continue
            found = (await rows.latest_builds(store, [template.id])).get(template.id)
            if found is None or found[0].status != "ready":
                continue
            description = await node.describe()
            return set(found[0].layers) <= set(description.layers)
        return False

    async def _build_base(self, node: Node) -> None:
        store, settings = self._plane.store, self._plane.settings
        team = next((team for team in await team_rows.list_teams(store) if team.is_default), None)
        if team is None:
            raise NotFound("there is no default team yet; run `emberbox up`, or `python -m emberbox.control.bootstrap`")
        build = self.new_build(
            cpu_count=settings.default_cpu_count,
            memory_mb=settings.default_memory_mb,
            disk_size_mb=settings.default_disk_size_mb,
            request={"recipe": BASE},
        )
        existing = await rows.alias_owner(store, team.slug, BASE)
        if existing is None:
            template = self.new_template(team, public=True, is_default=True)
            build = replace(build, template_id=template.id)
            await rows.add(store, template, aliases=[(team.slug, BASE)], build=build)
        else:
            build = replace(build, template_id=existing.id)
            await rows.add_build(store, build)
        self.startup = Startup("building", "starting")
        request = pb.BuildRequest(
            build_id=build.id,
            template_id=build.template_id,
            team_id=team.id,
            recipe=BASE,
            cpu_count=build.cpu_count,
            memory_mb=build.memory_mb,
            disk_size_mb=build.disk_size_mb,
        )
        await self.run(node, build, request, tags=[DEFAULT_TAG], follow_startup=True)
        finished = await rows.get_build(store, build.id)
        if finished is None or finished.status != "ready":
            raise NodeFailed(str((finished.reason or {}).get("message")) if finished else "the build is gone")

    async def connected_node(self) -> Node:
        """The first node that is up."""
        waits = [asyncio.create_task(node.connected.wait()) for node in self._plane.nodes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._plane.nodes.place()

    async def _give_up_unfinished(self) -> None:
        for build in await self.interrupted():
            if build.snapshot_id is not None:
                continue  # `snapshots.py` undoes those.
            log.warning("build.interrupted", build_id=build.id, template_id=build.template_id)
            await self._fail(build.id, {"message": "the build was interrupted by a restart; start it again"})

    async def interrupted(self) -> list[BuildRecord]:
        """Builds and snapshots that were being made by a process that is gone."""
        return [
            build
            for build in await rows.builds_in(self._plane.store, ["building"])
            if build.worker != self._plane.worker
            # With PostgreSQL another api process may be following it.
            and (self._plane.store.is_sqlite or now_ms() - build.updated_at > _BUILD_SECONDS * 1000)
        ]

    # ---- any build

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
        self, *, cpu_count: int, memory_mb: int, disk_size_mb: int, request: Mapping[str, Any]
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

    async def run(
        self,
        node: Node,
        build: BuildRecord,
        request: pb.BuildRequest,
        *,
        tags: list[str],
        follow_startup: bool = False,
    ) -> None:
        """Have a node carry out a waiting build; returns when its row says `ready` or `error`."""
        store = self._plane.store
        started = await rows.change_build(
            store,
            build.id,
            statuses=["waiting"],
            changes={
                "status": "building",
                "worker": self._plane.worker,
                "node_id": node.node_id,
                "updated_at": now_ms(),
            },
        )
        if started is None:
            raise NotFound(f"build {build.id!r} is not waiting to be started")
        journal = _Journal(self._plane, build.id, await rows.count_logs(store, build.id))
        outcome: pb.BuildDone | pb.BuildFailed | None = None
        try:
            async for event in node.build(request, seconds=_BUILD_SECONDS):
                match event.WhichOneof("event"):
                    case "log":
                        await journal.add(event.log.entry, event.log.step)
                    case "progress":
                        if follow_startup:
                            self.startup = Startup("building", event.progress.stage, event.progress.fraction)
                    case "done":
                        outcome = event.done
                    case "failed":
                        outcome = event.failed
            await journal.flush()
        except ControlError as error:
            await journal.flush()
            outcome = pb.BuildFailed(message=error.message)
        except BaseException:
            await asyncio.shield(self._fail(build.id, {"message": "the build was cancelled"}))
            raise
        if isinstance(outcome, pb.BuildDone):
            await self._finish(build, outcome, tags)
            return
        failed = outcome or pb.BuildFailed(message="the node ended the build without a result")
        reason: dict[str, Any] = {"message": failed.message}
        if failed.step:
            reason["step"] = failed.step
        await self._fail(build.id, reason)

    async def _finish(self, build: BuildRecord, done: pb.BuildDone, tags: list[str]) -> None:
        now = now_ms()
        image = done.image
        await rows.change_build(
            self._plane.store,
            build.id,
            statuses=["building"],
            changes={
                "status": "ready",
                "worker": None,
                "layers": list(image.layers),
                "env_vars": dict(image.env_vars),
                "default_user": image.default_user,
                "default_workdir": image.default_workdir,
                "start_command": image.start_command,
                "ready_command": image.ready_command,
                "size_bytes": done.size_bytes,
                "agent_version": done.agent_version,
                "updated_at": now,
                "finished_at": now,
            },
            tags=[TagRecord(str(uuid.uuid4()), build.template_id, tag, build.id, now) for tag in tags],
        )
        log.info("build.ready", build_id=build.id, template_id=build.template_id, size_bytes=done.size_bytes)

    async def _fail(self, build_id: str, reason: dict[str, Any]) -> None:
        now = now_ms()
        await rows.change_build(
            self._plane.store,
            build_id,
            statuses=_UNFINISHED,
            changes={"status": "error", "worker": None, "reason": reason, "updated_at": now, "finished_at": now},
        )
        log.warning("build.failed", build_id=build_id, reason=reason["message"], step=reason.get("step"))

    async def cancel_all(self, team_id: str) -> int:
        """Give up a team's builds that are not finished; returns how many."""
        unfinished = await rows.builds_in(self._plane.store, _UNFINISHED, team_id=team_id)
        for build in unfinished:
            if task := self._running.get(build.id):
                task.cancel()
            await self._fail(build.id, {"message": "the build was cancelled by the administrator"})
        return len(unfinished)


class _Journal:
    """Log entries on their way to the store, in batches: a build may print thousands of lines a second."""

    def __init__(self, plane: Plane, build_id: str, position: int) -> None:
        self._plane = plane
        self._build_id = build_id
        self._position = position
        self._entries: list[BuildLogRecord] = []
        self._flushed_at = time.monotonic()

    async def add(self, entry: pb.LogEntry, step: str) -> None:
        self._entries.append(
            BuildLogRecord(
                build_id=self._build_id,
                position=self._position,
                timestamp_ms=entry.timestamp_unix_ms or now_ms(),
                level=entry.level or "info",
                message=entry.message.replace("\0", ""),
                step=step,
            )
        )
        self._position += 1
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            await self.flush()

    async def flush(self) -> None:
        if self._entries:
            await rows.add_logs(self._plane.store, self._entries)
            self._entries = []
        self._flushed_at = time.monotonic()
