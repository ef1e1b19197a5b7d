"""A node that keeps its machines in a dictionary: the whole node contract, no machine behind it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from emberbox.wire import node_pb2 as pb
from emberbox.wire import node_pb2_grpc

Hook = Callable[[Any], Awaitable[None]]


class Refuse(Exception):
    """Raised in a hook: the call is answered with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class FakeMachine:
    request: pb.CreateRequest
    status: pb.MachineStatus
    logs: list[pb.LogEntry] = field(default_factory=list)


@dataclass
class FakeBuild:
    """A build and its journal; `changed` is replaced at every event."""

    request: pb.BuildRequest
    events: list[pb.BuildEvent] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tell(self, event: pb.BuildEvent) -> None:
        self.events.append(event)
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].WhichOneof("event") in ("done", "failed")


class FakeNode(node_pb2_grpc.NodeServicer):
    """Serve it with `start(address)`. `before[method]` runs before a call: raise in it, wait in it, count in it."""

    def __init__(self, node_id: str = "fake-node") -> None:
        self.node_id = node_id
        self.instance = str(uuid.uuid4())
        self.machines: dict[str, FakeMachine] = {}
        self.ended: dict[str, pb.MachineStatus] = {}
        self.snapshots: dict[str, pb.SnapshotStatus] = {}
        self.builds: list[pb.BuildRequest] = []
        self.layers = ["ab" * 32]
        self.base_key = "base-1"
        self.build_events: list[pb.BuildEvent] = [
            pb.BuildEvent(progress=pb.BuildProgress(stage="unpacking", fraction=0.5)),
            pb.BuildEvent(log=pb.BuildLog(entry=pb.LogEntry(level="info", message="one"), step="base")),
            pb.BuildEvent(done=pb.BuildDone(image=pb.Image(layers=self.layers), size_bytes=4096, agent_version="0.1")),
        ]
        self.build_script: Callable[[pb.BuildRequest], list[pb.BuildEvent]] | None = None
        """Instead of `build_events`, when set."""
        self.build_hold: asyncio.Event | None = None
        """When set, builds wait for it before their last event."""
        self.journals: dict[str, FakeBuild] = {}
        self.cancelled_builds: list[str] = []
        self.deleted_builds: list[pb.DeleteBuildRequest] = []
        self.calls: list[tuple[str, Any]] = []
        self.before: dict[str, Hook] = {}
        self.deadlines = True
        self._watchers: list[asyncio.Queue[pb.NodeEvent]] = []
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._addresses = 0

    # ---- serving

    async def start(self, address: str) -> None:
        self._server = grpc.aio.server()
        node_pb2_grpc.add_NodeServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self.forget_builds()
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def tell(self, event: pb.NodeEvent) -> None:
        for queue in self._watchers:
            queue.put_nowait(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            if not self.deadlines:
                continue
            for machine in list(self.machines.values()):
                deadline = machine.status.deadline_unix_ms
                if machine.status.state == pb.MACHINE_STATE_RUNNING and 0 < deadline <= now_ms():
                    await self.time_out(machine.status.sandbox_id)

    async def time_out(self, sandbox_id: str) -> None:
        """What a node does at a deadline."""
        machine = self.machines[sandbox_id]
        action = machine.request.on_timeout
        if action in (pb.TIMEOUT_ACTION_PAUSE, pb.TIMEOUT_ACTION_PAUSE_FILES):
            self._set_paused(machine, memory=action == pb.TIMEOUT_ACTION_PAUSE)
            await self.tell(pb.NodeEvent(changed=machine.status))
        else:
            await self.end(sandbox_id, pb.END_REASON_TIMED_OUT)

    async def end(self, sandbox_id: str, reason: Any, message: str = "") -> None:
        """A machine that ends without being asked."""
        status = self.machines.pop(sandbox_id).status
        status.state, status.end_reason, status.message = pb.MACHINE_STATE_ENDED, reason, message
        status.changed_unix_ms, status.address = now_ms(), ""
        self.ended[sandbox_id] = status
        await self.tell(pb.NodeEvent(changed=status))

    async def sample(self, *samples: pb.MachineSample) -> None:
        await self.tell(pb.NodeEvent(samples=pb.Samples(samples=samples)))

    # ---- the contract

    async def Describe(self, request: Any, context: Any) -> pb.NodeDescription:
        await self._called("Describe", request, context)
        return pb.NodeDescription(
            node_id=self.node_id,
            runtime="container",
            memory_snapshots=False,
            version="0.0.0",
            cpu_count=2,
            memory_bytes=8 << 30,
            disk_bytes=100 << 30,
            disk_free_bytes=50 << 30,
            machines_running=len(self.machines),
            layers=self.layers,
            cpu_architecture="x86_64",
            cpu_model="Fake",
            service_instance_id=self.instance,
            base_key=self.base_key,
        )

    async def Create(self, request: pb.CreateRequest, context: Any) -> pb.MachineStatus:
        await self._called("Create", request, context)
        if request.sandbox_id in self.machines:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"sandbox {request.sandbox_id!r} is here already")
        if request.WhichOneof("source") == "snapshot_id" and request.snapshot_id not in self.snapshots:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"snapshot {request.snapshot_id!r} is not on this node")
        return self._start(request)

    def _start(self, request: pb.CreateRequest) -> pb.MachineStatus:
        self._addresses += 1
        status = pb.MachineStatus(
            sandbox_id=request.sandbox_id,
            state=pb.MACHINE_STATE_RUNNING,
            address=f"198.18.{self._addresses // 250}.{self._addresses % 250 + 2}",
            deadline_unix_ms=request.deadline_unix_ms,
            started_unix_ms=now_ms(),
            changed_unix_ms=now_ms(),
        )
        entry = pb.LogEntry(timestamp_unix_ms=now_ms(), level="info", message="machine started")
        self.machines[request.sandbox_id] = FakeMachine(request, status, [entry])
        return status

    async def Pause(self, request: pb.PauseRequest, context: Any) -> pb.MachineStatus:
        await self._called("Pause", request, context)
        machine = await self._machine(request.sandbox_id, context)
        if machine.status.state == pb.MACHINE_STATE_PAUSED:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the sandbox is paused already")
        self._set_paused(machine, memory=request.memory)
        return machine.status

    def _set_paused(self, machine: FakeMachine, *, memory: bool) -> None:
        machine.status.state = pb.MACHINE_STATE_PAUSED
        machine.status.address = ""
        machine.status.deadline_unix_ms = 0
        machine.status.memory_kept = memory
        machine.status.changed_unix_ms = now_ms()

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.MachineStatus:
        await self._called("Resume", request, context)
        machine = await self._machine(request.sandbox_id, context)
        if machine.status.state == pb.MACHINE_STATE_RUNNING:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the sandbox is running")
        if request.on_timeout:
            machine.request.on_timeout = request.on_timeout
        self._addresses += 1
        machine.status.state = pb.MACHINE_STATE_RUNNING
        machine.status.address = f"198.18.{self._addresses // 250}.{self._addresses % 250 + 2}"
        machine.status.deadline_unix_ms = request.deadline_unix_ms
        machine.status.changed_unix_ms = now_ms()
        return machine.status

    async def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> pb.SnapshotStatus:
        await self._called("Snapshot", request, context)
        await self._machine(request.sandbox_id, context)
        status = pb.SnapshotStatus(snapshot_id=request.snapshot_id, memory_kept=False, size_bytes=4096)
        self.snapshots[request.snapshot_id] = status
        return status

    async def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: Any) -> pb.DeleteSnapshotResponse:
        await self._called("DeleteSnapshot", request, context)
        if self.snapshots.pop(request.snapshot_id, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
        return pb.DeleteSnapshotResponse()

    async def Fork(self, request: pb.ForkRequest, context: Any) -> pb.ForkResponse:
        await self._called("Fork", request, context)
        await self._machine(request.sandbox_id, context)
        return pb.ForkResponse(results=[pb.ForkResult(machine=self._start(create)) for create in request.creates])

    async def Kill(self, request: pb.KillRequest, context: Any) -> pb.KillResponse:
        await self._called("Kill", request, context)
        if self.machines.pop(request.sandbox_id, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such sandbox")
        return pb.KillResponse()

    async def SetDeadline(self, request: pb.SetDeadlineRequest, context: Any) -> pb.MachineStatus:
        await self._called("SetDeadline", request, context)
        machine = await self._machine(request.sandbox_id, context)
        if not (request.only_extend and machine.status.deadline_unix_ms >= request.deadline_unix_ms):
            machine.status.deadline_unix_ms = request.deadline_unix_ms
        return machine.status

    async def SetNetwork(self, request: pb.SetNetworkRequest, context: Any) -> pb.MachineStatus:
        await self._called("SetNetwork", request, context)
        machine = await self._machine(request.sandbox_id, context)
        machine.request.network.CopyFrom(request.network)
        return machine.status

    async def Logs(self, request: pb.LogsRequest, context: Any) -> pb.LogsResponse:
        await self._called("Logs", request, context)
        machine = await self._machine(request.sandbox_id, context)
        entries = [entry for entry in machine.logs if request.search in entry.message]
        return pb.LogsResponse(entries=entries[: request.limit])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pb.NodeEvent]:
        await self._called("Watch", request, context)
        queue: asyncio.Queue[pb.NodeEvent] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            machines = [machine.status for machine in self.machines.values()]
            yield pb.NodeEvent(state=pb.State(machines=[*machines, *self.ended.values()]))
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    async def Acknowledge(self, request: pb.AcknowledgeRequest, context: Any) -> pb.AcknowledgeResponse:
        await self._called("Acknowledge", request, context)
        for sandbox_id in request.sandbox_ids:
            self.ended.pop(sandbox_id, None)
        return pb.AcknowledgeResponse()

    async def Build(self, request: pb.BuildRequest, context: Any) -> AsyncIterator[pb.BuildEvent]:
        await self._called("Build", request, context)
        if request.build_id in self.journals:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"build {request.build_id!r} runs already")
        self.builds.append(request)
        build = self.journals[request.build_id] = FakeBuild(request)
        build.task = asyncio.create_task(self._carry_out(build))
        async for event in self._events_of(build, 0):
            yield event

    async def _carry_out(self, build: FakeBuild) -> None:
        position = 0
        events = self.build_script(build.request) if self.build_script else self.build_events
        for event in events:
            if event.WhichOneof("event") in ("done", "failed") and self.build_hold is not None:
                await self.build_hold.wait()
            told = pb.BuildEvent()
            told.CopyFrom(event)
            if told.WhichOneof("event") == "log":
                told.log.position = position
                position += 1
            build.tell(told)

    async def _events_of(self, build: FakeBuild, position: int) -> AsyncIterator[pb.BuildEvent]:
        seen = 0
        while True:
            changed = build.changed
            for event in build.events[seen:]:
                if event.WhichOneof("event") != "log" or event.log.position >= position:
                    yield event
            seen = len(build.events)
            if build.ended:
                return
            await changed.wait()

    async def FollowBuild(self, request: pb.FollowBuildRequest, context: Any) -> AsyncIterator[pb.BuildEvent]:
        await self._called("FollowBuild", request, context)
        build = self.journals.get(request.build_id)
        if build is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"build {request.build_id!r} is not on this node")
        assert build is not None
        async for event in self._events_of(build, request.from_position):
            yield event

    async def CancelBuild(self, request: pb.CancelBuildRequest, context: Any) -> pb.CancelBuildResponse:
        await self._called("CancelBuild", request, context)
        build = self.journals.get(request.build_id)
        if build is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"build {request.build_id!r} is not on this node")
        assert build is not None
        self.cancelled_builds.append(request.build_id)
        if not build.ended:
            if build.task is not None:
                build.task.cancel()
            build.tell(pb.BuildEvent(failed=pb.BuildFailed(message="the build was cancelled")))
        return pb.CancelBuildResponse()

    def forget_builds(self) -> None:
        """What a node that was killed knows of its builds: nothing."""
        for build in self.journals.values():
            if build.task is not None:
                build.task.cancel()
        self.journals.clear()

    async def DeleteBuild(self, request: pb.DeleteBuildRequest, context: Any) -> pb.DeleteBuildResponse:
        await self._called("DeleteBuild", request, context)
        self.deleted_builds.append(request)
        return pb.DeleteBuildResponse()

    # ---- inside

    async def _called(self, method: str, request: Any, context: Any) -> None:
        self.calls.append((method, request))
        if hook := self.before.get(method):
            try:
                await hook(request)
            except Refuse as refused:
                await context.abort(refused.code, refused.message)

    async def _machine(self, sandbox_id: str, context: Any) -> FakeMachine:
        machine = self.machines.get(sandbox_id)
        if machine is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"sandbox {sandbox_id!r} is not on this node")
        assert machine is not None
        return machine
