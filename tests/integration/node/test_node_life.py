"""A node process with real containers: the life of sandboxes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberbox.wire import node_pb2 as wire
from tests.support.node import NodeProcess, now_ms, run

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("node_life")]


async def kill(node: NodeProcess, sandbox_id: str) -> None:
    await node.stub.Kill(wire.KillRequest(sandbox_id=sandbox_id), timeout=300)


def runs(pid: int) -> bool:
    """False for a process that is gone or that the host has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_a_sandbox_runs_commands_as_its_user_and_knows_itself(node: NodeProcess) -> None:
    machine = await node.create(env_vars={"GREETING": "hello"})

    output = await run(machine.address, 'echo "$(id -un) $GREETING $E2B_SANDBOX_ID $(pwd)"')

    expected = f"user hello {machine.sandbox_id} /home/user"
    assert output.text == expected
    await kill(node, machine.sandbox_id)


async def test_its_limits_hold(node: NodeProcess) -> None:
    machine = await node.create(memory_mb=256, disk_size_mb=512)

    memory = await run(machine.address, "python3 -c 'bytearray(600 << 20)'")
    disk = await run(machine.address, "dd if=/dev/zero of=big bs=1M count=700; df -m /home/user | tail -1")

    assert memory.code != 0
    assert "No space left" in disk.text
    assert (await run(machine.address, "echo alive")).text == "alive"
    await kill(node, machine.sandbox_id)


async def test_a_killed_sandbox_leaves_nothing(node: NodeProcess) -> None:
    machine = await node.create()
    pid = node.container_pid(machine.address)

    await kill(node, machine.sandbox_id)

    assert node.traces() == []
    assert not runs(pid)
    assert (await refused(node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id))))[0] is (
        grpc.StatusCode.NOT_FOUND
    )


async def test_processes_go_on_after_a_pause_in_memory(node: NodeProcess) -> None:
    machine = await node.create()
    ticks = "while true; do date +%s%N > /tmp/tick.new; mv /tmp/tick.new /tmp/tick; sleep 0.05; done"
    await run(machine.address, f"({ticks}) >/dev/null 2>&1 &")
    await run(machine.address, "until [ -s /tmp/tick ]; do sleep 0.05; done")

    paused = await node.stub.Pause(wire.PauseRequest(sandbox_id=machine.sandbox_id, memory=True))
    resumed = await node.stub.Resume(
        wire.ResumeRequest(sandbox_id=machine.sandbox_id, deadline_unix_ms=now_ms() + 900_000)
    )
    first = await run(resumed.address, "cat /tmp/tick")
    ticked = f"until [ $(cat /tmp/tick) != {first.text} ]; do sleep 0.05; done; cat /tmp/tick"
    second = await run(resumed.address, ticked)

    assert (paused.state, paused.memory_kept, paused.address) == (wire.MACHINE_STATE_PAUSED, True, "")
    assert int(second.text) > int(first.text)
    await kill(node, machine.sandbox_id)


async def test_files_alone_are_kept_when_asked_again_and_again(node: NodeProcess) -> None:
    machine = await node.create()
    await run(machine.address, "echo 0 > count; sudo chown 1234:4321 /tmp; sleep 1000 >/dev/null 2>&1 &")

    for turn in range(1, 4):
        await node.stub.Pause(wire.PauseRequest(sandbox_id=machine.sandbox_id, memory=False))
        machine = await node.stub.Resume(
            wire.ResumeRequest(sandbox_id=machine.sandbox_id, deadline_unix_ms=now_ms() + 900_000)
        )
        await run(machine.address, f"test $(cat count) = {turn - 1} && echo {turn} > count")

    output = await run(machine.address, "cat count; stat -c '%U %a' count; stat -c %u:%g /tmp; pgrep -c sleep")
    assert output.text.split("\n") == ["3", "user 644", "1234:4321", "0"]
    assert len([trace for trace in node.traces() if trace.startswith("uppers/")]) == 1
    await kill(node, machine.sandbox_id)


