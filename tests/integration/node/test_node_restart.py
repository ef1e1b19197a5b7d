"""A node process that is killed with real containers running, and the one after it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import grpc
import pytest

from emberbox.wire import node_pb2 as wire
from tests.support.node import NodeProcess, now_ms, run

pytestmark = [pytest.mark.root]


@pytest.fixture
async def own_node() -> AsyncIterator[NodeProcess]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")
    async with NodeProcess(warm_min=1, warm_max=2) as entered:
        yield entered


async def test_a_killed_node_process_costs_nothing(own_node: NodeProcess) -> None:
    node = own_node
    running = await node.create(network=wire.Network(allow_internet=False))
    frozen = await node.create()
    files = await node.create()
    for machine in (running, frozen, files):
        await run(machine.address, f"echo {machine.sandbox_id} > mine")
    await run(running.address, "sleep 1000 > /dev/null 2>&1 & echo $! > pid")
    await node.stub.Pause(wire.PauseRequest(sandbox_id=frozen.sandbox_id, memory=True))
    await node.stub.Pause(wire.PauseRequest(sandbox_id=files.sandbox_id, memory=False))
    create = asyncio.create_task(node.create(sandbox_id="half"))
    await asyncio.sleep(0.01)
    await node.kill_process()
    await asyncio.gather(create, return_exceptions=True)

    during = await run(running.address, "cat mine")
    await node.start()

    state = {machine.sandbox_id: machine for machine in await node.state()}
    state.pop("half", None)  # its create may have been complete
    assert during.text == running.sandbox_id
    assert state[running.sandbox_id] == running
    assert state[frozen.sandbox_id].memory_kept
    assert state[files.sandbox_id].state == wire.MACHINE_STATE_PAUSED
    assert (await run(running.address, "kill -0 $(cat pid) && echo same")).text == "same"
    refused = await run(running.address, "timeout 60 bash -c '</dev/tcp/192.0.2.1/9' 2>&1 | grep -o refused | head -1")
    assert refused.text == "refused"
    for machine in (frozen, files):
        resume = wire.ResumeRequest(sandbox_id=machine.sandbox_id, deadline_unix_ms=now_ms() + 900_000)
        resumed = await node.stub.Resume(resume)
        assert (await run(resumed.address, "cat mine")).text == machine.sandbox_id


async def test_an_adopted_machine_is_watched_and_keeps_its_deadline(own_node: NodeProcess) -> None:
    node = own_node
    dies = await node.create()
    expires = await node.create(deadline_unix_ms=now_ms() + 4_000)
    pid = node.container_pid(dies.address)
    await node.kill_process()
    await node.start()
    os.kill(pid, signal.SIGKILL)

    reasons: dict[str, int] = {}
    async with asyncio.timeout(180):
        while set(reasons) != {dies.sandbox_id, expires.sandbox_id}:
            reasons = {one.sandbox_id: one.end_reason for one in await node.state() if one.end_reason}
            await asyncio.sleep(0.1)
    assert reasons == {dies.sandbox_id: wire.END_REASON_DIED, expires.sandbox_id: wire.END_REASON_TIMED_OUT}


async def test_what_ended_meanwhile_is_told_until_acknowledged(own_node: NodeProcess) -> None:
    node = own_node
    machine = await node.create()
    pid = node.container_pid(machine.address)
    await node.kill_process()
    os.kill(pid, signal.SIGKILL)
    await node.start()

    first = await node.state()
    await node.kill_process()
    await node.start()
    second = await node.state()
    await node.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=[machine.sandbox_id]))

    reasons = [(one.sandbox_id, one.end_reason) for one in (*first, *second)]
    assert reasons == [(machine.sandbox_id, wire.END_REASON_DIED)] * 2
    assert await node.state() == []


async def test_a_pause_cut_short_leaves_the_sandbox_running(own_node: NodeProcess) -> None:
    node = own_node
    machine = await node.create()
    pause = asyncio.ensure_future(
        node.stub.Pause(wire.PauseRequest(sandbox_id=machine.sandbox_id, memory=True), timeout=300)
    )
    await asyncio.sleep(0.001)
    await node.kill_process()
    await asyncio.gather(pause, return_exceptions=True)
    await node.start()

    (status,) = await node.state()
    if status.state == wire.MACHINE_STATE_PAUSED:  # it was quicker than the kill
        resume = wire.ResumeRequest(sandbox_id=machine.sandbox_id, deadline_unix_ms=now_ms() + 900_000)
        status = await node.stub.Resume(resume)

    assert (await run(status.address, "echo alive")).text == "alive"


async def test_a_clean_stop_leaves_running_machines_and_nothing_else(own_node: NodeProcess) -> None:
    node = own_node
    machine = await node.create()

    await node.stop()
    while_stopped = await run(machine.address, "echo alive")
    leftovers = [trace for trace in node.traces() if trace.startswith("uppers/")]
    await node.start()
    await node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id))
    await node.stop()
    traces = node.host_traces()
    await node.start()

    assert while_stopped.text == "alive"
    assert len(leftovers) == 1
    assert traces == []


async def test_a_second_node_process_is_refused(own_node: NodeProcess) -> None:
    node = own_node
    second = node.spawn()

    code = await asyncio.to_thread(second.wait, 60)

    assert code != 0
    assert "another node process already works in" in node.log.read_text()
    assert (await node.stub.Describe(wire.DescribeRequest())).runtime == "container"


async def test_the_warm_pool_makes_the_next_create_quick(own_node: NodeProcess) -> None:
    node = own_node
    await node.create()
    await node.until(lambda: '"event": "pool.added"' in node.log.read_text())

    machine = await node.create()

    events = [json.loads(line) for line in node.log.read_text().splitlines() if line.startswith("{")]
    created = {event["sandbox_id"]: event["warm"] for event in events if event["event"] == "sandbox.created"}
    assert created[machine.sandbox_id] is True
    assert (await run(machine.address, "echo warm")).text == "warm"


async def test_many_at_once_all_start(own_node: NodeProcess) -> None:
    node = own_node

    results = await asyncio.gather(*(node.create() for _ in range(20)), return_exceptions=True)

    failures = [result.details() for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert failures == []
    assert len({result.address for result in results}) == 20  # type: ignore[union-attr]
