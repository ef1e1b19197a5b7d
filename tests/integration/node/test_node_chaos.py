"""Random operations at once on a few sandboxes while the node process is killed again and again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time

import grpc
import pytest

from emberbox.wire import node_pb2 as wire
from tests.support.node import NodeProcess, now_ms, run

pytestmark = [pytest.mark.root, pytest.mark.slow]

_SECONDS = 40.0
_EXPECTED = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
}


class Storm:
    """Operations on the names `x0` to `x5` and the snapshots `snap0` and `snap1`."""

    def __init__(self, node: NodeProcess, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.unexpected: list[str] = []
        self.done = 0
        self.stopped = False

    async def worker(self) -> None:
        while not self.stopped:
            operation = self.random.choice(
                [self.create, self.create, self.copy, self.pause, self.pause, self.resume, self.snapshot, self.kill]
            )
            try:
                await operation(f"x{self.random.randrange(6)}")
                self.done += 1
            except grpc.aio.AioRpcError as error:
                if error.code() not in _EXPECTED:
                    self.unexpected.append(f"{operation.__name__}: {error.code().name} {error.details()}")
            except asyncio.CancelledError:  # the channel was closed with the process
                if self.stopped:
                    raise
            except (grpc.aio.UsageError, ValueError):
                pass  # between two processes
            await asyncio.sleep(0.01)

    async def create(self, name: str) -> None:
        deadline = now_ms() + self.random.choice([300, 3_000, 60_000])
        action = self.random.choice([wire.TIMEOUT_ACTION_KILL, wire.TIMEOUT_ACTION_PAUSE_FILES])
        await self.node.create(sandbox_id=name, deadline_unix_ms=deadline, on_timeout=action)

    async def copy(self, name: str) -> None:
        await self.node.create(sandbox_id=name, image=None, snapshot_id=f"snap{self.random.randrange(2)}")

    async def pause(self, name: str) -> None:
        memory = self.random.random() < 0.5
        await self.node.stub.Pause(wire.PauseRequest(sandbox_id=name, memory=memory), timeout=300)

    async def resume(self, name: str) -> None:
        request = wire.ResumeRequest(
            sandbox_id=name, deadline_unix_ms=now_ms() + 30_000, discard_memory=self.random.random() < 0.3
        )
        await self.node.stub.Resume(request, timeout=300)

    async def snapshot(self, name: str) -> None:
        snapshot = f"snap{self.random.randrange(2)}"
        if self.random.random() < 0.5:
            await self.node.stub.DeleteSnapshot(wire.DeleteSnapshotRequest(snapshot_id=snapshot), timeout=300)
        else:
            await self.node.stub.Snapshot(wire.SnapshotRequest(sandbox_id=name, snapshot_id=snapshot), timeout=300)

    async def kill(self, name: str) -> None:
        await self.node.stub.Kill(wire.KillRequest(sandbox_id=name), timeout=300)


async def stays(node: NodeProcess, sandbox_id: str) -> bool:
    """Move a sandbox's deadline away; False when it was quicker."""
    later = wire.SetDeadlineRequest(sandbox_id=sandbox_id, deadline_unix_ms=now_ms() + 900_000)
    waits_its_turn = wire.SetNetworkRequest(sandbox_id=sandbox_id, network=wire.Network(allow_internet=True))
    try:
        await node.stub.SetDeadline(later)
        await node.stub.SetNetwork(waits_its_turn)  # fails after a pause that had begun
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_nothing_is_left_after_a_storm() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    async with NodeProcess(warm_min=1, warm_max=2) as node:
        storm = Storm(node, seed)
        workers = [asyncio.create_task(storm.worker()) for _ in range(6)]
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(8)
            await node.kill_process()
            await node.start()
        storm.stopped = True
        await asyncio.gather(*workers, return_exceptions=True)

        for machine in await node.state():
            if machine.state == wire.MACHINE_STATE_RUNNING and await stays(node, machine.sandbox_id):
                assert (await run(machine.address, "echo alive")).text == "alive"
            if machine.state != wire.MACHINE_STATE_ENDED:
                with contextlib.suppress(grpc.aio.AioRpcError):  # its deadline was quicker
                    await node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id))
        ends = [one.sandbox_id for one in await node.state()]
        await node.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=ends))
        for number in range(2):
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may not be there
                await node.stub.DeleteSnapshot(wire.DeleteSnapshotRequest(snapshot_id=f"snap{number}"))
        await node.stop()
        left, log = node.host_traces(), node.log.read_text()
        await node.start()

    failures = [line for line in log.splitlines() if '"exception"' in line]
    assert (storm.unexpected, left, failures) == ([], [], [])
    assert storm.done > 20
