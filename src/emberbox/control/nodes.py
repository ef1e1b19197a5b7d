"""The seam to the nodes: one gRPC client a node, a deadline on every call, one translation of failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc.aio import EOF  # type: ignore[attr-defined]

from emberbox.control import errors
from emberbox.control.clock import now_ms
from emberbox.wire import node_pb2 as pb
from emberbox.wire import node_pb2_grpc

log = structlog.get_logger()

_SECONDS = {
    "Describe": 5.0,
    "Create": 180.0,
    "Pause": 120.0,
    "Resume": 180.0,  # of a paused sandbox: after a reboot all of its memory is read first
    "Snapshot": 300.0,
    "DeleteSnapshot": 30.0,
    "Fork": 300.0,
    "Kill": 30.0,
    "SetDeadline": 5.0,
    "SetNetwork": 10.0,
    "Logs": 10.0,
    "Acknowledge": 10.0,
    "CancelBuild": 60.0,
    "DeleteBuild": 60.0,
}
"""How long an answer may take before the call is given up, at `time_scale` 1."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
)

_FIRST_BACKOFF, _LAST_BACKOFF = 0.1, 3.0
_SILENCE_SECONDS = 20.0
"""A stream that is silent for so long is checked by a call. gRPC's own pings would not do: servers take more than one
in five minutes for an attack and end the connection."""


@dataclass(frozen=True, slots=True)
class NodeSighting:
    """A node as it was last described."""

    description: pb.NodeDescription
    seen_ms: int


