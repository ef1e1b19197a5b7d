"""Layers that builds leave, and when they go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from emberbox.node.errors import NoSuchBuild
from emberbox.node.model import Image
from tests.unit.node.conftest import IMAGE, LIMITS, until


def put_layer(world: Any, digest: str) -> Path:
    path: Path = world.node.directory / "layers" / f"{digest}.erofs"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


async def test_a_layer_goes_with_its_build(make_world: Any) -> None:
    world = await make_world()
    path = put_layer(world, "aa")

    await world.node.builds.delete("b", ["aa"])

    assert not path.exists()
    assert world.runtime.forgot_layers


async def test_a_layer_stays_for_a_sandbox_and_a_snapshot(make_world: Any) -> None:
    world = await make_world()
    path = put_layer(world, "aa")
    await world.create("s1", image=Image("b", ("aa",)))
    await world.node.snapshots.take("s1", "snap", memory=False)

    await world.node.builds.delete("b", ["aa"])
    with_both = path.exists()
    await world.node.machines.kill("s1")
    await world.node.builds.tend()
    with_the_snapshot = path.exists()
    await world.kill_process()
    await world.start()
    await world.node.snapshots.delete("snap")
    await world.node.builds.tend()

    assert (with_both, with_the_snapshot, path.exists()) == (True, True, False)


async def test_a_deleted_build_that_is_not_here_is_said_so(make_world: Any) -> None:
    world = await make_world()

    with pytest.raises(NoSuchBuild, match="'b'"):
        await world.node.builds.delete("b", ["aa"])


async def test_a_create_that_is_under_way_keeps_the_layers_it_starts_on(make_world: Any) -> None:
    world = await make_world()
    path = put_layer(world, "aa")
    reached = world.runtime.hold("start")
    create = asyncio.create_task(world.create("s1"))
    await reached.wait()

    await world.node.builds.delete("build1", ["aa"])
    while_it_starts = path.exists()
    world.runtime.gates["start"].set()
    await create

    assert while_it_starts
    assert path.exists()


async def test_the_memory_of_a_build_that_is_deleted_while_it_is_made_is_not_kept(make_world: Any) -> None:
    world = await make_world(memory=True)
    put_layer(world, "aa")
    reached = world.runtime.hold("save")
    warm = asyncio.create_task(world.node.preparing.warm(IMAGE, LIMITS))
    await reached.wait()
    kept = list((world.node.directory / "memories").iterdir())

    await world.node.builds.delete(IMAGE.build_id, ["aa"])

    assert len(kept) == 1
    assert list((world.node.directory / "memories").iterdir()) == []
    world.runtime.gates["save"].set()
    await asyncio.gather(warm, return_exceptions=True)


async def test_the_memory_of_a_build_that_is_not_here_is_swept(make_world: Any) -> None:
    world = await make_world(memory=True)
    memories = world.node.directory / "memories"
    await world.create("s1")
    await until(lambda: list(memories.glob("*/meta.json")))
    await world.kill_process()

    await world.start()

    assert list(memories.iterdir()) == []
