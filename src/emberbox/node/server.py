"""The node's gRPC service: translate, call, answer. Errors become status codes here and nowhere else."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

import grpc
import structlog

import emberbox
from emberbox.node import translate
from emberbox.node.admission import check_new
from emberbox.node.building.model import BuildEvent
from emberbox.node.errors import (
    AlreadyHere,
    BadValue,
    DiskFull,
    Interrupted,
    LayerMissing,
    NodeBusy,
    NodeError,
    NodeFull,
    NoSuchBuild,
    NoSuchSandbox,
    NoSuchSnapshot,
    Unsupported,
    WrongState,
)
from emberbox.node.machines import Seed
from emberbox.node.model import NewSandbox, Status
from emberbox.node.node import Node
from emberbox.runtime.errors import MachineGone, NotSupported, RuntimeFailure
from emberbox.wire import node_pb2 as wire
from emberbox.wire import node_pb2_grpc

log = structlog.get_logger("emberbox.node")

AGENT_VERSION = "0.6.4"
"""The level of E2B's agent contract that emberd serves; clients choose features by it."""

_LOGS_LIMIT = 1000

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (NoSuchSandbox, grpc.StatusCode.NOT_FOUND),
    (NoSuchSnapshot, grpc.StatusCode.NOT_FOUND),
    (NoSuchBuild, grpc.StatusCode.NOT_FOUND),
    (LayerMissing, grpc.StatusCode.NOT_FOUND),
    (AlreadyHere, grpc.StatusCode.ALREADY_EXISTS),
    (WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (Interrupted, grpc.StatusCode.ABORTED),
    (NodeFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BadValue, grpc.StatusCode.INVALID_ARGUMENT),
    (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    (NotSupported, grpc.StatusCode.UNIMPLEMENTED),
    (NodeBusy, grpc.StatusCode.UNAVAILABLE),
    (MachineGone, grpc.StatusCode.ABORTED),
    (NodeError, grpc.StatusCode.INTERNAL),
    (RuntimeFailure, grpc.StatusCode.INTERNAL),
)

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")
Request = TypeVar("Request")


def _failure(call: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and the sentence that an error becomes; what is the node's own fault is logged."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            if code is grpc.StatusCode.INTERNAL:
                log.error("call.failed", call=call, error=str(error))
            return code, str(error)
    log.error("call.failed", call=call, exc_info=error)
    if isinstance(error, OSError):
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.INTERNAL
        return code, f"the node's disk failed: {error.strerror or error}"
    return grpc.StatusCode.INTERNAL, f"the node failed in {call}; its log says why"


def _answers(
    method: Callable[[NodeService, Request, Context], Awaitable[Answer]],
) -> Callable[[NodeService, Request, Context], Awaitable[Answer]]:
    """Turn what a method raises into a status code, and refuse while the node starts or stops."""

    @wraps(method)
    async def call(self: NodeService, request: Request, context: Context) -> Answer:
        try:
            self.node.require_ready()
            return await method(self, request, context)
        except Exception as error:
            if isinstance(error, grpc.RpcError | grpc.aio.AbortError):
                raise
            await context.abort(*_failure(method.__name__, error))

    return call


def _fork_result(result: Status | Exception) -> wire.ForkResult:
    if isinstance(result, Status):
        return wire.ForkResult(machine=translate.status(result))
    code, message = _failure("Fork", result)
    return wire.ForkResult(error=message, error_code=code.value[0])


class NodeService(node_pb2_grpc.NodeServicer):
    """Answers `proto/node`."""

    def __init__(self, node: Node, *, runtime_why: str = "") -> None:
        """
        Args:
            runtime_why: why the node has the runtime it has, for people.
        """
        self.node = node
        self._runtime_why = runtime_why
        self._instance_id = uuid.uuid4().hex

    @_answers
    async def Describe(self, request: wire.DescribeRequest, context: Context) -> wire.NodeDescription:
        node = self.node
        host, counts = node.metrics.host(), node.machines.counts
        disk = await asyncio.to_thread(shutil.disk_usage, node.directory)
        return wire.NodeDescription(
            node_id=node.node_id,
            runtime=node.runtime.name,
            isolation=node.runtime.capabilities.isolation,
            runtime_why=self._runtime_why,
            memory_snapshots=node.runtime.capabilities.memory_snapshots,
            version=emberbox.__version__,
            cpu_count=host.cpu_count,
            memory_bytes=host.memory_bytes,
            disk_bytes=disk.total,
            disk_free_bytes=disk.free,
            machines_running=len(node.machines.running()),
            machines_starting=counts.starting,
            creates_succeeded=counts.creates_succeeded,
            creates_failed=counts.creates_failed,
            cpu_used_percent=host.cpu_used_percent,
            memory_used_bytes=host.memory_used_bytes,
            layers=await node.builds.digests(),
            cpu_architecture=host.cpu_architecture,
            cpu_model=host.cpu_model,
            service_instance_id=self._instance_id,
            base_key=await node.builds.base_key(),
        )

    # ---- machines

    @_answers
    async def Create(self, request: wire.CreateRequest, context: Context) -> wire.MachineStatus:
        new = translate.new_sandbox(request)
        check_new(new)
        return translate.status(await self._create(new))

    async def _create(self, new: NewSandbox) -> Status:
        if new.image is not None:
            return await self.node.machines.create(new, Seed(new.image, new.limits))
        async with self.node.snapshots.used(new.snapshot_id, new.limits) as seed:
            return await self.node.machines.create(new, seed)

    @_answers
    async def Pause(self, request: wire.PauseRequest, context: Context) -> wire.MachineStatus:
        return translate.status(await self.node.machines.pause(request.sandbox_id, memory=request.memory))

    @_answers
    async def Resume(self, request: wire.ResumeRequest, context: Context) -> wire.MachineStatus:
        if request.deadline_unix_ms <= 0:
            raise BadValue("a sandbox needs a deadline")
        resumed = await self.node.machines.resume(
            request.sandbox_id,
            deadline_ms=request.deadline_unix_ms,
            on_timeout=translate.timeout_action(request.on_timeout),
            discard_memory=request.discard_memory,
        )
        return translate.status(resumed)

    @_answers
    async def Kill(self, request: wire.KillRequest, context: Context) -> wire.KillResponse:
        await self.node.machines.kill(request.sandbox_id)
        return wire.KillResponse()

    @_answers
    async def SetDeadline(self, request: wire.SetDeadlineRequest, context: Context) -> wire.MachineStatus:
        if request.deadline_unix_ms <= 0:
            raise BadValue("a sandbox needs a deadline")
        changed = await self.node.machines.set_deadline(
            request.sandbox_id, request.deadline_unix_ms, only_extend=request.only_extend
        )
        return translate.status(changed)

    @_answers
    async def SetNetwork(self, request: wire.SetNetworkRequest, context: Context) -> wire.MachineStatus:
        network = translate.network(request.network)
        return translate.status(await self.node.machines.set_network(request.sandbox_id, network))

    # ---- snapshots

    @_answers
    async def Snapshot(self, request: wire.SnapshotRequest, context: Context) -> wire.SnapshotStatus:
        meta = await self.node.snapshots.take(request.sandbox_id, request.snapshot_id, memory=request.memory)
        return wire.SnapshotStatus(
            snapshot_id=meta.snapshot_id, memory_kept=meta.saved.memory, size_bytes=meta.size_bytes
        )

    @_answers
    async def DeleteSnapshot(
        self, request: wire.DeleteSnapshotRequest, context: Context
    ) -> wire.DeleteSnapshotResponse:
        await self.node.snapshots.delete(request.snapshot_id)
        return wire.DeleteSnapshotResponse()

    @_answers
    async def Fork(self, request: wire.ForkRequest, context: Context) -> wire.ForkResponse:
        source = self.node.machines.find(request.sandbox_id)
        limits = source.record.limits if source.record is not None else None
        news = []
        for message in request.creates:
            if limits is not None:  # a copy has the sizes of its source
                message.cpu_count, message.memory_mb = limits.cpu_count, limits.memory_mb
                message.disk_size_mb = limits.disk_size_mb
            message.snapshot_id = "fork"
            new = translate.new_sandbox(message)
            check_new(new)
            news.append(new)
        if not news:
            raise BadValue("a fork needs at least one sandbox ID")
        results = await self.node.snapshots.fork(request.sandbox_id, news)
        return wire.ForkResponse(results=[_fork_result(result) for result in results])

    # ---- logs and events

    @_answers
    async def Logs(self, request: wire.LogsRequest, context: Context) -> wire.LogsResponse:
        await self.node.collect_logs(request.sandbox_id)
        entries = await self.node.logs.read(
            request.sandbox_id,
            cursor_ms=request.cursor_unix_ms,
            limit=min(request.limit or _LOGS_LIMIT, _LOGS_LIMIT),
            backward=request.backward,
            level=request.level,
            search=request.search,
        )
        return wire.LogsResponse(entries=[translate.log_entry(entry) for entry in entries])

    async def Watch(self, request: wire.WatchRequest, context: Context) -> AsyncIterator[wire.NodeEvent]:
        try:
            self.node.require_ready()
        except NodeError as error:
            await context.abort(*_failure("Watch", error))
        with self.node.events.subscribe() as subscription:
            machines = [translate.status(status) for status in self.node.machines.statuses()]
            yield wire.NodeEvent(state=wire.State(machines=machines))
            while (event := await subscription.next()) is not None:
                yield translate.event(event)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream lagged or the node stops; watch again")

    @_answers
    async def Acknowledge(self, request: wire.AcknowledgeRequest, context: Context) -> wire.AcknowledgeResponse:
        await self.node.machines.acknowledge(list(request.sandbox_ids))
        return wire.AcknowledgeResponse()

    # ---- builds

    async def Build(self, request: wire.BuildRequest, context: Context) -> AsyncIterator[wire.BuildEvent]:
        def begin() -> AsyncIterator[BuildEvent]:
            self.node.builds.start(translate.new_build(request))
            return self.node.builds.follow(request.build_id)

        async for event in self._build_events("Build", begin, context):
            yield event

    async def FollowBuild(self, request: wire.FollowBuildRequest, context: Context) -> AsyncIterator[wire.BuildEvent]:
        def begin() -> AsyncIterator[BuildEvent]:
            return self.node.builds.follow(request.build_id, request.from_position)

        async for event in self._build_events("FollowBuild", begin, context):
            yield event

    async def _build_events(
        self, call: str, begin: Callable[[], AsyncIterator[BuildEvent]], context: Context
    ) -> AsyncIterator[wire.BuildEvent]:
        try:
            self.node.require_ready()
            async for event in begin():
                yield translate.build_event(event, AGENT_VERSION)
        except NodeError as error:
            await context.abort(*_failure(call, error))

    @_answers
    async def CancelBuild(self, request: wire.CancelBuildRequest, context: Context) -> wire.CancelBuildResponse:
        await self.node.builds.cancel(request.build_id)
        return wire.CancelBuildResponse()

    @_answers
    async def DeleteBuild(self, request: wire.DeleteBuildRequest, context: Context) -> wire.DeleteBuildResponse:
        await self.node.pool.forget(request.build_id)
        await self.node.builds.delete(request.build_id, list(request.layers))
        return wire.DeleteBuildResponse()
