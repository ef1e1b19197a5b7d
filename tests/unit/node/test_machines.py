"""The life of sandboxes on a node, with a fake runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from structlog.testing import capture_logs

from emberbox.node import hosting
from emberbox.node.agent import Agent
from emberbox.node.errors import (
    AgentFailure,
    AlreadyHere,
    Interrupted,
    LayerMissing,
    NodeFull,
    NoSuchSandbox,
    NoSuchSnapshot,
    WrongState,
)
from emberbox.node.model import EndReason, Image, Network, State, TimeoutAction, now_ms
from emberbox.runtime.base import Limits, Rates
from emberbox.runtime.errors import RuntimeFailure, SavedDamaged, SavedUnfit
from tests.unit.node.conftest import until

RATES = Rates(disk_mb_per_second=5, network_mbit_per_second=8)
LIMITED = Limits(cpu_count=1, memory_mb=128, disk_size_mb=512, rates=RATES)


def later(milliseconds: int) -> int:
    return now_ms() + milliseconds


async def test_a_created_sandbox_is_told_who_it_is(make_world: Any) -> None:
    world = await make_world()

    status = await world.create("s1", env_vars={"OWN": "1"}, access_token="secret")

    init = world.runtime.of(world.node, "s1").agent.inits[-1]
    assert status.state is State.RUNNING
    assert status.address == str(world.runtime.of(world.node, "s1").address)
    assert init["envVars"] == {"FROM": "template", "OWN": "1"}
    assert (init["accessToken"], init["sandboxID"], init["templateID"]) == ("secret", "s1", "t1")
    assert init["limits"] == {"cpuCount": 1, "memoryBytes": 128 << 20, "diskBytes": 512 << 20}


async def test_an_id_is_used_once(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")

    with pytest.raises(AlreadyHere, match="s1"):
        await world.create("s1")

    assert world.node.machines.find("s1").status().state is State.RUNNING


async def test_a_failed_start_leaves_nothing(make_world: Any) -> None:
    world = await make_world()
    world.runtime.fail_start = "no room in the inn"

    with pytest.raises(RuntimeFailure, match="no room in the inn"):
        await world.create("s1")

    assert world.left() == {}


async def test_a_refused_init_leaves_nothing(make_world: Any) -> None:
    world = await make_world()
    world.runtime.refuse_init = True

    with pytest.raises(AgentFailure, match="500"):
        await world.create("s1")

    assert world.left() == {}


async def test_a_missing_layer_leaves_nothing(make_world: Any) -> None:
    world = await make_world()

    with pytest.raises(LayerMissing):
        await world.create("s1", image=Image("b", ("missing",)))

    assert world.left() == {}


async def test_a_cancelled_create_leaves_nothing(make_world: Any) -> None:
    world = await make_world()
    reached = world.runtime.hold("start")
    create = asyncio.create_task(world.create("s1"))
    await reached.wait()

    create.cancel()
    await asyncio.gather(create, return_exceptions=True)

    assert world.left() == {}


async def test_a_machine_that_ends_while_it_starts_is_an_error_at_once(make_world: Any) -> None:
    world = await make_world()
    world.runtime.stall_init = True
    create = asyncio.create_task(world.create("s1"))
    await until(lambda: world.runtime.machines)
    machine = next(iter(world.runtime.machines.values()))
    await machine.agent.init_reached.wait()

    await world.node.machines.kill("s1")

    with pytest.raises(Interrupted, match="killed"):
        await create
    assert world.left() == {}


async def test_a_node_that_is_full_says_so(make_world: Any) -> None:
    world = await make_world(max_machines=1)
    await world.create("s1")

    with pytest.raises(NodeFull, match="runs 1 machines"):
        await world.create("s2")


async def test_a_network_policy_is_in_force_before_the_sandbox_is_there(make_world: Any) -> None:
    world = await make_world()
    closed = Network(allow_internet=False)

    await world.create("s1", network=closed)

    assert list(world.slots.policies.values()) == [closed]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_pause_and_resume(make_world: Any, memory: bool, keep: bool) -> None:
    world = await make_world(memory=memory)
    await world.create("s1")
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"written by the user")

    paused = await world.node.machines.pause("s1", memory=keep)
    resumed = await world.node.machines.resume(
        "s1", deadline_ms=later(60_000), on_timeout=TimeoutAction.PAUSE, discard_memory=False
    )

    machine = world.runtime.of(world.node, "s1")
    assert (paused.state, paused.memory_kept, paused.deadline_ms, paused.address) == (State.PAUSED, keep, 0, "")
    assert resumed.state is State.RUNNING
    assert not machine.frozen
    assert machine.spec.upper.read_bytes() == b"written by the user"
    assert machine.agent.inits[-1]["accessToken"] == "token"
    left = world.left()
    assert (len(left["uppers"]), len(left["machines"]), len(left["slots"]), left.get("saved")) == (1, 1, 1, None)


async def test_memory_on_the_disk_frees_the_machine(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")

    await world.node.machines.pause("s1", memory=True)

    await until(lambda: set(world.left()) == {"saved", "records", "sandboxes"})


async def test_a_resume_waits_for_the_end_of_the_machine_that_the_pause_left(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    before = world.runtime.of(world.node, "s1")
    await world.node.machines.pause("s1", memory=True)

    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    assert before.destroyed
    assert world.runtime.of(world.node, "s1") is not before


async def test_a_kill_waits_for_the_end_of_the_machine_that_the_pause_left(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await world.node.machines.pause("s1", memory=True)

    await world.node.machines.kill("s1")

    assert world.left() == {}


async def test_discarding_memory_starts_cold_from_the_files(make_world: Any, any_runtime: Any) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1")
    before = world.runtime.of(world.node, "s1")
    before.spec.upper.write_bytes(b"files")
    await world.node.machines.pause("s1", memory=True)

    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=True)

    machine = world.runtime.of(world.node, "s1")
    assert machine is not before
    assert before.destroyed
    assert machine.spec.upper.read_bytes() == b"files"
    assert machine is world.runtime.made[-1]
    assert len(world.runtime.machines) <= 2  # it, and maybe one that a template's memory is made of


async def test_programs_stand_still_in_every_memory_that_is_saved_and_go_on_in_what_runs_on(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    agent = world.runtime.of(world.node, "s1").agent
    (template,) = [machine.agent for machine in world.runtime.made if machine.agent is not agent]
    assert template.told[-2:] == ["/freeze", "saved"]

    agent.told.clear()
    await world.node.snapshots.take("s1", "snap", memory=True)
    assert agent.told == ["/freeze", "saved", "/unfreeze"]

    agent.told.clear()
    await world.node.machines.pause("s1", memory=True)
    assert sorted(agent.told[:2]) == ["/freeze", "/logs"]
    assert agent.told[2:] == ["saved"]


async def test_a_source_is_asked_to_let_its_programs_go_on_before_its_clock_does(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    agent = world.runtime.of(world.node, "s1").agent
    reached = world.runtime.hold("resume")

    taking = asyncio.create_task(world.node.snapshots.take("s1", "snap", memory=True))
    await reached.wait()
    await until(lambda: agent.waiting == 1)

    world.runtime.gates["resume"].set()
    await taking
    assert agent.told[-3:] == ["/freeze", "saved", "/unfreeze"]


async def test_programs_go_on_in_a_source_whose_clock_took_long_to(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    agent = world.runtime.of(world.node, "s1").agent
    monkeypatch.setattr(hosting, "_THAW_PAUSE", 0.01)
    monkeypatch.setattr(world.node.machines.find("s1").hosted.agent, "_scale", 0.02)
    reached = world.runtime.hold("resume")

    taking = asyncio.create_task(world.node.snapshots.take("s1", "snap", memory=True))
    await reached.wait()
    await asyncio.sleep(1)  # longer than all its tries together
    world.runtime.gates["resume"].set()
    await taking

    assert agent.told[-1] == "/unfreeze"


async def test_what_must_outlive_a_power_cut_is_said_to_the_runtime(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")

    await world.node.snapshots.take("s1", "snap", memory=True)
    await world.node.snapshots.fork("s1", [world.new("f1", image=None, snapshot_id="fork")])
    await world.node.machines.pause("s1", memory=True)

    assert machine.lasting == [True, False, True]


async def with_one_waiting(make_world: Any) -> tuple[Any, Any]:
    """A node with a sandbox, and the machine that waits in its pool."""
    world = await make_world(memory=True, warm_max=1)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    (waiting,) = [machine for machine in world.runtime.made if machine.frozen and not machine.destroyed]
    return world, waiting


async def test_a_machine_of_the_pool_is_connected_to_before_its_clock_goes_on(make_world: Any) -> None:
    world, waiting = await with_one_waiting(make_world)
    reached = world.runtime.hold("resume")

    creating = asyncio.create_task(world.create("s2"))
    await reached.wait()
    await until(lambda: waiting.agent.waiting == 1)

    world.runtime.gates["resume"].set()
    await creating
    assert world.runtime.of(world.node, "s2") is waiting
    assert len(waiting.agent.inits) == 2


async def test_an_agent_has_its_time_from_when_its_machine_goes_on(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, waiting = await with_one_waiting(make_world)
    reached = world.runtime.hold("resume")
    init = Agent.init

    async def note(agent: Agent, *arguments: Any, seconds: float, **others: Any) -> None:
        await init(agent, *arguments, seconds=seconds / 10, **others)

    monkeypatch.setattr(Agent, "init", note)
    creating = asyncio.create_task(world.create("s2"))
    await reached.wait()

    await asyncio.sleep(0.8)  # what an agent has whose machine runs is half a second now
    world.runtime.gates["resume"].set()
    await creating
    assert world.runtime.of(world.node, "s2") is waiting


async def test_a_machine_of_the_pool_whose_agent_says_nothing_after_the_resume_is_replaced(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, waiting = await with_one_waiting(make_world)
    monkeypatch.setattr(hosting, "ANSWER_SECONDS", 0.2)
    waiting.agent.stall_init.clear()

    with capture_logs() as logs:
        await world.create("s2")

    assert waiting.destroyed
    (failed,) = [entry for entry in logs if entry["event"] == "pool.claim_failed"]
    assert "within 0.2 s of the resume" in failed["error"]


async def test_a_machine_of_the_pool_that_does_not_go_on_is_replaced(make_world: Any) -> None:
    world, waiting = await with_one_waiting(make_world)
    world.runtime.fail_resume = "it does not go on"

    await world.create("s2")
    assert waiting.destroyed
    assert world.runtime.of(world.node, "s2") is not waiting


async def test_programs_go_on_when_the_memory_cannot_be_saved(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    agent = world.runtime.of(world.node, "s1").agent
    world.runtime.fail_save = "no room"

    for save in (
        lambda: world.node.snapshots.take("s1", "snap", memory=True),
        lambda: world.node.machines.pause("s1", memory=True),
    ):
        agent.told.clear()
        with pytest.raises(RuntimeFailure):
            await save()
        assert agent.told[-1] == "/unfreeze"
        assert "/freeze" in agent.told


async def test_programs_are_thawed_until_the_agent_has_done_it(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    monkeypatch.setattr(hosting, "_THAW_PAUSE", 0.01)
    machine = world.runtime.of(world.node, "s1")
    machine.agent.refuse_thaws = 2
    machine.agent.told.clear()

    await world.node.snapshots.take("s1", "snap", memory=True)
    assert machine.agent.told == ["/freeze", "saved", "/unfreeze", "/unfreeze", "/unfreeze"]

    hosted = world.node.machines.find("s1").hosted
    machine.agent.refuse_thaws = 100
    machine.agent.told.clear()
    machine.ended.set()
    await hosted.thaw_programs()
    assert machine.agent.told.count("/unfreeze") <= 1, "nobody is there to thaw"


async def test_an_agent_that_cannot_stop_programs_does_not_keep_a_sandbox_from_being_paused(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    world.runtime.of(world.node, "s1").agent.refuse_freeze = True

    await world.node.machines.pause("s1", memory=True)

    assert world.node.machines.find("s1").status().state is State.PAUSED


async def paused_with_unflushed_files(make_world: Any) -> Any:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"old")
    await world.node.machines.pause("s1", memory=True)
    return world


async def test_memory_that_is_discarded_is_flushed_to_the_disk_before(make_world: Any) -> None:
    world = await paused_with_unflushed_files(make_world)

    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=True)

    flushed, machine = world.runtime.made[-2:]
    assert world.runtime.restored[-1].memory
    assert flushed.agent.told == ["/init", "/fsfreeze"]
    assert flushed.destroyed
    assert world.slots.applied[-1] == Network(allow_internet=False)
    assert machine.spec.upper == flushed.spec.upper
    assert len(list((world.node.directory / "uppers").iterdir())) == 1


async def test_a_snapshot_of_the_files_of_a_paused_sandbox_has_what_its_guest_held(make_world: Any) -> None:
    world = await paused_with_unflushed_files(make_world)

    meta = await world.node.snapshots.take("s1", "snap", memory=False)

    assert world.runtime.made[-1].agent.told == ["/init", "/fsfreeze"]
    assert (meta.saved.memory, world.runtime.made[-1].destroyed) == (False, True)
    assert list((world.node.directory / "uppers").iterdir()) == []


async def test_memory_that_cannot_be_restored_any_more_leaves_the_disk_as_it_is(make_world: Any) -> None:
    world = await paused_with_unflushed_files(make_world)
    restore = world.runtime.restore

    async def damaged(spec: Any, saved: Any) -> Any:
        if saved.memory:
            raise SavedDamaged("the checksum differs")
        return await restore(spec, saved)

    world.runtime.restore = damaged
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=True)

    assert world.runtime.of(world.node, "s1").spec.upper.read_bytes() == b"old"


async def test_a_resume_that_fails_leaves_the_sandbox_paused(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"files")
    await world.node.machines.pause("s1", memory=False)
    world.runtime.fail_start = "not now"

    with pytest.raises(RuntimeFailure, match="not now"):
        await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    world.runtime.fail_start = ""
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    assert world.runtime.of(world.node, "s1").spec.upper.read_bytes() == b"files"


async def test_a_cold_resume_that_does_not_come_to_its_end_leaves_the_disk_as_it_was(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    left = world.runtime.of(world.node, "s1").spec.upper
    left.write_bytes(b"files")
    await world.node.machines.pause("s1", memory=False)
    reached = world.runtime.hold("start")
    resume = asyncio.create_task(
        world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    )
    await reached.wait()
    copies = set(left.parent.iterdir()) - {left}
    for copy in copies:
        copy.write_bytes(b"half-written")

    resume.cancel()
    await asyncio.gather(resume, return_exceptions=True)

    assert len(copies) == 1
    assert list(left.parent.iterdir()) == [left]
    world.runtime.gates["start"].set()
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    now = world.runtime.of(world.node, "s1").spec.upper
    assert now.read_bytes() == b"files"
    assert list(left.parent.iterdir()) == [now]


async def test_a_cold_resume_goes_on_in_place_when_a_copy_of_the_disk_does_not_fit(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    left = world.runtime.of(world.node, "s1").spec.upper
    await world.node.machines.pause("s1", memory=False)
    world.disks.full = True

    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    assert world.runtime.of(world.node, "s1").spec.upper == left
    assert left.exists()


async def test_a_pause_that_fails_leaves_the_sandbox_running(make_world: Any, any_runtime: Any) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1")
    reached = world.runtime.hold("save" if any_runtime.capabilities.memory_snapshots else "pause")
    pause = asyncio.create_task(world.node.machines.pause("s1", memory=True))
    await reached.wait()

    pause.cancel()
    await asyncio.gather(pause, return_exceptions=True)

    assert world.node.machines.find("s1").status().state is State.RUNNING
    assert not world.runtime.of(world.node, "s1").frozen
    assert world.left().get("saved") is None


async def test_states_are_kept_apart(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")

    with pytest.raises(WrongState, match="running, not paused"):
        await world.node.machines.resume("s1", deadline_ms=later(1), on_timeout=None, discard_memory=False)
    await world.node.machines.pause("s1", memory=True)
    with pytest.raises(WrongState, match="paused, not running"):
        await world.node.machines.pause("s1", memory=True)
    with pytest.raises(NoSuchSandbox):
        await world.node.machines.pause("s2", memory=True)


@pytest.mark.parametrize(
    ("point", "memory"), [("start", False), ("pause", False), ("pause", True), ("save", False), ("save", True)]
)
async def test_kill_in_the_middle_of_anything_leaves_nothing(make_world: Any, point: str, memory: bool) -> None:
    world = await make_world(memory=memory)
    if point == "start":
        reached = world.runtime.hold("start")
        operation = asyncio.create_task(world.create("s1"))
    else:
        await world.create("s1")
        reached = world.runtime.hold(point)
        work = (
            world.node.snapshots.take("s1", "snap", memory=True)
            if point == "save"
            else world.node.machines.pause("s1", memory=True)
        )
        operation = asyncio.create_task(work)
    await reached.wait()

    await world.node.machines.kill("s1")

    with pytest.raises(Interrupted):
        await operation
    assert world.left() == {}


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_kill_of_a_paused_sandbox_leaves_nothing(make_world: Any, memory: bool, keep: bool) -> None:
    world = await make_world(memory=memory)
    await world.create("s1")
    await world.node.machines.pause("s1", memory=keep)

    await world.node.machines.kill("s1")

    assert world.left() == {}


async def test_kill_during_resume_leaves_nothing(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.node.machines.pause("s1", memory=False)
    reached = world.runtime.hold("start")
    resume = asyncio.create_task(
        world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    )
    await reached.wait()

    await world.node.machines.kill("s1")

    with pytest.raises(Interrupted):
        await resume
    assert world.left() == {}


async def test_two_kills_at_once_both_answer(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")

    await asyncio.gather(world.node.machines.kill("s1"), world.node.machines.kill("s1"))

    with pytest.raises(NoSuchSandbox):
        await world.node.machines.kill("s1")
    assert world.left() == {}


async def test_a_kill_whose_caller_went_away_is_still_done(make_world: Any) -> None:
    world = await make_world()
    reached = world.runtime.hold("start")
    create = asyncio.create_task(world.create("s1"))
    await reached.wait()

    kill = asyncio.create_task(world.node.machines.kill("s1"))
    await asyncio.sleep(0)
    kill.cancel()
    await asyncio.gather(kill, create, return_exceptions=True)

    assert world.left() == {}


async def test_a_deadline_ends_the_sandbox_and_is_kept_until_acknowledged(make_world: Any) -> None:
    world = await make_world()
    with world.node.events.subscribe() as subscription:
        await world.create("s1", deadline_ms=later(30))

        async with asyncio.timeout(60):
            event = await subscription.next()

    assert (event.state, event.end_reason) == (State.ENDED, EndReason.TIMED_OUT)
    await until(lambda: not world.runtime.machines)
    assert [status.sandbox_id for status in world.node.machines.statuses()] == ["s1"]
    await world.node.machines.acknowledge(["s1", "unknown"])
    assert world.left() == {}


@pytest.mark.parametrize(("action", "kept"), [(TimeoutAction.PAUSE, True), (TimeoutAction.PAUSE_FILES, False)])
async def test_a_deadline_pauses_when_asked(
    make_world: Any, any_runtime: Any, action: TimeoutAction, kept: bool
) -> None:
    world = await make_world(runtime=any_runtime)
    with world.node.events.subscribe() as subscription:
        await world.create("s1", deadline_ms=later(30), on_timeout=action)

        async with asyncio.timeout(60):
            event = await subscription.next()

    assert (event.state, event.memory_kept) == (State.PAUSED, kept)


async def test_a_kill_while_the_deadline_pauses_it_is_no_failure_of_the_pause(make_world: Any) -> None:
    world = await make_world()
    reached = world.runtime.hold("pause")
    await world.create("s1", deadline_ms=later(30), on_timeout=TimeoutAction.PAUSE)
    await reached.wait()

    with capture_logs() as logged:
        await world.node.machines.kill("s1")
        await until(lambda: not any(task.get_name() == "expire s1" for task in asyncio.all_tasks()))

    assert world.left() == {}
    assert [entry for entry in logged if entry["log_level"] == "error"] == []


async def test_a_deadline_can_be_moved_and_only_extended(make_world: Any) -> None:
    world = await make_world()
    far = later(60_000)
    first = later(1500)
    await world.create("s1", deadline_ms=first)

    moved = await world.node.machines.set_deadline("s1", far, only_extend=False)
    kept = await world.node.machines.set_deadline("s1", later(1), only_extend=True)
    await until(lambda: later(0) > first + 100)

    assert moved.deadline_ms == kept.deadline_ms == far
    assert world.node.machines.find("s1").status().state is State.RUNNING


async def test_a_machine_that_dies_is_reported_and_removed(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")
    with world.node.events.subscribe() as subscription:
        machine.die("killed by the kernel: out of memory")

        async with asyncio.timeout(60):
            event = await subscription.next()

    assert (event.state, event.end_reason) == (State.ENDED, EndReason.DIED)
    assert "out of memory" in event.message
    await until(lambda: set(world.left()) == {"records", "sandboxes"})


async def test_an_end_is_reported_while_the_log_waits_for_the_agent_that_is_gone(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    await world.create("s1")
    logs = world.node.logs
    asked, answered = asyncio.Event(), asyncio.Event()

    async def hangs(*_: Any) -> bool:
        asked.set()
        await answered.wait()
        return False

    monkeypatch.setattr(logs, "_collect_seconds", 600.0)
    monkeypatch.setattr(logs, "_collect_batch", hangs)
    collecting = asyncio.create_task(world.node.collect_logs("s1"))
    await asked.wait()
    with world.node.events.subscribe() as subscription:
        world.runtime.of(world.node, "s1").die("a kernel panic")
        async with asyncio.timeout(60):
            event = await subscription.next()
    answered.set()
    await collecting

    async def noted() -> bool:
        entries = await logs.read("s1", cursor_ms=0, limit=10, backward=False, level="error", search="panic")
        return len(entries) == 1

    assert (event.state, event.end_reason) == (State.ENDED, EndReason.DIED)
    async with asyncio.timeout(60):
        while not await noted():
            await asyncio.sleep(0.01)


async def test_a_frozen_machine_that_dies_leaves_its_files(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")
    machine.spec.upper.write_bytes(b"files")
    await world.node.machines.pause("s1", memory=True)
    with world.node.events.subscribe() as subscription:
        machine.die("killed")
        async with asyncio.timeout(60):
            event = await subscription.next()

    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    assert (event.state, event.memory_kept) == (State.PAUSED, False)
    assert world.runtime.of(world.node, "s1").spec.upper.read_bytes() == b"files"


async def test_a_machine_that_cannot_be_ended_is_tried_again(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")
    machine.refuse_destroy = True
    await world.node.machines.kill("s1")
    stuck = world.node.hosting.stuck

    machine.refuse_destroy = False
    await world.node.hosting.retry_stuck()

    assert stuck == {machine.spec.machine_id}
    assert world.left() == {}


async def test_template_commands_run_before_the_sandbox_is_ready(make_world: Any) -> None:
    world = await make_world()
    image = Image("b", ("aa",), {"FROM": "template"}, start_command="serve", ready_command="ready")

    await world.create("s1", image=image, env_vars={"OWN": "1"})

    agent = world.runtime.of(world.node, "s1").agent
    assert agent.commands == ["serve", "ready"]
    assert [init["envVars"] for init in agent.inits] == [{"FROM": "template"}, {"FROM": "template", "OWN": "1"}]


async def test_a_template_with_memory_is_started_once_and_then_restored(make_world: Any) -> None:
    world = await make_world(memory=True)
    image = Image("b", ("aa",), start_command="serve")
    await world.create("s1", image=image)
    await until(lambda: list((world.node.directory / "memories").glob("b-*")))
    await until(lambda: len(world.runtime.machines) == 1)

    await world.create("s2", image=image)

    assert [saved.memory for saved in world.runtime.restored] == [True]
    assert world.runtime.of(world.node, "s2").agent.commands == []
    assert world.runtime.of(world.node, "s2").agent.inits[-1]["controlHash"]


async def test_a_templates_memory_is_made_again_when_the_parts_in_it_have_changed(make_world: Any) -> None:
    world = await make_world(memory=True)
    memories = world.node.directory / "memories"
    await world.create("s1")
    await until(lambda: list(memories.glob("*/meta.json")))
    world.runtime.parts = "2"

    await world.create("s2")
    assert world.runtime.restored == []
    await until(lambda: [path for path in memories.glob("*/meta.json") if '"parts":"2"' in path.read_text()])
    await world.create("s3")

    assert [saved.memory for saved in world.runtime.restored] == [True]


async def test_a_template_whose_memory_does_not_load_here_is_started_and_remembered_again(make_world: Any) -> None:
    world = await make_world(memory=True)
    memories = world.node.directory / "memories"
    await world.create("s1")
    await until(lambda: list(memories.glob("*/meta.json")))
    restore = world.runtime.restore

    async def unfit(spec: Any, saved: Any) -> Any:
        raise SavedUnfit("saved on another processor")

    def memories_made() -> int:
        return sum(1 for machine in world.runtime.made if "saved" in machine.agent.told)

    world.runtime.restore = unfit
    await world.create("s2")
    await world.create("s3")
    assert memories_made() == 1, "what this process made and cannot load is not made again at once"
    assert list(memories.iterdir()) == []

    world.node.preparing._rest_until.clear()
    world.runtime.restore = restore
    await world.create("s4")
    await until(lambda: list(memories.glob("*/meta.json")))
    await world.create("s5")

    assert memories_made() == 2
    assert [saved.memory for saved in world.runtime.restored] == [True]


async def test_only_a_restore_of_a_template_tells_what_a_start_needs(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    await until(lambda: list((world.node.directory / "memories").glob("*/meta.json")))
    started = world.runtime.of(world.node, "s1")
    await world.create("s2")
    restored = world.runtime.of(world.node, "s2")
    await world.node.machines.pause("s2", memory=True)
    await world.node.machines.resume("s2", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    resumed = world.runtime.of(world.node, "s2")

    assert [machine.has_answered for machine in (started, restored, resumed)] == [False, True, False]


async def test_a_snapshot_starts_others_and_leaves_its_source_running(make_world: Any, any_runtime: Any) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1", env_vars={"A": "1"})
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"snapped")

    meta = await world.node.snapshots.take("s1", "snap", memory=True)
    new = world.new("s2", image=None, snapshot_id="snap", env_vars={"B": "2"})
    async with world.node.snapshots.used("snap", new.limits) as seed:
        await world.node.machines.create(new, seed)

    copy = world.runtime.of(world.node, "s2")
    assert meta.saved.memory is any_runtime.capabilities.memory_snapshots
    assert copy.spec.upper.read_bytes() == b"snapped"
    assert copy.agent.inits[-1]["envVars"] == {"FROM": "template", "A": "1", "B": "2"}
    assert not world.runtime.of(world.node, "s1").frozen


@pytest.mark.parametrize("keep", [False, True])
async def test_a_paused_sandbox_can_be_snapped(make_world: Any, any_runtime: Any, keep: bool) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1")
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"paused")
    await world.node.machines.pause("s1", memory=keep)

    await world.node.snapshots.take("s1", "snap", memory=True)
    async with world.node.snapshots.used("snap", world.new("s2").limits) as seed:
        await world.node.machines.create(world.new("s2", image=None, snapshot_id="snap"), seed)

    assert world.node.machines.find("s1").status().state is State.PAUSED
    assert world.runtime.of(world.node, "s2").spec.upper.read_bytes() == b"paused"


async def test_forks_are_copies_and_the_fork_leaves_no_snapshot(make_world: Any, any_runtime: Any) -> None:
    world = await make_world(runtime=any_runtime, max_machines=3)
    await world.create("s1")
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"forked")
    news = [world.new(f"f{number}", image=None, snapshot_id="fork") for number in range(3)]

    results = await world.node.snapshots.fork("s1", news)

    running = [result for result in results if not isinstance(result, Exception)]
    refused = [result for result in results if isinstance(result, NodeFull)]
    assert len(running) == 2
    assert "may run 3" in str(refused[0])
    assert world.runtime.of(world.node, running[0].sandbox_id).spec.upper.read_bytes() == b"forked"
    assert world.left().get("snapshots") is None


async def held_for_a_while(world: Any, point: str, going: Coroutine[Any, Any, Any]) -> Any:
    """What `going` returns when it was held at `point` for 200 ms."""
    reached = world.runtime.hold(point)
    task = asyncio.create_task(going)
    await reached.wait()
    await asyncio.sleep(0.2)
    world.runtime.gates[point].set()
    return await task


async def test_what_a_start_takes_is_not_taken_from_the_sandbox_s_time(make_world: Any) -> None:
    world = await make_world()
    deadline = later(60_000)

    created = await held_for_a_while(world, "start", world.create("s1", deadline_ms=deadline))

    assert 200 <= created.deadline_ms - deadline < 30_000


async def test_what_the_save_before_a_fork_takes_is_not_taken_from_the_copy_s_time(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    deadline = later(60_000)
    new = world.new("f1", image=None, snapshot_id="fork", deadline_ms=deadline)

    (copy,) = await held_for_a_while(world, "save", world.node.snapshots.fork("s1", [new]))

    assert 200 <= copy.deadline_ms - deadline < 30_000


async def test_what_a_resume_takes_is_not_taken_from_the_sandbox_s_time(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.node.machines.pause("s1", memory=False)
    deadline = later(60_000)
    resume = world.node.machines.resume("s1", deadline_ms=deadline, on_timeout=None, discard_memory=False)

    resumed = await held_for_a_while(world, "start", resume)

    assert 200 <= resumed.deadline_ms - deadline < 30_000


async def test_a_snapshot_deleted_while_it_is_used_goes_afterwards(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.node.snapshots.take("s1", "snap", memory=False)
    new = world.new("s2", image=None, snapshot_id="snap")

    async with world.node.snapshots.used("snap", new.limits) as seed:
        await world.node.snapshots.delete("snap")
        created = await world.node.machines.create(new, seed)

    assert created.state is State.RUNNING
    assert world.left().get("snapshots") is None
    with pytest.raises(NoSuchSnapshot):
        await world.node.snapshots.delete("snap")


async def test_a_host_without_memory_takes_no_more(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await make_world(warm_max=1)
    await world.create("s1")
    await until(lambda: world.node.pool.size == 1)
    monkeypatch.setattr("emberbox.node.machines.available_memory", lambda: 100 << 20)

    with pytest.raises(NodeFull, match="less than 256 MiB of memory"):
        await world.create("s2")

    assert world.node.pool.size == 0
    assert world.node.machines.find("s1").status().state is State.RUNNING


async def test_memory_that_a_pause_is_giving_back_is_waited_for(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(memory=True)
    await world.create("s1")
    before = world.runtime.of(world.node, "s1")
    monkeypatch.setattr(
        "emberbox.node.machines.available_memory", lambda: (1 << 40) if before.destroyed else (100 << 20)
    )

    await world.node.machines.pause("s1", memory=True)
    await world.create("s2")

    assert before.destroyed
    assert world.node.machines.find("s2").status().state is State.RUNNING


def slow_records(world: Any, monkeypatch: pytest.MonkeyPatch, reached: asyncio.Event | None = None) -> Any:
    """Make every write of a record take long enough for others to overtake it; `reached` tells of the first."""
    records = world.node.machines.records
    write = records.write

    async def slow_write(record: Any) -> None:
        if reached is not None:
            reached.set()
        await asyncio.sleep(0.02)
        await write(record)

    monkeypatch.setattr(records, "write", slow_write)
    return records


async def test_deadlines_moved_during_other_operations_are_kept(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    await world.create("s1")
    records = slow_records(world, monkeypatch)
    deadlines = [later(1_000_000 + number) for number in range(5)]

    await asyncio.gather(
        world.node.machines.set_network("s1", Network(allow_internet=False)),
        *(world.node.machines.set_deadline("s1", deadline, only_extend=False) for deadline in deadlines),
    )

    (on_disk,) = await records.load()
    assert world.node.machines.find("s1").status().deadline_ms == deadlines[-1]
    assert (on_disk.deadline_ms, on_disk.network) == (deadlines[-1], Network(allow_internet=False))


async def test_a_deadline_moved_while_it_pauses_does_not_bring_it_back(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    await world.create("s1")
    records = slow_records(world, monkeypatch)

    await asyncio.gather(
        world.node.machines.pause("s1", memory=False),
        *(world.node.machines.set_deadline("s1", later(1_000_000 + n), only_extend=False) for n in range(3)),
    )

    (on_disk,) = await records.load()
    assert (on_disk.state, world.node.machines.find("s1").status().state) == (State.PAUSED, State.PAUSED)


async def test_a_deadline_moved_while_it_is_killed_leaves_no_record(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    await world.create("s1")
    records = slow_records(world, monkeypatch)
    move = asyncio.create_task(world.node.machines.set_deadline("s1", later(1_000_000), only_extend=False))
    await asyncio.sleep(0)

    await world.node.machines.kill("s1")

    await asyncio.gather(move, return_exceptions=True)
    assert await records.load() == []


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_a_pause_cancelled_while_it_is_written_is_whole(
    make_world: Any, monkeypatch: pytest.MonkeyPatch, memory: bool, keep: bool
) -> None:
    world = await make_world(memory=memory)
    await world.create("s1")
    world.runtime.of(world.node, "s1").spec.upper.write_bytes(b"files")
    reached = asyncio.Event()
    records = slow_records(world, monkeypatch, reached)
    pause = asyncio.create_task(world.node.machines.pause("s1", memory=keep))
    await reached.wait()

    pause.cancel()
    await asyncio.gather(pause, return_exceptions=True)

    (on_disk,) = await records.load()
    assert (on_disk.state, world.node.machines.find("s1").status().state) == (State.PAUSED, State.PAUSED)
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    assert world.runtime.of(world.node, "s1").spec.upper.read_bytes() == b"files"


async def test_a_create_cancelled_while_it_is_written_leaves_nothing(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    reached = asyncio.Event()
    slow_records(world, monkeypatch, reached)
    create = asyncio.create_task(world.create("s1"))
    await reached.wait()

    create.cancel()
    await asyncio.gather(create, return_exceptions=True)

    await until(lambda: world.left() == {})


@pytest.mark.parametrize("operation", ["pause", "resume"])
async def test_a_record_that_cannot_be_written_changes_nothing(
    make_world: Any, any_runtime: Any, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1")
    if operation == "resume":
        await world.node.machines.pause("s1", memory=True)
    before = world.node.machines.find("s1").status()

    async def full(_record: Any) -> None:
        raise OSError(28, "No space left on device")

    machines = world.node.machines
    work = (
        machines.pause("s1", memory=True)
        if operation == "pause"
        else machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    )
    with monkeypatch.context() as patched:
        patched.setattr(machines.records, "write", full)
        with pytest.raises(OSError, match="No space left"):
            await work

    after = world.node.machines.find("s1").status()
    assert (after.state, after.memory_kept) == (before.state, before.memory_kept)
    assert len(world.left().get("saved", [])) == (before.state is State.PAUSED and not world.runtime.machines)


async def test_a_frozen_machine_that_is_only_slow_keeps_its_memory(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    machine = world.runtime.of(world.node, "s1")
    await world.node.machines.pause("s1", memory=True)
    machine.agent.refuse_init = True

    with pytest.raises(AgentFailure):
        await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    machine.agent.refuse_init = False
    assert (machine.frozen, machine.destroyed) == (True, False)
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)
    assert world.runtime.of(world.node, "s1") is machine


async def test_of_two_snapshots_with_one_id_one_is_taken(make_world: Any) -> None:
    world = await make_world()
    await world.create("s1")
    await world.create("s2")

    results = await asyncio.gather(
        world.node.snapshots.take("s1", "snap", memory=False),
        world.node.snapshots.take("s2", "snap", memory=False),
        return_exceptions=True,
    )

    assert [type(result).__name__ for result in results] == ["SnapshotMeta", "AlreadyHere"]


async def test_of_two_creates_with_one_id_one_succeeds(make_world: Any) -> None:
    world = await make_world()

    results = await asyncio.gather(world.create("s1"), world.create("s1"), return_exceptions=True)

    assert [type(result).__name__ for result in results] == ["Status", "AlreadyHere"]
    assert len(world.runtime.machines) == 1


async def test_the_last_place_goes_to_whoever_asked_first(make_world: Any) -> None:
    world = await make_world(max_machines=2)

    results = await asyncio.gather(*(world.create(f"s{n}") for n in range(4)), return_exceptions=True)

    assert [type(result).__name__ for result in results] == ["Status", "Status", "NodeFull", "NodeFull"]
    assert sorted(world.node.machines.sandboxes) == ["s0", "s1"]


@pytest.mark.parametrize("operation", ["snapshot", "pause", "set_network"])
async def test_what_waits_for_a_create_that_fails_finds_nothing(make_world: Any, operation: str) -> None:
    world = await make_world()
    reached = world.runtime.hold("start")
    create = asyncio.create_task(world.create("s1"))
    await reached.wait()
    waiting = asyncio.create_task(
        {
            "snapshot": lambda: world.node.snapshots.take("s1", "snap", memory=False),
            "pause": lambda: world.node.machines.pause("s1", memory=False),
            "set_network": lambda: world.node.machines.set_network("s1", Network()),
        }[operation]()
    )
    await asyncio.sleep(0.02)

    world.runtime.fail_start = "no"
    world.runtime.gates["start"].set()

    results = await asyncio.gather(create, waiting, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["RuntimeFailure", "NoSuchSandbox"]
    assert world.left() == {}


async def test_rates_stay_with_a_sandbox_its_pauses_snapshots_and_forks(make_world: Any, any_runtime: Any) -> None:
    world = await make_world(runtime=any_runtime)
    await world.create("s1", limits=LIMITED)
    await world.node.machines.pause("s1", memory=False)
    await world.node.machines.resume("s1", deadline_ms=later(60_000), on_timeout=None, discard_memory=False)

    await world.node.snapshots.take("s1", "snap", memory=True)
    async with world.node.snapshots.used("snap", LIMITED) as seed:
        await world.node.machines.create(world.new("s2", image=None, snapshot_id="snap", limits=LIMITED), seed)
    await world.node.snapshots.fork("s1", [world.new("s3", image=None, snapshot_id="fork")])

    machines = [world.runtime.of(world.node, sandbox_id) for sandbox_id in ("s1", "s2", "s3")]
    assert [machine.spec.limits.rates for machine in machines] == [RATES] * 3
    assert [world.slots.shaped[machine.spec.slot.index] for machine in machines] == [8] * 3


async def test_without_rates_nothing_is_limited(make_world: Any) -> None:
    world = await make_world(memory=True)

    await world.create("s1")
    await world.node.snapshots.take("s1", "snap", memory=False)

    assert world.slots.shaped == {}
    assert not [told for told in world.runtime.of(world.node, "s1").agent.told if told.startswith("rates")]


async def test_files_are_flushed_as_fast_as_the_disk_can(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1", limits=LIMITED)
    agent = world.runtime.of(world.node, "s1").agent
    agent.told.clear()

    await world.node.snapshots.take("s1", "snap", memory=False)

    assert agent.told == ["rates 0", "/fsfreeze", "saved", "/fsthaw", "rates 5"]


@pytest.mark.parametrize(
    ("fails", "undoes"),
    [
        pytest.param("refuse_freeze", (), id="refused"),
        pytest.param("busy_freeze", ("/fsthaw",), id="it may come later"),
    ],
)
async def test_a_flush_that_fails_leaves_files_and_rates_as_they_were(
    make_world: Any, fails: str, undoes: tuple[str, ...]
) -> None:
    world = await make_world(memory=True)
    await world.create("s1", limits=LIMITED)
    agent = world.runtime.of(world.node, "s1").agent
    agent.told.clear()
    setattr(agent, fails, True)

    await world.node.snapshots.take("s1", "snap", memory=False)

    assert agent.told == ["rates 0", "/fsfreeze", *undoes, "rates 5", "saved"]


async def test_a_flush_that_is_cancelled_while_the_rates_are_lifted_sets_them_again(make_world: Any) -> None:
    world = await make_world(memory=True)
    await world.create("s1", limits=LIMITED)
    hosted = world.node.machines.find("s1").hosted
    hosted.machine.agent.told.clear()
    lifted = world.runtime.hold("rates")

    flush = asyncio.create_task(hosted.freeze_files())
    await lifted.wait()
    flush.cancel()
    await asyncio.sleep(0)
    world.runtime.gates["rates"].set()
    await asyncio.gather(flush, return_exceptions=True)

    assert flush.cancelled()
    assert hosted.machine.agent.told == ["rates 0", "rates 5"]
