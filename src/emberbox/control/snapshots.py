"""Saving sandboxes: snapshots, which start sandboxes like a template does, and forks, which start copies at once."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, replace

import structlog

from emberbox.control.builds import Builds
from emberbox.control.clock import now_ms
from emberbox.control.errors import Conflict, ControlError, Invalid, NodeUnavailable, NotFound
from emberbox.control.limits import check_timeout, key_limit, sandbox_limit
from emberbox.control.names import DEFAULT_TAG, parse_ref
from emberbox.control.nodes import Node, fork_failure
from emberbox.control.plane import Plane
from emberbox.control.rates import kept_rates
from emberbox.control.sandboxes import Sandboxes, sandbox_not_found
from emberbox.control.scopes import KeyLimit
from emberbox.control.states import State
from emberbox.control.templates import Templates
from emberbox.control.tokens import new_template_id
from emberbox.store import sandboxes as sandbox_rows
from emberbox.store import templates as rows
from emberbox.store.errors import DuplicateName, KeyLimitReached, SandboxLimitReached
from emberbox.store.records import BuildRecord, SandboxRecord, TagRecord, TeamRecord, TemplateRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """A snapshot as users name it."""

    template: TemplateRecord
    build: BuildRecord
    names: list[tuple[str, str]]
    tags: list[str]


@dataclass(frozen=True, slots=True)
class SnapshotPage:
    snapshots: list[SnapshotView]
    more: bool


class Snapshots:
    def __init__(self, plane: Plane, templates: Templates, sandboxes: Sandboxes, builds: Builds) -> None:
        self._plane = plane
        self._templates = templates
        self._sandboxes = sandboxes
        self._builds = builds

    # ---- snapshots

    async def create(self, team: TeamRecord, sandbox_id: str, *, name: str | None, memory: bool) -> SnapshotView:
        """Save a sandbox, which goes on in the state it has. A name that is taken gets a new build.

        Raises:
            NotFound: no such sandbox.
            Invalid: the name cannot be used, or is a template's.
            Conflict: the sandbox is changing its state.
            ControlError: the node could not save it; nothing is left behind.
        """
        ref = parse_ref(name) if name else None
        if ref is not None and ref.namespace not in (None, team.slug):
            raise Invalid(f"snapshot name {name!r} is in another namespace; use {team.slug}/... or no namespace")
        record = await self._sandboxes.get(team, sandbox_id)
        if record.state not in (State.RUNNING, State.PAUSED):
            raise Conflict(f"sandbox {sandbox_id!r} is changing its state; try again in a moment")
        node = self._plane.nodes.get(record.node_id)
        template, build = await self._begin(team, record, ref.name if ref else None, memory=memory)
        tag = ref.tag_or_default if ref else DEFAULT_TAG
        try:
            assert build.snapshot_id is not None
            saved = await node.snapshot(sandbox_id, build.snapshot_id, memory=memory)
        except BaseException as error:
            await asyncio.shield(self._undo(build, error))
            if isinstance(error, NotFound):
                raise sandbox_not_found(sandbox_id) from error
            raise
        now = now_ms()
        ready = await rows.change_build(
            self._plane.store,
            build.id,
            statuses=["building"],
            changes={
                "status": "ready",
                "worker": None,
                "memory_kept": saved.memory_kept,
                "size_bytes": saved.size_bytes,
                "updated_at": now,
                "finished_at": now,
            },
            tags=[TagRecord(str(uuid.uuid4()), template.id, tag, build.id, now)],
        )
        if ready is None:
            # Whoever deleted it found nothing on the node yet.
            await self._plane.delete_on_node(build)
            raise Conflict("the snapshot was deleted while it was being made")
        log.info("snapshot.created", sandbox_id=sandbox_id, snapshot_id=template.id, size_bytes=saved.size_bytes)
        return SnapshotView(template, ready, await self._templates.names(template.id), [tag])

    async def page(
        self,
        team: TeamRecord,
        *,
        sandbox_id: str | None,
        name: str | None,
        limit: int,
        after: tuple[int, str] | None,
    ) -> SnapshotPage:
        """Snapshots of a team, newest first."""
        template_id = build_id = None
        if name:
            ref = parse_ref(name)
            found = await rows.find(
                self._plane.store,
                team_id=team.id,
                namespace=ref.namespace or team.slug,
                name=ref.name,
                tag=ref.tag_or_default,
            )
            if found is None or (ref.tag is not None and found[2] is None):
                return SnapshotPage([], more=False)
            template_id = found[0].id
            build_id = found[2].id if ref.tag is not None and found[2] is not None else None
        pairs = await rows.snapshots_page(
            self._plane.store,
            team_id=team.id,
            sandbox_id=sandbox_id,
            template_id=template_id,
            build_id=build_id,
            limit=limit + 1,
            after=after,
        )
        shown = pairs[:limit]
        names = await rows.aliases_of(self._plane.store, {template.id for template, _ in shown})
        tags = await rows.tags_of_builds(self._plane.store, [build.id for _, build in shown])
        return SnapshotPage(
            [
                SnapshotView(template, build, names.get(template.id, []), tags.get(build.id, []))
                for template, build in shown
            ],
            more=len(pairs) > limit,
        )

    async def _begin(
        self, team: TeamRecord, record: SandboxRecord, name: str | None, *, memory: bool
    ) -> tuple[TemplateRecord, BuildRecord]:
        store = self._plane.store
        now = now_ms()
        build = replace(
            self._builds.new_build(
                cpu_count=record.cpu_count,
                memory_mb=record.memory_mb,
                disk_size_mb=record.disk_size_mb,
                rates=kept_rates(record.rates),
                request={"snapshot_of": record.id, "memory": memory},
            ),
            status="building",
            worker=self._plane.worker,
            snapshot_id=new_template_id(),
            node_id=record.node_id,
            source_sandbox_id=record.id,
            agent_version=record.agent_version,
        )
        existing = await rows.alias_owner(store, team.slug, name) if name else None
        if existing is not None:
            if existing.kind != "snapshot":
                raise Invalid(f"{name!r} is the name of a template; choose another one for the snapshot")
            build = replace(build, template_id=existing.id)
            await rows.add_build(store, build)
            return existing, build
        template = TemplateRecord(
            id=new_template_id(),
            team_id=team.id,
            kind="snapshot",
            public=False,
            is_default=False,
            description=None,
            created_at=now,
            updated_at=now,
            last_spawned_at=None,
            spawn_count=0,
        )
        build = replace(build, template_id=template.id)
        try:
            await rows.add(store, template, aliases=[(team.slug, name)] if name else [], build=build)
        except DuplicateName as error:
            raise Conflict(f"a snapshot named {name!r} is being made; try again in a moment") from error
        return template, build

    async def _undo(self, build: BuildRecord, error: BaseException) -> None:
        """Leave nothing of a snapshot that failed."""
        log.warning("snapshot.failed", sandbox_id=build.source_sandbox_id, reason=str(error))
        await self._remove_build(build)
        await self._plane.delete_on_node(build)

    async def undo_interrupted(self) -> None:
        """Remove the snapshots that a process which is gone was making, here and on their nodes."""
        for build in await self._builds.interrupted():
            await self._undo(build, NodeUnavailable("interrupted by a restart"))

    async def _remove_build(self, build: BuildRecord) -> None:
        store = self._plane.store
        await rows.delete_build(store, build.id)
        if not await rows.builds_page(store, build.template_id, limit=1):
            await rows.delete_template(store, build.template_id)

    # ---- forks

    async def fork(
        self, team: TeamRecord, sandbox_id: str, *, timeout: int, count: int, key: KeyLimit | None = None
    ) -> list[SandboxRecord | ControlError]:
        """Start `count` copies of a running sandbox. Each succeeds or fails by itself.

        Raises:
            NotFound: no such sandbox.
            Conflict: it does not run.
            TooMany: the team, or the key, would have more sandboxes than it may.
            ControlError: the node could not start with it.
        """
        check_timeout(team, timeout)
        source = await self._sandboxes.get(team, sandbox_id)
        if source.state != State.RUNNING:
            raise Conflict(f"sandbox {sandbox_id!r} is paused; resume it first")
        node = self._plane.nodes.get(source.node_id)
        records = [
            replace(self._sandboxes.new_fork(source, timeout), api_key_id=key.key_id if key is not None else None)
            for _ in range(count)
        ]
        try:
            await sandbox_rows.add(
                self._plane.store, records, limit=team.max_sandboxes, key_limit=key.most if key is not None else None
            )
        except SandboxLimitReached as error:
            raise sandbox_limit(error) from error
        except KeyLimitReached as error:
            raise key_limit(error) from error
        with self._plane.carrying(node.node_id, *(record.id for record in records)):
            try:
                results = await node.fork(sandbox_id, [self._sandboxes.fork_request(record) for record in records])
            except BaseException as error:
                await asyncio.shield(self._undo_all(records, node, error))
                if isinstance(error, NotFound):
                    raise sandbox_not_found(sandbox_id) from error
                raise
            return await asyncio.gather(
                *(self._forked(record, result, node) for record, result in zip(records, results, strict=True))
            )

    async def _forked(self, record: SandboxRecord, result: pb.ForkResult, node: Node) -> SandboxRecord | ControlError:
        if result.WhichOneof("result") == "machine":
            try:
                return await self._sandboxes.started(record, result.machine)
            except ControlError as error:
                return error
        failure = fork_failure(result)
        await self._sandboxes.undo_create(record, node, failure)
        return failure

    async def _undo_all(self, records: list[SandboxRecord], node: Node, error: BaseException) -> None:
        await asyncio.gather(*(self._sandboxes.undo_create(record, node, error) for record in records))
