"""The node's service over a real unix socket."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberbox.node.main import listen, open_socket_to_group
from emberbox.node.model import now_ms
from emberbox.node.server import NodeService
from emberbox.runtime.base import Rates
from emberbox.settings import Settings
from emberbox.wire import node_pb2 as wire
from emberbox.wire import node_pb2_grpc


@dataclass
class Served:
    world: Any
    stub: Any
    socket: Path


@pytest.fixture
async def served(make_world: Any, tmp_path: Path) -> AsyncIterator[Served]:
    world = await make_world()
    socket = tmp_path / "run" / "node.sock"
    settings = Settings(data_dir=world.directory, node_address=f"unix:{socket}")
    server = grpc.aio.server()
    node_pb2_grpc.add_NodeServicer_to_server(NodeService(world.node), server)
    listen(server, settings)
    await server.start()
    open_socket_to_group(settings)
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        yield Served(world, node_pb2_grpc.NodeStub(channel), socket)
    await server.stop(0)


def create(sandbox_id: str = "s1", **changes: Any) -> wire.CreateRequest:
    values: dict[str, Any] = {
        "sandbox_id": sandbox_id,
        "template_id": "t",
        "image": wire.Image(build_id="b", layers=["aa"]),
        "cpu_count": 1,
        "memory_mb": 128,
        "disk_size_mb": 512,
        "network": wire.Network(allow_internet=True),
        "deadline_unix_ms": now_ms() + 60_000,
    }
    return wire.CreateRequest(**(values | changes))


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_only_root_and_the_group_reach_the_socket(served: Served) -> None:
    mode = stat.S_IMODE(served.socket.stat().st_mode)

    assert mode == 0o660


async def test_create_pause_resume_kill(served: Served) -> None:
    created = await served.stub.Create(create())
    paused = await served.stub.Pause(wire.PauseRequest(sandbox_id="s1", memory=True))
    resumed = await served.stub.Resume(wire.ResumeRequest(sandbox_id="s1", deadline_unix_ms=now_ms() + 60_000))
    await served.stub.Kill(wire.KillRequest(sandbox_id="s1"))

    states = [created.state, paused.state, resumed.state]
    assert states == [wire.MACHINE_STATE_RUNNING, wire.MACHINE_STATE_PAUSED, wire.MACHINE_STATE_RUNNING]
    assert served.world.left() == {}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"sandbox_id": "../x"}, grpc.StatusCode.INVALID_ARGUMENT, "letters and digits"),
        ({"sandbox_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "letters and digits"),
        ({"cpu_count": 0}, grpc.StatusCode.INVALID_ARGUMENT, "cpuCount must be positive, not 0"),
        ({"deadline_unix_ms": 0}, grpc.StatusCode.INVALID_ARGUMENT, "deadline"),
        ({"image": wire.Image(build_id="b")}, grpc.StatusCode.INVALID_ARGUMENT, "no layers"),
        ({"image": wire.Image(layers=["missing"])}, grpc.StatusCode.NOT_FOUND, "layer missing"),
        ({"image": None, "snapshot_id": "gone"}, grpc.StatusCode.NOT_FOUND, "snapshot 'gone'"),
        ({"network": wire.Network(rules_json='{"a":[]}')}, grpc.StatusCode.UNIMPLEMENTED, "rules"),
        ({"volume_mounts": [wire.VolumeMount(name="v")]}, grpc.StatusCode.UNIMPLEMENTED, "volumeMounts"),
    ],
)
async def test_bad_input_is_refused_and_leaves_nothing(
    served: Served, changes: dict[str, Any], code: grpc.StatusCode, words: str
) -> None:
    found, details = await refused(served.stub.Create(create(**changes)))

    assert found is code
    assert words in details
    assert served.world.left() == {}


async def test_states_and_absences_have_their_codes(served: Served) -> None:
    await served.stub.Create(create())

    assert (await refused(served.stub.Create(create())))[0] is grpc.StatusCode.ALREADY_EXISTS
    resume = wire.ResumeRequest(sandbox_id="s1", deadline_unix_ms=1)
    assert (await refused(served.stub.Resume(resume)))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert (await refused(served.stub.Kill(wire.KillRequest(sandbox_id="s2"))))[0] is grpc.StatusCode.NOT_FOUND
    assert (await refused(served.stub.Logs(wire.LogsRequest(sandbox_id="s2"))))[0] is grpc.StatusCode.NOT_FOUND
    snapshot = wire.DeleteSnapshotRequest(snapshot_id="none")
    assert (await refused(served.stub.DeleteSnapshot(snapshot)))[0] is grpc.StatusCode.NOT_FOUND
    bad = wire.SnapshotRequest(sandbox_id="s1", snapshot_id="../../etc")
    assert (await refused(served.stub.Snapshot(bad)))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_runtime_failure_is_internal_with_its_sentence(served: Served) -> None:
    served.world.runtime.fail_start = "cgroup limit refused"

    code, details = await refused(served.stub.Create(create()))

    assert (code, details) == (grpc.StatusCode.INTERNAL, "cgroup limit refused")


async def test_a_client_that_gives_up_undoes_its_create(served: Served) -> None:
    served.world.runtime.hold("start")

    code, _ = await refused(served.stub.Create(create(), timeout=0.05))

    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await gone(served.world) == {}


async def gone(world: Any) -> dict[str, list[str]]:
    async with asyncio.timeout(60):
        while world.left():
            await asyncio.sleep(0.005)
    return world.left()


async def test_watch_begins_with_the_state_and_goes_on_with_ends(served: Served) -> None:
    await served.stub.Create(create("s1"))
    watch = served.stub.Watch(wire.WatchRequest(), timeout=60)
    first = await watch.read()
    served.world.runtime.of(served.world.node, "s1").die("out of memory")

    second = await watch.read()
    again = await served.stub.Watch(wire.WatchRequest(), timeout=60).read()
    await served.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=["s1"]))
    after = await served.stub.Watch(wire.WatchRequest(), timeout=60).read()

    assert [machine.sandbox_id for machine in first.state.machines] == ["s1"]
    assert second.changed.end_reason == wire.END_REASON_DIED
    assert [machine.state for machine in again.state.machines] == [wire.MACHINE_STATE_ENDED]
    assert list(after.state.machines) == []
    watch.cancel()


async def test_a_fork_answers_one_result_each(served: Served) -> None:
    await served.stub.Create(create("s1"))
    deadline = now_ms() + 60_000
    creates = [wire.CreateRequest(sandbox_id=name, deadline_unix_ms=deadline) for name in ("f1", "s1", "f2")]

    answer = await served.stub.Fork(wire.ForkRequest(sandbox_id="s1", creates=creates))

    kinds = [result.WhichOneof("result") for result in answer.results]
    assert kinds == ["machine", "error", "machine"]
    assert "already" in answer.results[1].error


async def test_describe_tells_what_the_node_is(served: Served) -> None:
    await served.stub.Create(create("s1"))

    node = await served.stub.Describe(wire.DescribeRequest())

    assert (node.runtime, node.memory_snapshots, node.machines_running, node.creates_succeeded) == ("fake", False, 1, 1)
    assert node.cpu_count > 0
    assert node.memory_bytes > node.memory_used_bytes > 0
    assert node.disk_bytes > 0


async def test_rates_reach_the_machine(served: Served) -> None:
    rates = wire.Rates(disk_mb_per_second=5, disk_operations_per_second=100, network_mbit_per_second=8)

    await served.stub.Create(create("s1", rates=rates))
    refusal = await refused(served.stub.Create(create("s2", rates=wire.Rates(network_mbit_per_second=-1))))

    assert served.world.runtime.of(served.world.node, "s1").spec.limits.rates == Rates(5, 100, 8)
    assert refusal[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "network_mbit_per_second must not be negative" in refusal[1]


def build(**changes: Any) -> wire.BuildRequest:
    values = {"build_id": "b", "cpu_count": 1, "memory_mb": 1, "disk_size_mb": 1}
    return wire.BuildRequest(**(values | changes))


async def test_builds_that_cannot_be_say_why(served: Served) -> None:
    (event,) = [event async for event in served.stub.Build(build())]

    assert "recipe, an image or another build" in event.failed.message
    assert event.failed.step == "base"


async def test_a_build_that_has_ended_can_be_followed_and_cancelled(served: Served) -> None:
    first = [event async for event in served.stub.Build(build())]

    again = [event async for event in served.stub.FollowBuild(wire.FollowBuildRequest(build_id="b"))]
    await served.stub.CancelBuild(wire.CancelBuildRequest(build_id="b"))

    assert again == first


async def test_builds_that_nobody_started_are_not_found(served: Served) -> None:
    follow = served.stub.FollowBuild(wire.FollowBuildRequest(build_id="none"))
    cancel = served.stub.CancelBuild(wire.CancelBuildRequest(build_id="none"))

    assert (await refused(follow.read()))[0] is grpc.StatusCode.NOT_FOUND
    assert (await refused(cancel))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"build_id": "../x"}, "build ID"),
        ({"build_id": ""}, "build ID"),
        ({"steps": [wire.BuildStep(type="FROM", args=["x"])]}, "unknown type"),
        ({"cpu_count": 0}, "cpuCount"),
        ({"rates": wire.Rates(disk_mb_per_second=-1)}, "disk_mb_per_second"),
    ],
)
async def test_a_build_that_makes_no_sense_is_refused_at_once(
    served: Served, changes: dict[str, Any], words: str
) -> None:
    code, message = await refused(served.stub.Build(build(**changes)).read())

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in message


async def test_a_stopping_node_asks_to_try_again(served: Served) -> None:
    watch = served.stub.Watch(wire.WatchRequest(), timeout=60)
    await watch.read()

    await served.world.node.close()

    assert (await refused(watch.read()))[0] is grpc.StatusCode.UNAVAILABLE
    assert (await refused(served.stub.Create(create())))[0] is grpc.StatusCode.UNAVAILABLE
    await served.world.start()