async def test_a_snapshot_starts_others_and_leaves_its_source_alone(node: NodeProcess) -> None:
    source = await node.create(env_vars={"FROM": "source"})
    await run(source.address, "echo before > file; sudo sh -c 'echo root > /etc/of-root'")

    snapshot = await node.stub.Snapshot(wire.SnapshotRequest(sandbox_id=source.sandbox_id, snapshot_id="snap1"))
    await run(source.address, "echo after > file")
    copy = await node.create(image=None, snapshot_id="snap1")
    output = await run(copy.address, "cat file /etc/of-root; stat -c %U file /etc/of-root; echo $FROM")

    assert not snapshot.memory_kept
    assert snapshot.size_bytes > 0
    assert output.text.split("\n") == ["before", "root", "user", "root", "source"]
    assert (await run(source.address, "cat file")).text == "after"
    await node.stub.DeleteSnapshot(wire.DeleteSnapshotRequest(snapshot_id="snap1"))
    await kill(node, copy.sandbox_id)
    await kill(node, source.sandbox_id)
    assert node.traces() == []


async def test_forks_are_copies_of_the_same_instant(node: NodeProcess) -> None:
    source = await node.create()
    await run(source.address, "echo shared > file")
    creates = [
        wire.CreateRequest(
            sandbox_id=f"fork{number}",
            access_token="other-token",
            deadline_unix_ms=now_ms() + 900_000,
            network=wire.Network(allow_internet=True),
        )
        for number in range(3)
    ]

    answer = await node.stub.Fork(wire.ForkRequest(sandbox_id=source.sandbox_id, creates=creates), timeout=300)
    assert [result.error for result in answer.results] == [""] * 3
    outputs = [
        await run(result.machine.address, "cat file; cat /etc/machine-id", token="other-token")
        for result in answer.results
    ]

    assert [output.text.split("\n")[0] for output in outputs] == ["shared"] * 3
    assert len({output.text.split("\n")[1] for output in outputs}) == 3
    for name in ("fork0", "fork1", "fork2", source.sandbox_id):
        await kill(node, name)
    assert node.traces() == []


async def test_the_deadline_ends_it_and_says_so(node: NodeProcess) -> None:
    watch = node.stub.Watch(wire.WatchRequest(), timeout=300)
    await watch.read()
    machine = await node.create(deadline_unix_ms=now_ms() + 500)

    ended = await node.event(watch, machine.sandbox_id)

    watch.cancel()
    assert ended.end_reason == wire.END_REASON_TIMED_OUT
    await node.until(lambda: len(node.traces()) == 1)
    await node.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=[machine.sandbox_id]))
    assert node.traces() == []


async def test_the_deadline_can_pause_it(node: NodeProcess) -> None:
    watch = node.stub.Watch(wire.WatchRequest(), timeout=300)
    await watch.read()
    machine = await node.create(deadline_unix_ms=now_ms() + 500, on_timeout=wire.TIMEOUT_ACTION_PAUSE_FILES)

    paused = await node.event(watch, machine.sandbox_id)

    watch.cancel()
    assert (paused.state, paused.memory_kept) == (wire.MACHINE_STATE_PAUSED, False)
    resumed = await node.stub.Resume(
        wire.ResumeRequest(sandbox_id=machine.sandbox_id, deadline_unix_ms=now_ms() + 900_000)
    )
    assert (await run(resumed.address, "echo back")).text == "back"
    await kill(node, machine.sandbox_id)


async def test_a_machine_that_dies_is_reported_and_removed(node: NodeProcess) -> None:
    watch = node.stub.Watch(wire.WatchRequest(), timeout=300)
    await watch.read()
    machine = await node.create()

    os.kill(node.container_pid(machine.address), signal.SIGKILL)
    ended = await asyncio.wait_for(node.event(watch, machine.sandbox_id), 120)

    watch.cancel()
    assert ended.end_reason == wire.END_REASON_DIED
    await node.until(lambda: len(node.traces()) == 1)
    await node.stub.Acknowledge(wire.AcknowledgeRequest(sandbox_ids=[machine.sandbox_id]))