class Node:
    """One node. Calls raise `control.errors`; nothing of gRPC leaves this class."""

    def __init__(
        self, target: str, *, time_scale: float = 1.0, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """`credentials` for a TCP target; a unix socket needs none."""
        self.target = target
        self._scale = time_scale
        self._channel = (
            grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)
        )
        self._stub: Any = node_pb2_grpc.NodeStub(self._channel)
        self.sighting: NodeSighting | None = None
        self.connected = asyncio.Event()
        """Set while the event stream is up."""
        self._stream: Any = None

    @property
    def node_id(self) -> str:
        """The node's own name; empty before it was first reached."""
        return self.sighting.description.node_id if self.sighting else ""

    async def describe(self) -> pb.NodeDescription:
        description: pb.NodeDescription = await self._call("Describe", pb.DescribeRequest())
        self.sighting = NodeSighting(description, now_ms())
        return description

    async def create(self, request: pb.CreateRequest) -> pb.MachineStatus:
        return await self._call("Create", request)  # type: ignore[no-any-return]

    async def pause(self, sandbox_id: str, *, memory: bool) -> pb.MachineStatus:
        return await self._call("Pause", pb.PauseRequest(sandbox_id=sandbox_id, memory=memory))  # type: ignore[no-any-return]

    async def resume(self, request: pb.ResumeRequest) -> pb.MachineStatus:
        return await self._call("Resume", request)  # type: ignore[no-any-return]

    async def snapshot(self, sandbox_id: str, snapshot_id: str, *, memory: bool) -> pb.SnapshotStatus:
        request = pb.SnapshotRequest(sandbox_id=sandbox_id, snapshot_id=snapshot_id, memory=memory)
        return await self._call("Snapshot", request)  # type: ignore[no-any-return]

    async def delete_snapshot(self, snapshot_id: str) -> None:
        await self._call("DeleteSnapshot", pb.DeleteSnapshotRequest(snapshot_id=snapshot_id))

    async def fork(self, sandbox_id: str, creates: list[pb.CreateRequest]) -> list[pb.ForkResult]:
        answer: pb.ForkResponse = await self._call("Fork", pb.ForkRequest(sandbox_id=sandbox_id, creates=creates))
        return list(answer.results)

    async def kill(self, sandbox_id: str) -> bool:
        """End a sandbox. Returns whether the node had it."""
        try:
            await self._call("Kill", pb.KillRequest(sandbox_id=sandbox_id))
        except errors.NotFound:
            return False
        return True

    async def set_deadline(self, sandbox_id: str, deadline_ms: int, *, only_extend: bool) -> pb.MachineStatus:
        request = pb.SetDeadlineRequest(sandbox_id=sandbox_id, deadline_unix_ms=deadline_ms, only_extend=only_extend)
        return await self._call("SetDeadline", request)  # type: ignore[no-any-return]

    async def set_network(self, sandbox_id: str, network: pb.Network) -> None:
        await self._call("SetNetwork", pb.SetNetworkRequest(sandbox_id=sandbox_id, network=network))

    async def logs(self, request: pb.LogsRequest) -> list[pb.LogEntry]:
        answer: pb.LogsResponse = await self._call("Logs", request)
        return list(answer.entries)

    async def acknowledge(self, sandbox_ids: list[str]) -> None:
        await self._call("Acknowledge", pb.AcknowledgeRequest(sandbox_ids=sandbox_ids))

    async def delete_build(self, build_id: str, layers: list[str]) -> None:
        await self._call("DeleteBuild", pb.DeleteBuildRequest(build_id=build_id, layers=layers))

    async def cancel_build(self, build_id: str) -> None:
        await self._call("CancelBuild", pb.CancelBuildRequest(build_id=build_id))

    async def build(self, request: pb.BuildRequest, *, seconds: float) -> AsyncIterator[pb.BuildEvent]:
        """Start a build; its events. Leaving the iteration leaves the build going on."""
        async for event in self._build_events(self._stub.Build(request, timeout=seconds * self._scale)):
            yield event

    async def follow_build(self, build_id: str, *, from_position: int, seconds: float) -> AsyncIterator[pb.BuildEvent]:
        """Events of a build that goes on or ended lately; of its log, those from a position on."""
        request = pb.FollowBuildRequest(build_id=build_id, from_position=from_position)
        async for event in self._build_events(self._stub.FollowBuild(request, timeout=seconds * self._scale)):
            yield event

    @staticmethod
    async def _build_events(call: Any) -> AsyncIterator[pb.BuildEvent]:
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise translated(error) from error
        finally:
            call.cancel()

    def look_again(self) -> None:
        """Open the event stream anew, so that the node says what state everything is in."""
        if self._stream is not None:
            self._stream.cancel()

    async def watch(self, handle: Callable[[pb.NodeEvent, int], Awaitable[None]]) -> None:
        """Receive the node's events for ever, reconnecting with a growing pause.

        `handle` gets each event and when its stream was opened (ms). Ends only by cancellation.
        """
        backoff = _FIRST_BACKOFF
        while True:
            opened_ms = now_ms()
            try:
                self._stream = self._stub.Watch(pb.WatchRequest())
                async for event in self._events(self._stream):
                    if not self.connected.is_set():
                        await self.describe()
                        self.connected.set()
                        log.info("node.connected", node_id=self.node_id, target=self.target)
                        backoff = _FIRST_BACKOFF
                    await handle(event, opened_ms)
                reason = "the node ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except asyncio.CancelledError:
                # Ours to look again, or the end of this task?
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.info("node.looking_again", node_id=self.node_id)
                continue
            except errors.ControlError as error:
                reason = error.message
            except Exception:
                # A fault of ours in handling an event must not end the watching: the next State event repairs.
                log.exception("node.event_failed", target=self.target)
                reason = "an event could not be handled"
            was_connected = self.connected.is_set()
            self.connected.clear()
            if was_connected or backoff == _FIRST_BACKOFF:
                log.warning("node.away", target=self.target, reason=reason)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LAST_BACKOFF)

    async def _events(self, stream: Any) -> AsyncIterator[pb.NodeEvent]:
        """The stream's events. Silence is broken by a call, whose failure ends the stream."""
        try:
            while True:
                reading = asyncio.ensure_future(stream.read())
                try:
                    while not (await asyncio.wait([reading], timeout=_SILENCE_SECONDS * self._scale))[0]:
                        await self.describe()
                finally:
                    reading.cancel()
                event = reading.result()
                if event is EOF:
                    return
                yield event
        finally:
            stream.cancel()

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=_SECONDS[method] * self._scale)
        except grpc.aio.AioRpcError as error:
            raise translated(error) from error


