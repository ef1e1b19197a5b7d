"""Creating sandboxes and reading them. What happens to one afterwards is in `lifecycle.py`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from emberbox.control.build_plan import image_of
from emberbox.control.clock import now_ms
from emberbox.control.edges import route_of
from emberbox.control.errors import Conflict, ControlError, Invalid, KeyReused, NotBuilt, NotFound
from emberbox.control.limits import check_timeout, key_limit, sandbox_limit
from emberbox.control.network import check_network, node_network, without_secrets
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.rates import given_rates
from emberbox.control.scopes import KeyLimit
from emberbox.control.states import SHOWN, Event, State, moves, shown_as
from emberbox.control.templates import Source, Templates
from emberbox.control.tokens import new_sandbox_id
from emberbox.store import sandboxes as rows
from emberbox.store.errors import KeyLimitReached, SandboxLimitReached
from emberbox.store.records import BuildRecord, SandboxRecord, TeamRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

_DEFAULT_DISK_MB = 512


@dataclass(frozen=True, slots=True)
class NewSandbox:
    """What a user asks for. `network` is as in the API; times are seconds."""

    template: str
    timeout: int
    secure: bool
    auto_pause: bool = False
    auto_pause_memory: bool = True
    auto_resume: bool = False
    allow_internet: bool | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    volume_mounts: tuple[tuple[str, str], ...] = ()
    iam: bool = False


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    key: str
    body_hash: str

    @classmethod
    def of(cls, key: str, body: Mapping[str, Any]) -> IdempotencyKey:
        """
        Raises:
            Invalid: the key is empty or longer than 255 characters.
        """
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise Invalid("Idempotency-Key must have 1 to 255 printable characters")
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return cls(key, hashlib.sha256(canonical.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class SandboxPage:
    sandboxes: list[SandboxRecord]
    more: bool


class Sandboxes:
    def __init__(self, plane: Plane, templates: Templates) -> None:
        self._plane = plane
        self._templates = templates

    async def create(
        self,
        team: TeamRecord,
        wanted: NewSandbox,
        idempotency: IdempotencyKey | None = None,
        *,
        key: KeyLimit | None = None,
    ) -> SandboxRecord:
        """Start a sandbox; returns when its agent answers and its route is set.

        Args:
            key: the API key that asks for it.

        Raises:
            Invalid: a value that cannot be used.
            NotFound: no such template.
            TooMany: the team, or the key, has all the sandboxes it may have.
            KeyReused: the idempotency key came with another body before.
            Conflict: a create with the same key is going on; or the sandbox was killed meanwhile.
            ControlError: the node could not start it; nothing is left behind.
        """
        began = time.perf_counter()
        # First of all: what was made needs no template, node or room in a limit any more.
        if idempotency is not None and (earlier := await self._earlier(team, idempotency)) is not None:
            return earlier
        _check(team, wanted)
        source = await self._templates.resolve(team, wanted.template)
        node = self._place(source.build)
        record = self._new_record(team, wanted, source, node, idempotency)
        if key is not None:
            record = replace(record, api_key_id=key.key_id)
        try:
            await rows.add(
                self._plane.store, [record], limit=team.max_sandboxes, key_limit=key.most if key is not None else None
            )
        except rows.IdempotencyKeyUsed as error:
            assert idempotency is not None
            earlier = await self._earlier(team, idempotency)
            if earlier is None:
                # It failed between our insert and this look.
                raise Conflict("a create with this Idempotency-Key has just failed; repeat the request") from error
            return earlier
        except SandboxLimitReached as error:
            raise sandbox_limit(error) from error
        except KeyLimitReached as error:
            raise key_limit(error) from error

        with self._plane.carrying(node.node_id, record.id):
            try:
                machine = await node.create(self._request(record, wanted, source))
            except BaseException as error:
                await asyncio.shield(self.undo_create(record, node, error))
                raise
            running = await self.started(record, machine)
        log.info(
            "sandbox.created",
            sandbox_id=record.id,
            team_id=team.id,
            template_id=record.template_id,
            ms=round((time.perf_counter() - began) * 1000, 1),
        )
        return running

    async def started(self, record: SandboxRecord, machine: pb.MachineStatus) -> SandboxRecord:
        """Record that the node has started `record`, and tell the edge.

        Raises:
            Conflict: the sandbox was killed, or ended by itself, meanwhile; its machine is ended.
        """
        changes = {
            "address": machine.address,
            "end_at": machine.deadline_unix_ms or record.end_at,
            "state_changed_at": now_ms(),
            "worker": None,
        }
        route = route_of(replace(record, address=machine.address), self._plane.tokens)
        running, _ = await asyncio.gather(
            rows.move(self._plane.store, record.id, transitions=moves(Event.STARTED), changes=changes),
            self._plane.edge.set_route(route),
        )
        if running is None:
            await self._plane.edge.drop_route(record.id)
            now = await rows.get(self._plane.store, record.id)
            if now is not None and now.end_reason == "timed_out":
                # It was created, and had so short a time that it is over.
                return now
            await self._plane.nodes.get(record.node_id).kill(record.id)
            raise Conflict(f"sandbox {record.id!r} ended while it was being created")
        self._plane.written_down(record.id, record.node_id)
        return running

    async def undo_create(self, record: SandboxRecord, node: Node, error: BaseException) -> None:
        """Leave nothing of a create that failed: no machine, no row that lives, the idempotency key free."""
        log.warning("sandbox.create_failed", sandbox_id=record.id, reason=str(error))
        ended = {"ended_at": now_ms(), "end_reason": "create_failed", "idempotency_key": None, "worker": None}
        event = Event.ENDED
        try:
            # The node undoes what fails there; a call that we gave up may still go on.
            if not isinstance(error, ControlError) or error.should_retry:
                await node.kill(record.id)
        except ControlError:
            ended = {"idempotency_key": None, "worker": None}
            event = Event.KILL
        await rows.move(
            self._plane.store,
            record.id,
            transitions=moves(event),
            changes={"state_changed_at": now_ms(), **ended},
        )

    async def get(self, team: TeamRecord, sandbox_id: str) -> SandboxRecord:
        """A sandbox that runs or is paused.

        Raises:
            NotFound: there is none of this ID, it has ended, or it is another team's.
        """
        record = await rows.get(self._plane.store, sandbox_id) if is_sandbox_id(sandbox_id) else None
        if record is None or record.team_id != team.id or State(record.state) not in SHOWN:
            raise sandbox_not_found(sandbox_id)
        return record

    async def page(
        self,
        team: TeamRecord,
        *,
        states: tuple[str, ...],
        metadata: tuple[tuple[str, str], ...],
        template: str | None,
        started_after: int | None,
        descending: bool,
        limit: int | None,
        after: tuple[int, str] | None,
    ) -> SandboxPage:
        """Sandboxes of a team by start time. `states` are the API's; `limit=None` gives all."""
        wanted = rows.SandboxFilter(
            team_id=team.id,
            states=shown_as(*states),
            metadata=metadata,
            template_ids=await self._templates.ids_named(team, template) if template else None,
            started_after=started_after,
        )
        found = await rows.page(
            self._plane.store,
            wanted,
            limit=limit + 1 if limit is not None else 100_000,
            descending=descending,
            after=after,
        )
        if limit is None:
            return SandboxPage(found, more=False)
        return SandboxPage(found[:limit], more=len(found) > limit)

    async def count_running(
        self,
        team: TeamRecord,
        *,
        metadata: tuple[tuple[str, str], ...],
        template: str | None,
        started_after: int | None,
    ) -> int:
        """How many running sandboxes a list with these filters has on all its pages."""
        wanted = rows.SandboxFilter(
            team_id=team.id,
            states=shown_as("running"),
            metadata=metadata,
            template_ids=await self._templates.ids_named(team, template) if template else None,
            started_after=started_after,
        )
        return await rows.count(self._plane.store, wanted)

    def new_fork(self, source: SandboxRecord, timeout: int) -> SandboxRecord:
        """The row of a sandbox that will start as a copy of `source`."""
        now = now_ms()
        return replace(
            source,
            id=new_sandbox_id(),
            state=State.CREATING.value,
            state_changed_at=now,
            worker=self._plane.worker,
            address="",
            timeout_seconds=timeout,
            started_at=now,
            end_at=now + timeout * 1000,
            paused_at=None,
            pause_memory=None,
            idempotency_key=None,
            idempotency_hash=None,
        )

    def fork_request(self, record: SandboxRecord) -> pb.CreateRequest:
        return pb.CreateRequest(
            sandbox_id=record.id,
            template_id=record.template_id,
            team_id=record.team_id,
            cpu_count=record.cpu_count,
            memory_mb=record.memory_mb,
            disk_size_mb=record.disk_size_mb,
            rates=pb.Rates(**record.rates),
            access_token=self._plane.tokens.agent(record.id) if record.secure else "",
            network=node_network(record.network, allow_internet=record.allow_internet),
            deadline_unix_ms=record.end_at,
            on_timeout=timeout_action(record.auto_pause, record.auto_pause_memory),
            metadata=record.metadata,
        )

    def _place(self, build: BuildRecord) -> Node:
        # A snapshot lies on one node; layers of a build lie where it was built.
        return self._plane.nodes.holding(build.node_id) if build.node_id else self._plane.nodes.place()

    def _new_record(
        self,
        team: TeamRecord,
        wanted: NewSandbox,
        source: Source,
        node: Node,
        idempotency: IdempotencyKey | None,
    ) -> SandboxRecord:
        now = now_ms()
        build = source.build
        return SandboxRecord(
            id=new_sandbox_id(),
            team_id=team.id,
            template_id=source.template.id,
            build_id=build.id,
            alias=source.alias,
            state=State.CREATING.value,
            state_changed_at=now,
            worker=self._plane.worker,
            node_id=node.node_id,
            address="",
            cpu_count=build.cpu_count,
            memory_mb=build.memory_mb,
            disk_size_mb=build.disk_size_mb or _DEFAULT_DISK_MB,
            rates=given_rates(build.rates, self._plane.settings),
            agent_version=build.agent_version,
            metadata=dict(wanted.metadata),
            secure=wanted.secure,
            allow_internet=wanted.allow_internet,
            network=without_secrets(wanted.network),
            volume_mounts=[{"name": name, "path": path} for name, path in wanted.volume_mounts],
            auto_pause=wanted.auto_pause,
            auto_pause_memory=wanted.auto_pause_memory,
            auto_resume=wanted.auto_resume,
            timeout_seconds=wanted.timeout,
            started_at=now,
            end_at=now + wanted.timeout * 1000,
            paused_at=None,
            pause_memory=None,
            ended_at=None,
            end_reason=None,
            idempotency_key=idempotency.key if idempotency else None,
            idempotency_hash=idempotency.body_hash if idempotency else None,
            api_key_id=None,
        )

    def _request(self, record: SandboxRecord, wanted: NewSandbox, source: Source) -> pb.CreateRequest:
        build = source.build
        request = pb.CreateRequest(
            sandbox_id=record.id,
            template_id=record.template_id,
            team_id=record.team_id,
            cpu_count=record.cpu_count,
            memory_mb=record.memory_mb,
            disk_size_mb=record.disk_size_mb,
            rates=pb.Rates(**record.rates),
            env_vars=wanted.env_vars,
            access_token=self._plane.tokens.agent(record.id) if wanted.secure else "",
            network=node_network(wanted.network, allow_internet=wanted.allow_internet),
            deadline_unix_ms=record.end_at,
            on_timeout=timeout_action(wanted.auto_pause, wanted.auto_pause_memory),
            metadata=wanted.metadata,
        )
        if build.snapshot_id is not None:
            request.snapshot_id = build.snapshot_id
        else:
            request.image.CopyFrom(image_of(build))
        return request

    async def _earlier(self, team: TeamRecord, idempotency: IdempotencyKey) -> SandboxRecord | None:
        """The sandbox that a create with this key has made; None when the key is free.

        Raises:
            KeyReused: the key came with another body.
            Conflict: the create is going on.
        """
        earlier = await rows.by_idempotency_key(self._plane.store, team.id, idempotency.key)
        if earlier is None:
            return None
        if earlier.idempotency_hash != idempotency.body_hash:
            raise KeyReused("this Idempotency-Key was used with another body; use a new key for another sandbox")
        if earlier.state == State.CREATING:
            raise Conflict(
                "a create with this Idempotency-Key is going on; repeat the request in a moment",
                error_code="idempotency_in_progress",
            )
        return earlier


