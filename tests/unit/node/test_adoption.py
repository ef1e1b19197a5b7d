"""A node process that is killed, and the one after it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from emberbox.node.errors import NodeBusy
from emberbox.node.model import EndReason, Network, State, TimeoutAction, now_ms
from emberbox.runtime.base import Rates
from tests.unit.node.conftest import until


async def test_running_sandboxes_outlive_the_node_process(make_world: Any) -> None:
    world = await make_world()
    created = await world.create("s1", network=Network(allow_internet=False))
    machine = world.runtime.of(world.node, "s1")
    await world.kill_process()
    world.slots.policies.clear()

    await world.start()

    assert world.node.machines.find("s1").status() == created
    assert world.runtime.of(world.node, "s1") is machine
    assert list(world.slots.policies.values()) == [Network(allow_internet=False)]


async def test_an_adopted_machine_is_watched_again(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.kill_process()
    await world.start()
    with world.node.events.subscribe() as subscription:
        world.runtime.of(world.node, "s1").die("gone")

        async with asyncio.timeout(60):
            event = await subscription.next()

    assert event.end_reason is EndReason.DIED


async def test_a_deadline_that_passed_meanwhile_is_enforced(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1", deadline_ms=now_ms() + 50)
    await world.kill_process()
    await asyncio.sleep(0.06)

    await world.start()

    async with asyncio.timeout(60):
        while world.runtime.machines:
            await asyncio.sleep(0.005)
    (status,) = world.node.machines.statuses()
    assert status.end_reason is EndReason.TIMED_OUT


async def test_what_has_no_record_is_swept(make_world: Any) -> None:
    world = await make_world(warm_max=2)
    await world.create("s1")
    async with asyncio.timeout(60):
        while world.node.pool.size == 0:
            await asyncio.sleep(0.005)
    reached = world.runtime.hold("start")
    create = asyncio.create_task(world.create("s2"))
    await asyncio.sleep(0)
    world.runtime.gates.clear()
    create.cancel()
    await asyncio.gather(create, return_exceptions=True)
    del reached
    (world.node.directory / "uppers" / "stray.ext4").touch()
    (world.node.directory / "machines" / "stray").mkdir()
    await world.kill_process()

    await world.start()

    left = world.left()
    assert left["sandboxes"] == ["s1"]
    assert (len(left["machines"]), len(left["uppers"]), len(left["slots"]), len(left["running"])) == (1, 1, 1, 1)


async def test_a_machine_that_ended_meanwhile_is_an_end(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.kill_process()
    await world.runtime.of(world.node, "s1").destroy()

    await world.start()

    (status,) = world.node.machines.statuses()
    assert (status.state, status.end_reason) == (State.ENDED, EndReason.DIED)
    assert set(world.left()) == {"records", "sandboxes"}


@pytest.mark.parametrize("failing", ["adopt", "apply"])
async def test_a_machine_that_cannot_be_adopted_leaves_nothing(make_world: Any, failing: str) -> None:
    world = await make_world()
    await world.create("s1")
    await world.kill_process()
    world.runtime.fail_adopt = "it does not answer" if failing == "adopt" else ""
    world.slots.refuse_policies = failing == "apply"

    await world.start()

    (status,) = world.node.machines.statuses()
    assert (status.state, status.end_reason) == (State.ENDED, EndReason.DIED)
    assert set(world.left()) == {"records", "sandboxes"}


async def test_nothing_is_deleted_through_a_mount_that_is_still_there(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    await world.create("s1")
    folder = world.runtime.of(world.node, "s1").spec.directory
    await world.kill_process()
    world.runtime.fail_adopt = "it does not answer"
    mounted = [str(folder / "root")]
    monkeypatch.setattr("emberbox.node.adoption.mounted_below", lambda path: mounted if path == folder else [])

    await world.start()
    left_alone = folder.exists()
    mounted.clear()
    await world.kill_process()
    await world.start()

    assert left_alone
    assert not folder.exists()


async def test_a_restarted_host_has_lost_what_ran_and_kept_what_was_paused(make_world: Any) -> None:
    world = await make_world()
    for name in ("running", "frozen", "files"):
        await world.create(name)
        world.runtime.of(world.node, name).spec.upper.write_bytes(name.encode())
    await world.node.machines.pause("frozen", memory=True)
    await world.node.machines.pause("files", memory=False)
    await world.kill_process()
    for machine in list(world.runtime.machines.values()):
        await machine.destroy()
    world.boot_id = "boot2"
    world.slots.used.clear()

    await world.start()

    found = {status.sandbox_id: status for status in world.node.machines.statuses()}
    assert (found["running"].state, found["running"].end_reason) == (State.ENDED, EndReason.LOST)
    for name in ("frozen", "files"):
        assert (found[name].state, found[name].memory_kept) == (State.PAUSED, False)
        await world.node.machines.resume(name, deadline_ms=now_ms() + 60_000, on_timeout=None, discard_memory=False)
        assert world.runtime.of(world.node, name).spec.upper.read_bytes() == name.encode()


async def test_a_pause_that_was_cut_short_is_undone(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")
    machine.frozen = True
    await world.kill_process()

    await world.start()

    assert not machine.frozen
    assert world.node.machines.find("s1").status().state is State.RUNNING


async def test_files_and_programs_that_a_snapshot_cut_short_left_frozen_are_thawed(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    agent = world.runtime.of(world.node, "s1").agent
    await world.kill_process()
    agent.told.clear()

    await world.start()

    await until(lambda: {"/fsthaw", "/unfreeze"} <= set(agent.told))


async def test_ends_are_reported_again_until_acknowledged(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1", deadline_ms=now_ms() + 10, on_timeout=TimeoutAction.KILL)
    async with asyncio.timeout(60):
        while world.runtime.machines:
            await asyncio.sleep(0.005)
    await world.kill_process()

    await world.start()

    assert [status.end_reason for status in world.node.machines.statuses()] == [EndReason.TIMED_OUT]
    await world.node.machines.acknowledge(["s1"])
    assert world.left() == {}


async def test_a_damaged_record_is_set_aside(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.create("s2")
    await world.kill_process()
    (world.node.directory / "records" / "s1.json").write_text("{")

    await world.start()

    assert [status.sandbox_id for status in world.node.machines.statuses()] == ["s2"]
    assert (world.node.directory / "records" / "s1.damaged").exists()
    assert len(world.runtime.machines) == 1


async def test_two_processes_cannot_share_a_directory(make_world: Any) -> None:
    world = await make_world()
    first = world.node

    with pytest.raises(NodeBusy, match="another node process"):
        await world.start()

    world.node = first


async def test_records_and_snapshots_from_before_there_were_rates_are_read(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.node.snapshots.take("s1", "snap", memory=False)
    await world.kill_process()
    for path in (
        world.node.directory / "records" / "s1.json",
        world.node.directory / "snapshots" / "snap" / "meta.json",
    ):
        written = json.loads(path.read_text())
        del written["limits"]["rates"]
        path.write_text(json.dumps(written))

    await world.start()

    record = world.node.machines.find("s1").record
    async with world.node.snapshots.used("snap", record.limits) as seed:
        assert seed.limits.rates == Rates()
    assert record.limits.rates == Rates()