class Nodes:
    """The nodes of this installation, and where the next sandbox goes."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self.draining: set[str] = set()
        """IDs of nodes that take no new sandboxes."""

    def __iter__(self) -> Any:
        return iter(self._nodes)

    def note_status(self, node_id: str, status: str) -> None:
        """Let a node take new sandboxes when its status is `ready`, and none otherwise."""
        if status == "ready":
            self.draining.discard(node_id)
        else:
            self.draining.add(node_id)

    def place(self) -> Node:
        """A node for a new sandbox: of those that are up, the one that runs the fewest.

        Raises:
            NodeUnavailable: none is up.
            NodeFull: those that are up are draining.
        """
        up = [node for node in self._nodes if node.connected.is_set()]
        if not up:
            raise errors.NodeUnavailable("no node is connected; try again in a moment")
        takers = [node for node in up if node.node_id not in self.draining]
        if not takers:
            raise errors.NodeFull("every node is draining and takes no new sandboxes")
        return min(takers, key=_running)

    def holding(self, node_id: str) -> Node:
        """The node that holds what a new sandbox starts from.

        Raises:
            NodeUnavailable: it is not up.
            NodeFull: it is draining.
        """
        node = self.get(node_id)
        if node_id in self.draining:
            raise errors.NodeFull(f"node {node_id!r} is draining and takes no new sandboxes")
        return node

    def get(self, node_id: str) -> Node:
        """
        Raises:
            NodeUnavailable: the node is not known to this process (yet).
        """
        for node in self._nodes:
            if node.node_id == node_id:
                return node
        raise errors.NodeUnavailable(f"node {node_id!r} is not connected; try again in a moment")

    def look_again(self, node_id: str) -> None:
        """Have the node say what state everything is in; nothing to do while it is away."""
        for node in self._nodes:
            if node.node_id == node_id:
                node.look_again()

    async def close(self) -> None:
        for node in self._nodes:
            await node.close()


def _running(node: Node) -> int:
    return node.sighting.description.machines_running if node.sighting else 0


_TRANSLATION: dict[grpc.StatusCode, type[errors.ControlError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.Interrupted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.NodeFull,
    grpc.StatusCode.INVALID_ARGUMENT: errors.Invalid,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotBuilt,
    grpc.StatusCode.UNAVAILABLE: errors.NodeUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.NodeTooSlow,
    grpc.StatusCode.CANCELLED: errors.NodeUnavailable,
}
"""The node contract's status codes as control errors; what is not here is the runtime's failure."""


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def translated(error: grpc.aio.AioRpcError) -> errors.ControlError:
    """The control error for a failed call, with the node's sentence for the user."""
    return _failure(error.code(), error.details())


def fork_failure(result: pb.ForkResult) -> errors.ControlError:
    """Why there is no copy: what a create would have failed with."""
    code = _CODES.get(result.error_code)
    if code not in _TRANSLATION:
        return errors.NodeFailed(result.error or "the copy could not be started", error_code="sandbox_create_failed")
    return _failure(code, result.error)


def _failure(code: grpc.StatusCode, details: str | None) -> errors.ControlError:
    if code is grpc.StatusCode.UNAVAILABLE:
        log.warning("node.unavailable", details=details)
        return errors.NodeUnavailable("the node is not reachable at the moment; try again")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.NodeTooSlow("the node did not answer in time; try again")
    kind = _TRANSLATION.get(code, errors.NodeFailed)
    return kind(details or f"the node answered {code.name}")