async def test_a_kill_in_the_middle_of_a_create_leaves_nothing(node: NodeProcess) -> None:
    create = asyncio.create_task(node.create(sandbox_id="half"))
    answered = False
    while not answered:
        try:
            await kill(node, "half")
            answered = True
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.002)

    (result,) = await asyncio.gather(create, return_exceptions=True)

    assert isinstance(result, grpc.aio.AioRpcError)
    assert result.code() is grpc.StatusCode.ABORTED
    await node.until(lambda: node.traces() == [])


async def test_a_paused_sandbox_can_be_killed(node: NodeProcess) -> None:
    for memory in (True, False):
        machine = await node.create()
        await node.stub.Pause(wire.PauseRequest(sandbox_id=machine.sandbox_id, memory=memory))

        await kill(node, machine.sandbox_id)

        assert node.traces() == []


async def test_closed_networks_stay_closed_and_can_be_opened(node: NodeProcess) -> None:
    machine = await node.create(network=wire.Network(allow_internet=False))
    probe = "timeout 60 bash -c '</dev/tcp/192.0.2.1/9' 2>&1 | grep -o -m1 refused | head -1"

    before = await run(machine.address, probe)
    changed = await node.stub.SetNetwork(
        wire.SetNetworkRequest(
            sandbox_id=machine.sandbox_id, network=wire.Network(allow_internet=True, deny_out=["203.0.113.0/24"])
        )
    )
    denied = await run(machine.address, probe.replace("192.0.2.1", "203.0.113.1"))

    assert before.text == "refused"
    assert changed.state == wire.MACHINE_STATE_RUNNING
    assert denied.text == "refused"
    code, words = await refused(
        node.stub.SetNetwork(
            wire.SetNetworkRequest(sandbox_id=machine.sandbox_id, network=wire.Network(deny_out=["nonsense"]))
        )
    )
    assert (code, "nonsense" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    await kill(node, machine.sandbox_id)


async def test_logs_and_samples_come_from_the_machine(node: NodeProcess) -> None:
    watch = node.stub.Watch(wire.WatchRequest(), timeout=300)
    await watch.read()
    machine = await node.create()
    await run(machine.address, "echo logged")

    logs = await node.stub.Logs(wire.LogsRequest(sandbox_id=machine.sandbox_id))
    sample = None
    while sample is None:
        event = await watch.read()
        found = [one for one in event.samples.samples if one.sandbox_id == machine.sandbox_id]
        sample = found[0] if found else None

    watch.cancel()
    assert logs.entries
    assert 0 < sample.memory_used_bytes < 256 << 20
    assert sample.memory_total_bytes == 256 << 20
    assert 900 << 20 < sample.disk_total_bytes <= 1024 << 20
    await kill(node, machine.sandbox_id)
    after = await node.stub.Logs(wire.LogsRequest(sandbox_id=machine.sandbox_id))
    assert len(after.entries) >= len(logs.entries)


async def test_start_and_ready_commands_run_before_create_answers(node: NodeProcess) -> None:
    image = wire.Image()
    image.CopyFrom(node.image)
    image.build_id = "serving"
    image.start_command = "sleep 0.3; echo $WHERE > /tmp/ready; exec python3 -m http.server 8000"
    image.ready_command = "test -s /tmp/ready && curl -sf localhost:8000 > /dev/null"
    image.env_vars["WHERE"] = "template"

    machine = await node.create(image=image)

    assert (await run(machine.address, "cat /tmp/ready; stat -c %U /tmp/ready")).text == "template\nuser"
    await kill(node, machine.sandbox_id)
