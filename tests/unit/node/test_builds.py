"""Layers that builds leave, and when they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emberbox.node.errors import NoSuchBuild
from emberbox.node.model import Image


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
