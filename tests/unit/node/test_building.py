"""Building where machines have their own kernel: their disks become layers as they are, ready memory is kept."""

from __future__ import annotations

from typing import Any

from emberbox.node.building.model import BuildEvent, Done, Failed, LogLines, NewBuild
from emberbox.node.building.plan import read_steps
from emberbox.node.model import Image
from emberbox.runtime.base import Limits

LIMITS = Limits(cpu_count=1, memory_mb=128, disk_size_mb=512)


def put_layer(world: Any, digest: str) -> None:
    (world.node.directory / "layers" / f"{digest}.erofs").write_bytes(b"layer")


def new(build_id: str, *commands: str, **changes: Any) -> NewBuild:
    steps = read_steps(("RUN", (command,), "", False) for command in commands)
    base = Image("base", ("aa",), {"A": "1"})
    return NewBuild(build_id, "t", LIMITS, team_id="team", from_build=base, steps=steps, **changes)


async def build(world: Any, asked: NewBuild) -> list[BuildEvent]:
    world.node.builds.start(asked)
    return [event async for event in world.node.builds.follow(asked.build_id)]


async def test_a_guests_disk_becomes_the_templates_layer_and_its_memory_is_kept(make_world: Any) -> None:
    world = await make_world(memory=True)
    put_layer(world, "aa")

    events = await build(world, new("b1", "one", "two", start_command="serve", ready_command="ready"))

    done = events[-1]
    assert isinstance(done, Done), done
    assert done.image.layers[0] == "aa"
    (disk,) = (world.node.directory / "layers").glob("*.ext4")
    assert done.image.layers[1:] == (disk.stem,)
    assert [path.name for path in (world.node.directory / "memories").iterdir()] == ["b1-1-128-512"]
    assert world.left() == {}


async def test_the_commands_of_a_template_with_memory_are_tried_once(make_world: Any) -> None:
    world = await make_world(memory=True)
    put_layer(world, "aa")

    await build(world, new("b1", "one", start_command="serve", ready_command="ready"))

    assert world.runtime.starts == 2  # the steps, and the machine that is saved


async def test_a_cached_chain_starts_no_machine(make_world: Any) -> None:
    world = await make_world()
    put_layer(world, "aa")
    world.runtime.capabilities = type(world.runtime.capabilities)(True, True, "none")
    await build(world, new("b1", "one", "two"))
    starts = world.runtime.starts

    events = await build(world, new("b2", "one", "two"))

    assert [line.message for event in events if isinstance(event, LogLines) for line in event.lines] == [
        "CACHED [1/2] RUN one",
        "CACHED [2/2] RUN two",
    ]
    assert world.runtime.starts == starts


async def test_a_build_that_is_cancelled_while_its_disk_is_saved_leaves_nothing(make_world: Any) -> None:
    world = await make_world(memory=True)
    put_layer(world, "aa")
    world.runtime.hold("save")
    world.node.builds.start(new("b1", "one"))
    await world.runtime.reached["save"].wait()

    await world.node.builds.cancel("b1")

    events = [event async for event in world.node.builds.follow("b1")]
    assert events[-1] == Failed("the build was cancelled", "1")
    assert list((world.node.directory / "cache/steps").iterdir()) == []
    assert world.left() == {}


async def test_a_start_that_fails_names_the_step_it_was_for(make_world: Any) -> None:
    world = await make_world()
    put_layer(world, "aa")
    world.runtime.fail_start = "no power"

    events = await build(world, new("b1", "one"))

    assert events[-1] == Failed("no power", "1")
    assert world.left() == {}