def is_sandbox_id(text: str) -> bool:
    return 1 <= len(text) <= 64 and text.isascii() and text.isalnum()


def sandbox_not_found(sandbox_id: str) -> NotFound:
    return NotFound(f"sandbox {sandbox_id[:64]!r} was not found")


def timeout_action(auto_pause: bool, auto_pause_memory: bool) -> pb.TimeoutAction.ValueType:
    if not auto_pause:
        return pb.TIMEOUT_ACTION_KILL
    return pb.TIMEOUT_ACTION_PAUSE if auto_pause_memory else pb.TIMEOUT_ACTION_PAUSE_FILES


def _check(team: TeamRecord, wanted: NewSandbox) -> None:
    check_timeout(team, wanted.timeout)
    if wanted.auto_resume and not wanted.auto_pause:
        raise Invalid("autoResume needs autoPause: a sandbox that is not paused at its deadline cannot be resumed")
    if wanted.auto_resume and not wanted.auto_pause_memory:
        raise Invalid("autoResume cannot be combined with autoPauseMemory=false")
    check_network(wanted.network)
    if wanted.volume_mounts:
        raise NotBuilt("volumes are not built yet; leave volumeMounts out")
    if wanted.iam:
        raise NotBuilt("workload identity is not built yet; leave iam out")
